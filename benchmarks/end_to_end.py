"""Whole training beside something else: what the rows of `smax`, `spread` and `half_cheetah` have in common, and SMAX.

MAPPO on SMAX 3m, 64 environments × 128 steps, 4 epochs × 4 minibatches, networks of 2 × 128, beside
`plain_mappo.Floor`.  The sides take turns; the first iterations, which compile, are dropped.  Ours includes its metrics
file and TensorBoard; evaluations and checkpoints, which the others have none of, are left out.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import plain_mappo as plain
from benchmarks.measure import Row
from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import Logger
from marl_memory.training.trainer import Schedule, Trainer

SMAX = {"n_envs": 64, "steps": 128}

Parts = dict[str, float]
"""Seconds of an iteration: ``collect`` and ``learn``; ``all`` where the other side does not tell them apart."""

PARTS = ("collect", "learn", "all")


def smax_trainer(folder: Path, seed: int) -> Trainer:
    """Ours, with the floor's sizes and settings."""
    from marl_memory_envs.smax import vector_env

    learner = partial(
        PPO,
        network=partial(MLP, hidden=(128, 128)),
        centralised_critic=True,
        share_parameters=True,
        epochs=4,
        minibatches=4,
        entropy_coef=0.01,
        lr=1e-3,
        max_grad_norm=10.0,
    )
    return our_trainer(partial(vector_env, map="3m"), learner, folder, seed, **SMAX)


def our_trainer(
    make: Callable[..., Any],
    learner: Callable[..., Any],
    folder: Path,
    seed: int,
    *,
    n_envs: int,
    steps: int,
    memory: Memory | None = None,
) -> Trainer:
    """A trainer whose iterations are called one by one."""
    frames = 1000 * n_envs * steps  # more than are made: no schedule ends, nothing is evaluated or saved
    env, evaluation_env = make(n_envs=n_envs, seed=seed), make(n_envs=1, seed=seed + 1)
    schedule = Schedule(
        total_frames=frames,
        steps=steps,
        checkpoint_every_frames=frames,
        evaluation_every_frames=frames,
        evaluation_episodes=1,
    )
    return Trainer(
        algorithm=learner(spec=env.task_spec, seed=seed),
        memory=memory or Memory(),
        env=env,
        evaluation_env=evaluation_env,
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints"),
        logger=Logger(folder, total_frames=frames, quiet=True),
        seed=seed,
    )


def our_iteration(trainer: Trainer) -> Parts:
    """One iteration with its logging, which counts as learning."""
    trainer.clock.restart()
    trainer.logger.log(trainer.step())
    seconds = trainer.clock.take()
    collect = seconds["time/environment"] + seconds["time/policy"]
    return {"collect": collect, "learn": sum(seconds.values()) - collect}


def in_turns(
    ours: Callable[[], Parts], beside: Callable[[], Parts], *, warm_up: int = 2, iterations: int = 5
) -> dict[str, Parts]:
    """Median seconds of an iteration's parts, of both."""
    rows: dict[str, list[Parts]] = {"beside it": [], "ours": []}
    for _ in range(warm_up + iterations):
        rows["beside it"].append(beside())
        rows["ours"].append(ours())
    return {name: median_of(timed[warm_up:]) for name, timed in rows.items()}


def median_of(rows: list[Parts]) -> Parts:
    """Median seconds of an iteration's parts."""
    return {part: statistics.median(row[part] for row in rows) for part in PARTS if part in rows[0]}


def peer(variable: str, script: str, *arguments: str) -> Parts | None:
    """What a script prints that runs another library in an environment of its own; None where there is none.

    Args:
        variable: names that environment's Python.
        script: a file beside this one; its last line is JSON with the seconds of an iteration's parts.
        arguments: of the script.
    """
    if not (python := os.environ.get(variable)):
        return None
    command = [python, str(Path(__file__).with_name(script)), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{variable}={python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def row_of(name: str, found: list[dict[str, Parts]], frames: int, **details: Any) -> Row:
    """Frames/s of ours / frames/s of the other side."""
    ratios = [sum(one["beside it"].values()) / sum(one["ours"].values()) for one in found]
    for side in ("ours", "beside it"):
        details[f"frames/s {side}"] = round(statistics.median(frames / sum(one[side].values()) for one in found))
    for part in found[0]["ours"].keys() & found[0]["beside it"].keys():
        details[part] = round(statistics.median(one["beside it"][part] / one["ours"][part] for one in found), 2)
    details["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return Row(name, ratios, details=details)


def smax(repeats: int) -> Iterator[Row]:
    """Ours beside the floor."""
    found = []
    for seed in range(max(repeats // 2, 2)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = smax_trainer(Path(folder), seed)
            floor = plain.Floor(iterations=7, seed=seed, **SMAX)
            with trainer.logger.writing(-1):
                found.append(in_turns(partial(our_iteration, trainer), floor.iterate))
            trainer.close()
    yield row_of("MAPPO on SMAX 3m, beside a plain loop", found, 64 * 128, batch="64 × 128", width="2×128")


def peak_memory(repeats: int) -> Iterator[Row]:
    """Peak memory of three iterations of MAPPO on SMAX 3m, ours / floor, each in a process of its own."""
    program = (
        "import resource, sys, torch; torch.set_num_threads(1); from pathlib import Path; "
        "from benchmarks import {module} as m; {work}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    sides = {
        "end_to_end": "t = m.smax_trainer(Path(sys.argv[1]), 0); [t.step() for _ in range(3)]",
        "plain_mappo": "f = m.Floor(iterations=3); [f.iterate() for _ in range(3)]",
    }
    values: dict[str, list[float]] = {}
    for _ in range(2):
        for module, work in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", program.format(module=module, work=work), folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.setdefault(module, []).append(float(done.stdout.splitlines()[-1]))
    ratios = [a / b for a, b in zip(values["end_to_end"], values["plain_mappo"], strict=True)]
    details = {"MB": round(values["end_to_end"][0]), "MB beside it": round(values["plain_mappo"][0])}
    yield Row("peak memory of MAPPO on SMAX 3m", ratios, details=details)
