"""Toy tasks in training: every one for 10 k frames, exact resume, and what plain hosts solve and do not (all slow)."""

from __future__ import annotations

from pathlib import Path

import pytest

from marl_memory.training.run import evaluate_run
from tests import fresh
from tests.envs.test_toy import NAMES
from tests.envs.trained import assert_trained, train
from tests.training.test_resume import OFF_POLICY, RESUME_ALL, TOY, assert_same_runs, train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TEAMS = ("hidden_coupling", "redundant_observations", "homogeneous_team")


def host(name: str) -> str:
    """The algorithm that a task is trained with here."""
    if name.startswith(TEAMS):
        return "mappo"
    return "td3" if "continuous" in name else "ppo"


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
LONGER = "training.total_frames=200_000"
SHORTER = "training.total_frames=61_440"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "options", "best"),
    [
        ("chain", [SHORTER], 1.0),
        ("four_rooms", ["env.start=anywhere", LONGER], 1.0),
        ("dark_chamber", ["algorithm.normalise_observations=true", SHORTER], 1.0),
        ("hidden_coupling", [LONGER], 10.0),
        ("redundant_observations", [SHORTER], 25.0),
        ("homogeneous_team", ["training.total_frames=300_000"], 17.76),
    ],
)
def test_a_plain_host_finds_the_optimum(name: str, options: list[str], best: float, seed: int, tmp_path: Path) -> None:
    """PPO alone, MAPPO in teams."""
    played, success = greedy(
        tmp_path / "run", f"env=toy/{name}", f"algorithm={host(name)}", f"seed={seed}", *ON_POLICY, *options
    )
    assert success == 1
    error = 0.2 if name == "homogeneous_team" else 1e-3  # there 64 random starts are nearer or farther than all
    assert abs(played - best) <= error


@pytest.mark.parametrize("seed", range(2))
def test_ppo_with_more_entropy_finds_a_way_along_the_cliff(seed: int, tmp_path: Path) -> None:
    """With the default's it mostly keeps away from the cliff and never arrives."""
    options = ["env=toy/cliff_walking", "algorithm=ppo", "algorithm.entropy_coef=0.05", f"seed={seed}"]
    played, success = greedy(tmp_path / "run", *options, *ON_POLICY, LONGER)
    assert success == 1
    assert played >= -15


@pytest.mark.parametrize("seed", range(2))
def test_td3_finds_the_end_of_the_continuous_chain(seed: int, tmp_path: Path) -> None:
    options = ["env=toy/chain_continuous", "algorithm=td3", "training.n_envs=8", "algorithm.warmup_frames=10_000"]
    options += ["training.total_frames=60_000", "algorithm.updates_per_frame=0.25", f"seed={seed}"]
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


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("ppo", "dark_chamber_noisy"), ("mappo", "hidden_coupling_noisy"), ("td3", "chain_continuous_noisy")],
)
def test_resume_equals_uninterrupted(algorithm: str, name: str, tmp_path: Path) -> None:
    """Streams of random numbers, grain and all: in a new process, to the last bit."""
    options = [f"env=toy/{name}", f"algorithm={algorithm}", *(OFF_POLICY if algorithm == "td3" else TOY[1:])]
    train_here(tmp_path / "straight", *options)
    # At a checkpoint: in between, a replay's files are cut elsewhere than those of the run that went on.
    train_here(tmp_path / "halved", *options, "training.stop_at_frames=512")
    fresh.python(RESUME_ALL, tmp_path / "halved", check=True)
    assert_same_runs(tmp_path / "straight", tmp_path / "halved")


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_frames(name: str, tmp_path: Path) -> None:
    options = ["training.n_envs=16", "training.steps=128", "training.total_frames=10_240", "network.hidden=[64,64]"]
    if host(name) == "td3":
        options += ["algorithm.warmup_frames=2_048", "algorithm.updates_per_frame=0.25"]
    train(tmp_path / "run", f"env=toy/{name}", f"algorithm={host(name)}", *options)
    assert_trained(tmp_path / "run", 10_240)
    assert evaluate_run(tmp_path / "run", episodes=32).returns.isfinite().all()
