"""Trajectories in a replay, as a run would write them, for the tests of what works over a replay's rows."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.keys import Entries, Entry, Keys
from marl_memory.spec import TaskSpec
from marl_memory.training.replay import ReplayRing

K = Keys()


def trajectories(
    spec: TaskSpec, steps: int, n_envs: int, seed: int, *, ends: float = 0.1, dtype: torch.dtype = torch.float64
) -> TensorDict:
    """Collected steps ``[T, N]``: states follow each other, episodes end in both ways, agents may be dead."""
    g, a = Generator().manual_seed(seed), spec.n_agents
    shape = (steps, n_envs)
    observation = torch.randn(steps + 1, n_envs, a, spec.observation_size, generator=g, dtype=dtype)
    done = torch.rand(*shape, generator=g) < ends
    truncated = done & (torch.rand(*shape, generator=g) < 0.5)
    discount = (~done | truncated).to(dtype).view(*shape, 1, 1).expand(*shape, a, 1).clone()
    reward = torch.randn(*shape, a, 1, generator=g, dtype=dtype)
    if spec.common_reward:
        reward = reward[:, :, :1].expand(*shape, a, 1).clone()
    alive, lives_on = (torch.rand(2, *shape, a, generator=g) < 0.8).unbind()
    if not spec.common_reward:  # else their returns end there, see `leaves_alone`
        lives_on = lives_on | alive
    td = TensorDict(batch_size=shape)
    for time, x in (((), observation[:-1]), (("next",), observation[1:])):
        td.set((*time, *K.observation), x.clone())
        td.set((*time, K.state), x.flatten(-2))
        td.set((*time, *K.alive), lives_on.clone() if time else alive.clone())
        if not spec.continuous:
            td.set((*time, *K.action_mask), torch.ones(*shape, a, spec.action_size, dtype=torch.bool))
    action = torch.rand(*shape, a, spec.action_size, generator=g, dtype=dtype) * 2 - 1
    td.set(K.action, action if spec.continuous else action.argmax(-1))
    td.set(("next", *K.reward), reward)
    td.set(("next", *K.discount), discount)
    for name, x in ((K.done, done), (K.truncated, truncated), (K.terminated, done & ~truncated)):
        td.set(("next", name), x.unsqueeze(-1))
    return td


def ring(spec: TaskSpec, *, steps: int, n_envs: int, entries: list[Any], learn: Entries, batch_size: int = 8) -> Any:
    """A replay for T steps of N environments."""
    room = {K.learn_reward: Entry((spec.n_agents, 1)), **learn}
    return ReplayRing(
        capacity=steps * n_envs,
        n_envs=n_envs,
        batch_size=batch_size,
        entries=entries,
        learn_entries=room,
        keys=K,
        seed=0,
    )


class Lent:
    """A replay's steps whose learning rewards are the environment's times ``scale`` (as a run lends them)."""

    def __init__(self, replay: Any, scale: float = 1.0) -> None:
        self.replay, self.scale, self.n_envs, self.asked = replay, scale, replay.n_envs, []
        self.ends_between = replay.ends_between

    oldest = property(lambda self: self.replay.oldest)
    written = property(lambda self: self.replay.written)

    def block(self, first: int, last: int) -> TensorDict:
        self.asked.append((first, last))
        td = self.replay.block(first, last)
        td.set(K.learn_reward, self.scale * td.get(("next", *K.reward)))
        return td


def value_of(critics: int) -> Any:
    """A bootstrap: values ``[*B, A, C]`` that depend on the observation only."""

    def bootstrap(td: Any, generator: Generator | None = None) -> Tensor:
        x = td.get(K.observation)
        return torch.stack([(x * (i + 1)).sum(-1).sin() for i in range(critics)], -1)

    return bootstrap
