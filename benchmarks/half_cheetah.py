"""Whole training on HalfCheetah-v5 with Stable-Baselines3's hyper-parameters, beside Stable-Baselines3 itself.

Measured where the variable ``SB3_PYTHON`` names the Python of an environment that has it (`sb3_peer.py`): PPO with
2 048 steps of one environment, 10 epochs of 32 minibatches, 2×64; TD3 and DDPG with one update per step, 400 and 300
units (they start after 256 random frames, one batch; Stable-Baselines3 after 100).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import Parts, our_iteration, our_trainer, peer, row_of
from benchmarks.measure import Row
from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.ppo import PPO
from marl_memory.algorithms.td3 import TD3
from marl_memory.networks.mlp import MLP
from marl_memory.training.trainer import Trainer

FRAMES = 2048
"""Per measured stretch, of both sides."""

_OFF_POLICY: dict[str, Any] = {"network": partial(MLP, hidden=(400, 300)), "warmup_frames": 256}
LEARNERS = {
    "PPO": partial(
        PPO,
        network=partial(MLP, hidden=(64, 64), activation="tanh"),
        entropy_coef=0.0,
        value_coef=0.5,
        value_clip=None,
        lr=3e-4,
        lr_final=3e-4,
        max_grad_norm=0.5,
        epochs=10,
        minibatches=32,
        value_norm=False,
    ),
    "TD3": partial(TD3, **_OFF_POLICY),
    "DDPG": partial(DDPG, **_OFF_POLICY),
}


def half_cheetah_trainer(name: str, folder: Path, seed: int) -> Trainer:
    """Ours, one environment."""
    return trainer_of(LEARNERS[name], "marl_memory_envs.mujoco:half_cheetah", folder, seed)


def trainer_of(learner: Callable[..., Any], factory: str, folder: Path, seed: int, n_envs: int = 1) -> Trainer:
    """A trainer on a Gymnasium task."""
    from marl_memory_envs.vector import vector_env

    make = partial(vector_env, factory=factory)
    return our_trainer(make, learner, folder, seed, n_envs=n_envs, steps=FRAMES // n_envs)


def rows(repeats: int) -> Iterator[Row]:
    """Frames/s of ours / frames/s of Stable-Baselines3's, in turns; nothing where that is not there."""
    for name in LEARNERS:
        make = partial(half_cheetah_trainer, name, seed=0)
        yield from beside_sb3(f"{name} on HalfCheetah, beside Stable-Baselines3", make, name.lower(), "HalfCheetah-v5")


def beside_sb3(row: str, make: Callable[[Path], Trainer], algorithm: str, task: str, n_envs: int = 1) -> Iterator[Row]:
    """One row: stretches of `FRAMES` of the trainer that ``make(folder)`` gives, and of Stable-Baselines3's."""
    found: list[dict[str, Parts]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder))
        with trainer.logger.writing(-1):
            our_iteration(trainer)
            for _ in range(3):
                theirs = peer("SB3_PYTHON", "sb3_peer.py", "speed", algorithm, str(FRAMES), task, str(n_envs))
                if theirs is None:
                    break
                ours = statistics.median(sum(our_iteration(trainer).values()) for _ in range(2))
                found.append({"ours": {"all": ours}, "beside it": theirs})
        trainer.close()
    if found:
        yield row_of(row, found, FRAMES, environments=n_envs)
