"""What AdaMemento costs: an iteration of PPO with and without it, and novelty over the size of states.

python -m benchmarks.adamemento    # the table of docs/memory/coarse_fine.md
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end import our_trainer
from benchmarks.measure import Row, calmest, seconds
from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.cloning import Cloning
from marl_memory.memory.coarse_fine import CoarseFineNovelty
from marl_memory.memory.novelty import StateNovelty
from marl_memory.memory.operator import Memory, MemoryOperator
from marl_memory.memory.reflection import Reflection
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec

SIZES: dict[str, Any] = {"n_envs": 16, "steps": 512}
"""Of ``experiment=ppo_lunar_lander``."""

STATES: list[tuple[int, tuple[int, int, int] | None]] = [
    (4, None),
    (28, None),
    (376, None),
    (4_096, None),
    (28_224, None),
    (28_224, (4, 84, 84)),
]
"""Numbers of a state, and its channels, height and width where it is a picture."""


def novelty(spec: TaskSpec) -> dict[str, MemoryOperator]:
    """``memory=[coarse_fine]``."""
    return {"coarse_fine": CoarseFineNovelty(spec=spec)}


def both(spec: TaskSpec) -> dict[str, MemoryOperator]:
    """``memory=[adamemento]``."""
    reflection = Reflection(spec=spec, n_envs=SIZES["n_envs"], batch_steps=SIZES["steps"])
    return {"reflection": reflection, "cloning": Cloning(spec=spec), **novelty(spec)}


def iterations(repeats: int) -> Iterator[Row]:
    """An iteration of PPO on LunarLander with / without, once memory acts."""
    for name, make in (("CoarseFineNovelty", novelty), ("AdaMemento", both)):
        yield _iteration(name, make, repeats)


def _iteration(name: str, make: Callable[[TaskSpec], dict[str, MemoryOperator]], repeats: int) -> Row:
    from marl_memory_envs.vector import vector_env

    env = partial(vector_env, factory="marl_memory_envs.box2d:lunar_lander")
    body = partial(MLP, hidden=(64, 64), activation="tanh")
    learner = partial(
        PPO, network=body, epochs=4, minibatches=32, lr=1e-3, gamma=0.999, gae_lambda=0.98, max_grad_norm=0.5
    )
    with tempfile.TemporaryDirectory() as folder:
        plain = our_trainer(env, learner, Path(folder) / "plain", 0, **SIZES)
        operators = make(plain.algorithm.spec)
        ours = our_trainer(env, learner, Path(folder) / "memory", 0, memory=Memory(operators.items()), **SIZES)
        for _ in range(3):  # then there are successes, failures and scales
            plain.step(), ours.step()
        pairs, kept = calmest(lambda: (seconds(ours.step), seconds(plain.step)), sum, repeats)
        row = ours.step()
        frames = SIZES["n_envs"] * SIZES["steps"]
        details = {"rows": sum(map(len, operators.values())), "calm turns": kept}
        details["bonus"] = round(row["memory/coarse_fine/bonus"], 4)
        if "reflection" in operators:
            details["share"] = round(row["memory/reflection/share"], 3)
        details["frames/s"] = round(frames / statistics.median(mine for mine, _ in pairs))
        plain.close(), ours.close()
    return Row(f"PPO on LunarLander with {name}", [a / b for a, b in pairs], details=details)


def state_sizes() -> Iterator[str]:
    """Lines of a table: processor time of 256 states, and bytes, over the size of a state; default settings."""
    torch.set_num_threads(1)
    yield "| numbers of a state | | novelty of 256 states, ms | a gradient step on 256, ms | 16 steps, s | MB |"
    yield "|---|---|---|---|---|---|"
    for size, picture in STATES:
        spec = TaskSpec.of_sizes(observation_size=4, n_actions=2)
        operator = CoarseFineNovelty(spec=spec)
        operator.model = model = StateNovelty(
            torch.ones(1, size, dtype=torch.bool),
            picture=picture,
            size=4_096,
            latent=64,
            hidden=(256, 256),
            sparsity=1e-3,
            lr=1e-4,
            fine_sign=1,
            seed=0,
        )
        states = torch.randint(0, 256, (1, 256, size), generator=torch.Generator().manual_seed(0))
        states = states.to(torch.uint8) if picture else states.float()
        model.write(states, torch.ones(1, 256, dtype=torch.bool))
        learn, look = partial(model.learn, 1, 256), partial(model.of, states)
        times = [1e3 * min(processor_seconds(work) for _ in range(3)) for work in (look, learn)]
        kind = "picture 4 × 84 × 84" if picture else "vector"
        megabytes = operator.bytes / 1e6
        yield f"| {size:,} | {kind} | {times[0]:.1f} | {times[1]:.1f} | {0.016 * times[1]:.2f} | {megabytes:.0f} |"


def processor_seconds(work: Callable[[], object]) -> float:
    """Of one call, on one thread: what else a machine does counts little."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    for text in state_sizes():
        print(text, flush=True)
