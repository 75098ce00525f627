"""What acting with `Reflection` costs, and what its stores weigh."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks.measure import Row, ratio, seconds, turns
from benchmarks.off_policy import task
from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Memory, Stage
from marl_memory.memory.reflection import Reflection
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.collection import Collector

N_ENVS, STEPS, CALLS = 16, 128, 8

SIZES = (4, 28, 128, 1024, 7056, 28_224)
"""Features of an observation: CartPole's to those of four pictures of 84 × 84."""


def filled(spec: TaskSpec, **options: Any) -> Reflection:
    """One that learnt of episodes that ended well and badly, and acts at about every step."""
    operator = Reflection(spec=spec, n_envs=N_ENVS, batch_steps=STEPS, kappa=0.01, **options)
    k, a = spec.keys, spec.n_agents
    for seed in range(4):
        g, shape = torch.Generator().manual_seed(seed), (16, N_ENVS)
        td = TensorDict(batch_size=shape)
        observation = torch.randn(*shape, a, spec.observation_size, generator=g)
        done = torch.zeros(*shape, 1, dtype=torch.bool)
        done[-1] = True
        entries: dict[Any, Any] = {
            k.observation: observation,
            k.alive: torch.ones(*shape, a, dtype=torch.bool),
            k.confidence: torch.zeros(*shape, a),
            ("next", k.done): done,
            ("next", k.terminated): done,
            ("next", k.success): torch.zeros_like(done),
            ("next", k.state): torch.randn(*shape, spec.state_size, generator=g),
            ("next", *k.reward): torch.randn(*shape, a, 1, generator=g),
        }
        if spec.continuous:
            entries[k.action] = torch.rand(*shape, a, spec.action_size, generator=g)
        else:
            entries[k.action] = torch.randint(spec.action_size, (*shape, a), generator=g)
            entries[k.action_mask] = torch.ones(*shape, a, spec.action_size, dtype=torch.bool)
        operator.write(td.update(entries))
    operator.learn()
    assert operator.ready.all()
    return operator


def acting(repeats: int) -> Iterator[Row]:
    """Collecting with / without, on LunarLander."""
    from marl_memory_envs.vector import vector_env

    sides: dict[bool, Collector] = {}
    operator = None
    for acts in (True, False):
        env: Any = vector_env(factory="marl_memory_envs.box2d:lunar_lander", n_envs=N_ENVS, seed=0)
        host = PPO(spec=env.task_spec, network=partial(MLP, hidden=(64, 64), activation="tanh"), seed=0)
        memory = Memory()
        if acts:
            operator = filled(env.task_spec)
            memory = Memory([("reflection", operator)])
        act = partial(memory.act, Stage.ACT)
        sides[acts] = Collector(env, host.actor, act, steps=STEPS, learn_entries={}, seed=0)
    timed = turns(sides[True].collect, sides[False].collect, repeats)
    batch, _ = sides[True].collect()
    assert operator is not None
    share = float(operator.metrics(batch)["share"])
    assert share >= 0
    yield ratio("acting with Reflection, 16 × LunarLander", timed, calls=STEPS, share=round(share, 3))
    for collector in sides.values():
        collector.env.close()


def steps(operator: Reflection, td: TensorDict) -> None:
    """As many vector steps as are timed at once."""
    for _ in range(CALLS):
        operator(td.clone(False))


def sizes(repeats: int) -> Iterator[Row]:
    """Milliseconds of a vector step of 16, and of learning, and megabytes, by the size of what is seen."""
    for size in SIZES:
        spec = task(1, size, 6)
        operator = filled(spec, capacity=4_096, horizon=128, hidden=(256, 256))
        k = spec.keys
        g = torch.Generator().manual_seed(0)
        td = TensorDict(
            {
                k.observation: torch.randn(N_ENVS, 1, size, generator=g),
                k.alive: torch.ones(N_ENVS, 1, dtype=torch.bool),
                k.action: torch.rand(N_ENVS, 1, 6, generator=g),
            },
            batch_size=(N_ENVS,),
        )
        step = partial(steps, operator, td)
        step()
        found = [seconds(step) / CALLS * 1e6 for _ in range(repeats)]
        learning = [seconds(operator.learn) for _ in range(2)]
        details = {
            "learn, s": round(statistics.median(learning), 3),
            "MB": round(operator.bytes / 1e6, 1),
            "bytes a step": sum(
                x.element_size() * x[0].numel()
                for x in (operator.successes.get_buffer(n) for n in operator.successes.entries)
            ),
        }
        yield Row(f"acting with Reflection, {size} features", found, unit="µs", details=details)
