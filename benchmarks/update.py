"""One PPO minibatch update and one pass of GAE beside the same arithmetic in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from benchmarks import plain_mappo as plain
from benchmarks.measure import Row, ratio, turns
from marl_memory.algorithms.ppo import PPO
from marl_memory.functional.returns import gae
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec

CALLS = 20


def single_agent_task() -> TaskSpec:
    """LunarLander's sizes: 8 numbers observed, 4 actions."""
    return TaskSpec(
        name="synthetic",
        agents=("agent_0",),
        observation_sizes=(8,),
        action_sizes=(4,),
        continuous=False,
        state_size=8,
        own_state=False,
        common_reward=True,
        has_success=False,
        max_episode_steps=None,
    )


def minibatch(spec: TaskSpec, rows: int) -> TensorDictBase:
    """Made-up rows of a PPO minibatch."""
    k, one, generator = spec.keys, (rows, spec.n_agents), torch.Generator().manual_seed(0)

    def normal(*tail: int) -> Tensor:
        return torch.randn(*one, *tail, generator=generator)

    entries = {
        k.observation: normal(spec.observation_size),
        k.action_mask: torch.ones(*one, spec.action_size, dtype=torch.bool),
        k.alive: torch.ones(one, dtype=torch.bool),
        k.action: torch.randint(spec.action_size, one, generator=generator),
        k.log_prob: -1.4 + 0.1 * normal(),
        k.advantage: normal(1),
        k.value_output: normal(1),
        k.value_target: normal(1),
    }
    td = TensorDict({}, batch_size=[rows])
    for key, entry in entries.items():
        td.set(key, entry)
    return td


def plain_rows(spec: TaskSpec, td: TensorDictBase) -> dict[str, Tensor]:
    """The same rows as the plain learner takes them."""
    k = spec.keys
    rows = {"observation": k.observation, "mask": k.action_mask, "action": k.action, "log_prob": k.log_prob}
    flat = {"advantage": k.advantage, "target": k.value_target, "old_output": k.value_output}
    data = {name: td.get(key) for name, key in rows.items()} | {"alive": td.get(k.alive)}
    return data | {name: td.get(key).squeeze(-1) for name, key in flat.items()}


def pair(rows: int, width: int) -> tuple[PPO, Any, TensorDictBase, dict[str, Tensor]]:
    """Our learner, the plain one with the same weights and optimiser, and their rows."""
    spec = single_agent_task()
    ours = PPO(spec=spec, network=partial(MLP, hidden=(width, width)), seed=0, entropy_coef=0.01)
    settings = plain.Settings(centralised=False, value_clip=None)
    beside = plain.like(ours, settings, fused=True)
    td = minibatch(spec, rows)
    return ours, beside, td, plain_rows(spec, td)


def minibatches(repeats: int) -> Iterator[Row]:
    """Ours / plain, one gradient step of each."""
    for rows, width in ((4096, 128), (512, 64)):
        ours, beside, td, data = pair(rows, width)

        def our_steps(ours: PPO = ours, td: TensorDictBase = td) -> None:
            rows = ours.prepare(td)
            for _ in range(CALLS):
                ours.update(rows)

        def plain_steps(beside: Any = beside, data: Any = data) -> None:
            for _ in range(CALLS):
                plain.gradient_step(beside, data)

        timed = turns(our_steps, plain_steps, repeats)
        yield ratio(f"PPO minibatch, {rows} × 2×{width}", timed, calls=CALLS, batch=rows, width=f"2×{width}")


def advantages(repeats: int) -> Iterator[Row]:
    """Ours / a plain loop over time, 128 steps × 64 environments × 3 agents."""
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value = torch.randn(3, 128, 64, 3, generator=generator)
    ends = torch.rand(128, 64, 3, generator=generator) < 0.02
    discount = 1.0 - ends.float()
    cut = ends.float()  # the plain loop takes it as a number

    def ours() -> None:
        for _ in range(CALLS):
            gae(reward, value, next_value, discount, ends, gamma=0.99, lam=0.95)

    def beside() -> None:
        for _ in range(CALLS):
            plain.advantages(reward, value, next_value, discount, cut, 0.99, 0.95)

    yield ratio("GAE, 128 × 64 × 3", turns(ours, beside, repeats), calls=CALLS, batch="128 × 64 × 3")
