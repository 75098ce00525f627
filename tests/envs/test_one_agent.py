"""OneAgent: Gymnasium's steps, unchanged, as a team of one."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test, parallel_seed_test

from marl_memory_envs.base import environment_seeds
from marl_memory_envs.one_agent import AGENT, OneAgent, gym_env
from marl_memory_envs.vector import VectorEnv, vector_env


def test_pettingzoo_contract() -> None:
    parallel_api_test(gym_env("CartPole-v1"), num_cycles=200)
    parallel_seed_test(lambda: gym_env("CartPole-v1"), num_cycles=50)


def test_same_steps_as_gymnasium() -> None:
    ours, theirs = gym_env("CartPole-v1"), gym.make("CartPole-v1")
    seen, infos = ours.reset(seed=5)
    expected, _ = theirs.reset(seed=5)
    assert infos == {AGENT: {}}
    for i in range(30):
        assert np.array_equal(seen[AGENT], expected)
        seen, rewards, terminated, truncated, _ = ours.step({AGENT: i % 2})
        expected, reward, *flags, _ = theirs.step(i % 2)
        assert [rewards[AGENT], terminated[AGENT], truncated[AGENT]] == [reward, *flags]
        assert ours.agents == ([] if any(flags) else [AGENT])
        if any(flags):
            seen, expected = ours.reset()[0], theirs.reset()[0]


def test_time_limit_truncates_with_the_true_last_observation() -> None:
    env = vector_env(gym_env, n_envs=1, seed=0, kwargs={"id": "CartPole-v1", "max_episode_steps": 3})
    raw = gym.make("CartPole-v1", max_episode_steps=3)
    raw.reset(seed=environment_seeds(0, 1)[0])
    expected = [raw.step(action)[0] for action in (0, 1, 1)][-1]
    td = env.reset()
    for action in (0, 1, 1):
        td["agents", "action"] = torch.tensor([[action]])
        done, td = env.step_and_maybe_reset(td)
    assert done["next", "truncated"].item()
    assert not done["next", "terminated"].item()
    assert done["next", "agents", "alive"].item()
    assert done["next", "agents", "discount"].item() == 1
    assert torch.equal(done["next", "agents", "observation"][0, 0], torch.from_numpy(expected))
    assert not torch.equal(td["agents", "observation"][0, 0], torch.from_numpy(expected))


def test_terminal_state_ends_the_return() -> None:
    env = vector_env(gym_env, n_envs=2, seed=0, kwargs={"id": "CartPole-v1"})
    td = env.reset()
    for _ in range(20):
        td["agents", "action"] = torch.ones(2, 1, dtype=torch.int64)
        done, td = env.step_and_maybe_reset(td)
        after = done["next"]
        assert torch.equal(after["agents", "discount"][:, 0], 1 - after["done"].float())
        assert torch.equal(after["agents", "alive"], ~after["terminated"])
        if after["done"].any():
            break
    assert after["done"].any()
    assert after["agents", "observation"][after["done"][:, 0]].abs().sum() > 0.2


def test_continuous_task() -> None:
    env = vector_env(gym_env, n_envs=2, seed=0, kwargs={"id": "Pendulum-v1"})
    assert env.task_spec.continuous
    assert env.task_spec.action_low == ((-2.0,),)
    data = env.rollout(5)
    assert data["agents", "action"].shape == (2, 5, 1, 1)


def test_info_state_and_rendering() -> None:
    class Told(gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2, start=5)
        render_mode, metadata, acted = "ansi", {"render_modes": ["ansi"]}, None

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {"told": 1}

        def step(self, action):
            self.acted = action
            return np.ones(2, np.float32), 2, False, True, {"told": 2}

        def render(self):
            return "picture"

    env = OneAgent(Told())
    assert env.render_mode == "ansi"
    assert env.render() == "picture"
    assert env.reset()[1] == {AGENT: {"told": 1}}
    vector = VectorEnv([env], success="told")
    assert not vector.task_spec.own_state
    assert vector.task_spec.agents == (AGENT,)
    td = vector.step(vector.rand_action(vector.reset()))
    assert env.env.acted - 5 == td["agents", "action"].item()
    assert td["next", "success"].item()
    assert td["next", "state"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("shape", "picture"), [((8, 9, 3), (3, 8, 9)), ((3, 8, 9), (3, 8, 9)), ((8, 9), (1, 8, 9)), ((9, 4, 9), None)]
)
def test_bytes_of_two_or_three_dimensions_are_pictures(
    shape: tuple[int, ...], picture: tuple[int, int, int] | None
) -> None:
    class Seeing(gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 255, shape, np.uint8), gym.spaces.Discrete(2)

    if picture:
        assert VectorEnv([OneAgent(Seeing())]).task_spec.picture == picture
        return
    with pytest.raises(ValueError, match=r"agent 'agent_0' observes a picture of \(9, 4, 9\); right is \[channels"):
        VectorEnv([OneAgent(Seeing())])


@pytest.mark.parametrize("space", [gym.spaces.Box(0.0, 1.0, (8, 8, 3)), gym.spaces.Box(0, 255, (2, 2, 8, 8), np.uint8)])
def test_other_arrays_of_several_dimensions_are_refused(space: gym.spaces.Space) -> None:
    class Seeing(gym.Env):
        observation_space, action_space = space, gym.spaces.Discrete(2)

    with pytest.raises(ValueError, match="agent 'agent_0' observes .*one dimension"):
        VectorEnv([OneAgent(Seeing())])
