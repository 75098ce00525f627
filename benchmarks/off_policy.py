"""One update of a host with a replay, and the replay itself, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from benchmarks import plain_ddpg as plain
from benchmarks import plain_dqn
from benchmarks.measure import Row, ratio, turns
from marl_memory.algorithms.algorithm import OffPolicyAlgorithm
from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.deterministic import DeterministicHost
from marl_memory.algorithms.dqn import DQN
from marl_memory.algorithms.td3 import TD3
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.replay import ReplayRing

CALLS = 10
BATCH = 256


def task(agents: int, features: int, actions: int) -> TaskSpec:
    """A continuous task of these sizes."""
    bounds = ((1.0,) * actions,) * agents
    return TaskSpec(
        name="synthetic",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(features,) * agents,
        action_sizes=(actions,) * agents,
        continuous=True,
        state_size=agents * features,
        own_state=False,
        common_reward=False,
        action_low=tuple(tuple(-x for x in row) for row in bounds),
        action_high=bounds,
    )


def collected(spec: TaskSpec, steps: int, n_envs: int) -> TensorDict:
    """A made-up collected batch ``[T, N]``; nobody dies."""
    k, shape, generator = spec.keys, (steps, n_envs), torch.Generator().manual_seed(0)
    a = spec.n_agents
    td = TensorDict(batch_size=shape)
    for time in ((), ("next",)):
        observation = torch.randn(*shape, a, spec.observation_size, generator=generator)
        td.set((*time, *k.observation), observation)
        td.set((*time, k.state), observation.flatten(-2))
        td.set((*time, *k.alive), torch.ones(*shape, a, dtype=torch.bool))
    if spec.continuous:
        td.set(k.action, torch.rand(*shape, a, spec.action_size, generator=generator) * 2 - 1)
    else:
        td.set(k.action, torch.randint(spec.action_size, (*shape, a), generator=generator))
        td.set(("next", *k.action_mask), torch.ones(*shape, a, spec.action_size, dtype=torch.bool))
    td.set(("next", *k.reward), torch.randn(*shape, a, 1, generator=generator))
    td.set(("next", *k.discount), torch.ones(*shape, a, 1))
    td.set(("next", k.done), torch.zeros(*shape, 1, dtype=torch.bool))
    return td


def ring(host: OffPolicyAlgorithm, n_envs: int, capacity: int) -> ReplayRing:
    """A replay for ``host``."""
    return ReplayRing(
        capacity=capacity,
        n_envs=n_envs,
        batch_size=BATCH,
        entries=host.replay_keys,
        learn_entries=host.learn_entries,
        keys=host.keys,
        seed=0,
    )


def update(host: OffPolicyAlgorithm, rows: TensorDictBase) -> None:
    """The steps of one update, as the trainer makes them."""
    host.derive_rewards(rows)
    host.compute_targets(rows)
    host.update_critic(rows)
    if host.actor_is_due:
        host.compute_action_gradient(rows)
        host.update_actor(rows)
        host.update_targets()


def updates(repeats: int) -> Iterator[Row]:
    """Ours / plain, on the same rows: HalfCheetah's sizes; simple_spread's, with the default network, for a team."""
    for name, kind, sizes, width, centralised in (
        ("TD3", TD3, (1, 17, 6), 256, False),
        ("DDPG", DDPG, (1, 17, 6), 256, False),
        ("MADDPG", DDPG, (3, 18, 2), 128, True),
    ):
        spec = task(*sizes)
        host: Any = kind(spec=spec, network=partial(MLP, hidden=(width, width)), seed=0, centralised_critic=centralised)
        settings = plain.Settings(centralised=centralised, policy_delay=2 if kind is TD3 else 1)
        beside = plain.like(host, settings)
        replay = ring(host, n_envs=4, capacity=4096)
        replay.extend(collected(spec, 1024, 4))
        rows = replay.draw()
        data = plain_rows(host, rows)

        def our_steps(host: Any = host, rows: Any = rows) -> None:
            for _ in range(CALLS):
                update(host, rows)

        def plain_steps(beside: Any = beside, data: Any = data, noisy: bool = kind is TD3) -> None:
            for _ in range(CALLS):
                noise = torch.randn_like(data["action"]) if noisy else None
                beside.update(data, target_noise=noise)

        timed = turns(our_steps, plain_steps, repeats)
        yield ratio(
            f"{name} update, {BATCH} × 2×{width}", timed, calls=CALLS, batch=BATCH, width=f"2×{width}", agents=sizes[0]
        )


def value_updates(repeats: int) -> Iterator[Row]:
    """Ours / plain, on the same rows: one agent with six actions; a team of three that shares a network."""
    for name, sizes, width in (("DQN", (1, 17, 6), 256), ("IDQN", (3, 30, 9), 128)):
        agents, features, actions = sizes
        spec = TaskSpec.of_sizes(observation_size=features, n_actions=actions, agents=agents)
        body, shared = partial(MLP, hidden=(width, width)), agents > 1
        host = DQN(spec=spec, network=body, seed=0, batch_size=BATCH, share_parameters=shared)
        settings = plain_dqn.Settings(sizes=spec.action_sizes, shared=shared, max_grad_norm=host.max_grad_norm)
        beside = plain_dqn.like(host, settings)
        replay = ring(host, n_envs=4, capacity=4096)
        replay.extend(collected(spec, 1024, 4))
        rows, k = replay.draw(), host.keys
        data = {"action": rows.get(k.action), "next_mask": rows.get(("next", *k.action_mask))}
        for key in ("reward", "discount"):
            data[key] = rows.get(("next", *getattr(k, key))).squeeze(-1)
        for prefix, td in (("", rows), ("next_", rows.get("next"))):
            data[prefix + "observation"] = td.get(k.observation)

        def our_steps(host: DQN = host, rows: TensorDictBase = rows) -> None:
            for _ in range(CALLS):
                update(host, rows)

        def plain_steps(beside: plain_dqn.Learner = beside, data: dict[str, Tensor] = data) -> None:
            for _ in range(CALLS):
                beside.update(data)

        timed = turns(our_steps, plain_steps, repeats)
        yield ratio(
            f"{name} update, {BATCH} × 2×{width}", timed, calls=CALLS, batch=BATCH, width=f"2×{width}", agents=agents
        )


def plain_rows(host: DeterministicHost, rows: TensorDictBase) -> dict[str, Tensor]:
    """The same rows as the plain learner takes them."""
    k = host.keys
    data = {"action": host.actor.vectors.encode(rows.get(k.action))}
    data |= {
        name: rows.get(("next", *key)).squeeze(-1) for name, key in (("reward", k.reward), ("discount", k.discount))
    }
    for prefix, td in (("", rows), ("next_", rows.get("next"))):
        data |= {prefix + "observation": td.get(k.observation), prefix + "state": td.get(k.observation).flatten(-2)}
    return data


def replay(repeats: int) -> Iterator[Row]:
    """Drawing and extending 256 rows / plain indexing and slice copies of the same tensors, preallocated."""
    spec = task(1, 17, 6)
    host = DDPG(spec=spec, network=partial(MLP, hidden=(8,)), seed=0)
    ours, batch = ring(host, n_envs=8, capacity=100_000), collected(spec, BATCH // 8, 8)
    for _ in range(100_000 // BATCH + 1):
        ours.extend(batch)
    stored, outs = [kept.flatten(0, 1).clone() for kept in ours.kept], [out.clone() for out in ours.outs]
    fresh = [batch.get(key).flatten(0, 1) for key in ours.entries]
    generator, where = torch.Generator().manual_seed(0), {"start": 0}

    def draw() -> None:
        for _ in range(100):
            ours.draw()

    def index() -> None:
        for _ in range(100):
            chosen = torch.randint(len(stored[0]), (BATCH,), generator=generator)
            for out, x in zip(outs, stored, strict=True):
                out.copy_(x[chosen])

    def extend() -> None:
        for _ in range(100):
            ours.extend(batch)

    def copy() -> None:
        for _ in range(100):
            start = where["start"] = (where["start"] + BATCH) % (len(stored[0]) - BATCH)
            for x, new in zip(stored, fresh, strict=True):
                x[start : start + BATCH].copy_(new)

    for name, mine, beside in (("draw", draw, index), ("extend by", extend, copy)):
        yield ratio(f"replay, {name} {BATCH} rows", turns(mine, beside, repeats), calls=100, entries=len(stored))
