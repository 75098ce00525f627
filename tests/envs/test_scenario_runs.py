"""One task of each scenario group trains 10 k frames with its default algorithm: teams mappo, one agent ppo or td3.

Toy tasks do so in test_toy_runs.py, SMAC and SMACv2 on the game's stand-in in test_smac_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fresh
from tests.envs.test_families import require
from tests.envs.trained import assert_trained, train

SMALL = ["network.hidden=[64,64]", "training.evaluation_episodes=2", "training.evaluation_every_frames=1_000_000"]
BATCHES = [*SMALL, "training.total_frames=10_240", "training.n_envs=16", "training.steps=128"]
REPLAY = [
    *SMALL,
    "training.total_frames=10_240",
    "training.steps=128",
    "algorithm.warmup_frames=2_048",
    "algorithm.updates_per_frame=0.25",
]
PICTURES = ["network.channels=[8,8]", "network.kernels=[8,4]", "network.strides=[4,2]", "network.hidden=[32]"]
ONCE = ["algorithm.epochs=1", "algorithm.minibatches=4"]

COMPILED = [*BATCHES, "training.evaluation_episodes=16"]  # for as many environments as train: compiled once

GROUPS = {
    "SMAX": ["env=smax/2s3z", *COMPILED],
    "SMACv2 on SMAX": ["env=smax/smacv2_5_units", *COMPILED],
    "MPE": ["env=mpe/simple_spread", *BATCHES],
    "MPE, a role for each": ["env=mpe/simple_tag", *BATCHES],
    "any PettingZoo environment": ["env=pettingzoo", "env.factory=mpe2.simple_adversary_v3:parallel_env", *BATCHES],
    "MuJoCo": ["env=mujoco/half_cheetah", "algorithm=td3", *REPLAY],
    "multi-agent MuJoCo": ["env=mamujoco/half_cheetah_2x3", *BATCHES],
    "classic": ["env=classic/acrobot", "algorithm=ppo", *BATCHES],
    "Box2D": ["env=box2d/bipedal_walker", "algorithm=ppo", *BATCHES],
    "CarRacing": ["env=box2d/car_racing", "algorithm=ppo", *BATCHES, *PICTURES, *ONCE],
    "SISL": ["env=sisl/multiwalker", *BATCHES],
    "Atari, one player": ["env=atari/pong", "algorithm=ppo", *BATCHES, *PICTURES, *ONCE],
    "Atari, two players": ["env=atari/pong_v3", "env.kwargs.max_cycles=4_000", *BATCHES, *PICTURES, *ONCE],
}


def needed(options: list[str]) -> None:
    """Skip where the suite is not installed."""
    family = options[0].removeprefix("env=").partition("/")[0]
    require(f"marl_memory_envs.{'mpe' if family == 'pettingzoo' else family}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", GROUPS)
def test_ten_thousand_frames(group: str, tmp_path: Path) -> None:
    needed(GROUPS[group])
    fresh.command("train", *GROUPS[group], f"run_folder={tmp_path / 'run'}", check=True)
    assert_trained(tmp_path / "run", 10_240)


def test_a_few_hundred_frames_of_atari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short games: each begins with the console's start, and evaluation plays to the end."""
    needed(["env=atari/pong"])
    monkeypatch.setattr("marl_memory_envs.atari.FRAMES", 400)
    few = ["training.total_frames=256", "training.n_envs=2", "training.steps=64", "training.evaluation_episodes=1"]
    train(tmp_path / "run", "env=atari/pong", "algorithm=ppo", *SMALL, *PICTURES, *ONCE, *few)
    assert_trained(tmp_path / "run", 256)
