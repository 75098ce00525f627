"""What the returns of GEM cost: the scan, a refresh of a whole table, and TD3 with both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain_ddpg as plain
from benchmarks.measure import Row, ratio, turns
from benchmarks.off_policy import collected, task
from marl_memory.algorithms.td3 import TD3
from marl_memory.functional.returns import twin_backpropagation
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.iteration import LentSteps, OffPolicyIteration
from marl_memory.training.replay import ReplayRing

ROWS, EPISODE = 100_000, 1_000
FRAMES, UPDATES, BATCH = 100, 200, 128
"""The paper's cadence."""


def scan(repeats: int) -> Iterator[Row]:
    """The loop over rollouts' lengths, vectorised over time and trajectories / the backward scan."""
    steps, trajectories, g = 1_000, 100, torch.Generator().manual_seed(0)
    reward, bootstrap = torch.randn(steps, trajectories, generator=g), torch.randn(steps, trajectories, 2, generator=g)
    discount, cut = torch.ones(steps, trajectories), torch.zeros(steps, trajectories, dtype=torch.bool)
    back = partial(twin_backpropagation, reward, bootstrap, discount, cut, gamma=0.99)
    torch.testing.assert_close(back(), over_lengths(reward, bootstrap, 0.99), rtol=1e-4, atol=1e-4)
    timed = turns(lambda: over_lengths(reward, bootstrap, 0.99), back, repeats)
    yield ratio("twin back-propagation, 100 × 1000, beside O(T²)", timed)


def over_lengths(reward: Tensor, bootstrap: Tensor, gamma: float) -> Tensor:
    """Twin back-propagation of trajectories ``[T, B]`` that were truncated, as the formula reads: for every h."""
    value = reward.unsqueeze(-1) + gamma * bootstrap
    best, found = value.clone(), value.flip(-1).clone()
    for _ in range(1, len(reward)):
        value = reward[: len(value) - 1].unsqueeze(-1) + gamma * value[1:]
        longer = value > best[: len(value)]
        best[: len(value)] = torch.where(longer, value, best[: len(value)])
        found[: len(value)] = torch.where(longer, value.flip(-1), found[: len(value)])
    return found


class Cheetah:
    """TD3 with a replay of `ROWS` rows in HalfCheetah's sizes, episodes of `EPISODE` steps, with or without returns."""

    def __init__(self, hidden: tuple[int, int], *, returns: bool) -> None:
        spec = task(1, 17, 6)
        sizes: dict[str, Any] = {"batch_size": BATCH, "capacity": ROWS, "warmup_frames": BATCH}
        self.algorithm = TD3(spec=spec, network=partial(MLP, hidden=hidden), seed=0, **sizes)
        self.returns = EpisodicReturn(spec=spec, off_policy=True, n_critics=2, capacity=ROWS, refresh_every=FRAMES)
        self.memory = Memory([("gem", self.returns)] if returns else [])
        self.replay = ReplayRing(
            capacity=ROWS,
            n_envs=1,
            batch_size=BATCH,
            entries=self.algorithm.replay_keys,
            learn_entries=self.algorithm.learn_entries | self.memory.entries,
            keys=spec.keys,
            seed=0,
        )
        whole = collected(spec, ROWS, 1)
        whole.get(("next", spec.keys.done))[EPISODE - 1 :: EPISODE] = True
        self.replay.extend(whole)
        self.fresh, self.lent = whole[:FRAMES], LentSteps(self.replay, self.algorithm, self.memory)
        self.beside = plain.like(self.algorithm, plain.Settings(centralised=False, policy_delay=2))
        self.rows = {"next_observation": whole.get(("next", *spec.keys.observation)).flatten(0, 1)}

    def refresh(self) -> None:
        """All returns."""
        self.returns.refreshed.fill_(-1)
        self.returns.sweep(self.algorithm.bootstrap_values, self.lent)

    @torch.no_grad()
    def forward(self) -> None:
        """The target networks over the same rows, in one batch."""
        beside = self.beside
        action = beside.target_choice(self.rows, 0, None)
        beside.values(beside.target_critics[0], self.rows, [action], 0, "next_")

    def turn(self) -> None:
        """What a run does for `FRAMES` frames, but for the environments."""
        self.replay.extend(self.fresh)
        self.memory.refresh(self.algorithm.bootstrap_values, self.lent)
        for _ in range(UPDATES):
            OffPolicyIteration.update(self, self.replay.draw())  # type: ignore[arg-type]


def refresh(repeats: int) -> Iterator[Row]:
    """A refresh of 100 000 returns / one forward of the same networks over the same rows."""
    cheetah = Cheetah((256, 256), returns=True)
    timed = turns(cheetah.refresh, cheetah.forward, repeats)
    yield ratio("refresh of 100 000 returns, 2×256, beside a forward", timed, calls=1)


def td3(repeats: int) -> Iterator[Row]:
    """TD3 with returns for 100 frames at the paper's cadence / its updates and one forward of its table."""
    ours, beside = (Cheetah((400, 300), returns=returns) for returns in (True, False))
    timed = turns(ours.turn, lambda: (beside.turn(), beside.forward()), repeats)
    rows = ours.replay.draw()
    OffPolicyIteration.update(ours, rows)  # type: ignore[arg-type]
    used = float(ours.returns.metrics(rows)["used"])
    assert used == 1.0
    yield ratio("TD3 with EpisodicReturn, the paper's cadence", timed, rows=len(ours.returns), used=used)
