"""TaskSpec from sizes alone."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from marl_memory import TaskSpec


def test_of_sizes() -> None:
    one = TaskSpec.of_sizes(observation_size=3, action_low=(-2.0, 0.0), action_high=(2.0, 1.0))
    assert (one.n_agents, one.observation_size, one.action_size, one.continuous) == (1, 3, 2, True)
    assert one.action_high == ((2.0, 1.0),) and one.keys.observation == ("agents", "observation")
    team = TaskSpec.of_sizes(observation_size=3, n_actions=5, agents=2, group="team")
    assert (team.agents, team.action_sizes, team.continuous) == (("team_0", "team_1"), (5, 5), False)
    assert (team.state_size, team.own_state, team.keys.observation) == (6, False, ("team", "observation"))
    assert TaskSpec.from_dict(team.to_dict()) == team


def test_names_of_entries_are_made_once_and_are_no_field() -> None:
    one = TaskSpec.of_sizes(observation_size=3, n_actions=5)
    assert one.keys is one.keys
    assert replace(one, group="team").keys.observation == ("team", "observation")
    assert one == TaskSpec.from_dict(one.to_dict()) == pickle.loads(pickle.dumps(one))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_actions": 2, "action_low": (0.0,), "action_high": (1.0,)},
        {"action_low": (0.0,)},
        {"action_high": (0.0,)},
        {"action_low": (0.0,), "action_high": (1.0, 1.0)},
    ],
    ids=str,
)
def test_of_sizes_wants_either_a_number_or_bounds(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give n_actions"):
        TaskSpec.of_sizes(observation_size=3, **sizes)
