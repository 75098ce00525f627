r"""Wasserstein barycenters of Gaussians with full covariance, anchored to a policy, batched.

Small matrices are slow one by one, so the neighbours' are kept as ``[P, P, K, B]``: every operation on entries runs
over all of them at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marl_memory.functional.transport import CHUNK, check_shapes, pull, shares

linalg: Any = torch.linalg  # torch gives its members no types


@torch.no_grad()
def full_gaussian_barycenter(
    mean: Tensor,
    cov: Tensor,
    means: Tensor,
    covs: Tensor,
    weights: Tensor,
    total: Tensor,
    lam: float | Tensor,
    *,
    iterations: int = 100,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Anchored W₂² barycenter of Gaussians with full covariance.

    It minimises $W \sum_i a_i W_2^2(N(m, S), N(m_i, S_i)) + \frac1\lambda \mathrm{KL}(N(m, S) \| N(\mu, \Sigma))$.
    With $t = 2 W \lambda$, $c = t / (1 + t)$ and $A = c I + (1 - c) \Sigma^{-1}$ the mean solves
    $A m = c \bar m + (1 - c) \Sigma^{-1} \mu$, and the covariance, whose objective is convex,

    $$
    A = c\, T(S) + (1 - c)\, S^{-1}, \qquad
    T(S) = S^{-\frac12} \Big[\sum_i a_i (S^{\frac12} S_i S^{\frac12})^{\frac12}\Big] S^{-\frac12}
    $$

    Transport is concave in a square root of S.  Replacing it by its tangent, each step minimises an upper bound
    exactly, so that the objective never rises: in coordinates in which A is I, with $E = T S T$,

    $$
    S \leftarrow \tfrac12 c^2 E + (1 - c) I + c \big(\tfrac14 c^2 E^2 + (1 - c) E\big)^{\frac12}
    $$

    which for λ = ∞ is the fixed point S ← T S T of Álvarez-Esteban et al., for commuting covariances exact after one
    step.  If covariances are diagonal, ``gaussian_barycenter`` is some hundred times faster.

    Args:
        mean: ``[*B, P]``, μ of π.
        cov: ``[*B, P, P]``, Σ of π, positive definite.
        means: ``[*B, K, P]`` of the neighbours.
        covs: ``[*B, K, P, P]``, positive definite (any numbers where the weight is 0).
        weights: ``[*B, K]``, a ≥ 0, summing to 1 (all 0 is allowed where ``total`` is 0).
        total: ``[*B]``, W ≥ 0.
        lam: λ in [0, ∞], a number or ``[*B]``.
        iterations: the most that are done; 5 to 20 suffice for condition numbers up to 100.
        tolerance: largest error of the equation above, relative to its left side, at which to stop; 1e-8 for float64
            and 4e-6 for float32 by default.

    Returns:
        ``[*B, P]`` mean and ``[*B, P, P]`` covariance of p*.

    Raises:
        ValueError: shapes do not fit, or λ is a negative number.
        RuntimeError: the tolerance was not reached, or a neighbour's covariance is not positive definite.
        torch.linalg.LinAlgError: a ``cov`` is not positive definite.

    Reference: Álvarez-Esteban et al., "A Fixed-Point Approach to Barycenters in Wasserstein Space" (2016).
    """
    check_shapes(mean, means, weights, total)
    size = mean.shape[-1]
    if cov.shape != (*mean.shape, size) or covs.shape != (*means.shape, size):
        raise ValueError(f"expected cov [*B, P, P] and covs [*B, K, P, P], got {list(cov.shape)}, {list(covs.shape)}")
    if tolerance is None:
        tolerance = 1e-8 if mean.dtype == torch.float64 else 4e-6
    to_neighbours, to_policy = shares(2 * pull(total, lam))
    c, d = to_neighbours.reshape(-1, 1, 1), to_policy.reshape(-1, 1, 1)
    precision = torch.cholesky_inverse(linalg.cholesky(cov)).reshape(-1, size, size)
    lower: Tensor = linalg.cholesky(c * torch.eye(size, dtype=c.dtype, device=c.device) + d * precision)
    target = (weights.unsqueeze(-2) @ means).reshape(-1, size, 1)
    offset = torch.cholesky_solve(d * precision @ (mean.reshape(-1, size, 1) - target), lower)
    rows, neighbours = len(lower), weights.shape[-1]
    step = rows if cov.is_cuda else max(1, CHUNK // (size * size * neighbours))
    solved, flat_cov = torch.empty_like(lower), cov.reshape(-1, size, size)
    flat_covs, a = covs.reshape(-1, neighbours, size, size), weights.reshape(-1, neighbours)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        own, near = flat_cov[part], c[part] > 0
        known = torch.where(near.unsqueeze(3) & (a[part, :, None, None] > 0), flat_covs[part], own.unsqueeze(1))
        weight = torch.where(near.squeeze(2), a[part], 1 / neighbours)
        solved[part] = solve(own, known, weight, c[part], d[part], lower[part], iterations, tolerance)
    stay = (to_neighbours == 0).unsqueeze(-1)
    m = torch.where(stay, mean, (target + offset).reshape(mean.shape))
    return m, torch.where(stay.unsqueeze(-1), cov, solved.reshape(cov.shape))


def solve(
    start: Tensor, covs: Tensor, weights: Tensor, c: Tensor, d: Tensor, lower: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """The covariance that solves the equation of ``full_gaussian_barycenter``.

    Args:
        start: ``[B, P, P]``, where to begin.
        covs: ``[B, K, P, P]``.
        weights: ``[B, K]``.
        c: ``[B, 1, 1]``.
        d: ``[B, 1, 1]``, 1 − c.
        lower: ``[B, P, P]``, L with L Lᵀ = A.
        iterations: the most that are done.
        tolerance: relative error of the equation.

    Returns:
        ``[B, P, P]``.
    """
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    inverse: Tensor = linalg.solve_triangular(lower, eye, upper=False)
    known = congruence(entries_last(inverse).unsqueeze(2), covs.permute(2, 3, 1, 0).contiguous())
    a = weights.T.contiguous()
    q = lower.mT @ start @ lower  # S in the coordinates in which A is I
    residual = start.new_zeros(())
    for _ in range(iterations):
        z: Tensor = linalg.cholesky(q)
        between = congruence(entries_last(z.mT).unsqueeze(2), known)
        mean_root = entries_first((square_root(between) * a).sum(2))
        gram = z.mT @ z
        error = gram - c * mean_root - d * eye
        residual = (error.square().sum((1, 2)) / gram.square().sum((1, 2))).max().sqrt()
        mapped: Tensor = linalg.solve_triangular(z.mT, mean_root, upper=True)
        e = mapped @ mapped.mT
        root = entries_first(square_root(entries_last(symmetric(c.square() / 4 * e @ e + d * e))))
        q = symmetric(c.square() / 2 * e + d * eye + c * root)  # better than the q that was judged, and all but free
        if residual <= tolerance:
            return symmetric(inverse.mT @ q @ inverse)
    raise RuntimeError(
        f"the barycenter's covariance has a relative error of {residual:.1e} after {iterations} iterations, not "
        f"{tolerance:.1e}: pass float64, or allow a larger tolerance"
    )


def entries_last(x: Tensor) -> Tensor:
    """``[B, P, P]`` → ``[P, P, B]``."""
    return x.permute(1, 2, 0).contiguous()


def entries_first(x: Tensor) -> Tensor:
    """``[P, P, B]`` → ``[B, P, P]``."""
    return x.permute(2, 0, 1).contiguous()


def symmetric(x: Tensor) -> Tensor:
    """The symmetric part of ``[*B, P, P]``."""
    return (x + x.mT) / 2


def product(x: Tensor, y: Tensor) -> Tensor:
    """The matrix product of ``[P, P, *N]`` and ``[P, P, *N]``; either may have dimensions of 1 in N."""
    out = x[:, 0, None] * y[None, 0]
    for k in range(1, len(y)):
        out.addcmul_(x[:, k, None], y[None, k])
    return out


def congruence(x: Tensor, y: Tensor) -> Tensor:
    """X Y Xᵀ of ``[P, P, *N]``."""
    return product(product(x, y), x.transpose(0, 1))


def inverse_of(x: Tensor) -> Tensor:
    """The inverses of positive definite ``[P, P, *N]``, by Gauss and Jordan; they need no pivoting."""
    x = x.clone()
    for k in range(len(x)):
        pivot = x[k, k].reciprocal()
        row = x[k] * pivot
        row[k] = pivot
        column = x[:, k].clone()
        column[k] = 0
        x[:, k] = 0
        x[k] = 0
        x.addcmul_(column.unsqueeze(1), row.unsqueeze(0), value=-1)
        x[k] = row
    return x


def square_root(x: Tensor) -> Tensor:
    """The roots of positive definite ``[P, P, *N]``: Newton's iteration in product form, scaled by traces.

    Reference: Cheng et al., "Approximating the Logarithm of a Matrix to Specified Accuracy" (2001).
    """
    size = len(x)
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, size, *[1] * (x.dim() - 2))
    near = torch.finfo(x.dtype).eps ** 0.5  # convergence is quadratic: one more step from here is enough
    m, root, last = x, x, False
    for _ in range(30):
        inverse = inverse_of(m)
        scale = (torch.einsum("ii...->...", inverse) / torch.einsum("ii...->...", m)).sqrt()
        inverse = inverse / scale
        root = product(root, eye + inverse).mul_(scale.sqrt() / 2)
        if last:
            break
        m = (m * scale).add_(inverse).mul_(0.25).add_(eye, alpha=0.5)
        last = bool((m - eye).abs().max() <= near)
    return (root + root.transpose(0, 1)) / 2


def full_gaussian_w2(mean: Tensor, cov: Tensor, to_mean: Tensor, to_cov: Tensor) -> Tensor:
    r"""W₂² between Gaussians: ``[*B, P]``, ``[*B, P, P]`` and the same of the other → ``[*B]``.

    $|m - m'|^2 + \mathrm{tr}(S + S' - 2 (S^{\frac12} S' S^{\frac12})^{\frac12})$, the last by its singular values.
    """
    cross: Tensor = linalg.svdvals(linalg.cholesky(cov).mT @ linalg.cholesky(to_cov)).sum(-1)
    traces = (cov + to_cov).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean - to_mean).square().sum(-1) + traces - 2 * cross
