"""Greedy evaluation: an exact number of episodes with fixed quotas, and nothing of the run touched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Keys
from marl_memory.networks.actor import Actor
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.evaluation import evaluate

K = Keys()


def task(has_success: bool = True) -> TaskSpec:
    return TaskSpec(
        name="lengths",
        agents=("a", "b"),
        observation_sizes=(3, 3),
        action_sizes=(4, 4),
        continuous=False,
        state_size=6,
        own_state=False,
        common_reward=True,
        has_success=has_success,
    )


def policy() -> Actor:
    return Actor(
        task(),
        partial(MLP, hidden=(8,)),
        share_parameters=True,
        normalise_observations=True,
        init_generator=Generator().manual_seed(0),
        seed=1,
    )


class Lengths:
    """Episode number e of environment i lasts ``lengths[i]`` steps and pays ``100 i + e`` in all, at its end."""

    resumable = False

    def __init__(self, *lengths: int, has_success: bool = True) -> None:
        self.task_spec, self.n_envs, self.lengths = task(has_success), len(lengths), torch.tensor(lengths)
        self.seeds: list[int] = []
        self.actions: list[Tensor] = []

    def set_seed(self, seed: int) -> None:
        self.seeds.append(seed)
        self.generator = Generator().manual_seed(seed)

    def look(self) -> TensorDict:
        n, td = self.n_envs, TensorDict(batch_size=(self.n_envs,))
        td.set(K.observation, torch.randn(n, 2, 3, generator=self.generator))
        td.set(K.action_mask, torch.ones(n, 2, 4, dtype=torch.bool))
        td.set(K.alive, torch.ones(n, 2, dtype=torch.bool))
        return td

    def reset(self) -> TensorDictBase:
        self.age, self.episode = torch.zeros(self.n_envs, dtype=torch.int64), torch.zeros(self.n_envs)
        return self.look()

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        self.actions.append(tensordict.get(K.action).clone())
        self.age += 1
        done = self.age == self.lengths
        pay = torch.where(done, 100 * torch.arange(self.n_envs) + self.episode, 0.0)
        seen = self.look()
        seen.set(K.reward, pay.reshape(-1, 1, 1).expand(-1, 2, 1).clone())
        seen.set(K.done, done.unsqueeze(-1))
        if self.task_spec.has_success:
            seen.set(K.success, (~done | (self.episode == 0)).unsqueeze(-1))  # before an end it says nothing
        tensordict.set("next", seen)
        self.age[done], self.episode = 0, self.episode + done
        return tensordict, self.look()


@pytest.mark.parametrize(("episodes", "quotas"), [(1, (1, 0, 0)), (3, (1, 1, 1)), (5, (2, 2, 1)), (7, (3, 2, 2))])
def test_exactly_the_first_episodes_of_each_environment(episodes: int, quotas: tuple[int, ...]) -> None:
    lengths = (2, 9, 5)  # the first would otherwise play most of them
    found = evaluate(Lengths(*lengths), policy(), episodes=episodes, seed=0)
    expected = [(100.0 * i + e, lengths[i], e == 0) for i, quota in enumerate(quotas) for e in range(quota)]
    assert found.returns.tolist() == [total for total, _, _ in expected]
    assert found.lengths.tolist() == [length for _, length, _ in expected]
    assert found.success is not None
    assert found.success.tolist() == [won for _, _, won in expected]


def test_short_episodes_are_not_favoured() -> None:
    found = evaluate(Lengths(1, 50), policy(), episodes=10, seed=0)
    assert found.lengths.double().mean().item() == 25.5


def test_success_is_left_out_where_the_task_does_not_tell() -> None:
    assert evaluate(Lengths(2, has_success=False), policy(), episodes=2, seed=0).success is None


def test_nothing_of_the_actor_is_touched() -> None:
    actor = policy()
    generator = actor.generator.get_state()
    state = {key: x.clone() for key, x in actor.state_dict().items()}
    torch.manual_seed(0)
    everybodys = torch.get_rng_state()
    evaluate(Lengths(2, 3), actor, episodes=5, seed=0)
    assert torch.equal(actor.generator.get_state(), generator)
    assert torch.equal(torch.get_rng_state(), everybodys)
    assert all(torch.equal(state[key], x) for key, x in actor.state_dict().items())
    assert not actor.greedy
    assert all(p.grad is None for p in actor.parameters())


def test_the_mode_is_played_and_the_seed_repeats_it() -> None:
    first, second, other = Lengths(3, 4), Lengths(3, 4), Lengths(3, 4)
    actor = policy()
    for env, seed in ((first, 5), (second, 5), (other, 6)):
        evaluate(env, actor, episodes=4, seed=seed)
    assert first.seeds == [5]
    assert all(torch.equal(a, b) for a, b in zip(first.actions, second.actions, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.actions, other.actions, strict=True))
    env = Lengths(3)
    evaluate(env, actor, episodes=1, seed=9)
    env.set_seed(9)
    seen = env.reset()
    assert torch.equal(actor.distribution(seen).mode, env.actions[0])


def test_actor_is_not_left_greedy_by_an_error() -> None:
    class Broken(Lengths):
        def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
            raise OSError("the simulator died")

    actor = policy()
    with pytest.raises(OSError, match="died"):
        evaluate(Broken(2), actor, episodes=1, seed=0)
    assert not actor.greedy


class Paid(Lengths):
    """Says too how the episodes end: those of environment 1 are truncated."""

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        step, following = super().step_and_maybe_reset(tensordict)
        after, cut = step.get("next"), torch.tensor([[False], [True]])
        done = after.get(K.done)
        after.set(K.truncated, done & cut)
        after.set(K.discount, (~done | cut).float().unsqueeze(-2).expand(-1, 2, 1).clone())
        return step, following


class Expecting:
    """10 for the first agent and 20 for the second."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec, self.gamma = spec, 0.5

    def estimate(self, td: TensorDictBase) -> torch.Tensor:
        return torch.tensor([10.0, 20.0]).expand(*td.batch_size, 2)


def test_overestimation_is_what_is_expected_minus_the_discounted_return() -> None:
    """Environment i pays 100 i + e at the end of its episode e, after 3 and 2 steps; γ = ½; means over agents."""
    env = Paid(3, 2)
    found = evaluate(env, policy(), episodes=4, seed=0, critic=Expecting(env.task_spec))  # type: ignore[arg-type]
    assert found.overestimation is not None
    terminated = [15 - 0.25 * e for e in (0, 1)]
    truncated = [15 - 0.5 * (100 + e) - 0.25 * 15 for e in (0, 1)]
    assert found.overestimation.tolist() == [*terminated, *truncated]
    assert found.metrics("evaluation")["evaluation/overestimation"] == sum(terminated + truncated) / 4
