"""Generalizable episodic memory (GEM): the best return that the memory's own trajectories lead to, as value targets."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Entries, Entry
from marl_memory.memory.operator import Bootstrap, MemoryOperator, Payloads, Stage, Steps, check_positive, put
from marl_memory.memory.own_steps import OwnSteps
from marl_memory.memory.return_table import ReturnTable
from marl_memory.spec import TaskSpec

NAME = "episodic_return"

REPORT = ("used", "effective_strength", "lead")
"""Of each row and agent: whether there is a return, its share in the target, and how far it lies above the host's."""


class EpisodicReturn(MemoryOperator):
    r"""Critics learn the best return along the trajectory that a row of the replay belongs to, not one step's target.

    Each of the newest ``capacity`` rows has returns $R^{(1)}_t, R^{(2)}_t$, one for each critic: those of
    `twin_backpropagation`, from the target critics' values at the target actors' choice (TD3's smoothed, by noise from
    the operator's own generator).  All are computed anew every ``refresh_every`` environment steps; a step that came
    since has provisional ones, along the steps that came with it.  They take the place of the host's targets, and a
    value that lies under its return counts α times:

    $$
    y^{(i)} = R^{(i)}, \qquad L_i = \mathbb{E}\,\big[ (\delta_i)_+^2 + \alpha\, (-\delta_i)_+^2 \big], \qquad
    \delta_i = Q^{(i)}(s_t, a_t) - R^{(i)}_t
    $$

    A strength s < 1 mixes: $y = (1 - s)\, y_{host} + s R$, with $1 - s (1 - \alpha)$ for α.  Rows that are not among
    the newest keep the host's targets.  Where the host has one critic there are no twins, and R is the maximum of its
    own estimates.

    **On PPO and its team forms** (no replay, one critic V) the operator holds the newest ``capacity`` rows itself.  One
    of them is replayed beside every row of the batch (stage REPLAY), each agent its own part of a team row:

    $$
    L = L_{\mathrm{host}} + \mathbb{E}\,\big[ -c\, g \log \pi(a|o) + \tfrac12 c_V (V - R)^2 \big], \qquad
    g = \min\big((R - V)_+ / \sigma_R,\ 1\big)
    $$

    with R from the present V, its deviation $\sigma_R$, and gains g of the last refresh; strength multiplies c and
    $c_V$.  These returns are no part of PPO's advantages.

    Values are those of the host's critic: what an agent's return is made of is what that critic reads, and ``scope``
    can name nothing else.

    Args:
        spec: the task.
        seed: of the smoothing noise and the draws.
        n_envs: N.
        off_policy: whether the host has a replay.
        n_critics: C of the host.
        reach: what its critic reads, see `Algorithm.reach`; None: anything.
        scope: None, or the reach.
        capacity: team rows.
        refresh_every: environment steps between two refreshes of all rows.
        estimator: ``twin``, ``max`` (the ablation without twins) or ``lambda``, see `ReturnTable`.
        lam, one_step_floor, include_running: see `ReturnTable`.
        max_rollout: the most rewards before a value; None: as many as there are, as in the paper (decision 79).
        under_weight: α in (0, 1], with a replay; 1 is plain regression.  None for 0.25: the 0.5 of the authors' code,
            which squares it.
        coefficient: c, only without a replay; None for 0.1.
        value_coefficient: $c_V$, only without a replay; None for 0.01.
        gamma: γ.
        strength, strength_final: see `MemoryOperator`.

    Raises:
        ValueError: for a value out of range, one that has no effect, or a scope that is not the critic's reach.

    Reference: Hu et al. 2021, "Generalizable Episodic Memory for Deep Reinforcement Learning" (arXiv 2103.06469),
    equations 2 to 8 and algorithm 1.  (Not Gradient Episodic Memory, which shares the abbreviation.)
    """

    stage: Stage  # type: ignore[misc]
    keeps_rewards = True

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        n_envs: int = 1,
        off_policy: bool = False,
        n_critics: int = 1,
        reach: str | None = None,
        scope: str | None = None,
        capacity: int = 100_000,
        refresh_every: int = 100,
        estimator: str = "twin",
        lam: float | None = None,
        max_rollout: int | None = 5,
        one_step_floor: bool = False,
        include_running: bool = True,
        under_weight: float | None = None,
        coefficient: float | None = None,
        value_coefficient: float | None = None,
        gamma: float = 0.99,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        check_positive(capacity=capacity, refresh_every=refresh_every, coefficient=coefficient)
        if value_coefficient is not None and not value_coefficient >= 0:
            raise ValueError(f"value_coefficient={value_coefficient!r} must not be negative")
        if under_weight is not None and not 0 < under_weight <= 1:
            raise ValueError(f"under_weight={under_weight!r} must lie in (0, 1]")
        _check_scope(scope, reach, spec)
        given = {"under_weight": under_weight} if not off_policy else {}
        given |= {"coefficient": coefficient, "value_coefficient": value_coefficient} if off_policy else {}
        for name, value in given.items():
            if value is not None:
                kind = "with" if off_policy else "without"
                raise ValueError(f"{name}={value!r} has no effect on a host {kind} a replay: leave it null")
        self.spec, self.refresh_every, self.critics = spec, refresh_every, n_critics
        self.stage = Stage.TARGET if off_policy else Stage.REPLAY
        self.writes_on = "collection" if off_policy else "update"
        self.estimator = estimator
        self.alpha = 0.25 if under_weight is None else under_weight
        self.told = False
        self.table = ReturnTable(
            spec,
            capacity=capacity,
            n_envs=n_envs,
            critics=n_critics,
            gamma=gamma,
            estimator=estimator,
            lam=lam,
            max_rollout=max_rollout,
            one_step_floor=one_step_floor,
            include_running=include_running,
        )
        self.generator = Generator().manual_seed(seed)
        self.register_buffer("refreshed", torch.full((), -1, dtype=torch.int64))
        k, a = spec.keys, spec.n_agents
        self.own: OwnSteps | None = None
        if off_policy:
            self._entries: Entries = {k.under_weight: Entry((a, 1)), self.report: Entry((a, len(REPORT)))}
            self.in_keys: list[Any] = [k.row, k.alive, k.value_target]
            self.out_keys: list[Any] = [k.value_target, *self._entries]
            self.write_keys: list[Any] = []
        else:
            imitation, value = (x if y is None else y for x, y in ((0.1, coefficient), (0.01, value_coefficient)))
            sizes = {"steps": self.table.steps, "n_envs": n_envs}
            self.own = OwnSteps(NAME, spec, **sizes, coefficients=(imitation, value))
            self._entries = self.own.entries
            self.in_keys, self.out_keys = [k.alive], list(self._entries)
            self.write_keys = self.own.steps.write_keys

    refreshed: Tensor
    """``[]``: the number after that of the newest step when all rows were refreshed; −1: never."""

    report = ("learn", NAME, "report")
    """``[*B, A, 3]``, see `REPORT`."""

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return self._entries

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`."""
        return Payloads(len(self) * self.spec.n_agents, self.table.steps * self.table.n_envs * self.spec.n_agents)

    def remarks(self) -> list[str]:
        """See `MemoryOperator.remarks`: that the host has no twins, once."""
        if self.estimator != "twin" or self.critics > 1 or self.told:
            return []
        self.told = True
        more = " (algorithm.critics=2 gives it two)" if self.own is None else ""
        return [f"the host has one critic{more}: without twins, returns are the maximum of its own estimates"]

    def __len__(self) -> int:
        return len(self.table)

    def clear(self) -> None:
        """Forget everything."""
        self.table.clear()
        self.refreshed.fill_(-1)
        if self.own is not None:
            self.own.steps.clear()

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state)

    # ---------------------------------------------------------------------------------------------------------- recall

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Set ``value_target`` ``[*B, A, C]`` and ``under_weight``; without a replay, a row beside every row."""
        if self.own is not None:
            self.own.replay(td, self.table, self.strength)
            return td
        k = self.spec.keys
        found, there = self.table.find(td.get(k.row))
        used = there & td.get(k.alive)
        share = torch.where(used, self.strength, 0.0).to(found.dtype).unsqueeze(-1)
        target: Tensor = td.get(k.value_target)
        found = torch.where(used.unsqueeze(-1), found, target)
        lead = (found - target).mean(-1, keepdim=True)
        mixed = torch.where(share < 1, torch.lerp(target, found, share), found)
        put(td, k.value_target, torch.where(share > 0, mixed, target))
        put(td, k.under_weight, 1 - share * (1 - self.alpha))
        put(td, self.report, torch.cat([used.unsqueeze(-1).to(share.dtype), share, lead], -1))
        return td

    # --------------------------------------------------------------------------------------------------------- remember

    def write(self, td: TensorDictBase) -> None:
        """Take in steps ``[T, N]``; where there is a replay, they are there already."""
        if self.own is not None:
            self.own.steps.write(td)

    def sweep(self, bootstrap: Bootstrap, steps: Steps) -> None:
        """Compute the returns of all rows if it is time to, else those of the steps that came since the last call."""
        if self.own is None:
            due = self._is_due(steps)
            self.table.sweep(bootstrap, steps, 0 if due else int(self.table.written), self.generator)

    def refresh(self, bootstrap: Bootstrap) -> None:
        """As `sweep`, over the rows that the operator holds where there is no replay; and draw for the next update."""
        if self.own is not None:
            due = self._is_due(self.own.steps)
            self.own.refresh(self.table, bootstrap, 0 if due else int(self.table.written), self.generator)

    def _is_due(self, steps: Steps) -> bool:
        """Whether all rows are to be refreshed; then the clock starts anew."""
        since = (steps.written - int(self.refreshed)) * steps.n_envs
        due = bool(self.refreshed < 0) or since >= self.refresh_every
        if due:
            self.refreshed.fill_(steps.written)
        return due

    def cut_episodes(self) -> None:
        """See `MemoryOperator.cut_episodes`; a replay marks its own rows."""
        if self.own is not None:
            self.own.steps.cut_episodes()

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over living agents of what `REPORT` lists; without a replay, of the rows drawn."""
        state = {
            "rows": torch.tensor(float(len(self))),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
        }
        if self.own is not None:
            return state | self.own.metrics(td)
        alive = td.get(self.spec.keys.alive)
        living = torch.where(alive.unsqueeze(-1), td.get(self.report), 0.0).flatten(0, -2).sum(0)
        return state | dict(zip(REPORT, (living / alive.sum().clamp(min=1)).unbind(), strict=True))


def _check_scope(scope: str | None, reach: str | None, spec: TaskSpec) -> None:
    """Raise ValueError for a scope that is not the critic's reach; of one agent every scope is."""
    if scope is None or reach is None or scope == reach or spec.n_agents == 1:
        return
    raise ValueError(
        f"scope={scope!r} is not what the host's critic reads, which is {reach!r}, and returns are made of its values. "
        "Leave scope out, or choose another critic (algorithm.centralised_critic, algorithm.share_critic)"
    )
