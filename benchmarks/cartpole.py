"""Whole training of DQN on CartPole-v1 with Stable-Baselines3's hyper-parameters, beside Stable-Baselines3 itself.

Eight environments, an update of 32 rows for four frames, 2×64, Huber's loss, no double estimate; measured as
`half_cheetah` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.half_cheetah import beside_sb3, trainer_of
from benchmarks.measure import Row
from marl_memory.algorithms.dqn import DQN
from marl_memory.networks.mlp import MLP
from marl_memory.training.trainer import Trainer

ENVIRONMENTS = 8


def cartpole_trainer(folder: Path) -> Trainer:
    """Ours, one environment."""
    learner = partial(
        DQN,
        network=partial(MLP, hidden=(64, 64)),
        double=False,
        target_every=2500,
        lr=1e-4,
        max_grad_norm=10.0,
        batch_size=32,
        capacity=1_000_000,
        warmup_frames=100,
        updates_per_frame=0.25,
        train_every=4,
    )
    return trainer_of(learner, "marl_memory_envs.classic:cartpole", folder, 0, ENVIRONMENTS)


def rows(repeats: int) -> Iterator[Row]:
    """Frames/s of ours / frames/s of Stable-Baselines3's, in turns; nothing where that is not there."""
    yield from beside_sb3(
        "DQN on CartPole, beside Stable-Baselines3", cartpole_trainer, "dqn", "CartPole-v1", ENVIRONMENTS
    )
