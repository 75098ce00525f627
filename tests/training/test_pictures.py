"""PPO learns from pictures: from the environment's bytes to the network and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Memory
from marl_memory.networks.cnn import CNN
from marl_memory.training.clock import Clock
from marl_memory.training.iteration import OnPolicyIteration
from marl_memory_envs.vector import vector_env


class Falling(ParallelEnv[str, Any, Any]):
    """A faint dot falls to the left or to the right on a grey screen ``[12, 12]``; whoever points where it goes gets 1.

    One picture does not tell where it falls, a stack of two does.
    """

    metadata = {"name": "falling", "render_modes": []}
    render_mode = None
    possible_agents = ["first", "second"]

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Box(0, 255, (12, 12), np.uint8)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(2)

    def _seen(self) -> dict[str, np.ndarray]:
        picture = np.full((12, 12), 100, np.uint8)
        picture[2 * self.time : 2 * self.time + 2, self.column : self.column + 2] = 160
        return dict.fromkeys(self.agents, picture)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None or not hasattr(self, "random"):
            self.random = np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        self.column, self.way = int(self.random.integers(4, 7)), 2 * int(self.random.integers(2)) - 1
        return self._seen(), {name: {} for name in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        rewards = {name: float(action == (self.way > 0)) for name, action in actions.items()}
        self.time, self.column = self.time + 1, self.column + self.way
        over, seen = self.time == 4, self._seen()
        acting, self.agents = self.agents, [] if over else self.agents
        flags = dict.fromkeys(acting, over)
        return seen, rewards, flags, dict.fromkeys(acting, False), {name: {} for name in acting}


def test_ppo_learns_where_a_faint_dot_falls() -> None:
    env = vector_env(Falling, n_envs=16, seed=0, wrappers=[{"frame_stack_v1": {"stack_size": 2}}])
    body: Any = partial(
        CNN, picture=env.task_spec.picture, channels=(8, 8), kernels=(4, 3), strides=(2, 1), hidden=(32,)
    )
    host = PPO(
        spec=env.task_spec, network=body, seed=0, share_parameters=True, gamma=0.5, entropy_coef=0.0, minibatches=4
    )
    iterate = OnPolicyIteration(host, Memory([]), env, steps=32, seed=0, clock=Clock())  # type: ignore[arg-type]
    returns = [float(iterate().episodes.returns.mean()) for _ in range(25)]
    # Four steps; in the first nobody can know: 0.5 + 3.
    assert returns[0] < 2.6
    assert torch.tensor(returns[-3:]).mean() > 3.2, returns
