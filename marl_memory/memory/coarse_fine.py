"""Novelty as a reward: a state that an autoencoder knows little of is worth a visit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.functional.novelty import COMBINATIONS, intrinsic_reward
from marl_memory.keys import Entries, Entry
from marl_memory.memory.novelty import StateNovelty
from marl_memory.memory.operator import MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.scope import Scope, state_there
from marl_memory.spec import TaskSpec

NAME = "coarse_fine"

REPORT = ("used", "coarse", "fine", "intrinsic", "bonus")
"""Of each row and agent: whether its novelty is known, r_c, r_f, r_int, and what is added to the reward."""


class CoarseFineNovelty(MemoryOperator):
    r"""Adds the novelty of the state that a step leads to, to the reward that learning uses.

    An autoencoder z = E(s), ŝ = D(z) learns the states that are collected.  Coarse novelty is what it can not draw yet,
    fine novelty how little it singles out in its code:

    $$
    r_c = \frac{\lVert s - \hat s \rVert^2}{\dim(s)}, \qquad
    r_f = 1 - \mathrm{Hoyer}(z) = 1 - \frac{\sqrt n - \lVert z \rVert_1 / \lVert z \rVert_2}{\sqrt n - 1}, \qquad
    L_{AE} = r_c + \lambda_1 \frac{\lVert z \rVert_1}{n}
    $$

    $$
    r \leftarrow r + \eta_t\, r_{int}, \qquad
    r_{int} = \frac{r_c}{\sigma_c} + \zeta \frac{r_f - \mu_f}{\sigma_f}
    $$

    with running deviations σ of what the autoencoder learnt from, and the mean $\mu_f$ of what it learnt last: of r_f
    itself, which is some 25 deviations everywhere at first, each step of an episode would be paid so well that a policy
    learns never to end one.  $\eta_t$ is multiplied by strength.  The environment's own reward stays what it is.

    A step is worth what the state after it is, to an agent that lives before and after it: a terminal state is worth
    nothing, the last state of a truncated episode is worth something.  A batch is rewarded before it is learnt from; a
    row of a replay is worth what it is when it is drawn.

    In the scope ``per_agent`` every agent has an autoencoder of its own observations, in ``shared`` all agents of a
    kind have one.  In ``centralized`` there is one of the state, whose novelty is everybody's: under a common reward
    that of the dead too.

    Args:
        spec: the task.
        seed: of the initial parameters and of the draws.
        scope, capacity, budget: see `Scope`; the newest states are kept to learn from.
        hidden: widths of the encoder's hidden layers; the decoder's are these in reverse.
        latent: n.
        sparsity: λ₁.
        lr: Adam's step size.
        batches: gradient steps after every collection.
        batch_size: states in each, of each bank.
        zeta: ζ.
        fine_sign: 1: dense codes are new, as above; −1: sparse ones, $r_f = \mathrm{Hoyer}(z)$.
        combine: ``add``, as above; ``mul``: see `intrinsic_reward`.
        centre: whether $\mu_f$ is taken off; else it is 0, as in the published summary.
        eta, eta_final: η at the beginning and at the end of a run, linear in frames.
        strength, strength_final: see `MemoryOperator`.

    Raises:
        ValueError: for a value out of range, or a scope that the task does not admit.

    Reference: our instantiation of the published summary of Yan et al. 2024, "AdaMemento" (arXiv 2410.04498).  The
    direction of the fine term, its centre and the sum are choices of ours.
    """

    stage: ClassVar[Stage] = Stage.REWARD
    writes_on = "collection"

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        scope: str | None = None,
        capacity: int = 4_096,
        budget: Literal["total", "per_bank"] = "total",
        hidden: Sequence[int] = (256, 256),
        latent: int = 64,
        sparsity: float = 1e-3,
        lr: float = 1e-4,
        batches: int = 16,
        batch_size: int = 256,
        zeta: float = 0.5,
        fine_sign: Literal[1, -1] = 1,
        combine: Literal["add", "mul"] = "add",
        centre: bool = True,
        eta: float = 0.01,
        eta_final: float = 0.0,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        check_positive(capacity=capacity, lr=lr, batches=batches, batch_size=batch_size)
        _check_not_negative(sparsity=sparsity, zeta=zeta, eta=eta, eta_final=eta_final)
        _check_choices(hidden, latent, fine_sign, combine)
        self.spec, k = spec, spec.keys
        self.batches, self.batch_size, self.zeta, self.combine = batches, batch_size, zeta, combine
        self.centre = centre
        self.eta_first, self.eta_final = eta, eta_final
        self.eta = eta
        """Now."""
        self.scope = Scope(scope or "shared", spec, raw=True)
        self.model = StateNovelty(
            _valid(self.scope, spec),
            gaps=self.scope.joint and not spec.own_state,
            picture=_picture(self.scope, spec),
            size=self.scope.rows_per_bank(capacity, budget),
            latent=latent,
            hidden=hidden,
            sparsity=sparsity,
            lr=lr,
            fine_sign=fine_sign,
            seed=seed,
        )
        self.rejected: Tensor
        self.register_buffer("rejected", torch.zeros(self.scope.banks, dtype=torch.int64))
        self.everybodys = self.scope.joint and spec.common_reward
        self._state: tuple[str, ...] = (k.state,) if self.scope.joint else k.observation
        self.write_keys: list[Any] = [k.alive, ("next", *k.alive), ("next", *self._state)]
        self.in_keys = [*self.write_keys, k.learn_reward]
        self.out_keys = [k.learn_reward, self.report]

    report = ("learn", NAME, "report")
    """``[*B, A, 5]``, see `REPORT`."""

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return {self.report: Entry((self.spec.n_agents, len(REPORT)))}

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`."""
        each = self.scope.payloads
        return Payloads(len(self) * each, self.model.recent.size * self.scope.banks * each)

    @property
    def bytes(self) -> int:
        """Of states, statistics, parameters, and Adam's two numbers beside each parameter."""
        return super().bytes + 2 * sum(p.numel() * p.element_size() for p in self.parameters())

    def __len__(self) -> int:
        return int(self.model.recent.held.sum())

    def clear(self) -> None:
        """Forget everything, what was learnt too."""
        self.model.clear()
        self.rejected.zero_()

    def set_progress(self, frames: int, progress: float) -> None:
        """Follow the schedules of strength and η."""
        super().set_progress(frames, progress)
        self.eta = self.eta_first + (self.eta_final - self.eta_first) * min(progress, 1.0)

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        r"""Add $\eta_t r_{int}$ to ``learn_reward`` ``[*B, A, 1]``."""
        k, scope, model = self.spec.keys, self.scope, self.model
        states, live, finite = self._states(td)
        coarse, fine, _ = model.of(states)
        scales, level = model.deviations.unsqueeze(1), model.level.unsqueeze(1) if self.centre else 0.0
        intrinsic = intrinsic_reward(coarse, fine, scales, level, zeta=self.zeta, combine=self.combine)
        bonus = self.strength * self.eta * intrinsic
        numbers = torch.stack([torch.ones_like(coarse), coarse, fine, intrinsic, bonus], -1)
        known = live & finite & model.known.unsqueeze(1)
        numbers = torch.where(known.unsqueeze(-1), numbers, 0.0).unsqueeze(2)
        each = scope.to_agents(numbers.expand(-1, -1, scope.payloads, -1), td.batch_size)
        if not self.everybodys:
            each = torch.where(self._lives_on(td).unsqueeze(-1), each, 0.0)
        reward, added = td.get(k.learn_reward), each[..., -1:]
        put(td, k.learn_reward, torch.where(added != 0, reward + added, reward))
        put(td, self.report, each)
        return td

    @torch.no_grad()
    def write(self, td: TensorDictBase) -> None:
        """Take in the states that the steps ``[*B]`` lead to."""
        states, live, finite = self._states(td)
        self.rejected += (live & ~finite).sum(1)
        self.model.write(states, live & finite)

    def learn(self) -> dict[str, Tensor]:
        """``batches`` Adam steps on $L_{AE}$ of states drawn from those that are kept."""
        if len(self) == 0:
            return {}
        loss = self.model.learn(self.batches, self.batch_size)
        scales = self.model.deviations[self.model.known].mean(0)
        return {"loss/autoencoder": loss, "scale_coarse": scales[0], "scale_fine": scales[1]}

    def _lives_on(self, td: TensorDictBase) -> Tensor:
        """``[*B, A]``: who lives before the step and after it."""
        k = self.spec.keys
        return td.get(k.alive) & td.get(("next", *k.alive))

    def _states(self, td: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """The states ``[G, R, F]`` that the steps ``[*B]`` lead to, and which ``[G, R]`` are there, and finite.

        Those that are neither are 0; of a state that is all observations the absent agents' part is NaN.
        """
        alive = self._lives_on(td)
        after = TensorDict({self.spec.keys.alive: alive}, batch_size=td.batch_size)
        states = self.scope.keys_of(after.set(self._state, td.get(("next", *self._state))))
        live, finite = self.scope.living(alive).any(-1), states.isfinite().all(-1)
        states = torch.where((live & finite).unsqueeze(-1), states, 0)
        if self.model.gaps:
            there = state_there(alive, self.scope.valid, own=False).reshape(1, -1, self.scope.features)
            states = states.masked_fill(~there, torch.nan)
        return states, live, finite

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over those whose novelty is known of what `REPORT` lists (``used``: their share), and the state."""
        numbers: Tensor = td.get(self.report)
        used, living = numbers[..., 0].sum(), (self._lives_on(td) | (numbers[..., 0] > 0)).sum()
        means = numbers.flatten(0, -2).sum(0) / used.clamp(min=1)
        return {
            "rows": torch.tensor(float(len(self))),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
            "effective_strength": torch.tensor(self.strength * self.eta),
            "rejected": self.rejected.sum().float(),
            **dict(zip(REPORT, means.unbind(), strict=True)),
            "used": used / living.clamp(min=1),
        }


def _valid(scope: Scope, spec: TaskSpec) -> Tensor:
    """``[G, F]``: what is no padding in the rows of each bank."""
    valid = torch.tensor(spec.observation_valid)
    if scope.joint:
        return torch.ones(1, spec.state_size, dtype=torch.bool) if spec.own_state else valid.reshape(1, -1)
    return scope.to_banks(valid.unsqueeze(0))[:, 0, 0]


def _picture(scope: Scope, spec: TaskSpec) -> tuple[int, int, int] | None:
    """Of a row, where observations are pictures: of a team's state, the agents' pictures are channels of one."""
    if spec.picture is None:
        return None
    channels, height, width = spec.picture
    return channels * scope.payloads, height, width


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r} must not be negative")


def _check_choices(hidden: Sequence[int], latent: int, fine_sign: int, combine: str) -> None:
    if min(hidden, default=1) < 1:
        raise ValueError(f"hidden={list(hidden)} must hold positive widths")
    if latent < 2:
        raise ValueError(f"latent={latent!r} must be at least 2: a single number is never sparse")
    if fine_sign not in (1, -1):
        raise ValueError(f"fine_sign={fine_sign!r} must be 1 (dense codes are new) or -1 (sparse ones are)")
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} must be one of {', '.join(COMBINATIONS)}")
