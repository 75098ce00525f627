"""Whole training beside a plain PyTorch loop of the same sizes, and beside BenchMARL.

``smax``: MAPPO on SMAX 3m, 64 environments × 128 steps, 4 epochs × 4 minibatches, networks of 2 × 128, beside
`plain_mappo.Floor`.  ``spread``: MAPPO on simple_spread with BenchMARL's default hyper-parameters, beside a plain loop
and, where the variable ``BENCHMARL_PYTHON`` names the Python of an environment that has it, beside BenchMARL
(`benchmarl_peer.py`).  The sides take turns; the first iterations, which compile, are dropped.  Ours includes its
metrics file and TensorBoard; evaluations and checkpoints, which the others have none of, are left out.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from benchmarks import plain_mappo as plain
from benchmarks.measure import Row
from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import Logger
from marl_memory.training.trainer import Schedule, Trainer

WARM_UP, ITERATIONS = 2, 5
SMAX = {"n_envs": 64, "steps": 128}
SPREAD = {"n_envs": 10, "steps": 600}
SPREAD_TASK = {
    "factory": "marl_memory_envs.mpe:simple_spread",
    "kwargs": {"N": 3, "local_ratio": 0.5, "max_cycles": 100, "continuous_actions": True},
}


def smax_trainer(folder: Path, seed: int) -> Trainer:
    """Ours, with the floor's sizes and settings."""
    from marl_memory_envs.smax import vector_env

    settings = {"epochs": 4, "minibatches": 4, "entropy_coef": 0.01, "lr": 1e-3, "max_grad_norm": 10.0}
    return our_trainer(partial(vector_env, map="3m"), (128, 128), "relu", settings, folder, seed, **SMAX)


def spread_trainer(folder: Path, seed: int) -> Trainer:
    """Ours, with BenchMARL's default hyper-parameters as far as they exist here.

    BenchMARL's policy also has a deviation that depends on the observation, which is a wider last layer.
    """
    from marl_memory_envs.vector import vector_env

    settings = {
        "epochs": 45, "minibatches": 15, "entropy_coef": 0.0, "lr": 5e-5, "lr_final": 5e-5, "adam_eps": 1e-6,
        "max_grad_norm": 5.0, "gae_lambda": 0.9, "value_norm": False, "normalise_advantages": False,
    }  # fmt: skip
    return our_trainer(partial(vector_env, **SPREAD_TASK), (256, 256), "tanh", settings, folder, seed, **SPREAD)


def our_trainer(
    make: Callable[..., Any],
    hidden: tuple[int, ...],
    activation: str,
    settings: dict[str, Any],
    folder: Path,
    seed: int,
    *,
    n_envs: int,
    steps: int,
) -> Trainer:
    """A trainer whose iterations are called one by one."""
    frames = (WARM_UP + ITERATIONS) * n_envs * steps
    env, evaluation_env = make(n_envs=n_envs, seed=seed), make(n_envs=1, seed=seed + 1)
    algorithm = PPO(
        spec=env.task_spec,
        network=partial(MLP, hidden=hidden, activation=activation),
        seed=seed,
        centralised_critic=True,
        share_parameters=True,
        **settings,
    )
    schedule = Schedule(
        total_frames=frames,
        steps=steps,
        checkpoint_every_frames=frames,
        evaluation_every_frames=frames,
        evaluation_episodes=1,
    )
    return Trainer(
        algorithm=algorithm,
        memory=Memory(),
        env=env,
        evaluation_env=evaluation_env,
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints"),
        logger=Logger(folder, total_frames=frames, quiet=True),
        seed=seed,
    )


class PlainSpread:
    """MAPPO on simple_spread in plain PyTorch: the raw environments one by one, one batched policy call a step."""

    def __init__(self, ours: PPO, seed: int) -> None:
        from marl_memory_envs.mpe import simple_spread

        self.envs: list[Any] = [simple_spread(**SPREAD_TASK["kwargs"]) for _ in range(SPREAD["n_envs"])]
        low, high = (torch.tensor(bound) for bound in (ours.spec.action_low, ours.spec.action_high))
        settings = plain.Settings(
            common_reward=False, gae_lambda=0.9, value_clip=None, entropy_coef=0.0, max_grad_norm=5.0,
            normalise_advantages=False, low=low, high=high,
        )  # fmt: skip
        self.learner = plain.like(ours, settings, fused=True)
        self.seen = [list(env.reset(seed=seed + i)[0].values()) for i, env in enumerate(self.envs)]

    @torch.no_grad()
    def collect(self) -> plain.Batch:
        s, columns = self.learner.settings, {}
        for _ in range(SPREAD["steps"]):
            row: plain.Batch = {"observation": torch.tensor(self.seen, dtype=torch.float32)}
            row["state"] = row["observation"].flatten(1)
            mean = self.learner.actor(row["observation"])
            normal = Normal(mean, self.learner.log_std.exp().expand_as(mean), validate_args=False)  # type: ignore[union-attr]
            squash = [TanhTransform(cache_size=1), AffineTransform((s.high + s.low) / 2, (s.high - s.low) / 2)]  # type: ignore[operator]
            policy = TransformedDistribution(normal, squash, validate_args=False)
            row["action"] = torch.minimum(torch.maximum(policy.sample(), s.low), s.high)  # type: ignore[arg-type]
            row["log_prob"] = policy.log_prob(row["action"]).sum(-1)
            self.step(row)
            for key, x in row.items():
                columns.setdefault(key, []).append(x)
        return {key: torch.stack(rows) for key, rows in columns.items()}

    def step(self, row: plain.Batch) -> None:
        """Step every environment; adds rewards, ends and what followed to ``row``."""
        rewards, ends, last = [], [], []
        for i, (env, actions) in enumerate(zip(self.envs, row["action"].numpy(), strict=True)):
            observations, reward, _, truncated, _ = env.step(dict(zip(env.agents, actions, strict=True)))
            rewards.append(list(reward.values()))
            ends.append(any(truncated.values()))
            last.append(list(observations.values()))
            self.seen[i] = last[-1] if not ends[-1] else list(env.reset()[0].values())
        living = torch.ones(row["action"].shape[:-1], dtype=torch.bool)
        following = torch.tensor(last, dtype=torch.float32)
        row |= {"reward": torch.tensor(rewards, dtype=torch.float32), "done": torch.tensor(ends), "alive": living}
        row |= {"discount": torch.ones_like(row["reward"]), "next_alive": living}  # time limits only
        row |= {"next_observation": following, "next_state": following.flatten(1)}

    def iterate(self) -> dict[str, float]:
        started = time.perf_counter()
        data = self.collect()
        collected = time.perf_counter()
        rows = SPREAD["n_envs"] * SPREAD["steps"]
        orders = (torch.randperm(rows).tensor_split(15) for _ in range(45))
        plain.learn(self.learner, data, orders, lambda n: torch.zeros(n, 3, data["action"].shape[-1]))
        return {"collect": collected - started, "learn": time.perf_counter() - collected}


def our_iteration(trainer: Trainer) -> dict[str, float]:
    """One iteration with its logging, which counts as learning."""
    trainer.clock.restart()
    trainer.logger.log(trainer.step())
    seconds = trainer.clock.take()
    collect = seconds["time/environment"] + seconds["time/policy"]
    return {"collect": collect, "learn": sum(seconds.values()) - collect}


def in_turns(ours: Callable[[], Any], beside: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Median seconds of an iteration's parts, of both."""
    rows: dict[str, list[dict[str, float]]] = {"beside it": [], "ours": []}
    for _ in range(WARM_UP + ITERATIONS):
        rows["beside it"].append(beside())
        rows["ours"].append(ours())
    return {
        name: {part: statistics.median(row[part] for row in timed[WARM_UP:]) for part in ("collect", "learn")}
        for name, timed in rows.items()
    }


def row_of(name: str, found: list[dict[str, dict[str, float]]], frames: int, **details: Any) -> Row:
    """Frames/s of ours / frames/s of the other side."""
    ratios = [sum(one["beside it"].values()) / sum(one["ours"].values()) for one in found]
    for side in ("ours", "beside it"):
        details[f"frames/s {side}"] = round(statistics.median(frames / sum(one[side].values()) for one in found))
    for part in ("collect", "learn"):
        details[part] = round(statistics.median(one["beside it"][part] / one["ours"][part] for one in found), 2)
    details["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return Row(name, ratios, details=details)


def smax(repeats: int) -> Iterator[Row]:
    """Ours beside the floor."""
    found = []
    for seed in range(max(repeats // 2, 2)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = smax_trainer(Path(folder), seed)
            floor = plain.Floor(iterations=WARM_UP + ITERATIONS, seed=seed, **SMAX)
            with trainer.logger.writing(-1):
                found.append(in_turns(partial(our_iteration, trainer), floor.iterate))
            trainer.close()
    yield row_of("MAPPO on SMAX 3m, beside a plain loop", found, 64 * 128, batch="64 × 128", width="2×128")


def spread(repeats: int) -> Iterator[Row]:
    """Ours beside a plain loop, and beside BenchMARL where it is."""
    peer, found, other = os.environ.get("BENCHMARL_PYTHON"), [], []
    for seed in range(2):
        with tempfile.TemporaryDirectory() as folder:
            trainer = spread_trainer(Path(folder), seed)
            beside = PlainSpread(trainer.algorithm, seed)  # type: ignore[arg-type]
            with trainer.logger.writing(-1):
                found.append(in_turns(partial(our_iteration, trainer), beside.iterate))
                if peer:
                    other.append({"ours": median_of(partial(our_iteration, trainer)), "beside it": benchmarl(peer)})
            trainer.close()
    sizes = {"batch": "10 × 600", "width": "2×256"}
    yield row_of("MAPPO on simple_spread, beside a plain loop", found, 6000, **sizes)
    if peer:
        yield row_of("MAPPO on simple_spread, beside BenchMARL", other, 6000, **sizes)


def median_of(iterate: Callable[[], dict[str, float]], count: int = 3) -> dict[str, float]:
    """Median seconds of an iteration's parts."""
    rows = [iterate() for _ in range(count)]
    return {part: statistics.median(row[part] for row in rows) for part in rows[0]}


def benchmarl(python: str, algorithm: str = "mappo") -> dict[str, float]:
    """Median seconds of an iteration of BenchMARL's, in its own environment."""
    script = Path(__file__).with_name("benchmarl_peer.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, str(script), algorithm], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"BENCHMARL_PYTHON={python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


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
