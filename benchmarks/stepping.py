"""Which way of stepping is faster, by task: ``python -m benchmarks.stepping [task…] [--n-envs 8 16] [--turns 9]``.

The three ways take turns of 0.2 s or so, and each one's *fastest* turn counts: on a busy machine other programs take
away most from those that use several cores.  Printed are µs of a vector step, resets, adapter and all but without a
policy, and how much faster than the serial one that is.  Not part of ``make bench``: it takes some minutes, and what is
faster depends on the machine's cores.

The last two columns are for machines that are never idle (Linux): the CPU time of a serial step, and that of a step in
processes along its longest way, this process and the busiest worker.  It is what would be left if nothing else ran; but
caches are colder than that, most of all where processes wait for each other.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.collection import random_actions, tasks
from marl_memory_envs.stepping import KINDS, Processes
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


class Way:
    """A vector that goes on where its last turn ended; seconds of its fastest turn, on the clock and of CPU."""

    def __init__(self, arguments: dict[str, Any], n_envs: int, stepping: str) -> None:
        self.env: VectorEnv = vector_env(**arguments, n_envs=n_envs, seed=0, stepping=stepping)
        self.actions, self.td, self.t = random_actions(self.env, 1000), self.env.reset(), 0
        processes = getattr(self.env.envs[0], "processes", None)
        self.workers = processes.process_ids if isinstance(processes, Processes) else []
        self.fastest = self.least_cpu = float("inf")

    def turn(self, count: int) -> None:
        """``count`` vector steps."""
        key, started, used = self.env.task_spec.keys.action, time.perf_counter(), self._cpu()
        for _ in range(count):
            self.td.set(key, self.actions[self.t % 1000])
            _, self.td = self.env.step_and_maybe_reset(self.td)
            self.t += 1
        self.fastest = min(self.fastest, (time.perf_counter() - started) / count)
        own, *workers = (after - before for after, before in zip(self._cpu(), used, strict=True))
        self.least_cpu = min(self.least_cpu, (own + max(workers, default=0.0)) / count)

    def _cpu(self) -> list[float]:
        """CPU seconds of this thread and of each worker."""
        spent = [Path(f"/proc/{pid}/schedstat").read_text().split()[0] for pid in self.workers]
        return [time.thread_time(), *(int(nanoseconds) / 1e9 for nanoseconds in spent)]


def measure(name: str, n_envs: int, turns: int) -> str:
    """One line of the table."""
    ways = {kind: Way(stepped_tasks()[name], n_envs, kind) for kind in KINDS}
    for way in ways.values():
        way.turn(5)
    each = max(5, int(SECONDS / ways["serial"].fastest))
    for _ in range(turns):
        for way in ways.values():
            way.turn(each)
    for way in ways.values():
        way.env.close()
    serial, threads, processes = (way.fastest for way in ways.values())
    cpu, cpu_processes = ways["serial"].least_cpu, ways["processes"].least_cpu
    cells = [_cell(serial), _cell(threads, serial), _cell(processes, serial), _cell(cpu), _cell(cpu_processes, cpu)]
    return f"| {name} | {n_envs} | {' | '.join(cells)} |"


def _cell(seconds: float, beside: float | None = None) -> str:
    return f"{seconds * 1e6:.0f}" + ("" if beside is None else f" ({beside / seconds:.2f}×)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="*", default=list(stepped_tasks()))
    parser.add_argument("--n-envs", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("task", "environments", *KINDS, "serial, CPU", "processes, CPU")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for name in options.tasks:
        for n_envs in options.n_envs:
            print(measure(name, n_envs, options.turns), f"  load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
