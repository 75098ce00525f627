"""Running episodes: returns by hand, against a plain list, over batches, resets and the end of the ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Keys
from marl_memory.memory.episodes import Ended, RunningEpisodes
from marl_memory.spec import TaskSpec
from marl_memory.training.replay import ReplayRing
from tests.memory.tasks import task

K = Keys()
GAMMA = 0.5


def episodes(spec: TaskSpec | None = None, **options: Any) -> RunningEpisodes:
    return RunningEpisodes(
        spec or task(),
        **{"n_envs": 1, "batch_steps": 8, "horizon": 16, "gamma": GAMMA, "learnt": False, **options},
    )


def batch(
    spec: TaskSpec,
    reward: Tensor,
    *,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    alive: Tensor | None = None,
    observation: Tensor | None = None,
) -> TensorDict:
    """Steps ``[T, N]`` with ``reward`` ``[T, N, A]``; observations at t + 1 are those at t plus 100."""
    t, n, a = reward.shape
    no = torch.zeros(t, n, dtype=torch.bool)
    terminated, truncated = (no if x is None else x for x in (terminated, truncated))
    alive = torch.ones(t, n, a, dtype=torch.bool) if alive is None else alive
    seen = torch.zeros(t, n, a, spec.observation_size) if observation is None else observation
    td = TensorDict(batch_size=(t, n))
    for prefix, x, lives in (((), seen, alive), (("next",), seen + 100, alive & ~terminated.unsqueeze(-1))):
        td.set((*prefix, *K.observation), x)
        td.set((*prefix, K.state), x.flatten(2))
        td.set((*prefix, *K.alive), lives)
        if not spec.continuous:
            td.set((*prefix, *K.action_mask), torch.tensor(spec.action_valid).expand(t, n, -1, -1).clone())
    p = spec.action_size
    td.set(K.action, torch.zeros(t, n, a, p) if spec.continuous else torch.zeros(t, n, a, dtype=torch.int64))
    td.set(("next", *K.reward), reward.unsqueeze(-1))
    td.set(("next", *K.discount), (~terminated).float().view(t, n, 1, 1).expand(t, n, a, 1).clone())
    td.set(("next", K.done), (terminated | truncated).unsqueeze(-1))
    td.set(("next", K.truncated), truncated.unsqueeze(-1))
    return td


def at(steps: int, *ends: int) -> Tensor:
    """``[T, 1]`` bool."""
    return torch.tensor([[t in ends] for t in range(steps)])


def nobody(td: TensorDictBase) -> Tensor:
    raise AssertionError("no episode was truncated, and a value is asked for")


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_the_returns_of_three_steps_over_two_batches() -> None:
    spec, running = task(), episodes()
    running.write(batch(spec, column([1.0, 2.0])))
    assert running.take(nobody) is None
    running.write(batch(spec, column([4.0, 8.0]), terminated=at(2, 0)))
    ended = running.take(nobody)
    assert ended is not None
    assert ended.returns.tolist() == [[1 + 0.5 * (2 + 0.5 * 4)], [2 + 0.5 * 4], [4.0]]
    assert ended.rows[K.row].tolist() == [0, 1, 2]
    assert running.take(nobody) is None  # the fourth step runs on
    running.write(batch(spec, column([16.0]), terminated=at(1, 0)))
    ended = running.take(nobody)
    assert ended is not None and ended.returns.tolist() == [[8 + 0.5 * 16], [16.0]]
    assert not running.open.any() and running.dropped == 0


def test_a_truncated_episode_goes_on_with_the_least_value_of_the_state_it_was_left_in() -> None:
    spec, running = task(), episodes()
    observation = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 2)
    running.write(batch(spec, column([1.0, 2.0, 3.0]), truncated=at(3, 1), observation=observation))
    asked = []

    def bootstrap(td: TensorDictBase) -> Tensor:
        asked.append(td.clone())
        return torch.tensor([7.0, 6.0]).expand(len(td), 1, 2)

    ended = running.take(bootstrap)
    assert ended is not None and ended.returns.tolist() == [[1 + 0.5 * (2 + 0.5 * 6)], [2 + 0.5 * 6]]
    assert len(asked) == 1 and asked[0][K.observation].tolist() == [[[101.0, 101.0]]]


def test_under_a_common_reward_the_dead_take_the_living_ones_value() -> None:
    spec = replace(task(2), common_reward=True)
    running = episodes(spec)
    alive = torch.tensor([[[True, True]], [[True, False]]])
    running.write(batch(spec, torch.ones(2, 1, 2), truncated=at(2, 1), alive=alive))
    ended = running.take(lambda td: torch.tensor([[[8.0], [-99.0]]]))
    assert ended is not None and ended.returns.tolist() == [[1 + 0.5 * 5, 1 + 0.5 * 5], [5.0, 5.0]]
    assert ended.rows[K.alive].tolist() == [[True, True], [True, False]]


def test_an_agent_s_own_return_ends_with_it() -> None:
    spec, running = task(2), episodes(task(2))
    td = batch(spec, torch.tensor([[[1.0, 1.0]], [[2.0, 5.0]], [[4.0, 7.0]]]), terminated=at(3, 2))
    td.get(("next", *K.discount))[1, 0, 1] = 0.0  # the second agent dies in the second step
    running.write(td)
    ended = running.take(nobody)
    assert ended is not None
    assert ended.returns[:, 0].tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]
    assert ended.returns[:2, 1].tolist() == [1 + 0.5 * 5, 5.0]


def test_rewards_are_the_environment_s_or_the_learner_s() -> None:
    td = batch(task(), column([1.0]), terminated=at(1, 0))
    td.set(K.learn_reward, torch.full((1, 1, 1, 1), 3.0))
    for learnt, expected in ((False, 1.0), (True, 3.0)):
        running = episodes(learnt=learnt)
        running.write(td.select(*running.write_keys, strict=False))
        ended = running.take(nobody)
        assert ended is not None and ended.returns.item() == expected


# ------------------------------------------------------------------------------------------------------ a plain list


def random_steps(seed: int, steps: int, n: int, agents: int) -> tuple[Tensor, Tensor, Tensor]:
    g = Generator().manual_seed(seed)
    reward = torch.randn(steps, n, agents, generator=g)
    ends = torch.rand(steps, n, generator=g)
    return reward, ends < 0.1, (ends >= 0.1) & (ends < 0.2)


@pytest.mark.parametrize("lengths", [[60], [1] * 60, [7, 1, 8, 3, 8, 8, 8, 8, 2, 7]], ids=len)
def test_episodes_equal_a_plain_list_wherever_batches_are_cut(lengths: list[int]) -> None:
    """So that the ring wraps several times; the value of the last state is its observation."""
    n, agents = 3, 2
    spec = task(agents)
    running = episodes(spec, n_envs=n, horizon=60, batch_steps=max(lengths))
    reward, terminated, truncated = random_steps(1, 60, n, agents)
    seen = torch.randn(60, n, agents, 2, generator=Generator().manual_seed(2))

    found: dict[int, Tensor] = {}

    def take_in(ended: Ended | None) -> None:
        for row, returns in zip(*((ended.rows[K.row].tolist(), ended.returns) if ended else ((), ())), strict=True):
            assert row not in found
            found[row] = returns

    since = 0
    for length in lengths:
        s = slice(since, since + length)
        td = batch(spec, reward[s], terminated=terminated[s], truncated=truncated[s], observation=seen[s])
        running.write(td)
        take_in(running.take(lambda td: td.get(K.observation)[..., :1]))
        since += length

    expected: dict[int, Tensor] = {}
    for env in range(n):
        waiting: list[int] = []
        for t in range(60):
            waiting.append(t)
            if terminated[t, env] or truncated[t, env]:
                value = seen[t, env, :, 0] + 100 if truncated[t, env] else torch.zeros(agents)
                for step in reversed(waiting):
                    value = reward[step, env] + GAMMA * value
                    expected[step * n + env] = value
                waiting.clear()
    assert found.keys() == expected.keys()
    for row, value in expected.items():
        torch.testing.assert_close(found[row], value)


def test_of_an_episode_longer_than_the_horizon_the_first_steps_are_dropped_and_counted() -> None:
    spec, running = task(), episodes(horizon=4, batch_steps=2)
    for i in range(5):
        running.write(batch(spec, column([1.0, 1.0]), terminated=at(2, 1) if i == 4 else None))
        ended = running.take(nobody)
    assert ended is not None and ended.rows[K.row].tolist() == [4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(ended.returns[0, 0], torch.tensor(2 * (1 - 0.5**6)))
    assert running.dropped == 4


def test_a_reset_drops_what_runs() -> None:
    spec, running = task(), episodes()
    running.write(batch(spec, column([1.0, 2.0])))
    running.drop_running()
    running.drop_running()
    assert running.dropped == 2
    running.write(batch(spec, column([3.0]), terminated=at(1, 0)))
    ended = running.take(nobody)
    assert ended is not None and ended.returns.tolist() == [[3.0]]
    assert ended.rows[K.row].tolist() == [2]


def test_rows_have_the_numbers_of_the_replay() -> None:
    spec, n = task(), 3
    running = episodes(spec, n_envs=n)
    replay = ReplayRing(
        capacity=15, n_envs=n, batch_size=64, entries=[("next", *K.reward)], learn_entries={}, keys=K, seed=0
    )
    numbered: dict[int, float] = {}
    for i in range(5):
        reward = torch.randn(2, n, 1, generator=Generator().manual_seed(i))
        td = batch(spec, reward, terminated=torch.ones(2, n, dtype=torch.bool))
        replay.extend(td)
        running.write(td)
        ended = running.take(nobody)
        assert ended is not None
        numbered |= dict(zip(ended.rows[K.row].tolist(), ended.returns.flatten().tolist(), strict=True))
    drawn = replay.draw()
    for row, reward in zip(drawn[K.row].tolist(), drawn["next", *K.reward].flatten().tolist(), strict=True):
        assert numbered[row] == reward


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, "gamma=1.5 must lie in"),
        ({"n_envs": 0}, "n_envs=0 must be positive"),
        ({"batch_steps": 0}, "batch_steps=0 must be positive"),
        ({"horizon": -3}, "horizon=-3 must be positive"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episodes(**options)


@pytest.mark.parametrize("shape", [(9, 2), (1, 3)])
def test_a_batch_that_does_not_fit_is_named(shape: tuple[int, int]) -> None:
    running = episodes(n_envs=2)
    with pytest.raises(ValueError, match=r"n_envs=2 environments, at most batch_steps=8"):
        running.write(batch(task(), torch.zeros(*shape, 1)))
