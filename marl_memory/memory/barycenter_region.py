"""Mnemo for stochastic policies: a region around what was done before at similar states."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.functional.transport import (
    categorical_barycenter,
    categorical_kl,
    gaussian_barycenter,
    gaussian_kl,
    ordinal_cost,
    structured_cost,
    value_cost,
)
from marl_memory.keys import Entries, Entry
from marl_memory.memory.fixed_point import LEAST, TINY, FixedPointGate
from marl_memory.memory.join import JoinedRegion
from marl_memory.memory.operator import MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.stock import StockEntries
from marl_memory.memory.trace import Trace
from marl_memory.spec import TaskSpec

NAME = "barycenter_region"

COSTS = ("one_hot", "ordinal", "structured", "value")

REPORT = ("mass", "effective_neighbours", "neighbours", "omega", "kl")
"""Of each row and agent: W, n_e, how many neighbours there are within reach, ω and KL(p*‖π)."""

LEAST_WEIGHT = 0.01
"""ω from which a row's KL says anything of how far memory and policy are apart."""


class BarycenterRegion(MemoryOperator):
    r"""Draws the policy to a barycenter of past action distributions at neighbouring states.

    Remembered after every update: the distributions $\nu_i = \pi(\cdot|s_i)$ that acted.  Recalled at state s, with
    the weights $w_i$ of `RingStore`, their sum W, $a_i = w_i / W$ and $\omega(s) = W / (W + c)$:

    $$
    p^*(\cdot|s) = \arg\min_p\; \omega \sum_i a_i D(p, \nu_i) + \tfrac{1}{\lambda} \mathrm{KL}(p \,\|\, \pi), \qquad
    L = L_{\mathrm{host}} + c_M\, \mathbb{E}\,[\omega(s)\, \mathrm{KL}(p^*(\cdot|s) \,\|\, \pi_\varphi(\cdot|s))]
    $$

    D is $W_2^2$ between diagonal Gaussians (before squashing), divided by the number of dimensions, or the debiased
    entropic transport between categoricals.  Solved once for a batch, with π the policy that collected it.  ω is
    multiplied by strength and by the fixed-point gate of `FixedPointGate`, whose δ is the advantage in units of the
    value targets.  With an empty memory ω = 0: exactly the host.

    This is our instantiation of the published abstract of "Mnemo: Policy Learning Accelerated by Experience" (2026);
    the paper's own method may differ.

    Args:
        spec: the task.
        seed: the run's seed; ``policy="simhash"`` and ``payloads="shuffled"`` draw from it.
        scope, capacity, budget, policy, neighbours, half_life, search, keys, feature_size, projection, min_rows: see
            `GradientField`.
        coefficient: $c_M$.
        mass_half: c.
        lam: λ at the start.
        radius: the median KL(p*‖π) that λ is adapted to; None: λ stays.
        divergence: ``kl``, or ``w2`` in its place in L (Gaussians).
        cost: between actions: ``one_hot``, ``ordinal``, ``structured`` (the task's action embedding) or ``value``
            (|Q(s, a) − Q(s, b)|, which someone must write as ``action_values``).
        eps: ε of the entropic transport.
        iterations: of its solver.
        quality: τ of weights exp(Â/τ) by which better rows count more; None: all count alike.
        fixed_point_gate, gate_slope, gamma: see `GradientField`; here the gate is on.
        strength, strength_final: see `MemoryOperator`.
        payloads: ``own``, or ``shuffled``: distributions are stored with the keys of other rows (a control).

    Raises:
        ValueError: for a value out of range, a cost or divergence that the actions do not admit, or a scope that the
            task does not.
    """

    stage: ClassVar[Stage] = Stage.REGION
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
        coefficient: float = 0.5,
        mass_half: float = 1.0,
        lam: float = 1.0,
        radius: float | None = 0.015,
        divergence: Literal["kl", "w2"] = "kl",
        cost: Literal["one_hot", "ordinal", "structured", "value"] = "one_hot",
        eps: float = 0.1,
        iterations: int = 30,
        quality: float | None = None,
        fixed_point_gate: bool = True,
        gate_slope: float = 1.0,
        gamma: float = 0.99,
        strength: float = 1.0,
        strength_final: float | None = None,
        payloads: Literal["own", "shuffled"] = "own",
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        _check(spec, cost, divergence)
        if policy == "fourier" and not spec.continuous:
            raise ValueError(
                "policy='fourier' reads means, and a mean of categorical distributions is no barycenter of theirs: "
                "choose merge, fifo or simhash"
            )
        check_positive(coefficient=coefficient, lam=lam, mass_half=mass_half, radius=radius, quality=quality)
        check_positive(eps=eps, iterations=iterations)
        self.spec, k, p = spec, spec.keys, spec.action_size
        self.coefficient, self.mass_half, self.radius, self.divergence = coefficient, mass_half, radius, divergence
        self.cost_name, self.eps, self.iterations, self.quality = cost, eps, iterations, quality
        self.parts = [2 * p if spec.continuous else p, 0 if spec.continuous else p, 1, 1]
        """Of a payload: distribution, mask, advantage (each times its quality) and quality."""
        self.bounds = (1e-3, 1e4 if spec.continuous else 100.0)
        """Of an adapted λ.  With discrete actions p* is all but the barycenter from 100 on, and the solver inexact."""
        if radius is not None and not self.bounds[0] <= lam <= self.bounds[1]:
            raise ValueError(
                f"lam={lam!r} must lie between {self.bounds[0]:g} and {self.bounds[1]:g}, or radius be null"
            )
        self.trace = Trace(
            NAME,
            spec,
            scope=scope,
            capacity=capacity,
            budget=budget,
            payload_size=sum(self.parts),
            signal_size=None,
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
        )
        self.scope = self.trace.scope
        self.gate = FixedPointGate(self.scope, slope=gate_slope, gamma=gamma) if fixed_point_gate else None
        self.first_lam = lam
        self.register_buffer("lam", torch.full((self.scope.banks, self.scope.payloads), float(lam)))
        self.register_buffer("valid", torch.tensor(spec.action_valid), persistent=False)
        self.register_buffer("cost", _cost(spec, cost), persistent=False)
        shape = (spec.n_agents, p)
        self.references = {name: (*k.region, NAME, name) for name in _parameters(spec)}
        self.weight = (*k.region, NAME, "weight" if divergence == "kl" else "w2_weight")
        self._entries: Entries = {
            **self.trace.entries,
            **{key: Entry(shape) for key in self.references.values()},
            self.weight: Entry((spec.n_agents,)),
            self.report: Entry((spec.n_agents, len(REPORT))),
        }
        read: list[Any] = [*self.trace.in_keys, *(k.policy(name) for name in _parameters(spec))]
        read += [] if spec.continuous else [k.action_mask]
        read += [k.action_values] if cost == "value" else []
        read += [k.value, k.value_target] if fixed_point_gate else []
        self.in_keys, self.out_keys = read, list(self._entries)
        self.write_keys = [*read, *self.trace.entries, self.report]
        self.write_keys += [k.learn_reward] if fixed_point_gate else []
        self.write_keys += [k.advantage] if quality is not None else []

    lam: Tensor
    """``[G, S]``: λ now."""
    valid: Tensor
    cost: Tensor | None
    """``[P, P]`` between actions; None: ``one_hot``, or one for each state."""

    report = ("learn", NAME, "report")
    """``[*B, A, 5]``, see `REPORT`."""

    @property
    def asks(self) -> Entries:
        """See `MemoryOperator.asks`."""
        k, shape = self.spec.keys, (self.spec.n_agents, self.spec.action_size)
        asked = {**self.trace.asks, **{k.policy(name): Entry(shape) for name in _parameters(self.spec)}}
        return {**asked, k.action_values: Entry(shape)} if self.cost_name == "value" else asked

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
        self.lam.fill_(self.first_lam)
        if self.gate is not None:
            self.gate.clear()

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        super().set_progress(frames, progress)
        self.trace.store.now.fill_(frames)

    def join(self, actor: Any, **entries: Any) -> JoinedRegion:
        """This operator in a script of TorchRL: see `JoinedRegion`.

        Args:
            actor: the ``ProbabilisticActor`` that is trained, [*B, …] or [*B, A, …].
            entries: keys of entries that lie elsewhere than `stock.DEFAULTS` says, as ``value="critic_value"``.

        Raises:
            ValueError: for an unknown entry.
        """
        return JoinedRegion(self, actor, StockEntries(self.spec, entries))

    # ---------------------------------------------------------------------------------------------------------- recall

    @torch.inference_mode()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Set p* (its parameters, ``[*B, A, P]``) and its weight in the loss ``[*B, A]``."""
        scope = self.scope
        payload, weights, mass, *_ = self.trace.find(td)
        past, share, error, quality = payload.split(self.parts, -1)
        weights = weights * quality.squeeze(-1)
        past, share, error = (x / quality.clamp(min=TINY) for x in (past, share, error))
        if not self.spec.continuous:
            past, known = self._completed(td, past, share)
            weights = torch.where(known, weights, 0.0)
        total = weights.sum(2)
        effective = total.square() / (weights.square() / mass).sum(2).clamp(min=LEAST)
        around = (weights * error.squeeze(-1)).sum(2)
        found = (weights > 0).sum(2)
        numbers = scope.to_agents(torch.stack([total, effective, found, around], -1), td.batch_size)
        total, effective, found, around = numbers.unbind(-1)
        # [G, R, K, S, …] → [*B, A, K, …]
        past = scope.to_agents(past.movedim(2, 3), td.batch_size)
        shares = scope.to_agents(weights.movedim(2, 3), td.batch_size) / total.clamp(min=TINY).unsqueeze(-1)
        omega = total / (total + self.mass_half)
        kl = self._solve(td, past, shares, omega)
        omega = omega * self.strength
        if self.gate is not None:
            omega = omega * self.gate(self._advantage(td), around, total)
        omega = torch.where(td.get(self.spec.keys.alive), omega, 0.0)
        put(td, self.weight, self.coefficient * omega)
        put(td, self.report, torch.stack([total, effective, found, omega, kl], -1))
        return td

    def _completed(self, td: TensorDictBase, past: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours ``[G, R, K, S, P]`` over the actions allowed now, and which of them ``[G, R, K, S]`` know any.

        What was forbidden then is not improbable but unknown: there they are as likely as π says, and what they know
        they share among as much as π gives it.

        Args:
            td: the batch.
            past: of every row the mean of probabilities, 0 where an action was forbidden.
            share: in how much of that mean it was allowed.
        """
        k = self.spec.keys
        allowed = self.scope.to_banks(td.get(k.action_mask)).unsqueeze(2)
        (name,) = _parameters(self.spec)
        present = self.scope.to_banks(td.get(k.policy(name))).unsqueeze(2).exp()
        known = allowed & (share > 0)
        ratio = torch.where(known, past / share.clamp(min=TINY), 0.0)
        amount = torch.where(known, present, 0.0).sum(-1, keepdim=True)
        ratio = ratio * (amount / ratio.sum(-1, keepdim=True).clamp(min=TINY))
        return torch.where(known, ratio, present), known.any(-1)

    def _solve(self, td: TensorDictBase, past: Tensor, shares: Tensor, omega: Tensor) -> Tensor:
        """Set p* from distributions ``[*B, A, K, width]`` with shares ``[*B, A, K]``; KL(p*‖π) ``[*B, A]``."""
        k, p = self.spec.keys, self.spec.action_size
        present = [td.get(k.policy(name)) for name in _parameters(self.spec)]
        lam = self.scope.per_agent(self.lam)
        if self.spec.continuous:
            loc, scale = present
            means, stds = past.split([p, p], -1)
            # Where there is no neighbour a row of the store is read all the same: any deviation will do.
            stds = torch.where(shares.unsqueeze(-1) > 0, stds, 1.0)
            dimensions = self.valid.sum(-1)
            mean, std = gaussian_barycenter(loc, scale, means, stds, shares, omega / dimensions, lam)
            mean, std = torch.where(self.valid, mean, loc), torch.where(self.valid, std, scale)
            put(td, self.references["loc"], mean)
            put(td, self.references["scale"], std)
            return gaussian_kl(mean, std, loc, scale)
        (log_probs,) = present
        best, used = log_probs.clone(), td.get(k.alive) & (omega > 0)  # it is solved where it will be read
        mask = td.get(k.action_mask)[used]
        cost = self.cost
        if self.cost_name == "value":  # what is forbidden is no farther than anything else
            values = td.get(k.action_values)[used]
            highest = torch.where(mask, values, -torch.inf).amax(-1, keepdim=True)
            cost = value_cost(torch.where(mask, values, highest))
        best[used] = categorical_barycenter(
            log_probs[used],
            past[used].clamp(min=TINY).log(),
            shares[used],
            omega[used],
            lam.expand(*td.batch_size, -1)[used],
            cost=cost,
            eps=self.eps,
            iterations=self.iterations,
            mask=mask,
        )
        put(td, self.references["log_probs"], best)
        return categorical_kl(best, log_probs)

    def _advantage(self, td: TensorDictBase) -> Tensor:
        """δ ``[*B, A]``: the advantage before normalisation."""
        k = self.spec.keys
        return (td.get(k.value_target) - td.get(k.value))[..., 0]

    # --------------------------------------------------------------------------------------------------------- remember

    @torch.inference_mode()
    def write(self, td: TensorDictBase) -> None:
        """Remember the distributions that acted, and bring λ nearer to the radius."""
        k, alive = self.spec.keys, td.get(self.spec.keys.alive)
        if self.gate is not None:
            self.gate.update(td)
        parts: list[Tensor] = [td.get(k.policy(name)) for name in _parameters(self.spec)]
        if not self.spec.continuous:
            parts = [parts[0].exp()]  # a mean of probabilities is a mixture, of logarithms it would forget modes
        allowed = self.valid if self.spec.continuous else self.valid & td.get(k.action_mask)
        parts = [torch.where(allowed, part, 0.0) for part in parts]
        if not self.spec.continuous:
            parts.append(allowed.to(parts[0].dtype))
        error = torch.zeros_like(parts[0][..., :1]) if self.gate is None else self._advantage(td).unsqueeze(-1)
        quality = torch.ones_like(error)
        if self.quality is not None:
            quality = (td.get(k.advantage) / self.quality).clamp(-5, 5).exp()
        self._adapt(td.get(self.report), alive)
        # A mean of what counts unequally: of each times its quality, over the mean quality.
        self.trace.write(td, torch.cat([*(x * quality for x in (*parts, error)), quality], -1))

    def _adapt(self, report: Tensor, alive: Tensor) -> None:
        """λ ← λ · radius / median KL(p*‖π), by a factor of 2 at most and within `bounds`.

        Over the rows where memory weighs something: the KL of others is small whatever memory says.
        """
        if self.radius is None:
            return
        total, kl = report[..., 0], report[..., REPORT.index("kl")]
        used = self.scope.living(alive & (total / (total + self.mass_half) > LEAST_WEIGHT))
        median = torch.where(used, self.scope.to_banks(kl, trailing=0), torch.nan).nanmedian(1).values
        adapted = self.lam * (self.radius / median.clamp(min=TINY)).clamp(0.5, 2.0)
        self.lam.copy_(torch.where(median.isfinite(), adapted.clamp(*self.bounds), self.lam))

    @torch.inference_mode()
    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over living agents of what `REPORT` lists, and the state of the memory."""
        alive = td.get(self.spec.keys.alive)
        living = torch.where(alive.unsqueeze(-1), td.get(self.report), 0.0)
        means = living.flatten(0, -2).sum(0) / alive.sum().clamp(min=1)
        store = self.trace.store
        return {
            "rows": store.held.sum().float(),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
            "lam": self.lam.mean(),
            "rejected": store.rejected.sum().float(),
            **dict(zip(REPORT, means.unbind(), strict=True)),
        }


def _parameters(spec: TaskSpec) -> tuple[str, ...]:
    """What a policy's distribution is described by."""
    return ("loc", "scale") if spec.continuous else ("log_probs",)


def _check(spec: TaskSpec, cost: str, divergence: str) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r} must be one of {', '.join(COSTS)}")
    if divergence not in ("kl", "w2"):
        raise ValueError(f"divergence={divergence!r} must be 'kl' or 'w2'")
    if spec.continuous and cost != "one_hot":
        raise ValueError(f"cost={cost!r} is one between discrete actions; those of {spec.name} are continuous")
    if not spec.continuous and divergence == "w2":
        raise ValueError(f"divergence='w2' is one between Gaussians; {spec.name} has discrete actions: use 'kl'")
    if cost == "structured" and spec.action_embedding is None:
        raise ValueError(f"cost='structured' needs an embedding of the actions, which {spec.name} does not give")


def _cost(spec: TaskSpec, name: str) -> Tensor | None:
    if name == "ordinal":
        return ordinal_cost(spec.action_size)
    if name == "structured":
        return structured_cost(torch.tensor(spec.action_embedding))
    return None
