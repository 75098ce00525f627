"""How fast training is, beside a plain PyTorch loop of the same sizes (`plain_mappo.py`).

Both train MAPPO on SMAX 3m in this process: 64 environments × 128 steps, 4 epochs × 4 minibatches, networks of 2 × 128,
one torch thread.  They take turns, one iteration each, so that whatever else the machine does falls on both; the first
iterations, which compile, are dropped.  Our side includes its metrics file and TensorBoard ("learn"); evaluations and
checkpoints, which the floor has none of, are left out.  Figures are medians over iterations, then over repeats.  The
exit code is 1 if ours / floor is below the bound.

    python benchmarks/end_to_end.py --frames 400000 --repeats 3
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BOUND = 0.8
N_ENVS, STEPS, WARM_UP = 64, 128, 2
Times = dict[str, float]


def load_plain() -> ModuleType:
    """The floor, from the file beside this one."""
    spec = importlib.util.spec_from_file_location("plain_mappo", Path(__file__).with_name("plain_mappo.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["plain_mappo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_trainer(folder: Path, frames: int, seed: int) -> Any:
    """The library's trainer with the floor's sizes and settings."""
    from marl_memory.algorithms.ppo import PPO
    from marl_memory.memory.operator import Memory
    from marl_memory.networks.mlp import MLP
    from marl_memory.training.checkpoint import CheckpointFolder
    from marl_memory.training.logging import Logger
    from marl_memory.training.trainer import Schedule, Trainer
    from marl_memory_envs.smax import vector_env

    env, evaluation_env = (vector_env(map="3m", n_envs=N_ENVS, seed=s) for s in (seed, seed + 1))
    algorithm = PPO(
        spec=env.task_spec,
        network=partial(MLP, hidden=(128, 128), activation="relu"),
        seed=seed,
        centralised_critic=True,
        share_parameters=True,
        gamma=0.99,
        gae_lambda=0.95,
        clip=0.2,
        value_clip=None,
        value_coef=1.0,
        entropy_coef=0.01,
        lr=1e-3,
        lr_final=0.0,
        max_grad_norm=10.0,
        epochs=4,
        minibatches=4,
        value_norm=True,
    )
    return Trainer(
        algorithm=algorithm,
        memory=Memory(),
        env=env,
        evaluation_env=evaluation_env,
        schedule=Schedule(
            total_frames=frames,
            steps=STEPS,
            checkpoint_every_frames=frames,
            evaluation_every_frames=frames,
            evaluation_episodes=N_ENVS,
        ),
        checkpoints=CheckpointFolder(folder / "checkpoints"),
        logger=Logger(folder, total_frames=frames, quiet=True),
        seed=seed,
    )


def one_repeat(plain: ModuleType, iterations: int, seed: int) -> dict[str, Times]:
    """Median seconds of an iteration's parts, of both."""
    total = (iterations + WARM_UP) * N_ENVS * STEPS
    with tempfile.TemporaryDirectory() as folder:
        floor = plain.Floor(iterations=iterations + WARM_UP, n_envs=N_ENVS, steps=STEPS, seed=seed)
        trainer = our_trainer(Path(folder), total, seed)
        rows: dict[str, list[Times]] = {"floor": [], "ours": []}
        with trainer.logger.writing(-1):
            for _ in range(iterations + WARM_UP):
                rows["floor"].append(floor.iterate())
                started = time.perf_counter()
                row = trainer.step()
                trainer.logger.log(row)
                whole = time.perf_counter() - started
                rows["ours"].append({"collect": row["time/collect"], "learn": whole - row["time/collect"]})
    return {
        name: {part: statistics.median(row[part] for row in timed[WARM_UP:]) for part in ("collect", "learn")}
        for name, timed in rows.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="speed of a whole run beside a plain loop")
    parser.add_argument("--frames", type=int, default=400_000, help="frames of each side in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bound", type=float, default=BOUND)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, frames = load_plain(), N_ENVS * STEPS
    iterations = max(options.frames // frames, 1)
    print(f"torch threads {torch.get_num_threads()}, cores {os.cpu_count()}, load average {os.getloadavg()}")
    ratios = []
    for repeat in range(options.repeats):
        found = one_repeat(plain, iterations, repeat)
        speed = {name: frames / sum(times.values()) for name, times in found.items()}
        ratios.append(speed["ours"] / speed["floor"])
        for name, times in found.items():
            parts = ", ".join(f"{part} {seconds * 1e3:.0f} ms" for part, seconds in times.items())
            print(f"repeat {repeat}: {name:5} {speed[name]:8,.0f} frames/s ({parts})")
        parts = ", ".join(f"{p} {found['floor'][p] / found['ours'][p]:.2f}" for p in ("collect", "learn"))
        print(f"repeat {repeat}: ours / floor {ratios[-1]:.2f} ({parts}); load average {os.getloadavg()}", flush=True)
    ratio = statistics.median(ratios)
    print(f"ours / floor: {ratio:.2f} (median of {len(ratios)}), bound {options.bound}")
    return 0 if ratio >= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
