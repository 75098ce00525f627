"""Mnemo for deterministic policies: a similarity-gated field of past action gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.functional.returns import masked_mean
from marl_memory.keys import Entries, Entry
from marl_memory.memory.operator import MemoryOperator, Stage, put
from marl_memory.memory.scope import Scope
from marl_memory.memory.store import Neighbours, RingStore
from marl_memory.spec import TaskSpec

RULES = ("variance", "mass")

REPORT = ("mass", "effective_neighbours", "beta", "cosine", "distance", "variance_kept")
"""Of each row and agent: W, n_e, β, cos(ĝ, g), the mean distance in units of h, and (1 − β)² + β²/n_e."""

TINY = 1e-12

FORGET = 0.99
"""Decay per write of the running means of scales."""


class _Recalled(NamedTuple):
    """What the neighbours of R queries say.

    Args:
        mean: ``[G, R, S, P]``, the mean gradient, in the present units.
        scalars: ``[G, R, S, 10]``: the regression's sums (5), W, n_e, mean distance, Σ w δ, whether the bank may act.
    """

    mean: Tensor
    scalars: Tensor


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
    over a distance d, $\tilde g$ has least mean squared error at
    $\beta^* = \sigma^2 / (\sigma^2 + \sigma^2 / n_e + b^2)$, where $n_e = (\sum \kappa n)^2 / \sum \kappa^2 n$ is the
    number of independent gradients in the mean and b = L d̄.  Hence

    $$
    \beta(s) = \beta_{\max}\,\mathrm{strength}\; \frac{\hat\sigma^2}{\hat\sigma^2 + \hat\sigma^2 / n_e + \hat b^2}
    \cdot \min\Big(1, c_\delta \frac{|\bar\delta(s)|}{S}\Big)
    $$

    where $\hat\sigma^2$ and L² are intercept (halved) and slope of a running regression of $\lVert g_i - g_j \rVert^2$
    on $d_{ij}^2$.  The last factor is the fixed-point gate: $\bar\delta$ is the TD error around s, S the running root
    mean square of the value targets, at least that of the rewards / (1 − γ).  It closes where the critic satisfies its
    Bellman equation, so that a memory cannot move that solution.

    On discrete (Gumbel) hosts g is defined up to a constant and on the allowed actions only: it is projected there.

    This is our instantiation of the published abstract of "Mnemo: Policy Learning Accelerated by Experience" (2026);
    the paper's own method may differ.

    Args:
        spec: the task.
        seed: the run's seed; only ``policy="simhash"`` draws from it.
        scope: ``per_agent``, ``shared`` or ``centralized``, see `Scope`.
        capacity: payloads of single agents that are remembered.
        budget: whether ``capacity`` is that of all banks together (``total``) or of each (``per_bank``).
        policy: ``merge``, ``fifo`` or ``simhash``, see `policies`.
        neighbours: K.
        half_life: environment steps after which a row counts half; None: never.
        min_rows: rows a bank must hold before it acts; None: a quarter of what it can hold, at most 1 000.
        beta: $\beta_{\max}$.
        beta_rule: ``variance`` (above), or ``mass``: $\beta_{\max} W / (W + c)$ with $W = \sum_i w_i$.
        mass_half: c of ``mass``.
        action_bandwidth: $h_a$ in units where an agent's bounds are ±1; None: no action gate.
        least_cosine: memory acts only where $\cos(\hat g, g)$ is at least this; None: everywhere.
        fixed_point_gate: whether the last factor is there.
        gate_slope: $c_\delta$.
        gamma: γ, the host's.
        strength, strength_final: see `MemoryOperator`.
        payloads: ``own``, or ``shuffled``: gradients are stored with the keys of other rows (a control).

    Raises:
        ValueError: for a value out of range, or a scope the task does not admit.
    """

    stage: ClassVar[Stage] = Stage.GRADIENT
    writes_on: ClassVar[Literal["collection", "update"]] = "update"

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
        min_rows: int | None = None,
        beta: float = 0.5,
        beta_rule: Literal["variance", "mass"] = "variance",
        mass_half: float = 1.0,
        action_bandwidth: float | None = 0.5,
        least_cosine: float | None = None,
        fixed_point_gate: bool = True,
        gate_slope: float = 1.0,
        gamma: float = 0.99,
        strength: float = 1.0,
        strength_final: float | None = None,
        payloads: Literal["own", "shuffled"] = "own",
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        if beta_rule not in RULES:
            raise ValueError(f"beta_rule={beta_rule!r} must be one of {', '.join(RULES)}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta!r} must lie in [0, 1]")
        self.spec, k = spec, spec.keys
        self.scope = Scope(scope or "shared", spec)
        rows = self.scope.rows_per_bank(capacity, budget)
        p = spec.action_size
        self.store = RingStore(
            banks=self.scope.banks,
            rows=rows,
            features=self.scope.features,
            payloads=self.scope.payloads,
            payload_size=2 * p + 1,
            signal_size=p,
            policy=policy,
            neighbours=neighbours,
            half_life=half_life,
            generator=Generator().manual_seed(seed),
        )
        self.min_rows = min(1000, rows // 4) if min_rows is None else min_rows
        self.beta, self.beta_rule, self.mass_half = beta, beta_rule, mass_half
        self.action_bandwidth, self.least_cosine = action_bandwidth, least_cosine
        self.fixed_point_gate, self.gate_slope, self.gamma = fixed_point_gate, gate_slope, gamma
        self.shuffled = payloads == "shuffled"
        self.generator = Generator().manual_seed(seed)
        self.register_buffer("valid", torch.tensor(spec.action_valid), persistent=False)
        for name, shape in {
            "gradient_square": (self.scope.banks, self.scope.payloads),
            "target_square": (),
            "reward_square": (),
            "pairs": (5,),
            "averages": (2, 2, spec.n_agents, p),
            "writes": (),
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        entry = (spec.n_agents,) if not self.scope.joint else ()
        self._entries = {
            self.fresh: Entry((spec.n_agents, p)),
            self.index: Entry((*entry, neighbours), torch.int64),
            self.squared: Entry((*entry, neighbours)),
            self.moments: Entry((spec.n_agents, 5)),
            self.report: Entry((spec.n_agents, len(REPORT))),
        }
        read: list[Any] = [k.state if self.scope.joint else k.observation, k.alive, k.action_gradient, k.policy_action]
        read += [] if spec.continuous else [k.action_mask]
        read += [k.td_error] if fixed_point_gate else []
        self.in_keys = [*read, k.row]
        self.out_keys = [k.action_gradient, *self._entries]
        self.write_keys = [*read, k.row, *self._entries]
        self.write_keys += [k.value_target, k.learn_reward] if fixed_point_gate else []

    valid: Tensor
    gradient_square: Tensor
    """``[G, S]``: running mean of ‖g‖²."""
    target_square: Tensor
    """``[]``: of squared value targets."""
    reward_square: Tensor
    """``[]``: of squared rewards."""
    pairs: Tensor
    """``[5]``: decayed sums over pairs of rows and neighbours: 1, x, y, x², xy."""
    averages: Tensor
    """``[2, 2, A, P]``: of the batch's mean gradient, as it was and as it became, the running mean and variance."""
    writes: Tensor
    """``[]``: how often `write` was called."""

    fresh = ("learn", "gradient_field", "fresh")
    """``[*B, A, P]``: the gradient as the critic gave it."""
    index = ("learn", "gradient_field", "index")
    """``[*B, A, K]`` (``[*B, K]`` if centralized) int64: rows found."""
    squared = ("learn", "gradient_field", "squared")
    """``[*B, A, K]`` (``[*B, K]`` if centralized): their squared distances."""
    moments = ("learn", "gradient_field", "moments")
    """``[*B, A, 5]``: sums over pairs (row, neighbour) for the regression: 1, x, y, x², xy."""
    report = ("learn", "gradient_field", "report")
    """``[*B, A, 6]``, see `REPORT`."""

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`; also what it asks the host for."""
        k, a = self.spec.keys, self.spec.n_agents
        asked = {k.policy_action: Entry((a, self.spec.action_size))}
        if self.fixed_point_gate:
            asked[k.td_error] = Entry((a, 1))
        return {**asked, **self._entries}

    def __len__(self) -> int:
        return len(self.store)

    def clear(self) -> None:
        """Forget everything."""
        self.store.clear()
        for name in ("gradient_square", "target_square", "reward_square", "pairs", "averages", "writes"):
            getattr(self, name).zero_()

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        super().set_progress(frames, progress)
        self.store.now.fill_(frames)

    # ---------------------------------------------------------------------------------------------------------- recall

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Put $\tilde g$ in the place of ``action_gradient`` ``[*B, A, P]``."""
        k, batch = self.spec.keys, td.batch_size
        gradient: Tensor = td.get(k.action_gradient)
        found = self.store.nearest(self.scope.keys_of(td))
        recalled = self._recall(td, found, self._project(gradient, td))
        mean = self.scope.to_agents(recalled.mean, batch)
        scalars = self.scope.to_agents(recalled.scalars, batch)
        put(td, self.fresh, gradient)
        put(td, self.index, self._unbank(found.rows, batch))
        put(td, self.squared, self._unbank(found.squared, batch))
        put(td, self.moments, scalars[..., :5])
        beta, report = self._blend(td, gradient, mean, scalars[..., 5:])
        blended = torch.lerp(self._project(gradient, td), self._project(mean, td), beta)
        put(td, k.action_gradient, torch.where(beta > 0, blended, gradient))
        put(td, self.report, report)
        return td

    def _recall(self, td: TensorDictBase, found: Neighbours, gradient: Tensor) -> _Recalled:
        """What the neighbours say, for ``gradient`` ``[*B, A, P]``."""
        p, store = self.spec.action_size, self.store
        weights = store.weights(found, self._numbers(td))
        signal, action, error = store.take(store.payload, found.rows).split([p, p, 1], -1)
        if self.action_bandwidth is not None:
            here = self.scope.to_banks(td.get(self.spec.keys.policy_action)).unsqueeze(2)
            weights = weights * torch.exp(-(here - action).square().sum(-1) / (2 * self.action_bandwidth**2))
        total = weights.sum(2)
        share = weights / total.clamp(min=TINY).unsqueeze(2)
        rms = self._rms().unsqueeze(1).unsqueeze(-1)
        mass = store.take(store.mass, found.rows).clamp(min=1)
        effective = total.square() / (weights.square() / mass).sum(2).clamp(min=TINY)
        reach = store.bandwidth.view(-1, 1, 1, 1)
        distance = found.squared.sqrt().unsqueeze(-1) / reach
        distance = torch.where(weights > 0, distance, 0.0)
        own = self.scope.to_banks(gradient) / rms.clamp(min=TINY)
        allowed = self.scope.to_banks(self._allowed(td)).unsqueeze(2)
        difference = torch.where(allowed, own.unsqueeze(2) - signal, 0.0).square().sum(-1)
        near = (weights > 0).to(weights.dtype)
        x = distance.square()
        columns = [
            near.sum(2),
            x.sum(2),
            (near * difference).sum(2),
            x.square().sum(2),
            (x * difference).sum(2),
            total,
            effective,
            (share * distance).sum(2),
            (weights * error.squeeze(-1)).sum(2),
            (self.store.held >= self.min_rows).view(-1, 1, 1).expand_as(total).to(total.dtype),
        ]
        return _Recalled((share.unsqueeze(-1) * signal).sum(2) * rms, torch.stack(columns, -1))

    def _blend(self, td: TensorDictBase, gradient: Tensor, mean: Tensor, recalled: Tensor) -> tuple[Tensor, Tensor]:
        """β ``[*B, A, 1]`` and the `REPORT` ``[*B, A, 6]``."""
        total, effective, distance, error, ready = recalled.unbind(-1)
        if self.beta_rule == "mass":
            beta = total / (total + self.mass_half)
        else:
            noise, slope = self.noise_and_slope()
            beta = noise / (noise + noise / effective.clamp(min=TINY) + slope * distance.square()).clamp(min=TINY)
        beta = self.beta * self.strength * beta * ready
        if self.fixed_point_gate:
            here: Tensor = td.get(self.spec.keys.td_error)[..., 0]
            around = (here + error) / (1 + total)
            beta = beta * (self.gate_slope * around.abs() / self.value_scale()).clamp(max=1.0)
        own, past = self._project(gradient, td), self._project(mean, td)
        cosine = nn.functional.cosine_similarity(own, past, dim=-1, eps=TINY)
        if self.least_cosine is not None:
            beta = torch.where(cosine >= self.least_cosine, beta, 0.0)
        beta = torch.where(total > 0, beta, 0.0)
        kept = (1 - beta).square() + beta.square() / effective.clamp(min=1.0)
        return beta.unsqueeze(-1), torch.stack([total, effective, beta, cosine, distance, kept], -1)

    def noise_and_slope(self) -> tuple[Tensor, Tensor]:
        """σ̂² and L² ``[]``, in units of the gradient's mean square and of h."""
        count, x, y, xx, xy = self.pairs.unbind()
        count = count.clamp(min=TINY)
        mean_x, mean_y = x / count, y / count
        spread = xx / count - mean_x.square()
        slope = ((xy / count - mean_x * mean_y) / spread.clamp(min=TINY)).clamp(min=0.0)
        slope = torch.where(spread > 1e-6, slope, 0.0)
        noise = (mean_y - slope * mean_x).clamp(min=0.0) / 2
        return torch.maximum(noise, 0.005 * mean_y), slope

    def value_scale(self) -> Tensor:
        """S ``[]``."""
        weight = self._seen()
        floor = (self.reward_square / weight).sqrt() / max(1 - self.gamma, 1e-6)
        return torch.maximum((self.target_square / weight).sqrt(), floor).clamp(min=TINY)

    def _seen(self) -> Tensor:
        """``[]``: the weight of what a running mean has seen, by which it is debiased."""
        return (1 - torch.pow(FORGET, self.writes)).clamp(min=TINY)

    def _rms(self) -> Tensor:
        """ρ ``[G, S]``."""
        return (self.gradient_square / self._seen()).sqrt()

    # --------------------------------------------------------------------------------------------------------- remember

    @torch.no_grad()
    def write(self, td: TensorDictBase) -> None:
        """Remember the gradients that ``forward`` was given on these rows."""
        k, alive = self.spec.keys, td.get(self.spec.keys.alive)
        live = self.scope.living(alive)
        gradient = self.scope.to_banks(self._project(td.get(self.fresh), td))
        square = torch.where(live, gradient.square().sum(-1), 0.0)
        mean = square.sum(1) / live.sum(1).clamp(min=1)
        self.writes += 1
        self.gradient_square.lerp_(torch.where(mean.isfinite(), mean, 0.0), 1 - FORGET)
        self._learn_scales(td, alive)
        parts = [gradient / self._rms().clamp(min=TINY).unsqueeze(1).unsqueeze(-1)]
        parts.append(self.scope.to_banks(td.get(k.policy_action)))
        if self.fixed_point_gate:
            parts.append(self.scope.to_banks(td.get(k.td_error)[..., :1]))
        else:
            parts.append(torch.zeros_like(parts[0][..., :1]))
        payload = torch.cat(parts, -1)
        if self.shuffled:
            order = torch.randperm(payload.shape[1], generator=self.generator)
            payload, live = payload[:, order], live & live[:, order]
        found = Neighbours(self._bank(td.get(self.index)), self._bank(td.get(self.squared)))
        self.store.write(self.scope.keys_of(td), payload, live, self._numbers(td), found)

    def _learn_scales(self, td: TensorDictBase, alive: Tensor) -> None:
        """Running means: of targets and rewards squared, of the regression's sums, of the batch's mean gradients."""
        k, living = self.spec.keys, alive.unsqueeze(-1)
        if self.fixed_point_gate:
            for name, key in (("target_square", k.value_target), ("reward_square", k.learn_reward)):
                getattr(self, name).lerp_(masked_mean(td.get(key)[..., :1].square(), living), 1 - FORGET)
        sums = torch.where(living, td.get(self.moments), 0.0).flatten(0, -2).sum(0)
        self.pairs.mul_(FORGET).add_(sums)
        count = alive.reshape(-1, self.spec.n_agents, 1).sum(0).clamp(min=1)
        for name, i in ((self.fresh, 0), (k.action_gradient, 1)):
            x = torch.where(living, td.get(name), 0.0).reshape(-1, *self.averages.shape[2:]).sum(0) / count
            mean, variance = self.averages[i]
            # West (1979): the variance around a mean that moves on.
            step = x - mean
            mean.add_(step, alpha=1 - FORGET)
            variance.add_((1 - FORGET) * step.square()).mul_(FORGET)

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over living agents of what `REPORT` lists, and the state of the memory.

        ``variance_ratio`` is that of the batch's mean gradient from update to update, with memory / without;
        ``variance_kept`` what equation (M3) says of a state's own gradient.
        """
        alive = td.get(self.spec.keys.alive)
        living = torch.where(alive.unsqueeze(-1), td.get(self.report), 0.0)
        report = living.flatten(0, -2).sum(0) / alive.sum().clamp(min=1)
        noise, slope = self.noise_and_slope()
        fresh, fused = self.averages[:, 1].sum((1, 2))
        return {
            "rows": self.store.held.sum().float(),
            "strength": torch.tensor(self.strength),
            "noise": noise,
            "slope": slope,
            "rejected": self.store.rejected.sum().float(),
            "variance_ratio": fused / fresh.clamp(min=TINY),
            **dict(zip(REPORT, report.unbind(), strict=True)),
        }

    # ---------------------------------------------------------------------------------------------------- conversions

    def _numbers(self, td: TensorDictBase) -> Tensor | None:
        """``[G, R]``: a number for each payload's row, by which it is known not to be a neighbour of its own."""
        row: Tensor | None = td.get(self.spec.keys.row, None)
        if row is None:
            return None
        if self.scope.joint:
            return row.reshape(1, -1)
        agents = torch.arange(self.spec.n_agents, device=row.device)
        return self.scope.to_banks(row.unsqueeze(-1) * self.spec.n_agents + agents, trailing=0).squeeze(2)

    def _allowed(self, td: TensorDictBase) -> Tensor:
        """``[*B, A, P]`` bool: entries of the gradient that mean something."""
        if self.spec.continuous:
            return self.valid.expand(*td.batch_size, *self.valid.shape)
        return td.get(self.spec.keys.action_mask)

    def _project(self, gradient: Tensor, td: TensorDictBase) -> Tensor:
        """0 where nothing is allowed; of discrete actions, without what all the allowed have in common."""
        allowed = self._allowed(td)
        gradient = torch.where(allowed, gradient, 0.0)
        if self.spec.continuous:
            return gradient
        mean = gradient.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(allowed, gradient - mean, 0.0)

    def _unbank(self, x: Tensor, batch: torch.Size) -> Tensor:
        """``[G, R, K] → [*B, A, K]``, or ``[*B, K]`` where rows are the team's."""
        if self.scope.joint:
            return x.reshape(*batch, x.shape[-1])
        return self.scope.to_agents(x.unsqueeze(2), batch)

    def _bank(self, x: Tensor) -> Tensor:
        """The inverse of `_unbank`."""
        return x.reshape(1, -1, x.shape[-1]) if self.scope.joint else self.scope.to_banks(x).squeeze(2)
