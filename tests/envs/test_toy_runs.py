"""Toy tasks in training: every one for 10 k frames, exact resume, and what plain hosts solve and do not (all slow)."""

from __future__ import annotations

from pathlib import Path

import pytest

from marl_memory import cli
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import evaluate_run
from tests.envs.test_toy import NAMES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TEAMS = ("hidden_coupling", "redundant_observations", "homogeneous_team")


def host(name: str) -> str:
    """The algorithm that a task is trained with here."""
    if name.startswith(TEAMS):
        return "mappo"
    return "td3" if "continuous" in name else "ppo"


def train(folder: Path, *overrides: str) -> MetricsFile:
    cli.main(["train", *overrides, "logger.quiet=true", "logger.tensorboard=false", f"run_folder={folder}"])
    return MetricsFile(folder / "metrics.csv")


def greedy(folder: Path, *overrides: str) -> tuple[float, float]:
    """Train in ``folder``; mean return and success of 64 greedy episodes with the last policy."""
    options = ["network.hidden=[64,64]", "training.evaluation_every_frames=1_000_000"]
    train(folder, *options, *overrides)
    played = evaluate_run(folder, episodes=64, checkpoint="last")
    assert played.success is not None
    found = played.returns.mean().item(), played.success.double().mean().item()
    print(*overrides, "greedy return and success:", *found)
    return found


ON_POLICY = ["training.n_envs=16", "training.steps=128"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "frames", "best"),
    [
        ("chain", 61_440, 1.0),
        ("cliff_walking", 61_440, -13.0),
        ("four_rooms", 61_440, 1.0),
        ("hidden_coupling", 81_920, 10.0),
        ("redundant_observations", 61_440, 25.0),
        ("homogeneous_team", 81_920, 17.76),
    ],
)
def test_a_plain_host_finds_the_optimum(name: str, frames: int, best: float, seed: int, tmp_path: Path) -> None:
    """PPO alone, MAPPO in teams."""
    options = [f"env=toy/{name}", f"algorithm={host(name)}", f"training.total_frames={frames}", f"seed={seed}"]
    played, success = greedy(tmp_path / "run", *options, *ON_POLICY)
    assert success == 1
    error = 0.6 if name == "homogeneous_team" else 1e-3  # there 64 random starts are nearer or farther than all
    assert abs(played - best) <= error


def test_td3_finds_the_end_of_the_continuous_chain(tmp_path: Path) -> None:
    options = ["env=toy/chain_continuous", "algorithm=td3", "training.n_envs=8", "algorithm.warmup_frames=10_000"]
    options += ["training.total_frames=30_000", "algorithm.updates_per_frame=0.25", "seed=0"]
    assert greedy(tmp_path / "run", *options) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_plain_ppo_stays_at_the_near_end_of_the_long_chain(seed: int, tmp_path: Path) -> None:
    """Sixty steps in one direction are not found by chance, and the small reward at the start is."""
    options = ["env=toy/long_chain", "algorithm=ppo", "training.total_frames=102_400", f"seed={seed}"]
    played, success = greedy(tmp_path / "run", *options, *ON_POLICY)
    assert success == 0
    assert played == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_plain_ppo_does_not_tell_the_pictures_of_the_dark_chamber_apart(seed: int, tmp_path: Path) -> None:
    """Its greedy policy does one thing everywhere, though the sampled one often stumbles on the exit."""
    options = ["env=toy/dark_chamber", "algorithm=ppo", "training.total_frames=102_400", f"seed={seed}"]
    assert greedy(tmp_path / "run", *options, *ON_POLICY) == (0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_frames(name: str, tmp_path: Path) -> None:
    options = ["training.n_envs=16", "training.steps=128", "training.total_frames=10_240", "network.hidden=[64,64]"]
    if host(name) == "td3":
        options += ["algorithm.warmup_frames=2_048", "algorithm.updates_per_frame=0.25"]
    metrics = train(tmp_path / "run", f"env=toy/{name}", f"algorithm={host(name)}", *options)
    assert metrics.column("frames")[1][-1] == 10_240
    assert evaluate_run(tmp_path / "run", episodes=32).returns.isfinite().all()
