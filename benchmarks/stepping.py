"""Which way of stepping is faster, by task: ``python -m benchmarks.stepping [task…] [--n-envs 8 16] [--turns 9]``.

The three ways take turns of 0.2 s or so, and each one's *fastest* turn counts: on a busy machine other programs take
away most from those that use several cores.  Printed are µs of a vector step, resets, adapter and all but without a
policy, and how much faster than the serial one that is.  Not part of ``make bench``: it takes some minutes, and what is
faster depends on the machine's cores.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

from benchmarks.collection import random_actions, tasks
from marl_memory_envs.stepping import KINDS
from marl_memory_envs.vector import VectorEnv, vector_env

SECONDS = 0.2


def stepped_tasks() -> dict[str, dict[str, Any]]:
    """The tasks of the table, as arguments of `vector_env`."""
    mamujoco = tasks()["MaMuJoCo HalfCheetah 2x3"]
    kwargs = {**mamujoco["kwargs"], "scenario": "ManySegmentSwimmer", "agent_conf": "10x2"}
    return {
        **tasks(),
        "BipedalWalker": {"factory": "marl_memory_envs.box2d:bipedal_walker"},
        "Humanoid": {"factory": "marl_memory_envs.mujoco:humanoid"},
        "MaMuJoCo Swimmer 10x2": {**mamujoco, "kwargs": kwargs},
    }


class Turn:
    """A vector that goes on where its last turn ended."""

    def __init__(self, arguments: dict[str, Any], n_envs: int, stepping: str) -> None:
        self.env: VectorEnv = vector_env(**arguments, n_envs=n_envs, seed=0, stepping=stepping)
        self.actions, self.td, self.t = random_actions(self.env, 1000), self.env.reset(), 0

    def steps(self, count: int) -> float:
        """Seconds that a vector step takes, on average over ``count``."""
        key, started = self.env.task_spec.keys.action, time.perf_counter()
        for _ in range(count):
            self.td.set(key, self.actions[self.t % 1000])
            _, self.td = self.env.step_and_maybe_reset(self.td)
            self.t += 1
        return (time.perf_counter() - started) / count


def measure(name: str, n_envs: int, turns: int) -> str:
    """One line of the table."""
    ways = {kind: Turn(stepped_tasks()[name], n_envs, kind) for kind in KINDS}
    each = max(5, int(SECONDS / ways["serial"].steps(10)))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(turns):
        for kind, way in ways.items():
            taken[kind].append(way.steps(each))
    for way in ways.values():
        way.env.close()
    best = {kind: min(values) for kind, values in taken.items()}
    cells = [
        f"{best[kind] * 1e6:.0f} ({best['serial'] / best[kind]:.2f}×)"
        if kind != "serial"
        else f"{best[kind] * 1e6:.0f}"
        for kind in KINDS
    ]
    return f"| {name} | {n_envs} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="*", default=list(stepped_tasks()))
    parser.add_argument("--n-envs", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| task | environments | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 2)}", flush=True)
    for name in options.tasks:
        for n_envs in options.n_envs:
            print(measure(name, n_envs, options.turns), f"  load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
