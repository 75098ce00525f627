"""Small tasks and made-up batches of them: every entry that a host writes, in its shape."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.keys import Entry
from marl_memory.memory.operator import MemoryOperator, Stage
from marl_memory.spec import TaskSpec

CRITICS = 2
"""C of the made-up values."""


def _spec(name: str, observations: tuple[int, ...], actions: tuple[int, ...], **more: Any) -> TaskSpec:
    agents, continuous = tuple(f"agent_{i}" for i in range(len(actions))), more.get("continuous", True)
    bounds = (((1.0,) * max(actions),) * len(actions)) if continuous else None
    return TaskSpec(
        **{
            "name": name,
            "agents": agents,
            "observation_sizes": observations,
            "action_sizes": actions,
            "continuous": continuous,
            "state_size": len(actions) * max(observations),
            "own_state": False,
            "common_reward": False,
            "action_low": None if bounds is None else tuple(tuple(-x for x in row) for row in bounds),
            "action_high": bounds,
            **more,
        }
    )


SPECS = (
    _spec("three equal agents with a state", (3, 3, 3), (2, 2, 2), state_size=5, own_state=True, common_reward=True),
    _spec("three unequal agents with masked actions", (4, 3, 4), (4, 3, 4), continuous=False),
    _spec("two unequal agents", (4, 2), (2, 1)),
    _spec("one agent", (3,), (2,)),
)
"""Continuous and discrete; 1, 2 and 3 agents, equal and not; with a state of their own and without."""


def make_batch(operator: MemoryOperator, spec: TaskSpec, *shape: int, seed: int, room: bool = True) -> TensorDict:
    """A batch ``[*B]`` as the operator's host hands it over: all agents alive, observations around 0.

    For the stages TARGET, REPLAY and ACT every row is an episode of one step: what such operators learn of it is known
    with it, whatever the shape of the batch.

    Args:
        operator: what it asks for is written, and room is made for its entries.
        spec: the task.
        shape: ``*B``.
        seed: of all values; other seeds have other row numbers.
        room: whether the batch takes no new keys, and has room for what was declared.
    """
    g, k, (a, p) = Generator().manual_seed(seed), spec.keys, (spec.n_agents, spec.action_size)

    def normal(*tail: int) -> Tensor:
        return torch.randn(*shape, *tail, generator=g)

    mask = torch.rand(*shape, a, p, generator=g) < 0.7
    mask[..., 0] = True
    mask &= torch.tensor(spec.action_valid)
    td = TensorDict(batch_size=shape)
    for prefix in ((), ("next",)):
        observation = torch.where(torch.tensor(spec.observation_valid), normal(a, spec.observation_size), 0.0)
        state = normal(spec.state_size) if spec.own_state else observation.flatten(-2)
        td.set((*prefix, *k.observation), observation)
        td.set((*prefix, k.state), state)
        td.set((*prefix, *k.alive), torch.ones(*shape, a, dtype=torch.bool))
        if not spec.continuous:
            td.set((*prefix, *k.action_mask), mask.clone())
    for name in (k.done, k.terminated, k.truncated, *((k.success,) if spec.has_success else ())):
        ends = name in (k.done, k.terminated) and operator.stage in (Stage.TARGET, Stage.REPLAY, Stage.ACT)
        td.set(("next", name), torch.full((*shape, 1), ends))
    td.set(("next", *k.reward), normal(a, 1) if not spec.common_reward else normal(1, 1).expand(*shape, a, 1).clone())
    td.set(("next", *k.discount), (~td.get(("next", k.terminated))).float().unsqueeze(-2).expand(*shape, a, 1).clone())
    td.get(("next", *k.alive)).logical_and_(~td.get(("next", k.terminated)))
    logits = torch.where(mask, normal(a, p), torch.finfo(torch.float32).min)
    action = normal(a, p).tanh() if spec.continuous else logits.argmax(-1)
    td.set(k.action, action)
    td.set(k.log_prob, normal(a) - 2.0)
    # Row numbers are never used twice, by no two seeds either.
    rows = torch.arange(torch.Size(shape).numel()).reshape(shape) + 100_000 * (seed + 1)
    values: dict[Any, Tensor] = {
        k.row: rows,
        k.learn_reward: td.get(("next", *k.reward)).clone(),
        k.value_output: normal(a, CRITICS),
        k.value: normal(a, CRITICS),
        k.next_value: normal(a, CRITICS),
        k.advantage: normal(a, 1),
        k.value_target: normal(a, CRITICS),
        k.under_weight: torch.ones(*shape, a, 1),
        k.action_gradient: normal(a, p),
    }
    for key, value in values.items():
        if key not in _ABSENT.get(operator.stage, _nothing)(spec):
            td.set(key, value)
    for key, entry in operator.asks.items():
        if key not in td.keys(include_nested=True):
            td.set(key, _asked(spec, key, entry, shape, g, logits))
    if room:
        for key, entry in operator.entries.items():
            if key not in td.keys(include_nested=True):
                td.set(key, entry.zeros(shape, torch.float32))
        td.lock_()
    return td


def _nothing(spec: TaskSpec) -> tuple[Any, ...]:
    return ()


_ABSENT = {
    Stage.GRADIENT: lambda spec: (spec.keys.value_output, spec.keys.value, spec.keys.next_value, spec.keys.advantage),
    Stage.REGION: lambda spec: (spec.keys.row, spec.keys.action_gradient),
    Stage.REPLAY: lambda spec: (spec.keys.row, spec.keys.action_gradient),
}
"""What the only hosts that have a stage do not write."""


def _asked(spec: TaskSpec, key: Any, entry: Entry, shape: tuple[int, ...], g: Generator, logits: Tensor) -> Tensor:
    """A value for an entry that the host writes on request."""
    k, value = spec.keys, torch.randn(*shape, *entry.shape, generator=g)
    if key == k.policy("log_probs"):
        return logits.log_softmax(-1)
    if key == k.policy("scale"):
        return value.exp()
    if key == k.policy_action:
        value = value.tanh() if spec.continuous else logits.softmax(-1)
        return torch.where(torch.tensor(spec.action_valid), value, 0.0)
    return value if entry.dtype is None else value.to(entry.dtype)
