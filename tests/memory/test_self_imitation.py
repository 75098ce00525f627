"""Self-imitation: its loss by hand, its draws, whose steps are replayed, and that it is PPO where it does not act."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.ppo import PPO
from marl_memory.keys import Keys
from marl_memory.memory.operator import Bootstrap
from marl_memory.memory.self_imitation import NAME, SelfImitation
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.testing import check_memory_operator
from tests.memory.tasks import FIRST, SCOPES, task

K = Keys()
OWN = (*K.replay, NAME)
BODY = partial(MLP, hidden=(8,))


def memory(spec: TaskSpec, **options: Any) -> SelfImitation:
    sizes = {"capacity": 60 * spec.n_agents, "normalise": False, "clip": None, "gamma": 0.5}
    return SelfImitation(spec=spec, **{**sizes, **options})


def collected(spec: TaskSpec, seed: int, *shape: int, over: bool = True) -> TensorDict:
    """Steps ``[*B]`` as PPO leaves them, each an episode of its own if ``over``; the reward tells whose step it is."""
    g, (a, p) = Generator().manual_seed(seed), (spec.n_agents, spec.action_size)
    td = TensorDict(batch_size=shape)
    for prefix, alive in (((), True), (("next",), not over)):
        observation = torch.randn(*shape, a, spec.observation_size, generator=g)
        td.set((*prefix, *K.observation), observation)
        td.set((*prefix, K.state), observation.flatten(-2))
        td.set((*prefix, *K.alive), torch.full((*shape, a), alive))
        if not spec.continuous:
            mask = torch.rand(*shape, a, p, generator=g) < 0.6
            mask[..., 0] = True
            td.set((*prefix, *K.action_mask), mask & torch.tensor(spec.action_valid))
    action = torch.rand(*shape, a, p, generator=g) * 1.8 - 0.9
    td.set(K.action, action if spec.continuous else td.get(K.action_mask).int().argmax(-1))
    td.set(K.learn_reward, torch.rand(*shape, a, 1, generator=g) + 2 * torch.arange(a).view(a, 1))
    td.set(("next", *K.discount), torch.full((*shape, a, 1), float(not over)))
    td.set(("next", K.done), torch.full((*shape, 1), over))
    td.set(("next", K.truncated), torch.zeros(*shape, 1, dtype=torch.bool))
    return td


def constant(value: float, agents: int) -> Bootstrap:
    return lambda td: torch.full((*td.batch_size, agents, 1), value)


def recalled(operator: SelfImitation, rows: int, alive: Tensor | None = None) -> TensorDictBase:
    """What is replayed beside ``rows`` rows."""
    a = operator.spec.n_agents
    td = TensorDict({K.alive: torch.ones(rows, a, dtype=torch.bool) if alive is None else alive}, batch_size=(rows,))
    return operator(td).get(OWN)


def taught(operator: SelfImitation, td: TensorDictBase, value: float = 0.0) -> None:
    operator.write(td)
    operator.refresh(constant(value, operator.spec.n_agents))


# ------------------------------------------------------------------------------------------------------------- by hand


def test_gains_and_weights_by_hand() -> None:
    """R = 1, 3 and 5 at V = 2: the second and third gain 1 and 3; a = 0.5, b = 0.25."""
    operator = memory(task(), coefficient=0.2, value_coefficient=0.5, priority=0.5, correction=0.25, strength=0.5)
    td = collected(operator.spec, 0, 3)
    td.get(K.learn_reward).copy_(torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1))
    taught(operator, td, 2.0)
    assert operator.gains().flatten()[:3].tolist() == [0.0, 1.0, 3.0]
    rows = recalled(operator, 1000)
    target, policy, value = (rows.get(name).flatten() for name in ("value_target", "policy_weight", "value_weight"))
    assert set(target.tolist()) == {3.0, 5.0} and rows.get(K.alive).all()
    third = target == 5.0
    assert third.float().mean().item() == pytest.approx(3**0.5 / (1 + 3**0.5), abs=2e-3)  # strata: no chance in it
    weight = 3 ** (0.5 * -0.25)
    torch.testing.assert_close(policy, torch.where(third, 0.5 * 0.2 * 3 * weight, 0.5 * 0.2))
    torch.testing.assert_close(value, torch.where(third, 0.5 * 0.2 * 0.5 / 2 * weight, 0.5 * 0.2 * 0.5 / 2))
    for key in (K.observation, K.action):
        torch.testing.assert_close(rows.get(key), torch.where(third.view(-1, 1, 1), td.get(key)[2], td.get(key)[1]))
    torch.testing.assert_close(
        rows.get(K.state), torch.where(third.view(-1, 1), td.get(K.state)[2], td.get(K.state)[1])
    )


def test_gains_are_in_deviations_of_the_returns_and_clipped() -> None:
    operator = memory(task(), normalise=True, clip=1.5)
    td = collected(operator.spec, 0, 2)
    td.get(K.learn_reward).copy_(torch.tensor([1.0, 5.0]).view(2, 1, 1))
    taught(operator, td, 0.0)  # a deviation of 2
    assert operator.gains().flatten()[:2].tolist() == [0.5, 1.5]


def test_every_row_is_replayed_though_the_agent_dies_in_every_batch() -> None:
    """Where somebody lives in the first half of a batch only, the second half of what is held is replayed as often."""
    operator = memory(task(), priority=0.0)
    td = collected(operator.spec, 0, 32)
    td.get(K.learn_reward).fill_(1.0)
    taught(operator, td)
    held, counts = operator.get_buffer("observation")[0, :32, 0], torch.zeros(32)
    alive = torch.arange(32).view(32, 1) < 16
    for _ in range(100):
        operator.refresh(constant(0.0, 1))
        rows = recalled(operator, 32, alive)
        seen = rows.get(K.observation)[rows.get(K.alive)]
        counts += torch.bincount(torch.cdist(seen, held).argmin(1), minlength=32)
    assert counts.sum() == 1600 and counts.min() > 0
    assert abs(counts[:16].sum().item() - 800) < 200  # were they laid row on row it would be 1 600 or so


def test_the_values_are_those_of_the_last_refresh() -> None:
    operator = memory(task())
    td = collected(operator.spec, 0, 4)
    taught(operator, td, -1.0)
    assert operator.metrics(operator(td.clone()))["better"] == 1
    operator.refresh(constant(100.0, 1))
    rows = recalled(operator, 8)
    assert not rows.get(K.alive).any() and not rows.get("policy_weight").any() and not rows.get("value_weight").any()


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("value_norm", [False, True])
def test_the_loss_of_two_rows_by_hand(continuous: bool, value_norm: bool) -> None:
    """Its gradient in the last biases, written out: of −w log π and of v (V − y)², means over the rows."""
    spec = task(1, actions=3, continuous=continuous)
    host = PPO(spec=spec, network=BODY, seed=0, value_norm=value_norm, minibatches=1, epochs=1)
    if host.value_norm is not None:
        host.value_norm.update(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))
    td = collected(spec, 1, 2)
    rows = td.select(K.observation, K.state, K.alive, K.action, *([] if continuous else [K.action_mask]))
    w, v, y = torch.tensor([[0.3], [0.8]]), torch.tensor([[0.2], [0.1]]), torch.tensor([[[4.0]], [[9.0]]])
    rows.update({"policy_weight": w, "value_weight": v, "value_target": y})
    prepared = host._replayed(rows)
    terms = host._replay_terms(TensorDict({(*OWN,): prepared}, batch_size=(2,)))
    assert terms.keys() == {f"loss/{NAME}_policy", f"loss/{NAME}_value"}
    actor, critic = (list(net.body.parameters())[-1] for net in (host.actor, host.critic))
    (mine,) = torch.autograd.grad(terms[f"loss/{NAME}_policy"], actor)
    distribution = host.actor.distribution(td)
    if continuous:
        u = torch.atanh(td.get(K.action))  # the box is [−1, 1]
        score = (u - distribution.loc) / distribution.scale**2  # type: ignore[union-attr]
    else:
        chosen = torch.nn.functional.one_hot(td.get(K.action), 3)
        score = chosen - distribution.log_probs.exp()  # type: ignore[union-attr]
    torch.testing.assert_close(
        mine.flatten(), -(w.unsqueeze(-1) * score).mean(0).flatten().detach(), rtol=1e-4, atol=1e-5
    )
    (mine,) = torch.autograd.grad(terms[f"loss/{NAME}_value"], critic)
    mean, std = (5.0, 2.0) if value_norm else (0.0, 1.0)
    output = host.critic(td).detach()
    expected = (2 * v.unsqueeze(-1) * (output - (y - mean) / std)).mean(0)
    torch.testing.assert_close(mine.flatten(), expected.flatten(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- whose steps


def of_whom(target: Tensor) -> Tensor:
    """The agent whose step it was: see `collected`."""
    return (target.squeeze(-1) / 2).long()


def test_agents_take_turns_and_imitate_whom_the_scope_says() -> None:
    spec = task(3)
    for scope in SCOPES:
        operator = memory(spec, scope=scope)
        taught(operator, collected(spec, 2, 20), -1.0)
        rows = recalled(operator, 300)
        there, who = rows.get(K.alive), of_whom(rows.get("value_target"))
        agents = torch.arange(3)
        if scope == "centralized":
            assert there.all() and (who == agents).all()
            continue
        assert torch.equal(there, (torch.arange(300).unsqueeze(1) % 3) == agents)
        if scope == "per_agent":
            assert (who == agents)[there].all()
        else:
            found = {(int(i), int(j)) for i, j in zip(there.nonzero()[:, 1], who[there], strict=True)}
            assert found == {(i, j) for i in range(3) for j in range(3)}


def test_a_shared_step_is_valued_by_its_imitator() -> None:
    spec = task(2)
    operator = memory(spec, scope="shared")
    operator.write(collected(spec, 3, 10))
    operator.refresh(lambda td: torch.tensor([[-1.0], [100.0]]).expand(len(td), 2, 1))
    rows = recalled(operator, 20)
    assert rows.get(K.alive)[:, 0].sum() == 10 and not rows.get(K.alive)[:, 1].any()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_dead_are_neither_replayed_nor_taught(scope: str) -> None:
    spec = task(2)
    operator, td = memory(spec, scope=scope), collected(spec, 4, 12)
    td.get(K.alive)[:, 1] = False
    td.get(K.learn_reward)[:, 1] = torch.nan
    taught(operator, td, -1.0)
    assert len(operator) == 12 and not operator.rejected.any()
    alive = torch.ones(20, 2, dtype=torch.bool)
    alive[:10, 0] = False
    rows = recalled(operator, 20, alive)
    assert not rows.get(K.alive)[:10, 0].any() and rows.get(K.alive)[10:, 0].any()
    if scope != "shared":
        assert not rows.get(K.alive)[:, 1].any()
    assert (of_whom(rows.get("value_target"))[rows.get(K.alive)] == 0).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_not_finite_is_refused_and_counted(scope: str) -> None:
    spec = task(2)
    operator, td = memory(spec, scope=scope), collected(spec, 5, 8)
    td.get(K.learn_reward)[3, 1] = torch.inf
    td.get(K.observation)[5, 0, 1] = torch.nan
    td.get(K.state).copy_(td.get(K.observation).flatten(-2))
    taught(operator, td, -1.0)
    # A step whose state is not finite is refused for both.
    assert int(operator.rejected.sum()) == (2 if scope == "centralized" else 3)
    assert len(operator) == (6 if scope == "centralized" else 13)
    assert all(x.isfinite().all() for x in operator.state_dict().values() if x.is_floating_point())


def test_the_ring_keeps_the_newest_rows() -> None:
    spec, held = task(), []
    operator = memory(spec, capacity=7)
    for step, length in enumerate((3, 5, 1, 9, 2)):
        td = collected(spec, step, length)
        taught(operator, td)
        held = [*held, *td.get(K.learn_reward).flatten().tolist()][-7:]
        assert sorted(operator.returns[operator.live].tolist()) == sorted(held)
        assert len(operator) == len(held)


def test_draws_come_with_the_refresh_and_repeat_after_a_checkpoint() -> None:
    spec = task(2)
    operator, other = memory(spec, seed=1), memory(spec, seed=2)
    taught(operator, collected(spec, 6, 30), 1.0)
    first = recalled(operator, 16)
    assert (first == recalled(operator, 16)).all()
    other.load_state_dict(operator.state_dict())
    for one in (operator, other):
        one.refresh(constant(1.0, 2))
    second = recalled(operator, 16)
    assert not (first == second).all() and (second == recalled(other, 16)).all()


# -------------------------------------------------------------------------------------------------------- in the host


HOSTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ippo": {"share_parameters": True},
    "mappo": {"centralised_critic": True, "share_parameters": True},
}


def host_batch(host: PPO, operator: SelfImitation | None, seed: int) -> TensorDict:
    """A batch ``[T, N]`` of the host's own actions, with room for what it and the operator write; locked."""
    td = collected(host.spec, seed, 6, 2, over=False)
    td.get(("next", K.done))[3] = True
    td.get(("next", K.truncated))[3, 1] = True
    td.get(("next", *K.discount))[3, 0] = 0.0
    td.set(("next", *K.reward), td.pop(K.learn_reward))
    td.set(("next", *K.alive), torch.ones(6, 2, host.spec.n_agents, dtype=torch.bool))
    host.actor(td)
    for key, entry in (host.learn_entries | ({} if operator is None else operator.entries)).items():
        td.set(key, entry.zeros((6, 2), torch.float32))
    return td.lock_()


def trained(host: PPO, operator: SelfImitation | None, steps: int = 3) -> list[dict[str, Tensor]]:
    losses = []
    for step in range(steps):
        td = host_batch(host, operator, step)
        host.derive_rewards(td)
        host.compute_advantages(td)
        if operator is not None:
            operator(td)
        losses += [host.update(minibatch) for minibatch in host.minibatches(td)]
        host.finish_update(td)
        if operator is not None:
            operator.write(td)
            operator.refresh(host.bootstrap_values)
    return losses


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("continuous", [False, True])
def test_off_or_empty_it_is_the_host_bit_for_bit(name: str, scope: str, continuous: bool) -> None:
    spec = task(2, actions=(3, 2), continuous=continuous)
    normalise = {"normalise_observations": True, "scale_rewards": True}
    make: Callable[[], PPO] = lambda: PPO(  # noqa: E731
        spec=spec, network=BODY, seed=3, minibatches=2, epochs=2, **HOSTS[name], **normalise
    )
    hosts = {}
    for case, options in {"absent": None, "off": {"strength": 0.0}, "acts": {"coefficient": 1.0}}.items():
        hosts[case] = make()
        operator = None if options is None else memory(spec, scope=scope, n_envs=2, **options)
        losses = trained(hosts[case], operator)
        terms = [f"loss/{NAME}_policy" in loss for loss in losses]
        assert any(terms) == (case == "acts") and not any(terms[:4])  # the first batch finds nothing
        assert operator is None or len(operator) > 0
        assert all(x.isfinite() for loss in losses for x in loss.values())
    bare = dict(hosts["absent"].named_parameters())
    same = {case: all(torch.equal(x, bare[key]) for key, x in h.named_parameters()) for case, h in hosts.items()}
    assert same == {"absent": True, "off": True, "acts": False}


def test_what_was_better_becomes_likelier_and_its_value_rises() -> None:
    """A bandit: of two actions the second once paid 1; replaying that alone has to prefer it."""
    spec = task(1, continuous=False)
    host = PPO(spec=spec, network=BODY, seed=0, entropy_coef=0.0, lr=1e-2, lr_final=1e-2, minibatches=1, epochs=1)
    operator = memory(spec, coefficient=1.0, value_coefficient=1.0)
    td = collected(spec, 0, 1)
    td.get(K.action_mask).fill_(True)
    td.get(K.action).fill_(1)
    td.get(K.learn_reward).fill_(1.0)
    operator.write(td)
    operator.refresh(host.bootstrap_values)
    before = host.actor.distribution(td).log_prob(td.get(K.action)).exp().item(), host.bootstrap_values(td).item()
    for _ in range(30):
        rows = TensorDict({K.alive: torch.ones(8, 1, dtype=torch.bool)}, batch_size=(8,))
        operator(rows)
        terms = host._replay_terms(TensorDict({OWN: host._replayed(rows.get(OWN))}, batch_size=(8,)))
        host.optimiser.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        host.optimiser.gather()
        host.optimiser.step()
        operator.refresh(host.bootstrap_values)
    after = host.actor.distribution(td).log_prob(td.get(K.action)).exp().item(), host.bootstrap_values(td).item()
    assert after[0] > before[0] + 0.2
    assert before[1] + 0.2 < after[1]
    assert after[1] > 1 and not operator.gains().any()  # and then there is nothing left to imitate


# ------------------------------------------------------------------------------------------------- contract, bad input


@pytest.mark.parametrize("scope", FIRST)
@pytest.mark.parametrize(
    "options", [{"normalise": False, "clip": None}, {"priority": 0.0}, {"correction": 1.0}], ids=str
)
def test_options_keep_the_contract(options: dict[str, Any], scope: str) -> None:
    check_memory_operator(partial(SelfImitation, scope=scope, capacity=48, **options), capacity=48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity=0 must be positive"),
        ({"capacity": 1, "scope": "centralized"}, "capacity=1 with budget='total' leaves no row"),
        ({"coefficient": 0.0}, "coefficient=0.0 must be positive"),
        ({"clip": -1.0}, "clip=-1.0 must be positive"),
        ({"value_coefficient": -0.1}, "value_coefficient=-0.1 must not be negative"),
        ({"priority": 2.0}, r"priority=2.0 must lie in \[0, 1\]"),
        ({"correction": -1.0}, r"correction=-1.0 must lie in \[0, 1\]"),
        ({"gamma": 2.0}, r"gamma=2.0 must lie in \[0, 1\]"),
        ({"scope": "nobody"}, "scope='nobody' must be one of"),
        ({"strength": 1.5}, "strength=1.5 must lie in"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfImitation(spec=task(2), **options)


def test_strength_follows_its_schedule() -> None:
    operator = memory(task(), strength=1.0, strength_final=0.5)
    taught(operator, collected(operator.spec, 0, 5), -1.0)
    full = recalled(operator, 4).get("policy_weight")
    operator.set_progress(100, 0.5)
    torch.testing.assert_close(recalled(operator, 4).get("policy_weight"), 0.75 * full)
