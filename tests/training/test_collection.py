"""The collector against what a scripted environment handed out, and episodes against a plain list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.keys import Entry, Keys
from marl_memory.spec import TaskSpec
from marl_memory.training.collection import Collector, Episodes, EpisodeTracker

K = Keys()
SPEC = TaskSpec(
    name="scripted",
    agents=("a", "b"),
    observation_sizes=(3, 3),
    action_sizes=(2, 2),
    continuous=False,
    state_size=3,
    own_state=True,
    common_reward=False,
    has_success=True,
)


class Scripted:
    """Environment i ends its episodes after ``lengths[i]`` steps; every number handed out is new and remembered."""

    def __init__(self, lengths: tuple[int, ...], *, resumable: bool = False) -> None:
        self.task_spec, self.n_envs, self.resumable = SPEC, len(lengths), resumable
        self.lengths, self.age = torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.int64)
        self.counter, self.seeds = 0.0, []
        self.steps: list[TensorDictBase] = []

    def numbers(self, *shape: int) -> Tensor:
        count = int(torch.tensor(shape).prod())
        self.counter += count
        return torch.arange(self.counter - count, self.counter).reshape(shape)

    def look(self, **flags: Tensor) -> TensorDict:
        n, td = self.n_envs, TensorDict(batch_size=(self.n_envs,))
        none = torch.zeros(n, 1, dtype=torch.bool)
        td.set(K.observation, self.numbers(n, 2, 3))
        td.set(K.action_mask, torch.ones(n, 2, 2, dtype=torch.bool))
        td.set(K.alive, torch.ones(n, 2, dtype=torch.bool))
        td.set(K.state, self.numbers(n, 3))
        td.set(K.discount, torch.ones(n, 2, 1))
        for key in (K.done, K.terminated, K.truncated, K.success):
            td.set(key, flags.get(key, none))
        return td

    def set_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def reset(self) -> TensorDictBase:
        self.age.zero_()
        return self.look()

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        self.age += 1
        done = (self.age == self.lengths).unsqueeze(-1)
        seen = self.look(done=done, terminated=done, success=done & (self.counter % 2 == 0))
        seen.set(K.reward, self.numbers(self.n_envs, 2, 1))
        tensordict.set("next", seen)
        self.steps.append(tensordict.clone())
        self.age[done.squeeze(-1)] = 0
        return tensordict, self.look()

    def snapshot(self) -> dict[str, Tensor]:
        return {"age": self.age.clone()}

    def restore(self, snapshot: dict[str, Tensor]) -> TensorDictBase:
        self.age = snapshot["age"].clone()
        return self.look()

    def close(self) -> None:
        pass


def choose(td: TensorDictBase) -> TensorDictBase:
    observation = td.get(K.observation)
    td.set(K.action, observation[..., 0].long() % 2)
    td.set(K.log_prob, observation[..., 1] / 7)
    return td


def collector(env: Scripted, steps: int = 5, act: Any = lambda td: None) -> Collector:
    return Collector(env, choose, act, steps=steps, learn_entries={K.value: Entry((2, 1))}, seed=11)


def test_rows_are_what_the_environment_handed_out() -> None:
    env = Scripted((3, 4))
    source = collector(env)
    for batch_number in range(3):
        batch, _ = source.collect()
        assert batch.batch_size == (5, 2)
        for t, handed in enumerate(env.steps[5 * batch_number :]):
            row = batch[t]
            for key in (K.observation, K.action_mask, K.alive, K.state, K.action, K.log_prob):
                assert torch.equal(row.get(key), handed.get(key)), key
            for key in handed.get("next").keys(include_nested=True, leaves_only=True):
                path = ("next", key) if isinstance(key, str) else ("next", *key)
                assert torch.equal(row.get(path), handed.get(path)), path


def test_actions_belong_to_the_observations_they_were_chosen_for() -> None:
    source = collector(Scripted((3, 4)))
    for _ in range(2):
        batch, _ = source.collect()
        assert torch.equal(batch.get(K.action), batch.get(K.observation)[..., 0].long() % 2)


def test_batch_is_locked_the_same_memory_and_has_the_learners_entries() -> None:
    source = collector(Scripted((3, 4)))
    first, _ = source.collect()
    pointers = {key: first.get(key).data_ptr() for key in first.keys(include_nested=True, leaves_only=True)}
    second, _ = source.collect()
    assert second is first
    assert first.is_locked
    with pytest.raises(RuntimeError):
        first.set("new", torch.zeros(5, 2))
    assert pointers == {key: second.get(key).data_ptr() for key in second.keys(include_nested=True, leaves_only=True)}
    assert second.get(K.value).shape == (5, 2, 2, 1)
    assert K.done not in second.keys()  # of the step before: only ("next", done) is kept
    assert K.reward not in second.keys(include_nested=True)


def test_memory_acts_on_the_choice_before_the_environment_sees_it() -> None:
    def flip(td: TensorDictBase) -> None:
        td.set(K.action, 1 - td.get(K.action))

    env = Scripted((3, 4))
    batch, _ = collector(env, act=flip).collect()
    assert torch.equal(batch.get(K.action), 1 - batch.get(K.observation)[..., 0].long() % 2)
    assert torch.equal(env.steps[0].get(K.action), batch[0].get(K.action))


def test_collector_counts_whole_episodes_across_batches() -> None:
    env = Scripted((3, 4))
    source = collector(env)
    batches = [source.collect()[1] for _ in range(4)]
    assert sum(len(found.lengths) for found in batches) == 20 // 3 + 20 // 4
    assert set(torch.cat([found.lengths for found in batches]).tolist()) == {3, 4}
    rewards = torch.stack([step.get(("next", *K.reward))[0].mean() for step in env.steps])
    assert batches[0].returns[0].item() == pytest.approx(rewards[:3].sum().item())


def test_reset_seeds_anew_and_forgets_running_episodes() -> None:
    env = Scripted((3, 7))
    source = collector(env)
    source.collect()
    assert source.episodes.running_length.tolist() == [2, 5]
    source.reset(42)
    assert env.seeds == [11, 42]
    _, found = source.collect()
    assert found.lengths.tolist() == [3]


def test_episodes_that_were_cut_do_not_come_back() -> None:
    source = collector(Scripted((3, 7), resumable=False))
    source.collect()
    state = source.state_dict()
    assert state == {}
    restored = collector(Scripted((3, 7), resumable=False))
    restored.load_state_dict(state)
    assert restored.episodes.running_length.tolist() == [0, 0]
    assert restored.collect()[1].lengths.tolist() == [3]


def test_state_goes_and_comes_back() -> None:
    env = Scripted((3, 7), resumable=True)
    source = collector(env)
    source.collect()
    state = source.state_dict()
    later = [source.collect()[1] for _ in range(2)]
    assert state["running_length"].tolist() == [2, 5]  # a copy, not a view of what goes on
    restored = collector(Scripted((3, 7), resumable=True))
    restored.load_state_dict(state)
    again = [restored.collect()[1] for _ in range(2)]
    for a, b in zip(later, again, strict=True):
        assert torch.equal(a.lengths, b.lengths)


# ---------------------------------------------------------------------------------------------------------- episodes


class PlainTracker:
    """Episodes by plain lists, environment by environment."""

    def __init__(self, n: int) -> None:
        self.rewards: list[list[float]] = [[] for _ in range(n)]

    def take(self, reward: Tensor, done: Tensor, success: Tensor) -> list[tuple[float, int, bool]]:
        ended = []
        for i, running in enumerate(self.rewards):
            for t in range(len(reward)):
                running.append(sum(reward[t, i, :, 0].tolist()) / reward.shape[2])
                if done[t, i]:
                    ended.append((sum(running), len(running), bool(success[t, i])))
                    running.clear()
        return ended


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_tracker_is_a_plain_list(n: int, sizes: list[int], share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tracker, oracle = EpisodeTracker(n), PlainTracker(n)
    for steps in sizes:
        reward = torch.randn(steps, n, 3, 1, generator=generator)
        done = torch.rand(steps, n, 1, generator=generator) < share
        success = done & (torch.rand(steps, n, 1, generator=generator) < 0.5)
        found = tracker.take(reward, done, success)
        expected = oracle.take(reward, done, success)
        assert found.lengths.tolist() == [length for _, length, _ in expected]
        assert found.returns.tolist() == pytest.approx([total for total, _, _ in expected], abs=1e-9)
        assert found.success is not None
        assert found.success.tolist() == [won for _, _, won in expected]


def test_metrics_are_means_and_leave_out_what_is_not_known() -> None:
    found = Episodes(torch.tensor([1.0, 3.0]).double(), torch.tensor([10, 20]), torch.tensor([True, False]))
    assert found.metrics("train") == {
        "train/episodes": 2, "train/return": 2.0, "train/length": 15.0, "train/success": 0.5,
    }  # fmt: skip
    without = Episodes(found.returns, found.lengths, None)
    assert "train/success" not in without.metrics("train")
    assert Episodes(found.returns[:0], found.lengths[:0], None).metrics("train") == {"train/episodes": 0}
