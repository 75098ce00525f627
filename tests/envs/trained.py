"""What a run must show that has trained at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from marl_memory import cli
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import MetricsFile


def train(folder: Path, *overrides: str) -> MetricsFile:
    """``marl-memory train *overrides`` in this process; the run's metrics."""
    cli.main(["train", *overrides, "logger.quiet=true", "logger.tensorboard=false", f"run_folder={folder}"])
    return MetricsFile(folder / "metrics.csv")


def assert_trained(folder: Path, frames: int) -> None:
    """``frames`` were played, every metric is finite, and no weight is what it was at the first checkpoint kept."""
    metrics, checkpoints = MetricsFile(folder / "metrics.csv"), CheckpointFolder(folder / "checkpoints")
    assert metrics.column("frames")[1][-1] == frames
    values = {name: metrics.column(name)[1] for name in metrics.columns}
    assert not {name: found for name, found in values.items() if not all(abs(x) < float("inf") for x in found)}
    after, newest = checkpoints.newest(pytest.fail)
    oldest = checkpoints.scheduled()[-1]
    assert oldest.frames < newest.frames == frames
    before = oldest.load()["algorithm"]
    weights = [name for name in before if name.startswith(("actor.", "critic.")) and name.endswith("weight")]
    assert len(weights) >= 4
    assert not [name for name in weights if (before[name] == after["algorithm"][name]).all()]
