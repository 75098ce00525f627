"""Multiwalker: its ends and its state."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from marl_memory_envs import sisl
from marl_memory_envs.vector import vector_env

for _package in sisl.REQUIRES:
    pytest.importorskip(_package, reason="needs the extra box2d")


def walkers(n_envs: int = 3, **kwargs: Any):
    return vector_env(sisl.multiwalker, n_envs=n_envs, seed=0, common_reward=True, kwargs=kwargs)


def test_the_time_limit_truncates_and_a_fall_terminates() -> None:
    torch.manual_seed(0)
    after = walkers(max_cycles=20).rollout(20)["next"][:, -1]
    assert after["truncated"].all() and not after["terminated"].any()
    assert after["agents", "alive"].all() and after["agents", "discount"].all()
    after = walkers().rollout(300, break_when_any_done=False)["next"]
    fallen = after["terminated"].squeeze(-1)
    assert fallen.any() and not after["truncated"].any()
    assert (after["agents", "reward"][fallen] < -90).all()
    assert not after["agents", "discount"][fallen].any()


def test_a_fall_in_the_last_step_of_the_time_limit_is_a_fall() -> None:
    torch.manual_seed(0)
    data = walkers(n_envs=1).rollout(300)
    env = walkers(n_envs=1, max_cycles=data.shape[1])
    td = env.reset()
    for action in data["agents", "action"][0]:
        td["agents", "action"] = action.unsqueeze(0)
        after = env.step(td)["next"]
        td = after.clone()
    assert after["terminated"].item() and not after["truncated"].item()


def test_state_is_pettingzoos_while_all_stand_and_outlives_a_fall() -> None:
    torch.manual_seed(0)
    env = walkers(n_envs=1, terminate_on_fall=False)
    assert env.task_spec.own_state and env.task_spec.state_size == 3 * 24 + 3
    td, before = env.reset(), torch.zeros(3, dtype=torch.bool)
    for _ in range(400):
        assert np.array_equal(td["state"][0].numpy(), env.envs[0].state())
        gone = ~td["agents", "alive"][0]
        assert not td["state"][0, :72].reshape(3, 24)[before].any()  # zeros after the step of the fall
        before = gone
        if not gone.any():
            world = env.envs[0].unwrapped.env
            assert np.allclose(td["state"][0].numpy(), world.state())
        done, td = env.step_and_maybe_reset(env.rand_action(td))
        if done["next", "done"].item():
            break
    assert gone.any()


def test_the_same_steps_as_pettingzoo() -> None:
    theirs = import_module("pettingzoo.sisl.multiwalker.multiwalker").parallel_env()
    ours, rng = sisl.multiwalker(), np.random.default_rng(0)
    (seen, _), (expected, _) = ours.reset(seed=5), theirs.reset(seed=5)
    for _ in range(100):
        assert all(np.array_equal(seen[name], expected[name]) for name in theirs.possible_agents)
        actions = {name: rng.uniform(-1, 1, 4).astype(np.float32) for name in ours.agents}
        seen, *told, _ = ours.step(dict(actions))
        expected, *others, _ = theirs.step(dict(actions))
        assert told == others and ours.agents == theirs.agents
        if not ours.agents:
            (seen, _), (expected, _) = ours.reset(), theirs.reset()
