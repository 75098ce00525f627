"""Actors and critics: shapes and what they may depend on, in every arrangement."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.keys import Keys
from marl_memory.networks.actor import Actor
from marl_memory.networks.critic import Critic
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec

K = Keys()
BODY = partial(MLP, hidden=(8,), activation="tanh")


def task(agents: int = 3, *, continuous: bool = False, common: bool = True) -> TaskSpec:
    bounds = {"action_low": ((-1.0,) * 4,) * agents, "action_high": ((2.0,) * 4,) * agents} if continuous else {}
    return TaskSpec(
        name="synthetic",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(5,) * agents,
        action_sizes=(4,) * agents,
        continuous=continuous,
        state_size=7,
        own_state=True,
        common_reward=common,
        **bounds,
    )


def rows(agents: int = 3, *batch: int, same_observations: bool = False) -> TensorDict:
    generator = Generator().manual_seed(0)
    batch = batch or (6,)
    observation = torch.randn(*batch, 1 if same_observations else agents, 5, generator=generator)
    mask = torch.rand(*batch, agents, 4, generator=generator) < 0.5
    mask[..., 0] = True
    td = TensorDict(batch_size=batch)
    td.set(K.observation, observation.expand(*batch, agents, 5).clone())
    td.set(K.action_mask, mask)
    td.set(K.alive, torch.ones(*batch, agents, dtype=torch.bool))
    td.set(K.state, torch.randn(*batch, 7, generator=generator))
    return td


def critic(spec: TaskSpec, *, centralised: bool, share: bool, normalise: bool = False) -> Critic:
    return Critic(
        spec,
        BODY,
        centralised=centralised,
        share_parameters=share,
        normalise_observations=normalise,
        init_generator=Generator().manual_seed(1),
    )


def actor(spec: TaskSpec, *, share: bool = True, normalise: bool = False, seed: int = 0) -> Actor:
    return Actor(
        spec,
        BODY,
        share_parameters=share,
        normalise_observations=normalise,
        init_generator=Generator().manual_seed(1),
        seed=seed,
    )


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("centralised", [False, True])
@pytest.mark.parametrize("agents", [1, 3])
def test_values_have_one_shape(agents: int, centralised: bool, share: bool, common: bool, normalise: bool) -> None:
    network = critic(task(agents, common=common), centralised=centralised, share=share, normalise=normalise)
    for batch in ((6,), (2, 3)):
        td = rows(agents, *batch)
        network.update_moments(td)
        assert network(td).shape == (*batch, agents, 1)


@pytest.mark.parametrize(
    ("centralised", "share", "common", "equal"),
    [
        (True, True, True, True),  # one network of the state, one return: one value
        (True, True, False, False),  # one head each
        (True, False, True, False),  # a network each
        (False, True, True, False),  # told apart by the indicator
        (False, False, True, False),  # a network each
    ],
)
def test_agents_that_see_the_same(centralised: bool, share: bool, common: bool, equal: bool) -> None:
    values = critic(task(common=common), centralised=centralised, share=share)(rows(same_observations=True))
    for other in (1, 2):
        same = torch.equal(values[:, 0], values[:, other])
        assert same if equal else not torch.isclose(values[:, 0], values[:, other]).any()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("centralised", [False, True])
def test_critic_reads_what_it_should_and_nothing_else(centralised: bool, share: bool) -> None:
    network, td = critic(task(), centralised=centralised, share=share), rows()
    before = network(td)
    unread = td.clone()
    key = K.observation if centralised else K.state
    unread.get(key).add_(1.0)
    assert torch.equal(network(unread), before)
    if not centralised:  # each its own observation
        other = td.clone()
        other.get(K.observation)[:, 1].add_(1.0)
        torch.testing.assert_close(network(other)[:, ::2], before[:, ::2])
        assert not torch.isclose(network(other)[:, 1], before[:, 1]).any()


@pytest.mark.parametrize("share", [False, True])
def test_actor_chooses_by_its_own_observation(share: bool) -> None:
    policy, td = actor(task(), share=share), rows()
    before, other = policy.distribution(td).log_probs, td.clone()
    other.get(K.observation)[:, 1].add_(1.0)
    after = policy.distribution(other).log_probs
    torch.testing.assert_close(after[:, ::2], before[:, ::2])
    assert not torch.equal(after[:, 1], before[:, 1])


def test_indicator_is_dropped_where_nobody_shares() -> None:
    assert actor(task(3)).input.features == 5 + 3
    assert actor(task(3), share=False).input.features == 5
    assert actor(task(1)).input.features == 5
    one_agent = critic(task(1), centralised=False, share=True)
    assert one_agent.input.features == 5
    assert one_agent.input.indicator is None


@pytest.mark.parametrize("share", [False, True])
def test_one_agent_is_the_same_shared_or_not(share: bool) -> None:
    reference, network = critic(task(1), centralised=False, share=True), critic(task(1), centralised=False, share=share)
    assert torch.equal(network(rows(1)), reference(rows(1)))
    choice = [actor(task(1), share=s)(rows(1)).get(K.action) for s in (True, share)]
    assert torch.equal(*choice)


@pytest.mark.parametrize("continuous", [False, True])
def test_actor_writes_actions_and_their_probability(continuous: bool) -> None:
    policy, td = actor(task(continuous=continuous)), rows()
    out = policy(td)
    action, log_prob = out.get(K.action), out.get(K.log_prob)
    assert log_prob.shape == (6, 3)
    torch.testing.assert_close(log_prob, policy.distribution(td).log_prob(action))
    if continuous:
        assert action.shape == (6, 3, 4)
        assert ((action >= -1) & (action <= 2)).all()
    else:
        assert action.dtype == torch.int64
        assert td.get(K.action_mask).gather(-1, action.unsqueeze(-1)).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_greedy_actor_takes_the_mode_and_draws_nothing(continuous: bool) -> None:
    policy, td = actor(task(continuous=continuous)), rows()
    policy.greedy = True
    state = policy.generator.get_state()
    action = policy(td.clone()).get(K.action)
    assert torch.equal(action, policy.distribution(td).mode)
    assert torch.equal(policy.generator.get_state(), state)


def test_actors_draws_follow_its_seed() -> None:
    def draws(seed: int) -> Tensor:
        policy = actor(task(), seed=seed)
        return torch.stack([policy(rows(3, 50)).get(K.action) for _ in range(3)])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert not torch.equal(*draws(1)[:2])


def test_statistics_are_of_the_living() -> None:
    td = rows()
    td.get(K.alive)[:, 2] = False
    td.get(K.alive)[0] = False
    td.get(K.observation)[:, 2] = 1e6
    td.get(K.observation)[0] = 1e6
    td.get(K.state)[0] = 1e6
    own, central = (critic(task(), centralised=c, share=True, normalise=True) for c in (False, True))
    for network in (own, central):
        network.update_moments(td)
    torch.testing.assert_close(own.input.moments.mean[0].float(), td.get(K.observation)[1:, :2].mean((0, 1)))
    torch.testing.assert_close(central.moments.mean[0].float(), td.get(K.state)[1:].mean(0))


def test_log_std_is_one_row_or_one_per_agent() -> None:
    assert actor(task(continuous=True)).log_std.shape == (1, 4)
    apart = actor(task(continuous=True), share=False)
    apart.log_std.data = torch.arange(12.0).reshape(3, 4)
    scale = apart.distribution(rows()).scale
    assert torch.equal(scale[2], apart.log_std.exp())
