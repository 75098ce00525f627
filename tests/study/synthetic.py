"""Studies that were never run: records and run files as runs leave them, drawn from a fixed seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marl_memory.study.definition import Study
from marl_memory.study.results import STUDY, Record, run_folder

VERSIONS = {"marl-memory": "0.1.0", "torch": "2.13.0+cpu", "torchrl": "0.14.1", "numpy": "2.4.6", "jax": None}


def make_study(
    arms: Sequence[str] = ("no memory", "shared"), tasks: Sequence[str] = ("duel",), **changes: Any
) -> Study:
    """A study with these names."""
    return Study(
        **{
            "name": "scope",
            "question": "Does memory help?",
            "arms": {arm: [f"memory=[{i}]"] for i, arm in enumerate(arms)},
            "tasks": {task: [f"env=mpe/{task}"] for task in tasks},
            "seeds": list(range(5)),
            "baseline": arms[0],
            **changes,
        }
    )


def make_record(
    task: str,
    arm: str,
    seed: int,
    values: Sequence[float],
    *,
    every: int = 1000,
    absolute: Sequence[float] | None = None,
    **changes: Any,
) -> Record:
    """A record with this curve of returns, and plausible costs."""
    frames = [every * i for i in range(len(values))]
    rng = np.random.default_rng([seed, len(arm), len(task)])
    return Record(
        **{
            "task": task,
            "arm": arm,
            "seed": seed,
            "frames": frames[-1],
            "curves": {"evaluation/return": (frames, list(values))},
            "absolute": {"return": [max(values)] * 4 if absolute is None else list(absolute)},
            "digest": hashlib.sha256(f"{task} {arm} {seed}".encode()).hexdigest(),
            "costs": {
                "wall_seconds": float(rng.uniform(100, 200)),
                "frames_per_second": float(rng.uniform(900, 1100)),
                "peak_bytes": 6.5e8,
                "memory_seconds": 12.25,
                "memory_bytes": 2.5e6,
                "memory_parameters": 128,
                "rows": 4096,
                "payloads": 12288,
            },
            **changes,
        }
    )


def write_study(
    folder: Path,
    study: Study,
    curve: Callable[[str, str, int], Sequence[float] | None],
    *,
    command: Sequence[str] | None = ("marl-memory", "study", "scope"),
    run: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A study in ``folder`` whose runs have these curves; None for a run that did not finish."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STUDY).write_text(json.dumps({"study": study.to_dict(), "command": command}))
    for task in study.tasks:
        for arm in study.arms:
            for seed in study.seeds:
                values = curve(task, arm, seed)
                if values is not None:
                    write_run(folder, make_record(task, arm, seed, values, **changes), **(run or {}))
    return folder


def write_run(folder: Path, record: Record, **description: Any) -> Path:
    """A run of a study: its record, and what describes it."""
    where = run_folder(folder, record.task, record.arm, record.seed)
    where.mkdir(parents=True, exist_ok=True)
    record.write(where)
    words = ["marl-memory train", f"env=mpe/{record.task}", f"seed={record.seed}"]
    run = {
        "command": words,
        "git_commit": "0" * 40,
        "threads": 1,
        "task": {"name": f"mpe/{record.task}"},
        "python": "3.11.7",
        "versions": VERSIONS,
    }
    (where / "run.json").write_text(json.dumps(run | description))
    (where / "metrics.csv").write_text("frames\n0\n")
    return where


def learning(
    heights: Mapping[str, float], *, points: int = 21, noise: float = 1.0, scale: float = 1.0
) -> Callable[[str, str, int], Sequence[float]]:
    """Curves that rise to the height of their arm, with a spread of seeds."""

    def curve(task: str, arm: str, seed: int) -> Sequence[float]:
        rng = np.random.default_rng([seed, len(task), *arm.encode()])
        end = heights[arm] + rng.normal(0, noise)
        rise = 1 - np.exp(-np.linspace(0, rng.uniform(3, 5), points))
        return (scale * (end * rise + rng.normal(0, 0.2 * noise, points))).tolist()

    return curve
