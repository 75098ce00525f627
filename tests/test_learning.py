"""Runs that must learn: minutes each, so all are slow (`make test-slow`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import evaluate_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def train(folder: Path, *overrides: str) -> MetricsFile:
    command = [sys.executable, "-m", "marl_memory.cli", "train", *overrides, f"run_folder={folder}"]
    subprocess.run(command, check=True)
    return MetricsFile(folder / "metrics.csv")


def test_the_quick_start_wins_more_than_half(tmp_path: Path) -> None:
    wins = train(tmp_path / "run", "experiment=quickstart").column("evaluation/success")[1]
    assert wins[0] < 0.2
    assert wins[-1] > 0.5
    success = evaluate_run(tmp_path / "run", episodes=128).success
    assert success is not None
    assert success.double().mean() > 0.5


def test_ppo_solves_cartpole_in_100_k_frames(tmp_path: Path) -> None:
    returns = []
    for seed in range(3):
        train(tmp_path / str(seed), "experiment=ppo_cartpole", f"seed={seed}")
        returns.append(evaluate_run(tmp_path / str(seed), episodes=128, checkpoint="last").returns.mean().item())
    assert sum(returns) / 3 >= 475, returns


def test_dqn_solves_cartpole_in_100_k_frames(tmp_path: Path) -> None:
    returns = []
    for seed in range(3):
        train(tmp_path / str(seed), "experiment=dqn_cartpole", f"seed={seed}")
        returns.append(evaluate_run(tmp_path / str(seed), episodes=128, checkpoint="last").returns.mean().item())
    assert sum(returns) / 3 >= 475, returns


def test_ppo_lands_in_a_million_frames(tmp_path: Path) -> None:
    returns = []
    for seed in range(3):
        train(tmp_path / str(seed), "experiment=ppo_lunar_lander", f"seed={seed}")
        returns.append(evaluate_run(tmp_path / str(seed), episodes=128, checkpoint="last").returns.mean().item())
    assert sum(returns) / 3 >= 200, returns
