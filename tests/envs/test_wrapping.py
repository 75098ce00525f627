"""SuperSuit's wrappers by name: around one-agent tasks and teams, with their arguments, and the same for a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import supersuit
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from marl_memory_envs.toy import Rendezvous
from marl_memory_envs.vector import vector_env
from marl_memory_envs.wrapping import Wrapped, known_wrappers

CARTPOLE = "marl_memory_envs.classic:cartpole"


class Film(ParallelEnv[str, Any, Any]):
    """Two agents before a screen ``[12, 10, 3]`` that shows the time, brighter at each step; six steps long."""

    metadata = {"name": "film", "render_modes": []}
    render_mode = None
    possible_agents = ["first", "second"]

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Box(0, 255, (12, 10, 3), np.uint8)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(2)

    def _seen(self) -> dict[str, np.ndarray]:
        return {name: np.full((12, 10, 3), 10 + 10 * self.time, np.uint8) for name in self.possible_agents}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.agents, self.time = list(self.possible_agents), 0
        return self._seen(), {name: {} for name in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        self.time, acting = self.time + 1, self.agents
        over = self.time == 6
        self.agents = [] if over else acting
        rewards = {name: 3.0 * float(actions[name]) for name in acting}
        ends = dict.fromkeys(acting, over)
        return self._seen(), rewards, dict.fromkeys(acting, False), ends, {name: {} for name in acting}


def film() -> Film:
    return Film()


def values(td: Any, picture: tuple[int, ...]) -> list[int]:
    """The brightness of each of the first agent's channels."""
    planes = td["agents", "observation"][0, 0].reshape(picture)
    assert (planes == planes[:, :1, :1]).all()
    return planes[:, 0, 0].tolist()


def test_without_wrappers_a_picture_is_its_channels_one_after_the_other() -> None:
    env = vector_env(film, n_envs=2, seed=0)
    assert (env.task_spec.picture, env.task_spec.frame_stack) == ((3, 12, 10), 1)
    td = env.reset()
    assert td["agents", "observation"].dtype == td["state"].dtype == torch.uint8
    assert values(td, (3, 12, 10)) == [10, 10, 10]
    assert torch.equal(td["state"], td["agents", "observation"].flatten(1))


def test_stacks_hold_the_oldest_picture_first() -> None:
    wrappers = [{"color_reduction": {"mode": "R"}}, {"frame_stack_v1": {"stack_size": 3}}]
    env = vector_env(film, n_envs=2, seed=0, wrappers=wrappers)
    assert (env.task_spec.picture, env.task_spec.frame_stack) == ((3, 12, 10), 3)
    td = env.reset()
    assert values(td, (3, 12, 10)) == [0, 0, 10]
    for expected in ([0, 10, 20], [10, 20, 30]):
        td["agents", "action"] = torch.ones(2, 2, dtype=torch.int64)
        td, following = env.step_and_maybe_reset(td)
        assert values(following, (3, 12, 10)) == expected
        td = following


def test_wrappers_apply_from_the_inmost_out() -> None:
    """Two frames a step, each worth 3; the clipped sum of two is 1, the sum of two clipped ones 2."""
    for wrappers, expected in (
        ([{"frame_skip": {"num_frames": 2}}, "clip_reward"], 1.0),
        (["clip_reward_v0", {"frame_skip_v0": {"num_frames": 2}}], 2.0),
    ):
        env = vector_env(film, n_envs=1, seed=0, wrappers=wrappers)
        td = env.reset()
        td["agents", "action"] = torch.ones(1, 2, dtype=torch.int64)
        assert env.step(td)["next", "agents", "reward"].flatten().tolist() == [expected] * 2


def test_a_stack_that_other_wrappers_change_is_kept_whole() -> None:
    """A replay makes stacks again of single pictures only where each step adds one."""
    stack = {"frame_stack": {"stack_size": 4}}
    grey = {"color_reduction": {"mode": "full"}}
    for wrappers, expected in (
        ([grey, stack, {"resize": {"x_size": 8, "y_size": 8}}], 4),
        ([grey, stack, {"frame_skip": {"num_frames": 2}}], 1),
        ([grey, stack, {"delay_observations": {"delay": 1}}], 1),
    ):
        env = vector_env(film, n_envs=1, seed=0, wrappers=wrappers)
        assert env.task_spec.frame_stack == expected, wrappers


def test_a_one_agent_task_can_be_wrapped() -> None:
    wrappers = [{"frame_stack": {"stack_size": 3}}, {"frame_skip": {"num_frames": 2}}]
    env = vector_env(CARTPOLE, n_envs=2, seed=0, wrappers=wrappers)
    assert (env.task_spec.observation_sizes, env.task_spec.picture) == ((12,), None)
    td = env.rand_action(env.reset())
    assert env.step(td)["next", "agents", "reward"].flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("stepping", ["serial", "processes"])
def test_what_wrappers_draw_follows_from_the_seed(stepping: str) -> None:
    """SuperSuit's sticky actions draw from the clock in every episode but the first, if one lets them."""
    wrappers = [{"sticky_actions": {"repeat_action_probability": 0.5}}]

    def play(seed: int) -> torch.Tensor:
        env = vector_env("marl_memory_envs.classic:cartpole", n_envs=2, seed=seed, wrappers=wrappers, stepping=stepping)
        td, found, actions = env.reset(), [], Generator(0)
        for _ in range(60):
            td["agents", "action"] = actions()
            _, td = env.step_and_maybe_reset(td)
            found.append(td["agents", "observation"])
        env.close()
        return torch.stack(found)

    first = play(3)
    assert torch.equal(first, play(3))
    assert not torch.equal(first, play(4))


class Generator:
    """Random actions ``[2, 1]``, the same each time."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> torch.Tensor:
        return torch.randint(2, (2, 1), generator=self.generator)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "color_reduction": {"mode": "B"},
    "resize": {"x_size": 8, "y_size": 6},
    "dtype": {"dtype": "uint8"},
    "reshape": {"shape": [20, 18]},
    "scale_actions": {"scale": 0.5},
    "delay_observations": {"delay": 2},
    "frame_skip": {"num_frames": 2},
    "max_observation": {"memory": 2},
    "sticky_actions": {"repeat_action_probability": 0.3},
    "nan_noop": {"no_op_action": 0},
    "action_lambda": {"change_action_fn": f"{__name__}:same", "change_space_fn": f"{__name__}:same"},
    "observation_lambda": {"change_observation_fn": f"{__name__}:darker"},
    "reward_lambda": {"change_reward_fn": f"{__name__}:darker"},
}
REAL = ("scale_actions", "clip_actions")
"""They need real actions."""


def same(x: Any, space: Any = None) -> Any:
    return x


def darker(x: Any, space: Any = None) -> Any:
    return x // 2


@pytest.mark.parametrize("name", sorted(known_wrappers()))
def test_every_wrapper_of_supersuit_can_be_named(name: str) -> None:
    plain = name.rpartition("_v")[0]
    wrapper = {plain: ARGUMENTS[plain]} if plain in ARGUMENTS else name
    make = Rendezvous if plain in REAL or plain == "normalize_obs" else film
    if plain == "normalize_obs":
        pytest.skip("it needs real pictures, which no task of ours has")
    env = Wrapped(make, [wrapper])()
    observations, _ = env.reset(seed=0)
    actions = {agent: env.action_space(agent).sample() for agent in env.agents}
    for agent, seen in env.step(actions)[0].items():
        assert env.observation_space(agent).contains(seen), name
        assert env.observation_space(agent).contains(observations[agent])


@pytest.mark.parametrize(
    ("wrappers", "said"),
    [
        (["frame_stak"], r"env\.wrappers\[0\]='frame_stak' is no wrapper of SuperSuit .*: did you mean frame_stack"),
        (["clip_reward", "resiz_v1"], r"env\.wrappers\[1\]='resiz_v1' .*did you mean resize"),
        (["resize_v0"], r"env\.wrappers\[0\]='resize_v0': SuperSuit .* has resize_v1; name that, or resize"),
        (["concat_vec_envs_v1"], r"'concat_vec_envs_v1' is no wrapper"),
        (["xyz"], r"known are action_lambda, agent_indicator"),
        (["resize"], r"env\.wrappers\[0\]: resize_v1\(\): missing a required argument: 'x_size'"),
        ([{"resize": {"x_size": 8, "y_size": 8, "z": 1}}], r"got an unexpected keyword argument 'z'"),
        ([{"frame_stack": 4}], r"must be a wrapper's name, or a mapping of one name to its arguments"),
        ([{"resize": {}, "clip_reward": {}}], r"must be a wrapper's name"),
        ([{"color_reduction": {"mode": "R"}}, {"frame_stack": {"stack_dim": 0}}], r"stack_dim=0 is wrong in SuperSuit"),
        ([7], r"env\.wrappers\[0\]=7 must be a wrapper's name"),
        (
            [{"color_reduction": {"mode": "purple"}}],
            r"env\.wrappers\[0\]: color_reduction_v0\(mode='purple'\) does not",
        ),
    ],
)
def test_what_does_not_fit_is_said(wrappers: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        vector_env(film, n_envs=1, seed=0, wrappers=wrappers)


def test_the_newest_version_is_meant_where_none_is_named() -> None:
    newest = max(int(name.rpartition("_v")[2]) for name in vars(supersuit) if name.startswith("frame_stack_v"))
    assert Wrapped(film, [{"frame_stack": {}}]).layers == [(f"frame_stack_v{newest}", {})]
