"""Tasks and rows for the tests of operators: what a host would hand them, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.keys import Entries, Keys
from marl_memory.spec import TaskSpec

K = Keys()

SCOPES = ("per_agent", "shared", "centralized")

FIRST = [SCOPES[0], *(pytest.param(scope, marks=pytest.mark.slow) for scope in SCOPES[1:])]
"""For what an option does: it meets the other scopes in the slow tests."""


def task(
    agents: int = 1,
    *,
    features: int | Sequence[int] = 2,
    actions: int | Sequence[int] = 2,
    continuous: bool = True,
    state: int | None = None,
    embedding: tuple[tuple[float, ...], ...] | None = None,
) -> TaskSpec:
    """Agents with sizes of their own, or all alike; ``state`` features of a state of the task's own."""
    observation_sizes = (features,) * agents if isinstance(features, int) else tuple(features)
    action_sizes = (actions,) * agents if isinstance(actions, int) else tuple(actions)
    bounds = {
        name: tuple((bound,) * n + (0.0,) * (max(action_sizes) - n) for n in action_sizes) if continuous else None
        for name, bound in (("action_low", -1.0), ("action_high", 1.0))
    }
    return TaskSpec(
        name="synthetic",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=observation_sizes,
        action_sizes=action_sizes,
        continuous=continuous,
        state_size=agents * max(observation_sizes) if state is None else state,
        own_state=state is not None,
        common_reward=False,
        action_embedding=embedding,
        **bounds,
    )


def rows(
    spec: TaskSpec,
    observation: Tensor,
    entries: Entries | None = None,
    *,
    alive: Tensor | None = None,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    numbers: Tensor | None = None,
) -> TensorDict:
    """Rows ``[B]`` with ``observation`` ``[B, A, F]`` and room for ``entries``; everybody lives, all is allowed."""
    b, a = observation.shape[:2]
    td = TensorDict(batch_size=(b,))
    td.set(K.observation, observation)
    td.set(K.alive, torch.ones(b, a, dtype=torch.bool) if alive is None else alive)
    td.set(K.state, observation.flatten(1) if state is None else state)
    if not spec.continuous:
        every = torch.tensor(spec.action_valid).expand(b, a, spec.action_size)
        td.set(K.action_mask, (every if mask is None else mask).clone())
    if numbers is not None:
        td.set(K.row, numbers)
    for key, entry in (entries or {}).items():
        td.set(key, entry.zeros((b,), torch.float32))
    for key in (K.value, K.value_target, K.learn_reward, K.advantage):
        td.set(key, torch.zeros(b, a, 1))
    return td


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers between 0 and 1."""
    return torch.rand(shape, generator=Generator().manual_seed(seed))
