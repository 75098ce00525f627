"""An agent with rewards of its own that is truncated before the others: what every learner makes of its last step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.algorithms.ppo import PPO
from marl_memory.keys import Keys
from marl_memory.memory.episodes import RunningEpisodes
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.collection import Collector
from marl_memory_envs.vector import VectorEnv
from tests.memory.replayed import Lent, ring

K = Keys()
GAMMA = 0.9
CUT, END = 3, 10


class Leaving(ParallelEnv):
    """Agent ``a`` is truncated at step 3, ``b`` goes on and terminates at step 10; observations count steps."""

    metadata = {"name": "leaving"}  # noqa: RUF012
    possible_agents = ["a", "b"]  # noqa: RUF012
    render_mode = None

    def observation_space(self, agent: str) -> Box:
        return Box(-100, 100, (1,), np.float32)

    def action_space(self, agent: str) -> Box:
        return Box(-1, 1, (1,), np.float32)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents, self.time = ["a", "b"], 0
        return {name: np.ones(1, np.float32) for name in self.agents}, {name: {} for name in self.agents}

    def step(self, actions: dict[str, np.ndarray]) -> Any:
        self.time += 1
        was = list(self.agents)
        ended = {name: name == "b" and self.time == END for name in was}
        cut = {name: name == "a" and self.time == CUT for name in was}
        self.agents = [name for name in was if not (ended[name] or cut[name])]
        seen = {name: np.full(1, 1 + self.time, np.float32) for name in was}
        return seen, dict.fromkeys(was, 1.0), ended, cut, {name: {} for name in was}


@pytest.fixture
def collected() -> tuple[TaskSpec, Any]:
    env = VectorEnv([Leaving()], common_reward=False)
    policy = lambda td: td.set(K.action, torch.zeros(1, 2, 1))  # noqa: E731
    collector = Collector(env, policy, lambda td: None, steps=END, learn_entries={}, seed=0)
    batch = collector.collect()[0].clone()
    batch.set(K.learn_reward, batch.get(("next", *K.reward)).clone())
    assert batch.get(K.alive)[:, 0, 0].sum() == CUT and batch.get(("next", *K.discount))[CUT - 1, 0, 0] == 1
    return env.task_spec, batch


def value(td: TensorDictBase, generator: Any = None, critics: int = 1) -> Tensor:
    """10 − 2 o: of what it saw last, 4, it is 2; of zeros 10."""
    return (10 - 2 * td.get(K.observation)).expand(*td.batch_size, 2, critics)


LONG = [1 + GAMMA * (1 + GAMMA * (1 + GAMMA * 2)), 1 + GAMMA * (1 + GAMMA * 2), 1 + GAMMA * 2]
BEST = [1 + GAMMA * 6, 1 + GAMMA * 4, 1 + GAMMA * 2]
"""With the values 6, 4 and 2 of what followed it is best to stop at once."""


def test_returns_over_a_replay_end_with_the_agent(collected: tuple[TaskSpec, Any]) -> None:
    spec, batch = collected
    memory = EpisodicReturn(spec=spec, off_policy=True, n_critics=2, capacity=20, gamma=GAMMA, refresh_every=1)
    entries = [key for key in batch.keys(True, True) if "learn_reward" not in key]
    replay = ring(spec, steps=20, n_envs=1, entries=entries, learn=memory.entries)
    replay.extend(batch)
    memory.sweep(partial(value, critics=2), Lent(replay))
    assert memory.table.returns[:CUT, 0, 0, 0].tolist() == pytest.approx(BEST)


def test_returns_over_rows_of_its_own_end_with_the_agent(collected: tuple[TaskSpec, Any]) -> None:
    spec, batch = collected
    memory = EpisodicReturn(spec=spec, capacity=20, gamma=GAMMA, refresh_every=1)
    memory.write(batch)
    memory.refresh(value)
    assert memory.table.returns[:CUT, 0, 0, 0].tolist() == pytest.approx(BEST)


def test_returns_of_whole_episodes_end_with_the_agent(collected: tuple[TaskSpec, Any]) -> None:
    spec, batch = collected
    running = RunningEpisodes(spec, n_envs=1, batch_steps=END, horizon=None, gamma=GAMMA, learnt=True)
    running.write(batch)
    ended = running.take(value)
    assert ended is not None and ended.returns[:CUT, 0].tolist() == pytest.approx(LONG)
    other = [sum(GAMMA**i for i in range(END - t)) for t in range(END)]
    assert ended.returns[:, 1].tolist() == pytest.approx(other)


def test_ppo_values_what_the_agent_saw_last(collected: tuple[TaskSpec, Any]) -> None:
    spec, batch = collected
    host = PPO(spec=spec, network=partial(MLP, hidden=(8,)), seed=0, value_norm=False, gamma=GAMMA, gae_lambda=1.0)
    for key, entry in host.learn_entries.items():
        batch.set(key, entry.zeros(tuple(batch.batch_size), torch.float32))
    batch.set(K.log_prob, torch.zeros(*batch.batch_size, 2))
    host.derive_rewards(batch)
    host.normalise_advantages = False
    host.compute_advantages(batch)
    last = host.bootstrap_values(batch.get("next"))[CUT - 1, 0, 0, 0].item()
    now = batch.get(K.value)[:CUT, 0, 0, 0]
    following = batch.get(K.next_value)[:CUT, 0, 0, 0].tolist()
    assert following == pytest.approx([*now[1:].tolist(), last])
    expected = 1 + GAMMA * (1 + GAMMA * (1 + GAMMA * last)) - now[0].item()
    assert batch.get(K.advantage)[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-5)
