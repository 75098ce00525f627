r"""Regions around a policy made of past policies: KL-anchored Wasserstein barycenters, batched.

$$
A(\pi) = \arg\min_p\; W \sum_i a_i\, D(p, \nu_i) + \tfrac1\lambda\, \mathrm{KL}(p \,\|\, \pi)
$$

π is the policy, ν_i its K neighbours, a_i their weights (they sum to 1), W ≥ 0 what the neighbours weigh together, λ
the size of the region: KL(p‖π) ≤ λ W Σ a_i D(π, ν_i).  λ = 0 or W = 0 returns π bit for bit, λ = ∞ the barycenter.

Which one: ``gaussian_barycenter`` for policies with a mean and a standard deviation for each action dimension;
``full_gaussian_barycenter`` (in ``bures``) if dimensions are correlated; ``categorical_barycenter`` for discrete
actions; ``pot_barycenter`` (in ``pot``) to check the last one.

Every function takes any leading batch dimensions ``[*B]``, keeps the floating type it is given and records no gradient.
Values are not looked at, which would stall an accelerator: what an argument must satisfy is said with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-8  # of a probability: an action that nobody ever takes could not be transported to
LEAST = -30.0  # log-probability of an iterate: products of two stay within float32
SCALING_LIMIT = 30.0  # largest cost / ε for products with exp(−cost / ε); beyond, float32 needs logarithms
SELF_ITERATIONS = 12  # to π's transport to itself, where the solver starts
CHUNK = 2**17  # numbers a tensor of the iteration holds on a CPU, so that five of them stay in its cache

Kernel = Callable[[Tensor, Tensor], object]


def pull(total: Tensor, lam: float | Tensor) -> Tensor:
    """λW ``[*B]``, and 0 where W is 0 even if λ is infinite."""
    if isinstance(lam, float | int) and not lam >= 0:
        raise ValueError(f"lam must be ≥ 0 (math.inf gives the barycenter), got {lam}")
    return torch.where(total > 0, total * lam, 0.0)


def shares(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / (1 + x) and 1 / (1 + x) of x in [0, ∞], both ends included."""
    return 1 / (1 + 1 / x), 1 / (1 + x)


@torch.no_grad()
def gaussian_barycenter(
    mean: Tensor, std: Tensor, means: Tensor, stds: Tensor, weights: Tensor, total: Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Anchored W₂² barycenter of Gaussians with diagonal covariance: exact, in closed form.

    With $t = 2 W \lambda \sigma^2$, $c = t / (1 + t)$ and the weighted means $\bar m, \bar s$ of means and deviations,

    $$
    m = (1 - c)\,\mu + c\,\bar m, \qquad s = \tfrac{c \bar s}{2} + \sqrt{(\tfrac{c \bar s}{2})^2 + (1 - c)\,\sigma^2}
    $$

    so m lies between μ and $\bar m$, s between σ and $\bar s$.  The best p of any shape is this Gaussian.  For squashed
    policies use it before the squashing.

    Args:
        mean: ``[*B, P]``, μ of π.
        std: ``[*B, P]``, σ > 0 of π.
        means: ``[*B, K, P]`` of the neighbours.
        stds: ``[*B, K, P]``, ≥ 0.
        weights: ``[*B, K]``, a ≥ 0, summing to 1 (any numbers where ``total`` is 0).
        total: ``[*B]``, W ≥ 0.
        lam: λ in [0, ∞], a number or ``[*B]``.

    Returns:
        ``[*B, P]`` mean and ``[*B, P]`` standard deviation of p*.

    Raises:
        ValueError: shapes do not fit, or λ is a negative number.

    Reference: Agueh & Carlier, "Barycenters in the Wasserstein Space" (2011), for λ = ∞.
    """
    check_shapes(mean, means, weights, total)
    if std.shape != mean.shape or stds.shape != means.shape:
        raise ValueError(f"std {list(std.shape)} and stds {list(stds.shape)} must have the shapes of mean and means")
    to_neighbours, to_policy = shares(2 * pull(total, lam).unsqueeze(-1) * std.square())
    row = weights.unsqueeze(-2)
    half = (row @ stds).squeeze(-2) * (to_neighbours / 2)
    barycenter = (row @ means).squeeze(-2)
    stay = to_neighbours == 0
    m = torch.where(stay, mean, torch.lerp(mean, barycenter, to_neighbours))
    s = torch.where(stay, std, half + torch.hypot(half, to_policy.sqrt() * std))
    return m, s


@torch.no_grad()
def categorical_barycenter(
    log_policy: Tensor,
    log_neighbours: Tensor,
    weights: Tensor,
    total: Tensor,
    lam: float | Tensor,
    *,
    cost: Tensor | None = None,
    eps: float = 0.1,
    iterations: int = 30,
    tolerance: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Anchored barycenter of distributions over P actions under the Sinkhorn divergence of a ground cost.

    D is the *debiased* entropic transport
    $S_\varepsilon(p, \nu) = OT_\varepsilon(p, \nu) - \frac12 OT_\varepsilon(p, p) - \frac12 OT_\varepsilon(\nu, \nu)$:
    plain entropic transport blurs, and would move π even if every ν_i were π.  With
    $K = e^{-C / \varepsilon}$ and $c = \lambda\varepsilon W / (1 + \lambda\varepsilon W)$ it repeats

    $$
    v_i \leftarrow \nu_i / K u_i, \qquad
    p \propto \pi^{1 - c} \Big[d \prod_i (K v_i)^{a_i}\Big]^c, \qquad
    d \leftarrow \sqrt{d\, p / K d}, \qquad
    u_i \leftarrow p / K v_i
    $$

    from π's transport to itself on (so that p* is π at once where every ν_i is), with u and v relaxed beyond their
    targets by half, which needs about a third of the iterations.  At a fixed point the gradient of the objective is
    constant over actions, and the objective is convex.

    Error of p* in float32 after 30 iterations at ε = 0.1, K = 16, λ ≤ 10: at most 2e-3 from five actions on (median row
    below 1e-4), at most 1e-2 for two or three (median 5e-4).  A smaller ε needs more iterations.  At λ = ∞ a smooth
    cost such as ``ordinal_cost`` leaves p* all but undetermined: the objective converges, p does not.

    With ``cost=None`` an iteration costs O(K P), else O(K P²).  Above ε = 1/30 it works on scalings, below on
    logarithms, which is slow except for ``cost=None``.

    Args:
        log_policy: ``[*B, P]``, log π.
        log_neighbours: ``[*B, K, P]``, log ν_i.
        weights: ``[*B, K]``, a ≥ 0, summing to 1 (any finite numbers where ``total`` is 0).
        total: ``[*B]``, W ≥ 0.
        lam: λ in [0, ∞], a number or ``[*B]``.
        cost: ``[P, P]`` or one for each row ``[*B, P, P]``, symmetric, between 0 and 1, 0 on the diagonal; None is 1
            between any two actions.
        eps: entropic smoothing ε > 0, in units of the largest cost.
        iterations: as many are done; the most that are done if there is a tolerance.
        tolerance: iterate until no probability of any row moves by more than this (the error is larger: by the
            inverse of what an iteration gains).
        mask: ``[*B, P]`` bool, which actions are allowed, at least one; π and the neighbours are renormalised on them.

    Returns:
        ``[*B, P]``, log p*, −∞ where an action is forbidden.

    Raises:
        ValueError: shapes do not fit, or ε, λ, the iterations or the tolerance are out of range.
        RuntimeError: the tolerance was not reached.

    Reference: Janati et al., "Debiased Sinkhorn Barycenters" (2020), algorithm 1, for λ = ∞; the relaxation:
    Thibault et al., "Overrelaxed Sinkhorn–Knopp Algorithm for Regularized Optimal Transport" (2021).
    """
    check_shapes(log_policy, log_neighbours, weights, total)
    check_sinkhorn(log_policy.shape, cost, eps, iterations, tolerance, mask)
    shape, actions, neighbours = log_policy.shape, log_policy.shape[-1], weights.shape[-1]
    strength = pull(total, lam).reshape(-1)
    allowed = None if mask is None else mask.expand(shape).reshape(-1, actions).T.unsqueeze(1)
    # Rows go last, so that every operation runs along contiguous numbers: [P, 1, B], [P, K, B] and [1, K, B].
    policy = log_policy.reshape(-1, actions).T.unsqueeze(1)
    past = log_neighbours.reshape(-1, neighbours, actions).permute(2, 1, 0)
    a = weights.reshape(1, -1, neighbours).mT
    each = None if cost is None or cost.dim() == 2 else cost.expand(*shape, actions).reshape(-1, actions, actions)
    rows = past.shape[-1]
    size = rows if past.is_cuda else max(1, CHUNK // (actions * neighbours))
    solved = torch.empty_like(policy, memory_format=torch.contiguous_format)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        kernel = log_kernel if 1 / eps > SCALING_LIMIT else scaling_kernel
        solve = solve_logarithms if 1 / eps > SCALING_LIMIT else solve_scalings
        here = None if allowed is None else allowed[..., part].contiguous()
        solved[..., part] = solve(
            floored(policy[..., part].contiguous(), here),
            floored(past[..., part].contiguous(), here),
            a[..., part].contiguous(),
            shares(eps * strength[part])[0],
            kernel(cost if each is None else each[part].permute(1, 2, 0).contiguous(), eps),
            here,
            iterations,
            tolerance,
        )
    untouched = policy if allowed is None else torch.where(allowed, policy, -math.inf)
    return torch.where(strength > 0, solved, untouched).squeeze(1).T.reshape(shape)


def check_shapes(policy: Tensor, neighbours: Tensor, weights: Tensor, total: Tensor) -> None:
    """Raise unless shapes are ``[*B, P]``, ``[*B, K, P]``, ``[*B, K]`` and ``[*B]``."""
    batch, size = policy.shape[:-1], policy.shape[-1]
    if weights.shape[:-1] != batch or total.shape != batch or neighbours.shape != (*weights.shape, size):
        raise ValueError(
            "expected a policy [*B, P], neighbours [*B, K, P], weights [*B, K] and a total [*B], got "
            f"{list(policy.shape)}, {list(neighbours.shape)}, {list(weights.shape)} and {list(total.shape)}"
        )


def check_sinkhorn(
    shape: torch.Size,
    cost: Tensor | None,
    eps: float,
    iterations: int,
    tolerance: float | None,
    mask: Tensor | None = None,
) -> None:
    """Raise unless cost and mask fit a policy of ``shape`` ``[*B, P]`` and the numbers are in their ranges."""
    actions = shape[-1]
    if cost is not None and cost.shape not in ((actions, actions), (*shape, actions)):
        raise ValueError(f"cost must be {[actions, actions]} or {[*shape, actions]}, got {list(cost.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(f"mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if iterations < 1 or (tolerance is not None and not tolerance > 0):
        raise ValueError(f"needs at least one iteration and a tolerance > 0, got {iterations} and {tolerance}")


def floored(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Log-probabilities along dimension 0, none below log ``FLOOR`` but the forbidden ones, which are −∞.

    ``logits`` ``[P, K, B]``, ``allowed`` ``[P, 1, B]``.  Where nothing allowed has a finite logit it is uniform.
    """
    least = math.log(FLOOR)
    if allowed is None:
        return logits.clamp(min=-1e30).log_softmax(0).clamp_(min=least).log_softmax(0)
    logits = torch.where(allowed, logits.clamp(min=-1e30), -math.inf).log_softmax(0).clamp_(min=least)
    return torch.where(allowed, logits, -math.inf).log_softmax(0)


def scaling_kernel(cost: Tensor | None, eps: float) -> Kernel:
    """x, out ↦ out ← exp(−cost / ε) x over the first dimension of ``[P, K, B]``.

    ``cost`` is ``[P, P]`` or ``[P, P, B]``.
    """
    if cost is None:
        q = math.exp(-1 / eps)
        return lambda x, out: torch.add(x.sum(0, keepdim=True).mul_(q), x, alpha=1 - q, out=out)
    matrix = torch.exp(cost / -eps)
    if cost.dim() == 2:
        return lambda x, out: torch.mm(matrix, x.view(len(x), -1), out=out.view(len(x), -1))

    def each(x: Tensor, out: Tensor) -> None:
        torch.mul(matrix[:, 0, None], x[0], out=out)
        for b in range(1, len(x)):
            out.addcmul_(matrix[:, b, None], x[b])

    return each


def log_kernel(cost: Tensor | None, eps: float) -> Kernel:
    """x, out ↦ out ← log(exp(−cost / ε) exp(x)), as ``scaling_kernel``."""
    if cost is None:
        near = math.log1p(-math.exp(-1 / eps))
        return lambda x, out: torch.logaddexp(x + near, x.logsumexp(0, keepdim=True) - 1 / eps, out=out)
    exponent = cost.reshape(len(cost), len(cost), 1, -1) / -eps

    def each(x: Tensor, out: Tensor) -> None:
        for a in range(len(x)):
            torch.logsumexp(exponent[a] + x, 0, out=out[a])

    return each


def solve_scalings(
    log_policy: Tensor,
    log_neighbours: Tensor,
    weights: Tensor,
    share: Tensor,
    kernel: Kernel,
    allowed: Tensor | None,
    iterations: int,
    tolerance: float | None,
) -> Tensor:
    """``categorical_barycenter`` by products: ``[P, 1, B]``, ``[P, K, B]``, ``[1, K, B]``, ``[B]`` → ``[P, 1, B]``.

    x = v / ν and y = u / p are iterated, because they stay positive where an action is forbidden.  The target of x is
    1 / Ku; half beyond it is (1 / Ku)^1.5 x^-0.5.  Everything of the neighbours' size is written in place.
    """
    nu, p = log_neighbours.exp(), log_policy.exp()
    d = torch.ones_like(p) if allowed is None else allowed.to(p.dtype).contiguous()
    spread = torch.empty_like(d)
    for _ in range(SELF_ITERATIONS):  # the plan of π to itself: exact at once where the neighbours are π
        kernel(d, spread)
        d.mul_(p).div_(spread).sqrt_()
    u = d.repeat(1, nu.shape[1], 1)
    x, y, product = torch.empty_like(nu), torch.empty_like(nu), torch.empty_like(nu)
    log_p = log_policy
    for step in range(iterations):
        kernel(u, product)
        torch.reciprocal(product, out=x) if step == 0 else x.mul_(product).rsqrt_().div_(product)
        kernel(torch.mul(nu, x, out=u), product)
        torch.reciprocal(product, out=y) if step == 0 else y.mul_(product).rsqrt_().div_(product)
        aim = product.log_().mul_(weights).sum(1, keepdim=True).add_(d.log())
        old, log_p = log_p, next_policy(log_policy, aim, share, allowed)
        before, p = p, log_p.exp()
        kernel(d, spread)
        d.mul_(p).div_(spread).sqrt_()
        if step:
            y.mul_(moved(log_p, old, allowed).mul_(0.5).exp_())
        torch.mul(y, p, out=u)
        if tolerance is not None and (p - before).abs().max() <= tolerance:
            return log_p
    return log_p if tolerance is None else give_up(iterations, tolerance)


def solve_logarithms(
    log_policy: Tensor,
    log_neighbours: Tensor,
    weights: Tensor,
    share: Tensor,
    kernel: Kernel,
    allowed: Tensor | None,
    iterations: int,
    tolerance: float | None,
) -> Tensor:
    """``solve_scalings`` on logarithms, for a small ε."""
    d = torch.zeros_like(log_policy)
    if allowed is not None:
        d.masked_fill_(~allowed, -math.inf)
    spread = torch.empty_like(d)
    for _ in range(SELF_ITERATIONS):
        kernel(d, spread)
        d.add_(log_policy).sub_(spread).mul_(0.5)
    u = d.repeat(1, log_neighbours.shape[1], 1)
    x, y, product = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
    log_p = log_policy
    for step in range(iterations):
        kernel(u, product)
        torch.neg(product, out=x) if step == 0 else x.add_(product).mul_(-0.5).sub_(product)
        kernel(torch.add(log_neighbours, x, out=u), product)
        torch.neg(product, out=y) if step == 0 else y.add_(product).mul_(-0.5).sub_(product)
        aim = product.mul_(weights).sum(1, keepdim=True).add_(d)
        old, log_p = log_p, next_policy(log_policy, aim, share, allowed)
        kernel(d, spread)
        d.add_(log_p).sub_(spread).mul_(0.5)
        if step:
            y.add_(moved(log_p, old, allowed), alpha=0.5)
        torch.add(y, log_p, out=u)
        if tolerance is not None and (log_p.exp() - old.exp()).abs().max() <= tolerance:
            return log_p
    return log_p if tolerance is None else give_up(iterations, tolerance)


def next_policy(log_policy: Tensor, aim: Tensor, share: Tensor, allowed: Tensor | None) -> Tensor:
    """Normalised π^(1 − share) exp(aim)^share as logarithms, all ``[P, 1, B]``; forbidden actions stay at −∞.

    Without an anchor an action that no neighbour takes would go to 0 for ever, out of float32's range.
    """
    logits = torch.lerp(log_policy, aim, share)
    if allowed is None:
        return logits.log_softmax(0).clamp_(min=LEAST)
    return torch.where(allowed, torch.where(allowed, logits, -math.inf).log_softmax(0).clamp_(min=LEAST), -math.inf)


def moved(log_p: Tensor, old: Tensor, allowed: Tensor | None) -> Tensor:
    """``log_p − old``, 0 where an action is forbidden, ``[P, 1, B]``."""
    return log_p - old if allowed is None else torch.where(allowed, log_p - old, 0.0)


def give_up(iterations: int, tolerance: float) -> Tensor:
    """Say that a tolerance was out of reach."""
    raise RuntimeError(f"not within {tolerance:g} after {iterations} iterations: allow more, or a larger eps")


def ordinal_cost(actions: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Cost (a − b)² / (P − 1)² between ordered actions, e.g. throttle levels: ``[P, P]`` (one action: 0)."""
    place = torch.linspace(0, 1, actions, dtype=dtype, device=device)
    return (place.unsqueeze(1) - place).square()


def one_hot_cost(actions: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Cost 1 between any two actions: ``[P, P]``.  ``cost=None`` means the same and is faster."""
    return 1 - torch.eye(actions, dtype=dtype, device=device)


def structured_cost(embedding: Tensor) -> Tensor:
    """Squared distances between embedded actions, the largest scaled to 1: ``[P, E]`` → ``[P, P]``.

    E.g. the stick's position and the fire button, or moves on the unit circle and attacks on an axis of their own.
    """
    return scaled((embedding.unsqueeze(1) - embedding).square().sum(-1))


def value_cost(value: Tensor) -> Tensor:
    """|Q(s, a) − Q(s, b)|, each state's largest scaled to 1: ``[*B, P]`` → ``[*B, P, P]``.

    Probability moves for free between actions of equal value.  Exclude forbidden actions by giving them an allowed
    one's value, or they set the scale.
    """
    return scaled((value.unsqueeze(-1) - value.unsqueeze(-2)).abs())


def scaled(cost: Tensor) -> Tensor:
    """``[*B, P, P]`` over its largest entry; all 0 stays 0."""
    largest = cost.amax((-2, -1), keepdim=True)
    return cost / torch.where(largest > 0, largest, 1.0)


@torch.no_grad()
def sinkhorn_divergence(
    log_p: Tensor,
    log_q: Tensor,
    *,
    cost: Tensor | None = None,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
) -> Tensor:
    r"""Debiased entropic transport S_ε(p, q) between categoricals: ``[*B, P]`` and ``[*B, P]`` → ``[*B]``.

    $S_\varepsilon \ge 0$, 0 only for p = q, convex in each argument; the D of ``categorical_barycenter``.  It works on
    logarithms; −∞ means probability 0.  ``cost``, ``eps``: as there.  100 iterations at ε = 0.1
    leave an error below 1e-5, and none at p = q.  ``tolerance``: iterate until no potential moves by more than this
    (times ε), RuntimeError if ``iterations`` do not reach it.

    Reference: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences" (2019).
    """
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_p and log_q must have one shape, got {list(log_p.shape)} and {list(log_q.shape)}")
    check_sinkhorn(log_p.shape, cost, eps, iterations, tolerance)
    shape, actions = log_p.shape, log_p.shape[-1]
    # Unequal masses, if only by float32's rounding, would make the potentials drift for ever.
    both = torch.stack([x.reshape(-1, actions).T.log_softmax(0) for x in (log_p, log_q)], 1)
    if cost is not None and cost.dim() > 2:
        cost = cost.reshape(-1, actions, actions).permute(1, 2, 0)
    kernel = log_kernel(cost, eps)

    def spread(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernel(x, out)
        return out

    def relaxed(x: Tensor) -> Tensor:
        f, g = x[:, :1], x[:, 1:]
        f = -1.5 * spread(both[:, 1:] + g) - 0.5 * f
        return torch.cat([f, -1.5 * spread(both[:, :1] + f) - 0.5 * g], 1)

    own = settled(lambda x: (x - spread(both + x)) / 2, torch.zeros_like(both), iterations, tolerance)
    g = settled(relaxed, own, iterations, tolerance)[:, 1:]  # from there p = q is at its end
    f = -spread(both[:, 1:] + g)  # exact for this g, so that the dual value is a lower bound
    gain = torch.where(both > -math.inf, both.exp() * (torch.cat([f, g], 1) - own), 0.0)
    return eps * gain.sum((0, 1)).reshape(shape[:-1])


def settled(step: Callable[[Tensor], Tensor], x: Tensor, iterations: int, tolerance: float | None) -> Tensor:
    """``step`` repeated on ``x``, until nothing moves by more than ``tolerance``."""
    for _ in range(iterations):
        old, x = x, step(x)
        if tolerance is not None and (x - old).abs().max() <= tolerance:
            return x
    return x if tolerance is None else give_up(iterations, tolerance)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of log-probabilities: ``[*B, P]`` and ``[*B, P]`` → ``[*B]``.  Where p is 0 nothing is added.

    Gradients pass to both arguments, and none through an action with p = 0, though log q may be −∞ there.
    """
    inside = log_p > -math.inf
    ratio = torch.where(inside, log_p, 0.0) - torch.where(inside, log_q, 0.0)
    return (torch.where(inside, log_p, -math.inf).exp() * ratio).sum(-1)


def gaussian_kl(mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> Tensor:
    """KL(N(mean, std²)‖N(to_mean, to_std²)), diagonal: four ``[*B, P]`` → ``[*B]``.  Gradients pass to all."""
    ratio = std / to_std
    return (0.5 * (ratio.square() - 1 + ((mean - to_mean) / to_std).square()) - ratio.log()).sum(-1)


def gaussian_w2(mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> Tensor:
    """W₂² between diagonal Gaussians, |mean − to_mean|² + |std − to_std|²: four ``[*B, P]`` → ``[*B]``."""
    return ((mean - to_mean).square() + (std - to_std).square()).sum(-1)
