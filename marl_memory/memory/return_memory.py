"""Remembered returns as part of the value targets: the return memories of EMAC and EMC, on any host."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.keys import Entries, Entry
from marl_memory.memory.episodes import RunningEpisodes
from marl_memory.memory.operator import Bootstrap, MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.trace import Trace
from marl_memory.spec import TaskSpec

NAME = "return_memory"

POLICIES = ("best", "fifo")

NEAREST = 0.01
"""The least bandwidth: keys closer than this, in standard deviations, are as good as equal."""

REPORT = ("used", "neighbours", "effective_strength", "recalled")
"""Of each row and agent: whether a neighbour is near enough, how many are, α and H."""


class ReturnMemory(MemoryOperator):
    r"""Mixes the value targets with the returns that were seen near by.

    Remembered, once an episode is over: the discounted return R of each of its steps, under a fixed random projection
    of the key (the observation or, in the scope ``centralized``, the state; with the action, where the host's critic
    is a Q(s, a)).  Recalled, with the weights $w_i$ of `RingStore` over the k nearest rows within 3h:

    $$
    H = \frac{\sum_i w_i R_i}{\sum_i w_i}, \qquad y \leftarrow (1 - \alpha)\, y + \alpha H, \qquad
    \alpha = \texttt{strength} \cdot \texttt{coefficient}
    $$

    and y stays what it was where no row is near enough.  For the critic that is the two-term loss of the papers:

    $$
    (1-\alpha) (V - y)^2 + \alpha (V - H)^2 = \big(V - (1-\alpha) y - \alpha H\big)^2 + \alpha (1-\alpha) (y - H)^2
    $$

    whose last term has no gradient.  (EMC's TD loss keeps weight 1 beside 0.1 of memory's: α = 1/11, and a step size
    1.1 times as large.)

    A row never recalls itself: where the host learns from a replay, rows are known by their numbers, and nothing is
    averaged, so that a remembered return belongs to one of them; elsewhere a batch is written after its update.
    Returns of truncated episodes go on with the host's value of the state they were left in; steps of episodes that a
    reset of the environments cut are dropped.

    Args:
        spec: the task.
        seed: of the projection and of ``payloads="shuffled"``.
        n_envs, batch_steps, horizon, gamma: see `RunningEpisodes`.
        off_policy: the host learns Q(s, a) from a replay: keys hold the action, rows are written from the collection,
            with the environment's rewards.  Else they are written after the update, with ``learn_reward``.
        scope, capacity, budget, min_rows, search: see `GradientField`.
        policy: ``best``: of returns at the same key the highest stays; ``fifo``: all do.
        neighbours: k.
        projection: dimensions that keys are compared in; None: their own (of pictures, 64).
        half_life: environment steps after which a return counts half; None: they do not age.
        coefficient: α at strength 1.
        strength, strength_final: see `MemoryOperator`.
        payloads: ``own``, or ``shuffled``: returns are stored with the keys of other rows (a control).

    Raises:
        ValueError: for a value out of range, or a scope that the task does not admit.

    References: Kuznetsov and Filchenkov 2021, "Solving Continuous Control with Episodic Memory" (arXiv 2106.08832);
    Zheng et al. 2021, "Episodic Multi-agent Reinforcement Learning with Curiosity-Driven Exploration" (arXiv
    2111.11032).
    """

    stage: ClassVar[Stage] = Stage.TARGET
    keeps_rewards = True

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        n_envs: int = 1,
        batch_steps: int = 256,
        off_policy: bool = False,
        scope: str | None = None,
        capacity: int = 10_000,
        budget: str = "total",
        policy: Literal["best", "fifo"] = "best",
        neighbours: int = 2,
        projection: int | None = 8,
        half_life: float | None = None,
        search: str = "exact",
        min_rows: int | None = None,
        coefficient: float = 0.1,
        gamma: float = 0.99,
        horizon: int | None = None,
        strength: float = 1.0,
        strength_final: float | None = None,
        payloads: Literal["own", "shuffled"] = "own",
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
        if not 0 <= coefficient <= 1:
            raise ValueError(f"coefficient={coefficient!r} must lie in [0, 1]")
        check_positive(capacity=capacity)
        self.spec, k = spec, spec.keys
        self.coefficient, self.n_envs = coefficient, n_envs
        self.writes_on = "collection" if off_policy else "update"
        self.episodes = RunningEpisodes(
            spec, n_envs=n_envs, batch_steps=batch_steps, horizon=horizon, gamma=gamma, learnt=not off_policy
        )
        self.trace = Trace(
            NAME,
            spec,
            scope=scope,
            capacity=capacity,
            budget=budget,
            payload_size=1,
            signal_size=None,
            policy=policy,
            neighbours=neighbours,
            half_life=half_life,
            search=search,
            projection=projection,
            min_rows=min_rows,
            payloads=payloads,
            seed=seed,
            actions=off_policy,
            least_bandwidth=NEAREST,
        )
        self.scope = self.trace.scope
        self._entries: Entries = {**self.trace.entries, self.report: Entry((spec.n_agents, len(REPORT)))}
        self.in_keys = [*self.trace.in_keys, k.value_target]
        self.out_keys = [k.value_target, *self._entries]
        self.write_keys = self.episodes.write_keys

    report = ("learn", NAME, "report")
    """``[*B, A, 4]``, see `REPORT`."""

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
        self.episodes.clear()

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        super().set_progress(frames, progress)
        self.trace.store.now.fill_(frames)

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Mix H into ``value_target`` ``[*B, A, C]``, the same for every critic."""
        k, scope = self.spec.keys, self.scope
        payload, weights, *_ = self.trace.find(td)
        total = weights.sum(2)
        recalled = (weights * payload.squeeze(-1)).sum(2) / torch.where(total > 0, total, 1.0)
        numbers = torch.stack([total, (weights > 0).sum(2).to(total.dtype), recalled], -1)
        total, near, recalled = scope.to_agents(numbers, td.batch_size).unbind(-1)
        used = (total > 0) & td.get(k.alive)
        alpha = torch.where(used, self.strength * self.coefficient, 0.0)
        target: Tensor = td.get(k.value_target)
        share = alpha.unsqueeze(-1)
        put(td, k.value_target, torch.where(share > 0, torch.lerp(target, recalled.unsqueeze(-1), share), target))
        put(td, self.report, torch.stack([used.to(alpha.dtype), near, alpha, torch.where(used, recalled, 0.0)], -1))
        return td

    def write(self, td: TensorDictBase) -> None:
        """Take in steps ``[T, N]``; they are remembered once their episodes are over, by `refresh`."""
        self.episodes.write(td)

    def refresh(self, bootstrap: Bootstrap) -> None:
        """Remember the returns of the episodes that ended."""
        ended = self.episodes.take(bootstrap)
        if ended is not None:
            self.trace.write(ended.rows, ended.returns.unsqueeze(-1))

    def cut_episodes(self) -> None:
        """See `MemoryOperator.cut_episodes`."""
        self.episodes.drop_running()

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Means over living agents of what `REPORT` lists (``recalled``: over those that were used), and the state."""
        alive, store = td.get(self.spec.keys.alive), self.trace.store
        living = torch.where(alive.unsqueeze(-1), td.get(self.report), 0.0).flatten(0, -2).sum(0)
        means = dict(zip(REPORT, (living / alive.sum().clamp(min=1)).unbind(), strict=True))
        return {
            "rows": store.held.sum().float(),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
            "rejected": store.rejected.sum().float(),
            "dropped": self.episodes.dropped.float(),
            **means,
            "recalled": living[-1] / living[0].clamp(min=1),
        }
