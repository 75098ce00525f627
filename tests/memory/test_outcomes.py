"""Episodes as they end, which of them count as successes and failures, and what the stores keep: beside plain lists."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.keys import Entry, Keys
from marl_memory.memory.outcomes import CELL, Ends, Outcomes, OutcomeStore, Taken, blame
from marl_memory.memory.trajectories import Finished, Trajectories
from marl_memory.spec import TaskSpec
from tests.memory.tasks import task

K = Keys()


def steps(spec: TaskSpec, count: int, n: int, seed: int, *, ends: float = 0.2) -> TensorDict:
    """Steps ``[T, N]`` of which some end an episode, by termination or time."""
    g, a, p = Generator().manual_seed(seed), spec.n_agents, spec.action_size
    td = TensorDict(batch_size=(count, n))
    td.set(K.observation, torch.randn(count, n, a, spec.observation_size, generator=g))
    td.set(K.state, torch.randn(count, n, spec.state_size, generator=g))
    td.set(K.alive, torch.rand(count, n, a, generator=g) < 0.8)
    if spec.continuous:
        td.set(K.action, torch.rand(count, n, a, p, generator=g))
    else:
        td.set(K.action, torch.randint(p, (count, n, a), generator=g))
        td.set(K.action_mask, torch.rand(count, n, a, p, generator=g) < 0.7)
    done = torch.rand(count, n, 1, generator=g) < ends
    td.set(("next", K.done), done)
    td.set(("next", K.terminated), done & (torch.rand(count, n, 1, generator=g) < 0.5))
    td.set(("next", K.state), torch.randn(count, n, spec.state_size, generator=g))
    td.set(("next", *K.reward), torch.randn(count, n, a, 1, generator=g))
    return td


class OneByOne:
    """What `Trajectories` is to know, episode by episode in plain lists."""

    def __init__(self, n: int, horizon: int) -> None:
        self.running: list[list[tuple[Tensor, Tensor, float]]] = [[] for _ in range(n)]
        self.horizon, self.time, self.found = horizon, 0, []

    def write(self, spec: TaskSpec, td: TensorDict) -> None:
        valid = torch.tensor(spec.observation_valid)
        for t in range(td.shape[0]):
            for env in range(td.shape[1]):
                row = td[t, env]
                alive = row.get(K.alive)
                observation = torch.where(alive.unsqueeze(-1) & valid, row.get(K.observation), 0.0)
                reward = row.get(("next", *K.reward)).squeeze(-1).double()[alive].sum().item() / spec.n_agents
                shape = (-1,) + (1,) * (row.get(K.action).ndim - 1)
                action = row.get(K.action) * alive.view(shape)
                action = action * torch.tensor(spec.action_valid) if spec.continuous else action
                self.running[env].append((observation, action, reward))
                if row.get(("next", K.done)):
                    episode = self.running[env]
                    self.found.append(
                        {
                            "env": env,
                            "last": self.time,
                            "length": len(episode),
                            "returns": sum(reward for *_, reward in episode),
                            "terminated": bool(row.get(("next", K.terminated))),
                            "observation": [x for x, *_ in episode[-self.horizon :]],
                            "action": [x for _, x, _ in episode[-self.horizon :]],
                        }
                    )
                    self.running[env] = []
            self.time += 1


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("cuts", [(64,), (1,) * 40, (3, 20, 7, 1, 33)])
def test_episodes_are_those_of_plain_lists_however_batches_are_cut(cuts: tuple[int, ...], continuous: bool) -> None:
    spec = task(2, features=(3, 2), actions=(3, 2), continuous=continuous)
    known = Trajectories(spec, n_envs=3, batch_steps=64, horizon=4, state=False)
    oracle, found = OneByOne(3, 4), 0
    for i, count in enumerate(cuts):
        td = steps(spec, count, 3, i)
        oracle.write(spec, td)
        ended = known.write(td)
        assert (ended is None) == (found == len(oracle.found))
        if ended is None:
            continue
        expected, found = oracle.found[found:], len(oracle.found)
        for name in ("env", "last", "length", "terminated"):
            assert getattr(ended, name).tolist() == [one[name] for one in expected], name
        torch.testing.assert_close(
            ended.returns, torch.tensor([one["returns"] for one in expected], dtype=torch.double)
        )
        rows, which, follow = known.steps(ended, ended.kept)
        for name in ("observation", "action"):
            torch.testing.assert_close(rows.get(name), torch.stack([x for one in expected for x in one[name]]))
        lengths = [len(one["action"]) for one in expected]
        assert which.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
        assert follow.tolist() == [j for length in lengths for j in reversed(range(length))]
    assert found > 3


def test_what_a_reset_cuts_is_nobodys_episode() -> None:
    spec = task()
    known = Trajectories(spec, n_envs=2, batch_steps=8, horizon=8, state=False)
    known.write(steps(spec, 5, 2, 0, ends=0.0))
    known.drop_running()
    td = steps(spec, 3, 2, 1, ends=0.0)
    td.get(("next", K.done))[-1] = True
    ended = known.write(td)
    assert ended is not None
    assert ended.length.tolist() == [3, 3]
    living = torch.where(td.get(K.alive), td.get(("next", *K.reward)).squeeze(-1), 0.0)
    torch.testing.assert_close(ended.returns.float(), living.sum((0, 2)))


def test_too_large_or_uneven_batches_are_refused() -> None:
    known = Trajectories(task(), n_envs=2, batch_steps=4, horizon=4, state=False)
    for count in (10, 3):
        with pytest.raises(ValueError, match="must be steps of n_envs=2 environments, at most batch_steps=4"):
            known.write(steps(task(), count, 1, 0))


@pytest.mark.parametrize("rewards", [(-0.1, -0.2, -0.1), (0.1, 0.7, 0.3)])
def test_equal_episodes_have_equal_returns(rewards: tuple[float, ...]) -> None:
    """To the bit, wherever in the run they are: else rounding would make successes."""
    known, judge = Trajectories(task(3), n_envs=2, batch_steps=64, horizon=60, state=False), Outcomes(**QUANTILES)
    returns, succeeded = [], 0
    for seed in range(20):
        td = steps(task(3), 64, 2, seed, ends=0.0)
        td.get(K.alive).fill_(True)
        td.get(("next", *K.reward)).copy_(torch.tensor(rewards).unsqueeze(-1))
        td.get(("next", K.done)).copy_((torch.arange(64 * seed, 64 * seed + 64) % 50 == 49).view(64, 1, 1))
        if (ended := known.write(td)) is not None:
            returns += ended.returns.tolist()
            succeeded += int(judge.judge(ended)[0].sum())
    assert len(returns) == 50 and len(set(returns)) == 1 and succeeded == 0
    assert returns[0] == pytest.approx(50 * sum(rewards) / 3)


def test_what_broke_off_is_nobodys_episode() -> None:
    spec = replace(task(), has_dropped=True)
    known = Trajectories(spec, n_envs=2, batch_steps=8, horizon=8, state=False)
    assert ("next", K.dropped) in known.write_keys
    td = steps(spec, 6, 2, 0, ends=0.0)
    done = torch.zeros(6, 2, 1, dtype=torch.bool)
    done[1], done[4, 0] = True, True
    dropped = done.clone()
    dropped[1, 1], dropped[4, 0] = False, False
    td.update({("next", K.done): done, ("next", K.dropped): dropped})
    ended = known.write(td)
    assert ended is not None and ended.env.tolist() == [1, 0] and ended.length.tolist() == [2, 3]
    living = torch.where(td.get(K.alive), td.get(("next", *K.reward)).squeeze(-1), 0.0).sum(-1)
    torch.testing.assert_close(ended.returns.float(), torch.stack([living[:2, 1].sum(), living[2:5, 0].sum()]))
    td.update({("next", K.dropped): done})
    assert known.write(td) is None


def test_a_reward_that_is_not_finite_ends_with_its_episode() -> None:
    known = Trajectories(task(), n_envs=1, batch_steps=8, horizon=8, state=False)
    td = steps(task(), 8, 1, 0, ends=0.0)
    td.get(K.alive).fill_(True)
    td.get(("next", K.done))[3::4] = True
    td.get(("next", *K.reward))[2] = torch.inf
    for bad in (True, False):
        ended = known.write(td)
        assert ended is not None and ended.returns.isfinite().tolist() == [not bad, True]
        td.get(("next", *K.reward))[2] = 0.0


# ------------------------------------------------------------------------------------------------ which is a success

QUANTILES = {"window": 200, "upper": 0.8, "lower": 0.2}


def finished(returns: list[float], success: list[bool] | None = None) -> Finished:
    count = len(returns)
    zero, whole = torch.zeros(count, dtype=torch.int64), torch.tensor(returns, dtype=torch.float64)
    won = None if success is None else torch.tensor(success)
    return Finished(zero, zero, zero + 1, zero + 1, whole, zero.bool(), won, torch.zeros(count, 1))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_outcomes_are_those_of_a_list_of_returns(flag: bool, integers: bool) -> None:
    generator = np.random.default_rng(0)
    judge, past, found = Outcomes(window=10, upper=0.7, lower=0.3), [], [0, 0]
    for size in (1, 2, 7, 1, 30, 4):
        returns = (generator.integers(3, size=size) if integers else generator.normal(size=size)).astype(float)
        won = [bool(x) for x in generator.random(size) < 0.4]
        success, failure = judge.judge(finished(list(returns), won if flag else None))
        for i, x in enumerate(returns):
            past = [*past, x][-10:]
            low, high = np.quantile(past, [0.3, 0.7])
            right = won[i] if flag else x >= high and x > low
            assert bool(success[i]) == right
            assert bool(failure[i]) == (not right and x <= low)
            found[0] += bool(success[i])
            found[1] += bool(failure[i])
    assert judge.seen.tolist() == [45, *found] and min(found) > 0


def test_equal_returns_are_no_successes() -> None:
    success, failure = Outcomes(window=10, upper=0.8, lower=0.2).judge(finished([1.0] * 5))
    assert not success.any() and failure.all()


@pytest.mark.parametrize("levels", [(0.2, 0.8), (0.5, 0.5), (1.2, 0.1), (0.5, -0.1)])
def test_crossed_quantiles_are_refused(levels: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be quantiles with 0 ≤ lower < upper ≤ 1"):
        Outcomes(window=10, upper=levels[0], lower=levels[1])


def test_blame_by_hand() -> None:
    weight = blame(
        torch.tensor([2, 1, 0, 3]), torch.tensor([3, 3, 3, 50]), torch.tensor([True, True, True, False]), decay=0.5
    )
    assert weight.tolist() == [0.25, 0.5, 1.0, 0.02]


def test_ends_are_one_within_a_cell() -> None:
    ends = Ends(3)
    state = torch.tensor([[0.5, -1.0, 2.0]])
    near, far = state + 0.3 * CELL, state + torch.tensor([0.0, 2 * CELL, 0.0])
    assert ends(state) == ends(near) != ends(far)
    assert len(ends(torch.randn(1000, 3, generator=Generator().manual_seed(0))).unique()) == 1000


# ------------------------------------------------------------------------------------------------------- the stores


class Listed:
    """What `OutcomeStore` is to hold: a sorted list."""

    def __init__(self, episodes: int, room: int, alike: int | None) -> None:
        self.episodes, self.room, self.alike = episodes, room, alike or episodes
        self.held: list[dict[str, Any]] = []
        self.bar = -math.inf

    def offer(self, new: list[dict[str, Any]]) -> None:
        order = sorted([*self.held, *new], key=lambda one: (-one["score"], one["length"], one["age"]))
        ends: dict[int, int] = {}
        self.held, total = [], 0
        for one in order:
            ends[one["end"]] = ends.get(one["end"], 0) + 1
            if ends[one["end"]] <= self.alike and one["score"] >= self.bar:
                total += len(one["steps"])
                if total > self.room or len(self.held) == self.episodes:
                    self.bar = one["score"]
                    break
                self.held.append(one)


@pytest.mark.parametrize(("episodes", "room", "alike"), [(5, 1000, 2), (50, 30, None), (8, 40, 3)])
def test_a_store_holds_what_a_sorted_list_holds(episodes: int, room: int, alike: int | None) -> None:
    store = OutcomeStore({"observation": Entry((1,))}, episodes=episodes, steps=room, alike=alike)
    oracle, generator, age, shapes = Listed(episodes, room, alike), np.random.default_rng(1), 0, store.state_dict()
    for _ in range(40):
        new = []
        for _ in range(generator.integers(1, 7)):
            length = int(generator.integers(1, 12))
            score = float(generator.integers(6))
            new.append({"score": score, "length": length, "end": int(generator.integers(3)), "age": age})
            new[-1]["steps"] = [age + j / 100 for j in range(length)]
            age += 1
        values = torch.tensor([x for one in new for x in one["steps"]]).unsqueeze(1)
        owners = torch.tensor([i for i, one in enumerate(new) for _ in one["steps"]])
        store.offer(
            Taken(
                score=torch.tensor([one["score"] for one in new], dtype=torch.float64),
                length=torch.tensor([one["length"] for one in new]),
                ends=torch.tensor([one["end"] for one in new]),
                rows=TensorDict({"observation": values}, batch_size=(len(values),)),
                episode=owners,
                weight=values.squeeze(1) * 2,
            )
        )
        oracle.offer(new)
        assert sorted(store.age[store.held].tolist()) == sorted(one["age"] for one in oracle.held)
        there = store.owner >= 0
        expected = sorted(x for one in oracle.held for x in one["steps"])
        torch.testing.assert_close(
            store.get_buffer("observation")[there].flatten().sort().values, torch.tensor(expected)
        )
        torch.testing.assert_close(store.weight[there], 2 * store.get_buffer("observation")[there].flatten())
        assert len(store) == len(expected) and store.held[store.owner[there]].all()
        for place in store.held.nonzero().flatten().tolist():
            mine = store.get_buffer("observation")[store.owner == place].flatten().sort().values
            assert len(mine) == int(store.count[place]) and int(mine[0]) == int(store.age[place])
    assert {name: x.shape for name, x in store.state_dict().items()} == {name: x.shape for name, x in shapes.items()}
    store.clear()
    assert len(store) == 0 and not store.held.any()


def test_random_scores_are_a_reservoir() -> None:
    """Of 60 episodes offered a few at a time, 10 stay; every one alike often."""
    counts = torch.zeros(60)
    generator = Generator().manual_seed(0)
    for _ in range(400):
        store = OutcomeStore({}, episodes=10, steps=100, alike=None)
        for first in range(0, 60, 6):
            ones = torch.arange(6)
            scores = torch.rand(6, generator=generator, dtype=torch.float64)
            rows = TensorDict({}, batch_size=(6,))
            store.offer(Taken(scores, torch.ones(6).long(), first + ones, rows, ones, torch.ones(6)))
        counts[store.age[store.held]] += 1
    expected = 400 / 6
    assert int(counts.sum()) == 4000
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected * 5 / 6)


def test_long_episodes_stay_in_a_reservoir_as_often_as_among_all_at_once() -> None:
    """What there was no room for is not replaced by shorter ones that come later."""
    generator, room, held, right = Generator().manual_seed(0), 500, torch.zeros(2), torch.zeros(2)
    for _ in range(40):
        lengths = torch.where(torch.rand(60, generator=generator) < 0.5, 20, 200)
        scores = torch.rand(60, generator=generator, dtype=torch.float64)
        store = OutcomeStore({}, episodes=60, steps=room, alike=None)
        for i, length in enumerate(lengths.tolist()):
            zero, rows = torch.zeros(1, dtype=torch.int64), TensorDict({}, batch_size=(length,))
            store.offer(Taken(scores[i, None], zero + length, zero, rows, zero.expand(length), torch.ones(length)))
        order = scores.argsort(descending=True)
        first = order[lengths[order].cumsum(0) <= room]
        for counts, found in ((held, store.age[store.held]), (right, first)):
            counts += torch.stack([(lengths[found] == length).sum() for length in (20, 200)])
        assert set(store.age[store.held].tolist()) <= set(first.tolist())
    # One at a time what will be among the first may be gone already: never another in its place.
    assert held[1] / held.sum() == pytest.approx(float(right[1] / right.sum()), abs=0.05)


def test_draws_are_of_what_is_held_and_all_alike_likely() -> None:
    store = OutcomeStore({}, episodes=3, steps=10, alike=None)
    rows = TensorDict({}, batch_size=(4,))
    store.offer(Taken(torch.zeros(2).double(), torch.tensor([1, 3]), torch.zeros(2).long(), rows,
                      torch.tensor([0, 1, 1, 1]), torch.ones(4)))  # fmt: skip
    drawn = store.draw((1000, 8), Generator().manual_seed(0)).flatten().bincount(minlength=10)
    assert drawn[4:].sum() == 0 and (drawn[:4] - 2000).abs().max() < 5 * math.sqrt(8000 * 3 / 16)
