"""Mnemo for deterministic policies: a similarity-gated field of past action gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.nn.functional import cosine_similarity

from marl_memory.keys import Entries, Entry
from marl_memory.memory.fixed_point import FORGET, LEAST, TINY, FixedPointGate, RunningMean
from marl_memory.memory.operator import MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.stock import StockEntries
from marl_memory.memory.tap import ActionTap
from marl_memory.memory.trace import Trace
from marl_memory.spec import TaskSpec

NAME = "gradient_field"

RULES = ("variance", "mass")

REPORT = ("mass", "effective_neighbours", "beta", "cosine", "distance", "age", "neighbours", "variance_kept")
"""Of each row and agent: W, n_e, β, cos(ĝ, g), the mean distance in units of h, the mean age in environment steps, how
many there are within reach, and (1 − β)² + β²/n_e."""

SUMS = 9
"""Of products of u, x, t and y, but y²."""


class _Recalled(NamedTuple):
    """What the neighbours of each row and agent say.

    Args:
        mean: ``[*B, A, P]``, their gradient, in the present units.
        pairs: ``[*B, A, 9]``, the regression's sums.
        total: ``[*B, A]``, W.
        effective: ``[*B, A]``, n_e.
        distance: ``[*B, A]``, mean distance in units of h.
        age: ``[*B, A]``, mean age in environment steps.
        found: ``[*B, A]``, how many there are.
        around: ``[*B, A]``, Σ w_i δ_i.
    """

    mean: Tensor
    pairs: Tensor
    total: Tensor
    effective: Tensor
    distance: Tensor
    age: Tensor
    found: Tensor
    around: Tensor


class GradientField(MemoryOperator):
    r"""Smooths the action gradient with those seen at neighbouring states.

    Remembered at every update: $g_i = \partial Q / \partial a$ at $a_i = \mu(s_i)$, divided by its running root mean
    square $\rho$.  Recalled at state s, with the weights $w_i$ of `RingStore` and the action gate
    $e^{-\lVert \mu(s) - a_i \rVert^2 / 2 h_a^2}$:

    $$
    \hat g(s) = \rho\, \frac{\sum_i w_i g_i}{\sum_i w_i}, \qquad
    \tilde g(s) = (1 - \beta(s))\, g(s) + \beta(s)\, \hat g(s)
    $$

    and the actor follows $\tilde g$.  With noise of variance $\sigma^2$ in each g, and gradients that differ by $L d$
    over a distance d and by $\sqrt{D t}$ over a time t, in which the critic learns, $\tilde g$ has least mean squared
    error at $\beta^* = \sigma^2 / (\sigma^2 + \sigma^2 / n_e + b^2)$, where
    $n_e = (\sum_i w_i)^2 / \sum_i (w_i^2 / n_i)$ is the number of independent gradients in the mean and
    $b^2 = L^2 \bar d^2 + D \bar t$.  Hence

    $$
    \beta(s) = \beta_{\max}\,\mathrm{strength}\; \frac{\hat\sigma^2}{\hat\sigma^2 + \hat\sigma^2 / n_e + \hat b^2}
    \cdot \min\Big(1, c_\delta \frac{|\bar\delta(s)|}{S}\Big)
    $$

    where $\hat\sigma^2$, L² and D are the coefficients, none of them negative, of a running regression of
    $\lVert g(s) - g_i \rVert^2$ on $1 + 1/n_i$ ($g_i$ is a mean of $n_i$ gradients), $d_i^2$ and the age $t_i$, in
    which a neighbour counts by its action gate.  Every one is in it twice, with its mean and with the newest gradient
    in it: means alone may all be of one age.  The last factor is the fixed-point gate:
    $\bar\delta$ is the TD error around s, S the running root mean square of the value targets, at least that of the
    rewards / (1 − γ).  It closes where the critic satisfies its Bellman equation, so that a memory cannot move that
    solution; it is there with ``fixed_point_gate=True`` only.

    On discrete (Gumbel) hosts g is defined up to a constant and on the allowed actions only: it is projected there, and
    compared and averaged on what was allowed both then and now.

    This is our instantiation of the published abstract of "Mnemo: Policy Learning Accelerated by Experience" (2026);
    the paper's own method may differ.

    Args:
        spec: the task.
        seed: the run's seed; only ``policy="simhash"`` draws from it.
        scope: ``per_agent``, ``shared`` or ``centralized``, see `Scope`.
        capacity: payloads of single agents that are remembered.
        budget: whether ``capacity`` is that of all banks together (``total``) or of each (``per_bank``).
        policy: ``merge``, ``fifo`` or ``simhash``, see `policies`; ``fourier``: no rows but sums, see `FourierSketch`,
            which needs ``beta_rule="mass"`` and no action gate.
        neighbours: K.
        half_life: environment steps after which a row counts half; None: never.
        search: ``exact``, or ``lists`` for banks of tens of thousands of rows, see `RingStore`.
        keys: what rows are found by: ``observation`` (the state, with ``scope="centralized"``), or ``features``: what
            the last layer of the host's actor reads, detached.  They drift as it learns: rows age.
        feature_size: width of ``features``; in a run the host's is handed over.
        projection: to how many dimensions keys are projected before they are compared; None: they are not, but for
            pictures: to 64.
        min_rows: rows a bank must have seen before it acts; None: a quarter of what it can hold, at most 1 000.
        beta: $\beta_{\max}$.
        beta_rule: ``variance`` (above), or ``mass``: $\beta_{\max} W / (W + c)$ with $W = \sum_i w_i$.
        mass_half: c of ``mass``.
        action_bandwidth: $h_a$ in units where an agent's bounds are ±1; None: no action gate.
        least_cosine: memory acts only where $\cos(\hat g, g)$ is at least this; None: everywhere.
        fixed_point_gate: whether the last factor is there.  It is small (decision 79): with it memory hardly acts.
        gate_slope: $c_\delta$.
        gamma: γ, the host's.
        strength, strength_final: see `MemoryOperator`.
        keep_neighbours: updates for which a row of the replay keeps its neighbours (see `KeptNeighbours`), for hosts
            that draw the same rows often beside a memory that changes slowly; None: they are searched at every draw.
        keep_rows: of how many rows; two rows of the replay that are so far apart share a place.
        payloads: ``own``, or ``shuffled``: gradients are stored with the keys of other rows (a control).

    Raises:
        ValueError: for a value out of range, or a scope the task does not admit.
    """

    stage: ClassVar[Stage] = Stage.GRADIENT
    writes_on = "update"

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        scope: str | None = None,
        capacity: int = 4096,
        budget: str = "total",
        policy: str = "merge",
        neighbours: int = 16,
        half_life: float | None = 50_000.0,
        search: str = "exact",
        keys: Literal["observation", "features"] = "observation",
        feature_size: int | None = None,
        projection: int | None = None,
        min_rows: int | None = None,
        beta: float = 0.5,
        beta_rule: Literal["variance", "mass"] = "variance",
        mass_half: float = 1.0,
        action_bandwidth: float | None = 0.5,
        least_cosine: float | None = None,
        fixed_point_gate: bool = False,
        gate_slope: float = 1.0,
        gamma: float = 0.99,
        strength: float = 1.0,
        strength_final: float | None = None,
        keep_neighbours: int | None = None,
        keep_rows: int = 1_000_000,
        payloads: Literal["own", "shuffled"] = "own",
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        if beta_rule not in RULES:
            raise ValueError(f"beta_rule={beta_rule!r} must be one of {', '.join(RULES)}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta!r} must lie in [0, 1]")
        check_positive(mass_half=mass_half, action_bandwidth=action_bandwidth)
        if policy == "fourier" and not (beta_rule == "mass" and action_bandwidth is None):
            raise ValueError(
                f"policy='fourier' keeps sums and no single gradient: beta_rule={beta_rule!r} must be 'mass' and "
                f"action_bandwidth={action_bandwidth!r} null"
            )
        self.spec, k, p = spec, spec.keys, spec.action_size
        self.beta, self.beta_rule, self.mass_half = beta, beta_rule, mass_half
        self.action_bandwidth, self.least_cosine = action_bandwidth, least_cosine
        mask = 0 if spec.continuous else p
        self.parts = [p, p, 1, 1, mask, p, 1, mask]
        """Of a payload: means of gradient, action, TD error, time and mask; gradient, time and mask of the newest."""
        self.trace = Trace(
            NAME,
            spec,
            scope=scope,
            capacity=capacity,
            budget=budget,
            payload_size=sum(self.parts),
            signal_size=p,
            newest=sum(self.parts[5:]),
            policy=policy,
            neighbours=neighbours,
            half_life=half_life,
            search=search,
            keys=keys,
            feature_size=feature_size,
            projection=projection,
            min_rows=min_rows,
            payloads=payloads,
            seed=seed,
            keep_neighbours=keep_neighbours,
            keep_rows=keep_rows,
        )
        self.scope = self.trace.scope
        self.gate = FixedPointGate(self.scope, slope=gate_slope, gamma=gamma) if fixed_point_gate else None
        self.square = RunningMean(self.scope.banks, self.scope.payloads)
        self.register_buffer("valid", torch.tensor(spec.action_valid), persistent=False)
        self.padded = not bool(self.valid.all())
        self.register_buffer("pairs", torch.zeros(self.scope.banks, self.scope.payloads, SUMS))
        self.register_buffer("averages", torch.zeros(2, 2, spec.n_agents, p))
        self._entries: Entries = {
            **self.trace.entries,
            self.fresh: Entry((spec.n_agents, p)),
            self.moments: Entry((spec.n_agents, SUMS)),
            self.report: Entry((spec.n_agents, len(REPORT))),
        }
        self._size = float(self.bytes)
        read: list[Any] = [*self.trace.in_keys, k.action_gradient, k.policy_action]
        read += [] if spec.continuous else [k.action_mask]
        read += [k.td_error] if fixed_point_gate else []
        self.in_keys = read
        self.out_keys = [k.action_gradient, *self._entries]
        self.write_keys = [*read, *self._entries]
        self.write_keys += [k.value_target, k.learn_reward] if fixed_point_gate else []

    valid: Tensor
    pairs: Tensor
    """``[G, S, 9]``: decayed sums over pairs of rows and neighbours: u², ux, ut, uy, x², xt, xy, t², ty."""
    averages: Tensor
    """``[2, 2, A, P]``: of the batch's mean gradient, as it was and as it became, the running mean and variance."""

    fresh = ("learn", NAME, "fresh")
    """``[*B, A, P]``: the gradient as the critic gave it."""
    moments = ("learn", NAME, "moments")
    """``[*B, A, 9]``: sums over pairs (row, neighbour) for the regression: u², ux, ut, uy, x², xt, xy, t², ty."""
    report = ("learn", NAME, "report")
    """``[*B, A, 8]``, see `REPORT`."""

    @property
    def asks(self) -> Entries:
        """See `MemoryOperator.asks`."""
        k, a = self.spec.keys, self.spec.n_agents
        asked = {**self.trace.asks, k.policy_action: Entry((a, self.spec.action_size))}
        return asked if self.gate is None else {**asked, k.td_error: Entry((a, 1))}

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return self._entries

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`."""
        return self.trace.payloads

    def __len__(self) -> int:
        return len(self.trace.store)

    def clear(self) -> None:
        """Forget everything."""
        self.trace.clear()
        self.square.clear()
        self.pairs.zero_()
        self.averages.zero_()
        if self.gate is not None:
            self.gate.clear()

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        super().set_progress(frames, progress)
        self.trace.store.now.fill_(frames)

    def tap(
        self,
        actor: TensorDictModuleBase,
        *,
        action: Any = None,
        reduction: Literal["mean", "sum"] = "mean",
        **entries: Any,
    ) -> TensorDictSequential:
        """``actor`` followed by an `ActionTap`: the actor to give to TorchRL's ``DDPGLoss`` or ``TD3Loss``.

        Args:
            actor: writes an action ``[*B, P]``, or ``[*B, A, P]``; its parameters stay its own.
            action: the action's key; None: the actor's last out_key.
            reduction: the loss's.
            entries: keys of entries that lie elsewhere than `stock.DEFAULTS` says, as ``observation="pixels"``.

        Raises:
            ValueError: for discrete actions, or an unknown entry; when the loss first calls the actor, if the
                fixed-point gate is on and there is no TD error for it.
        """
        if action is None:
            action = actor.out_keys[-1]
        modules: list[Any] = [actor, ActionTap(self, StockEntries(self.spec, entries), action, reduction)]
        return TensorDictSequential(modules)

    # ---------------------------------------------------------------------------------------------------------- recall

    @torch.inference_mode()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        r"""Put $\tilde g$ in the place of ``action_gradient`` ``[*B, A, P]``."""
        gradient: Tensor = td.get(self.spec.keys.action_gradient)
        own = self._project(gradient, td)
        recalled = self._recall(td, own)
        beta, report = self._blend(td, own, recalled)
        put(td, self.fresh, gradient)
        put(td, self.moments, recalled.pairs)
        put(td, self.report, report)
        blended = torch.lerp(own, recalled.mean, beta)
        put(td, self.spec.keys.action_gradient, torch.where(beta > 0, blended, gradient))
        return td

    def _recall(self, td: TensorDictBase, gradient: Tensor) -> _Recalled:
        """What the neighbours say, for ``gradient`` ``[*B, A, P]``."""
        scope, rms = self.scope, self._rms.unsqueeze(1).unsqueeze(-1)
        payload, weights, mass, *squared = self.trace.find(td)
        _, action, error, time, _, _, last_time, _ = payload.split(self.parts, -1)
        root: Tensor | float = 1.0
        if self.action_bandwidth is not None:  # what the gate shuts out is no neighbour, in no sum
            here = scope.to_banks(self._action(td)).unsqueeze(2)
            root = torch.exp((here - action).square().sum(-1) / (-4 * self.action_bandwidth**2))
            weights = weights * root**2
        own = scope.to_banks(gradient) / rms
        difference, there = self._differences(own, payload, td)
        near = weights > 0
        # Two pairs with every neighbour: its mean, and the last that was averaged in it.
        u, x = torch.stack([mass.reciprocal() + 1, torch.full_like(mass, 2.0)]), torch.stack(squared)
        t = (self.trace.store.now - torch.stack([time, last_time])).squeeze(-1)
        of_means = torch.where(near, torch.stack([near, weights / mass, x[0].sqrt(), t[0], error.squeeze(-1)]), 0.0)
        compared = near if there is None else near & (there.count_nonzero(-1) > 1)
        u, x, t, y = torch.where(compared, torch.stack([u, x, t, difference.square().sum(-1)]) * root, 0.0)
        pairs = (torch.stack([u, u, u, u, x, x, x, t, t]) * torch.stack([u, x, t, y, x, t, y, t, y])).sum((1, 4))
        sums = torch.cat([pairs, (torch.stack([weights] * 5) * of_means).sum(3), near.sum(2).unsqueeze(0)])
        sums = scope.to_agents(sums.movedim(0, -1), td.batch_size)
        total, squares, distance, age, around, found = sums[..., SUMS:].unbind(-1)
        shares = weights.unsqueeze(-1) if there is None else weights.unsqueeze(-1) * there[0]
        apart = (shares * difference[0]).sum(2) / shares.sum(2).clamp(min=LEAST)
        mean = scope.to_agents((own - apart) * rms, td.batch_size)
        least, effective = total.clamp(min=LEAST), total.square() / squares.clamp(min=LEAST)
        pairs = sums[..., :SUMS]
        return _Recalled(self._project(mean, td), pairs, total, effective, distance / least, age / least, found, around)

    def _differences(self, own: Tensor, payload: Tensor, td: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """What ``own`` ``[G, R, S, P]`` differs by from each neighbour's mean and newest ``[2, G, R, K, S, P]``.

        Of discrete actions only what both had allowed is compared, and without what it has in common; the second tensor
        says how much of each entry is known, None: all.
        """
        signal, _, _, _, share, last, _, last_share = payload.split(self.parts, -1)
        own, stored = own.unsqueeze(2), torch.stack([signal, last])
        if self.spec.continuous:
            return own - stored, None
        share = torch.stack([share, last_share]) * self.scope.to_banks(self._allowed(td)).unsqueeze(2)
        known = share > 0
        difference = torch.where(known, own - stored / share.clamp(min=TINY), 0.0)
        common = difference.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(known, difference - common, 0.0), share

    def _blend(self, td: TensorDictBase, own: Tensor, recalled: _Recalled) -> tuple[Tensor, Tensor]:
        """β ``[*B, A, 1]`` and the `REPORT` ``[*B, A, 8]``."""
        _, _, total, effective, distance, age, found, around = recalled
        if self.beta_rule == "mass":
            beta = total / (total + self.mass_half)
        else:
            noise, slope, drift = (self.scope.per_agent(x) for x in self.regression())
            bias = slope * distance.square() + drift * age
            beta = noise / (noise + noise / effective.clamp(min=TINY) + bias).clamp(min=TINY)
        beta = beta * (self.beta * self.strength)
        if self.gate is not None:
            beta = beta * self.gate(td.get(self.spec.keys.td_error)[..., 0], around, total)
        cosine = cosine_similarity(own, recalled.mean, dim=-1, eps=TINY)
        if self.least_cosine is not None:
            beta = torch.where(cosine >= self.least_cosine, beta, 0.0)
        beta = torch.where((total > 0) & td.get(self.spec.keys.alive), beta, 0.0)
        kept = (1 - beta).square() + beta.square() / effective.clamp(min=1.0)
        return beta.unsqueeze(-1), torch.stack([total, effective, beta, cosine, distance, age, found, kept], -1)

    def regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """σ̂², L² and D ``[G, S]``, in units of the gradient's mean square, and of that over h² and environment steps.

        Least squares under L², D ≥ 0: where that of both is negative in one, the one that alone explains more.  σ̂² is
        at least a hundredth of the pairs' mean difference (L² and D are then those of the fit without that bound).
        """
        _, ux, ut, uy, xx, xt, xy, tt, ty = (self.pairs / self.pairs[..., :1].clamp(min=TINY)).unbind(-1)
        of_x, of_t = _left(xx, ux * ux), _left(tt, ut * ut)  # by u
        xt, xy, ty = xt - ux * ut, xy - ux * uy, ty - ut * uy
        slope, drift = (y.clamp(min=0.0) / of.clamp(min=TINY) * (of > 0) for y, of in ((xy, of_x), (ty, of_t)))
        steeper = slope * xy >= drift * ty
        slope, drift = torch.where(steeper, slope, 0.0), torch.where(steeper, 0.0, drift)
        apart = _left(of_x * of_t, xt.square())
        both = torch.stack([of_t * xy - xt * ty, of_x * ty - xt * xy])
        joint = (apart > 0) & (both >= 0).all(0)
        slope, drift = torch.where(joint, both / apart.clamp(min=TINY), torch.stack([slope, drift]))
        return torch.maximum(uy - slope * ux - drift * ut, 0.01 * uy), slope, drift

    @property
    def _rms(self) -> Tensor:
        """ρ ``[G, S]``."""
        return self.square.value.sqrt_().clamp_(min=TINY)

    # --------------------------------------------------------------------------------------------------------- remember

    @torch.inference_mode()
    def write(self, td: TensorDictBase) -> None:
        """Remember the gradients that ``forward`` was given on these rows."""
        k, alive = self.spec.keys, td.get(self.spec.keys.alive)
        gradient = self._project(td.get(self.fresh), td)
        self._learn_scales(td, gradient, alive)
        signal, one = gradient / self.scope.per_agent(self._rms).unsqueeze(-1), torch.ones_like(gradient[..., :1])
        error = torch.zeros_like(one) if self.gate is None else td.get(k.td_error)[..., :1]
        newest = [signal, one * self.trace.store.now]
        if not self.spec.continuous:
            newest.append(self._allowed(td).to(signal.dtype))
        self.trace.write(td, torch.cat([signal, self._action(td), error, *newest[1:], *newest], -1))

    def _learn_scales(self, td: TensorDictBase, gradient: Tensor, alive: Tensor) -> None:
        """ρ, the regression's sums, the gate's, and how the batch's mean gradient varies from update to update."""
        columns = [gradient.square().sum(-1, keepdim=True), td.get(self.moments)]
        columns += [] if self.gate is None else [self.gate.squared(td)]
        means, count = self.scope.means(torch.cat(columns, -1), self.scope.living(alive))
        known = count > 0
        self.square.update(means[..., 0], known[..., 0])
        pairs = means[..., 1 : 1 + SUMS]
        self.pairs.mul_(FORGET).add_(torch.where(pairs.isfinite().all(-1, keepdim=True), pairs * count, 0.0))
        if self.gate is not None:
            self.gate.squares.update(means[..., 1 + SUMS :], known)
        alive = alive.reshape(-1, self.spec.n_agents, 1)
        # Both projected, else masked and padded entries would count in one of the two.
        both = torch.stack([gradient, self._project(td.get(self.spec.keys.action_gradient), td)])
        both = both.reshape(2, len(alive), self.spec.n_agents, -1)
        means, variances = self.averages.unbind(1)
        step = torch.where(alive, both, 0.0).sum(1) / alive.sum(0).clamp(min=1) - means
        step = torch.where(alive.any(0) & step.isfinite(), step, 0.0)
        means.add_(step, alpha=1 - FORGET)  # West (1979): the variance around a mean that moves on
        variances.addcmul_(step, step, value=1 - FORGET).mul_(FORGET)

    @torch.inference_mode()
    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over living agents of what `REPORT` lists, and the state of the memory.

        ``variance_ratio`` is that of the batch's mean gradient from update to update, with memory / without;
        ``variance_kept`` is $(1-\beta)^2 + \beta^2/n_e$, what is left of that of a state's own gradient.
        """
        alive = td.get(self.spec.keys.alive)
        living = torch.where(alive.unsqueeze(-1), td.get(self.report), 0.0)
        report = living.flatten(0, -2).sum(0) / alive.sum().clamp(min=1)
        noise, slope, drift = self.regression()
        fresh, fused = self.averages[:, 1].sum((1, 2))
        return {
            "rows": self.trace.store.held.sum().float(),
            "bytes": torch.tensor(self._size),
            "strength": torch.tensor(self.strength),
            "noise": noise.mean(),
            "slope": slope.mean(),
            "drift": drift.mean(),
            "rejected": self.trace.store.rejected.sum().float(),
            "variance_ratio": fused / fresh.clamp(min=TINY),
            **dict(zip(REPORT, report.unbind(), strict=True)),
        }

    # ---------------------------------------------------------------------------------------------------- conversions

    def _allowed(self, td: TensorDictBase) -> Tensor:
        """``[*B, A, P]`` or ``[A, P]`` bool: entries of the gradient that mean something."""
        return self.valid if self.spec.continuous else td.get(self.spec.keys.action_mask)

    def _action(self, td: TensorDictBase) -> Tensor:
        """What the policy does ``[*B, A, P]``, padding 0."""
        action = td.get(self.spec.keys.policy_action)
        return torch.where(self.valid, action, 0.0) if self.padded else action

    def _project(self, gradient: Tensor, td: TensorDictBase) -> Tensor:
        """0 where nothing is allowed; of discrete actions, without what all the allowed have in common."""
        if self.spec.continuous and not self.padded:
            return gradient
        allowed = self._allowed(td)
        gradient = torch.where(allowed, gradient, 0.0)
        if self.spec.continuous:
            return gradient
        mean = gradient.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(allowed, gradient - mean, 0.0)


def _left(whole: Tensor, taken: Tensor) -> Tensor:
    """``whole`` without what is ``taken``; 0 where that is rounding."""
    left = whole - taken
    return torch.where(left > 1e-5 * whole, left, 0.0)
