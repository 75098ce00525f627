"""EpisodicReturn: its table against the definition over a replay, its clock, and what it hands to its hosts."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.functional.returns import columns_of, team_value, twin_backpropagation
from marl_memory.memory import return_table
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.memory.operator import Memory, Stage
from marl_memory.spec import TaskSpec
from marl_memory.testing import check_memory_operator
from tests.functional.test_rollouts import by_definition
from tests.memory.replayed import K, Lent, ring, trajectories, value_of
from tests.memory.tasks import task

torch.set_num_threads(1)

ENTRIES: list[Any] = [
    *(key for time in ((), ("next",)) for key in ((*time, *K.observation), (*time, *K.alive))),
    K.action,
    ("next", *K.reward),
    ("next", *K.discount),
]


def team(agents: int, *, common: bool = False) -> TaskSpec:
    spec = task(agents, features=3)
    return TaskSpec(**{**vars(spec), "common_reward": common})


def operator(spec: TaskSpec, **options: Any) -> EpisodicReturn:
    given = {"off_policy": True, "n_critics": 2, "capacity": 64, "gamma": 0.9, "n_envs": 2, "refresh_every": 20}
    return EpisodicReturn(spec=spec, **{**given, "max_rollout": None, **options}).double()


def collected(spec: TaskSpec, memory: EpisodicReturn, lengths: list[int], *, steps: int = 32, **options: Any) -> Lent:
    """A replay of N = 2 environments that took in parts of these lengths, with a sweep after each."""
    replay = ring(spec, steps=steps, n_envs=2, entries=ENTRIES, learn=memory.entries)
    whole, lent, at = trajectories(spec, sum(lengths), 2, 0, **options), Lent(replay), 0
    for length in lengths:
        replay.extend(whole[at : at + length])
        memory.sweep(value_of(memory.critics), lent)
        at += length
    return lent


def drawn(replay: Any, spec: TaskSpec, critics: int = 2, target: float = 100.0) -> TensorDict:
    """Every row of the replay, as a draw."""
    index = torch.arange(len(replay))
    td = TensorDict({K.row: replay.row_of(index)}, batch_size=(len(index),))
    for key, kept in zip(replay.entries, replay.flat, strict=True):
        td.set(key, kept[index])
    td.set(K.value_target, torch.full((len(index), spec.n_agents, critics), target, dtype=torch.float64))
    td.set(K.under_weight, torch.ones(len(index), spec.n_agents, 1, dtype=torch.float64))
    return td


def expected_returns(spec: TaskSpec, whole: TensorDict, critics: int = 2) -> Tensor:
    """R ``[T, N, A, C]`` of whole trajectories, column by column."""
    value = value_of(critics)(whole.get("next"))
    if spec.common_reward:
        value = team_value(value, whole.get(("next", *K.alive)))
    done = whole.get(("next", K.done)).unsqueeze(-2).expand(*whole.batch_size, spec.n_agents, 1).squeeze(-1)
    rows = (whole.get(("next", *K.reward)).squeeze(-1), value, whole.get(("next", *K.discount)).squeeze(-1), done)
    return twin_backpropagation(*rows, gamma=0.9)


# ------------------------------------------------------------------------------------------------------------ the table


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """Ends of episodes ``[T, N]``, T from 1 to 30 and N from 1 to 3."""
    n_envs = draw(st.integers(1, 3))
    return torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=n_envs, max_size=n_envs), min_size=1, max_size=30))
    )


@settings(deadline=None, max_examples=200)
@given(table=tables())
def test_columns_hold_every_row_once_and_cut_behind_episodes_only(table: Tensor) -> None:
    before, n_envs = table.clone(), table.shape[1]
    index, valid = columns_of(table)
    assert torch.equal(table, before)
    assert sorted(index[valid].tolist()) == list(range(table.numel()))
    closed = table.clone()
    closed[-1] = True
    lengths = []
    for env in closed.T.tolist():
        begin = -1
        for t, end in enumerate(env):
            if end:
                lengths.append(t - begin)
                begin = t
    assert len(index) <= 2 * max(lengths)
    for rows, real in zip(index.T.tolist(), valid.T.tolist(), strict=True):
        column = rows[: sum(real)]
        assert real == sorted(real, reverse=True) and closed.flatten()[column[-1]]
        for row, following in zip(column, column[1:], strict=False):
            assert following == row + n_envs or closed.flatten()[row]


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_however_steps_come_the_replays_episodes_stay_and_returns_reach_through_them(length: int, n_envs: int) -> None:
    """As with ``algorithm.train_every=1``: a sweep behind every step of the environments, most of them of one step."""
    spec = team(1)
    memory = operator(spec, n_envs=n_envs, capacity=32 * n_envs, refresh_every=7)
    replay = ring(spec, steps=32, n_envs=n_envs, entries=ENTRIES, learn=memory.entries)
    whole = trajectories(spec, 30, n_envs, 0)
    for last in range(length, 31, length):
        replay.extend(whole[last - length : last])
        memory.sweep(value_of(2), Lent(replay))
        assert torch.equal(replay.ends[:last], whole[:last]["next", K.done].squeeze(-1))
    memory.table.sweep(value_of(2), Lent(replay), 0)
    torch.testing.assert_close(memory.table.returns[:30], expected_returns(spec, whole))


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("agents", [1, 3])
def test_returns_after_the_ring_wrapped_are_those_of_the_whole_trajectories(agents: int, common: bool) -> None:
    """Overwriting the oldest steps leaves an exact suffix; and every row of a draw finds its own return."""
    spec = team(agents, common=common)
    memory = operator(spec, refresh_every=1)
    lent = collected(spec, memory, [7, 20, 11, 9])
    whole = trajectories(spec, 47, 2, 0)
    expected = expected_returns(spec, whole)[-32:]
    td = memory(drawn(lent.replay, spec))
    for i, number in enumerate(td[K.row].tolist()):
        step, env = divmod(number, 2)
        living = td[K.alive][i]
        torch.testing.assert_close(td[K.value_target][i][living], expected[step - 15, env][living])
        assert (td[K.value_target][i][~living] == 100).all() and (td[K.under_weight][i][~living] == 1).all()
        assert (td[K.under_weight][i][living] == 0.25).all()


def test_the_returns_are_the_definitions() -> None:
    spec = team(1)
    memory = operator(spec, refresh_every=1, capacity=200)
    lent = collected(spec, memory, [40], steps=100)
    whole = trajectories(spec, 40, 2, 0)
    for env in range(2):
        rows = (
            whole["next", "agents", "reward"][:, env, 0, 0],
            value_of(2)(whole["next"])[:, env, 0],
            whole["next", "agents", "discount"][:, env, 0, 0],
            whole["next", "done"][:, env, 0],
        )
        torch.testing.assert_close(memory.table.returns[:40, env, 0], by_definition(rows, 0.9, twin=True))
    assert len(memory) == len(lent.replay) == 80


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, found = team(2), []
    for rows in (4096, 6):
        monkeypatch.setattr(return_table, "BLOCK", rows)
        memory = operator(spec)
        lent = collected(spec, memory, [31, 16])
        assert max(last - first for first, last in lent.asked) <= max(rows // 2, 1)
        found.append(memory.table.returns.clone())
    assert torch.equal(*found)


def test_new_steps_have_provisional_returns_and_the_clock_counts_environment_steps() -> None:
    """20 environment steps are 10 vector steps: a refresh at 4 (the first), not at 7 and 10, then at 14."""
    spec = team(1)
    memory = operator(spec)
    replay = ring(spec, steps=32, n_envs=2, entries=ENTRIES, learn=memory.entries)
    whole, lent = trajectories(spec, 14, 2, 0, ends=0.0), Lent(replay)
    asked = []
    for first, last in ((0, 4), (4, 7), (7, 10), (10, 14)):
        before = memory.table.returns.clone()
        replay.extend(whole[first:last])
        lent.asked.clear()
        memory.sweep(value_of(2), lent)
        asked += lent.asked
        expected = expected_returns(spec, whole[0 if last == 14 else first : last])
        torch.testing.assert_close(memory.table.returns[0 if last == 14 else first : last], expected)
        assert last == 14 or torch.equal(memory.table.returns[:first], before[:first])
        assert len(memory) == 2 * last
    assert asked == [(0, 4), (4, 7), (7, 10), (0, 14)]


def test_only_the_newest_rows_of_a_larger_replay_have_returns() -> None:
    spec = team(1)
    memory = operator(spec, capacity=20, refresh_every=10)
    lent = collected(spec, memory, [25, 5])
    td = memory(drawn(lent.replay, spec))
    held = (td[K.value_target] != 100).all(-1).squeeze(-1)
    # Rows that live, of the newest 10 steps.
    assert torch.equal(held, (td[K.row] >= 2 * 20) & td[K.alive].squeeze(-1)) and held.any() and not held.all()
    assert lent.asked[-1] == (20, 30) and memory.payloads == (20, 20)


def test_episodes_that_run_may_be_left_out() -> None:
    spec = team(1)
    memory = operator(spec, include_running=False)
    lent = collected(spec, memory, [30])
    over = lent.ends_between(0, 30).flip(0).cumsum(0).flip(0) > 0
    assert torch.equal(memory.table.returns[:30, :, 0, 0].isfinite(), over) and not over.all()
    _, there = memory.table.find(torch.arange(60))
    assert torch.equal(there.squeeze(-1), over.flatten())


def test_a_reset_ends_the_trajectory_and_its_tail_bootstraps() -> None:
    spec = team(1)
    memory = operator(spec, refresh_every=1)
    replay = ring(spec, steps=32, n_envs=2, entries=ENTRIES, learn=memory.entries)
    whole = trajectories(spec, 12, 2, 0, ends=0.0)
    replay.extend(whole[:5])
    replay.cut_episodes()
    memory.cut_episodes()
    replay.extend(whole[5:])
    memory.sweep(value_of(2), Lent(replay))
    expected = torch.cat([expected_returns(spec, whole[:5]), expected_returns(spec, whole[5:])])
    torch.testing.assert_close(memory.table.returns[:12], expected)


def test_returns_are_made_of_the_rewards_that_learning_sees() -> None:
    spec = team(1)
    memory = operator(spec, estimator="lambda", lam=1.0)
    replay = ring(spec, steps=32, n_envs=2, entries=ENTRIES, learn=memory.entries)
    whole = trajectories(spec, 12, 2, 0)
    replay.extend(whole)
    none = lambda td, generator=None: torch.zeros(*td.batch_size, 1, 2)  # noqa: E731
    returns = []
    for scale in (1.0, 3.0):
        memory.clear()
        assert len(memory) == 0
        memory.sweep(none, Lent(replay, scale))
        returns.append(memory.table.returns[:12].clone())
    torch.testing.assert_close(3 * returns[0], returns[1])


# --------------------------------------------------------------------------------------------------- estimators, blends


def test_four_critics_are_two_pairs_of_which_the_least_counts() -> None:
    spec = team(1)
    four, floor = operator(spec, n_critics=4), operator(spec, n_critics=4, one_step_floor=True)
    for memory in (four, floor):
        collected(spec, memory, [30])
    whole = trajectories(spec, 30, 2, 0)
    pairs = value_of(4)(whole["next"]).unflatten(-1, (2, 2)).amin(-1)
    done = whole["next", "done"].expand(30, 2, 1)
    reward, discount = (whole["next", "agents", name].squeeze(-1) for name in ("reward", "discount"))
    expected = twin_backpropagation(reward, pairs, discount, done, gamma=0.9)
    torch.testing.assert_close(four.table.returns[:30], expected[..., [0, 0, 1, 1]])
    one_step = reward.unsqueeze(-1) + 0.9 * discount.unsqueeze(-1) * pairs
    torch.testing.assert_close(floor.table.returns[:30], torch.maximum(expected, one_step)[..., [0, 0, 1, 1]])


def test_a_critic_without_a_twin_is_estimated_alone_and_the_log_says_so() -> None:
    spec = team(1)
    alone, twin, single = (operator(spec, n_critics=c, estimator=e) for c, e in ((1, "twin"), (2, "twin"), (2, "max")))
    collected(spec, alone, [30])
    collected(spec, single, [30])
    torch.testing.assert_close(alone.table.returns[..., 0], single.table.returns[..., 0])
    assert not twin.remarks() and not single.remarks()
    assert Memory([("gem", alone)]).remarks() == [
        "memory=gem: the host has one critic (algorithm.critics=2 gives it two): without twins, returns are the "
        "maximum of its own estimates"
    ]


def test_strength_is_the_share_of_the_returns() -> None:
    spec = team(1)
    memory = operator(spec, strength=0.5, under_weight=0.2)
    lent = collected(spec, memory, [10])
    td = memory(drawn(lent.replay, spec))
    living = td[K.alive].squeeze(-1)
    returns, _ = memory.table.find(td[K.row])
    torch.testing.assert_close(td[K.value_target][living], 50 + returns[living] / 2)
    torch.testing.assert_close(td[K.under_weight][living].flatten(), torch.full((int(living.sum()),), 0.6).double())
    metrics = memory.metrics(td)
    assert metrics["used"] == 1 and metrics["effective_strength"] == 0.5 and metrics["rows"] == 20
    torch.testing.assert_close(metrics["lead"], (returns[living] - 100).mean())


def test_strength_0_and_an_empty_table_leave_the_targets_to_the_last_bit() -> None:
    spec = team(1)
    empty, off = operator(spec), operator(spec, strength=0.0)
    lent = collected(spec, off, [10])
    off.table.returns[3] = torch.inf
    for memory in (empty, off):
        td = drawn(lent.replay, spec)
        td[K.value_target].copy_(torch.randn(td[K.value_target].shape, generator=Generator().manual_seed(0)))
        after = memory(td.clone())
        assert torch.equal(after[K.value_target], td[K.value_target])
        assert torch.equal(after[K.under_weight], td[K.under_weight])


def test_a_return_that_is_not_finite_is_not_used() -> None:
    spec = team(1)
    memory = operator(spec)
    lent = collected(spec, memory, [10])
    memory.table.returns[3, 0, 0, 1] = torch.nan
    td = memory(drawn(lent.replay, spec))
    assert td[K.value_target].isfinite().all() and (td[K.value_target][6] == 100).all()


def test_values_are_asked_for_with_the_operators_own_generator() -> None:
    spec, drawn_by = team(1), []

    def noisy(td: TensorDict, generator: Generator | None = None) -> Tensor:
        assert generator is not None
        drawn_by.append(generator)
        return torch.randn(*td.batch_size, 1, 2, generator=generator)

    memory, other = operator(spec, seed=3), operator(spec, seed=3)
    replay = ring(spec, steps=32, n_envs=2, entries=ENTRIES, learn=memory.entries)
    replay.extend(trajectories(spec, 12, 2, 0))
    memory.sweep(noisy, Lent(replay))
    other.sweep(noisy, Lent(replay))
    assert torch.equal(memory.table.returns, other.table.returns)
    state = memory.state_dict()
    memory.sweep(noisy, Lent(replay))  # nothing is new: nothing is drawn
    assert len(drawn_by) == 2
    third = operator(spec, seed=4)
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    third.load_state_dict(torch.load(stream, weights_only=True))
    replay.extend(trajectories(spec, 12, 2, 1))
    for one in (other, third):
        one.sweep(noisy, Lent(replay))
    assert torch.equal(other.table.returns, third.table.returns) and other.refreshed == third.refreshed


# ------------------------------------------------------------------------------------------------- rows for PPO's hosts


@pytest.mark.parametrize(
    "options", [{}, {"max_rollout": None}, {"estimator": "lambda", "max_rollout": None, "refresh_every": 40}]
)
def test_without_a_replay_the_contract_holds(options: dict[str, Any]) -> None:
    check_memory_operator(
        partial(EpisodicReturn, n_critics=2, **{"capacity": 40, "refresh_every": 1, **options}), private=True
    )


def test_a_hosts_target_that_is_not_finite_is_replaced() -> None:
    spec = team(1)
    memory = operator(spec)
    lent = collected(spec, memory, [16])
    for strength, finite in ((1.0, True), (0.5, False)):
        memory.strength = strength
        td = drawn(lent.replay, spec, target=math.nan)
        memory(td)
        assert bool(td.get(K.value_target)[td.get(K.alive)].isfinite().all()) == finite


def test_rows_that_the_replay_lets_go_are_not_counted() -> None:
    spec = team(1)
    memory = operator(spec, capacity=200, refresh_every=10_000)
    replay = collected(spec, memory, [16, 16, 16, 16]).replay
    assert len(replay) == 64 and len(memory) == 64
    numbers = torch.arange(128)
    assert memory.table.find(numbers)[1][:, 0].tolist() == [False] * 64 + [True] * 64


def test_own_rows_of_pictures_stay_bytes() -> None:
    spec = replace(task(1, features=2 * 4 * 4, actions=3, continuous=False), picture=(2, 4, 4))
    memory = EpisodicReturn(spec=spec, capacity=8)
    assert memory.own is not None
    for key in (K.observation, (K.state,)):
        assert memory.entries[(*K.replay, "episodic_return", *key)].dtype == torch.uint8
    assert memory.own.steps.of(K.observation).dtype == memory.own.steps.of(K.state).dtype == torch.uint8


def test_rows_of_its_own_are_replayed_by_hand() -> None:
    """One environment; rewards 1, 2, 4, terminated; γ = ½ and V = 3: returns max-backed-up are 3½, 5 and 4."""
    spec = task(1, features=1)
    memory = EpisodicReturn(spec=spec, capacity=8, gamma=0.5, coefficient=0.2, value_coefficient=0.6, refresh_every=1)
    assert memory.stage is Stage.REPLAY and memory.writes_on == "update"
    td = trajectories(spec, 3, 1, 0, ends=0.0, dtype=torch.float32)
    td[K.alive].fill_(True)
    td["next", "agents", "alive"].fill_(True)
    td["next", "agents", "reward"].copy_(torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1))
    td["next", "agents", "discount"][2], td["next", "done"][2], td["next", "terminated"][2] = 0.0, True, True
    td.set(K.learn_reward, td["next", "agents", "reward"].clone())
    memory(td)
    assert not td[*K.replay, "episodic_return", "policy_weight"].any()
    memory.write(td)
    memory.refresh(lambda rows: torch.full((*rows.batch_size, 1, 1), 3.0))
    assert memory.table.returns[:3].flatten().tolist() == [1 + 0.5 * 4, 2 + 0.5 * 4, 4.0]
    memory(td)
    rows = td[*K.replay, "episodic_return"]
    assert rows["value_target"].flatten().tolist() == [3.0, 4.0, 4.0] and rows[K.alive].all()
    deviation = torch.tensor([3.0, 4.0, 4.0]).std(correction=0)
    gains = [0.0, min(1 / float(deviation), 1.0), min(1 / float(deviation), 1.0)]
    assert rows["policy_weight"].flatten().tolist() == pytest.approx([0.2 * gain for gain in gains])
    assert rows["value_weight"].flatten().tolist() == pytest.approx([0.3] * 3)
    assert torch.equal(rows[K.observation], td[K.observation]) and torch.equal(rows[K.action], td[K.action])


def test_values_of_rows_are_asked_for_once() -> None:
    """V of a state is what was said of it as the state that followed, but where an episode begins."""
    spec = task(1, features=3)
    memory = EpisodicReturn(spec=spec, capacity=40, n_envs=2, refresh_every=1)
    td = trajectories(spec, 20, 2, 0, ends=0.2, dtype=torch.float32)
    td.set(K.learn_reward, td["next", "agents", "reward"].clone())
    td[K.alive].fill_(True), td["next", "agents", "alive"].fill_(True)
    done = td["next", "done"].squeeze(-1)
    for t, n in done.nonzero().tolist():  # the next episode begins elsewhere
        if t < 19:
            td[K.observation][t + 1, n] += 10
    asked = []

    def bootstrap(rows: TensorDict) -> Tensor:
        asked.append(rows.numel())
        return value_of(1)(rows)

    memory.write(td)
    memory.refresh(bootstrap)
    assert sum(asked) == 40 + 2 + int(done[:-1].sum())
    assert memory.own is not None
    torch.testing.assert_close(memory.own.values[:20], value_of(1)(td)[..., 0])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rollout": 0}, "max_rollout=0 must be at least 1"),
        ({"under_weight": 0.0}, "under_weight=0.0 must lie in"),
        ({"under_weight": 1.5}, "under_weight=1.5 must lie in"),
        ({"scope": "shared", "reach": "centralized"}, "scope='shared' is not what the host's critic reads"),
        ({"capacity": 1}, "capacity=1 must hold a step of training.n_envs=2"),
        ({"refresh_every": 0}, "refresh_every=0 must be positive"),
        ({"estimator": "min"}, "estimator='min' must be one of twin, max, lambda"),
        ({"n_critics": 3}, "needs an even number of critics, the host has 3"),
        ({"lam": 0.5}, "lam=0.5 has no effect with estimator='twin'"),
        ({"estimator": "lambda", "lam": 2.0}, "lam=2.0 must lie in"),
        ({"estimator": "lambda", "max_rollout": 4}, "max_rollout=4 has no effect with estimator='lambda'"),
        ({"n_critics": 1, "one_step_floor": True}, "one_step_floor=True has an effect"),
        ({"coefficient": 0.5}, "coefficient=0.5 has no effect on a host with a replay"),
        ({"value_coefficient": 0.5}, "value_coefficient=0.5 has no effect on a host with a replay"),
        ({"off_policy": False, "under_weight": 0.5}, "under_weight=0.5 has no effect on a host without a replay"),
        ({"off_policy": False, "value_coefficient": -1.0}, "value_coefficient=-1.0 must not be negative"),
        ({"gamma": 1.5}, "gamma=1.5 must lie in"),
        ({"strength": 2.0}, "strength=2.0 must lie in"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator(team(2), **options)


def test_of_one_agent_every_scope_is_the_critics_reach() -> None:
    for scope in ("per_agent", "shared", "centralized"):
        operator(team(1), scope=scope, reach="per_agent")
