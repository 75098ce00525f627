"""Reflection: what it learns, the mixture that it acts by, and that PPO learns from its own actions only."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.mixed import settle
from marl_memory.algorithms.ppo import PPO
from marl_memory.keys import Keys
from marl_memory.memory.cloning import NAME, Cloning
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.memory.operator import Memory
from marl_memory.memory.reflecting import NARROWEST, reflection_loss
from marl_memory.memory.reflection import Reflection
from marl_memory.memory.return_memory import ReturnMemory
from marl_memory.memory.self_imitation import SelfImitation
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.trainer import check_stages
from tests.memory.tasks import SCOPES, task

K = Keys()
BODY = partial(MLP, hidden=(8,))
SMALL: dict[str, Any] = {"capacity": 4000, "hidden": (16,), "batches": 8, "batch_size": 64, "least": 1, "kappa": 0.3}
SMALL |= {"upper": 0.6, "lower": 0.4}  # few episodes are enough for both


def memory(spec: TaskSpec, **options: Any) -> Reflection:
    return Reflection(spec=spec, **{**SMALL, "n_envs": 2, **options})


def batch(spec: TaskSpec, seed: int, steps: int = 8, n: int = 2, *, observation: Tensor | None = None) -> TensorDict:
    """Vector steps ``[T, N]`` whose episodes all end with the last one; rewards and actions are anything."""
    g, (a, p), shape = Generator().manual_seed(seed), (spec.n_agents, spec.action_size), (steps, n)
    td = TensorDict(batch_size=shape)
    for prefix in ((), ("next",)):
        seen = torch.randn(*shape, a, spec.observation_size, generator=g) if observation is None else observation
        seen = torch.where(torch.tensor(spec.observation_valid), seen, 0.0)
        td.set((*prefix, *K.observation), seen)
        td.set((*prefix, K.state), seen.flatten(-2))
        td.set((*prefix, *K.alive), torch.ones(*shape, a, dtype=torch.bool))
        if not spec.continuous:
            mask = torch.rand(*shape, a, p, generator=g) < 0.7
            mask[..., 0] = True
            td.set((*prefix, *K.action_mask), mask & torch.tensor(spec.action_valid))
    action = torch.rand(*shape, a, p, generator=g) * 1.6 - 0.8
    action = torch.where(torch.tensor(spec.action_valid), action, 0.0)
    td.set(K.action, action if spec.continuous else td.get(K.action_mask).int().argmax(-1))
    td.set(("next", *K.reward), torch.randn(*shape, a, 1, generator=g))
    done = torch.zeros(*shape, 1, dtype=torch.bool)
    done[-1] = True
    for name, x in ((K.done, done), (K.terminated, done), (K.truncated, torch.zeros_like(done))):
        td.set(("next", name), x.clone())
    td.set(("next", *K.discount), (~done).float().unsqueeze(-2).expand(*shape, a, 1).clone())
    td.set(K.confidence, torch.zeros(*shape, a))
    return td


def taught(operator: Reflection, batches: int = 6, **options: Any) -> Reflection:
    """One that holds successes and failures, and learnt from them."""
    for seed in range(batches):
        operator.write(batch(operator.spec, seed, **options))
        operator.learn()
    assert operator.ready.any() and len(operator) > 0
    return operator


# ------------------------------------------------------------------------------------------------------ what it learns


def test_the_confidence_is_the_share_of_successes() -> None:
    """Of three actions at one place: p_succ/(p_succ + p_fail), whatever the numbers of episodes."""
    spec = task(1, actions=3, continuous=False)
    operator = memory(
        spec,
        batches=300,
        batch_size=256,
        lr=1e-2,
        members=3,
        kappa=0.6,
        upper=0.8,
        lower=0.2,
        alike=200,
        window=2000,
        episodes=200,
    )
    place, g = torch.ones(1, 1, 1, 2), Generator().manual_seed(0)
    odds = {True: torch.tensor([0.2, 0.2, 0.6]), False: torch.tensor([0.6, 0.2, 0.2])}
    for i in range(300):
        won = i % 3 > 0
        td = batch(spec, i, 1, 2, observation=place.expand(1, 2, 1, 2))
        td.get(K.action_mask).fill_(True)
        td.get(K.action).copy_(odds[won].multinomial(2, replacement=True, generator=g).view(1, 2, 1))
        td.get(("next", *K.reward)).fill_(float(won))
        operator.write(td)
    assert operator.outcomes.seen.tolist()[0] == 600
    operator.learn()
    seen, mask = operator.networks.seen(torch.ones(3, 1, 2)), torch.ones(3, 1, 3, dtype=torch.bool)
    policy, _, logits, outlook = operator.networks.both(seen, mask, torch.arange(3).view(3, 1))
    counts = [
        store.get_buffer("action")[store.owner >= 0].flatten().bincount(minlength=3).double() / len(store)
        for store in (operator.successes, operator.failures)
    ]
    found = logits.sigmoid().mean(-1).flatten()
    torch.testing.assert_close(found.double(), counts[0] / (counts[0] + counts[1]), atol=0.05, rtol=0)
    torch.testing.assert_close(outlook.sigmoid(), torch.full((3, 1), 0.5), atol=0.05, rtol=0)  # it is all the action's
    torch.testing.assert_close(policy.parameters["log_probs"][0].exp().flatten().double(), counts[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("balance", [0.25, 0.5])
def test_the_two_halves_by_hand(balance: float) -> None:
    operator = taught(memory(task(), balance=balance, batch_size=40))
    succeeded, failed = next(operator._batches())
    assert (len(succeeded), len(failed)) == (round(balance * 40), 40 - round(balance * 40))
    terms, net = operator._losses(succeeded, failed), operator.networks
    judged = [net.both(net.seen(x.get("observation")), None, x.get("action")) for x in (succeeded, failed)]
    logits, outlook = [x.logits[:, 0] for x in judged], [x.outlook for x in judged]
    weight = failed.get("weight") / failed.get("weight").mean()
    expected = -balance * logits[0].sigmoid().log().mean()
    expected -= (1 - balance) * (weight.unsqueeze(-1) * (-logits[1]).sigmoid().log()).mean()
    torch.testing.assert_close(terms["loss/reflection"], expected)
    expected = -balance * outlook[0].sigmoid().log().mean()
    expected -= (1 - balance) * (weight.unsqueeze(-1) * (-outlook[1]).sigmoid().log()).mean()
    torch.testing.assert_close(terms["loss/outlook"], expected)
    assert len(weight.unique()) > 1  # the last steps of a lost episode count more
    share = (succeeded.get("share") / succeeded.get("share").mean()).unsqueeze(-1)
    policy, *_ = net.both(net.seen(succeeded.get("observation")), None)
    density = policy.log_density(torch.atanh(succeeded.get("action")))
    torch.testing.assert_close(terms["loss/prediction"], -(share * density).mean(), rtol=1e-4, atol=1e-4)


def test_better_successes_count_more() -> None:
    operator = taught(memory(task(), upper=0.5, lower=0.1), 10)
    score, shares = operator.successes.score[operator.successes.held], operator._shares()
    assert shares[~operator.successes.held].sum() == 0
    expected = (score / score.std(correction=0)).softmax(0).float()
    torch.testing.assert_close(shares[operator.successes.held], expected)


def test_without_failures_the_judges_learn_nothing_and_memory_does_not_act() -> None:
    spec = task()
    operator = memory(spec, lower=0.0)
    assert operator.networks.judges is not None
    before = {name: p.clone() for name, p in operator.networks.judges.named_parameters()}
    for i in range(4):
        td = batch(spec, i)
        td.get(("next", *K.reward)).fill_(float(i))
        operator.write(td)
    operator.failures.clear()
    report = operator.learn()
    assert set(report) == {"loss/prediction"} and len(operator.successes) > 0
    assert all(torch.equal(p, before[name]) for name, p in operator.networks.judges.named_parameters())
    assert not operator(batch(spec, 9)).get(K.taken).any()


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("decides", ["action", "place"])
def test_memory_acts_where_the_action_decides_and_not_where_the_place_does(decides: str, continuous: bool) -> None:
    """At two places, by two actions: C is right of both, but what ends well whatever is done is no reason to act."""
    spec = task(1, actions=1 if continuous else 2, continuous=continuous)
    operator = memory(spec, batches=300, batch_size=256, lr=3e-3, alike=200, window=2000, kappa=0.7)
    g = Generator().manual_seed(0)
    for i in range(100):
        place, action = torch.randint(2, (2, 1, 2, 1), generator=g)
        td = batch(spec, i, 1, 2, observation=(2.0 * place - 1).unsqueeze(-1).expand(1, 2, 1, spec.observation_size))
        td.set(K.action, 1.2 * action.unsqueeze(-1) - 0.6 if continuous else action)
        if not continuous:
            td.get(K.action_mask).fill_(True)
        td.get(("next", *K.reward)).copy_((action if decides == "action" else place).unsqueeze(-1))
        operator.write(td)
    operator.learn()
    td.get(K.observation)[:, 0], td.get(K.observation)[:, 1] = -1.0, 1.0
    if not continuous:
        td.get(K.action_mask).fill_(True)
    judged = operator.networks.both(operator.networks.seen(td.get(K.observation)), td.get(K.action_mask, None))
    certain = judged.logits.amin(-1).sigmoid()[0, :, 0]
    acts = acted(operator, td).get(K.taken)[0, :, 0]
    if decides == "action":
        assert certain.min() > 0.9 and acts.all()
    else:
        assert certain[0] < 0.1 and certain[1] > 0.9 and not acts.any()


@pytest.mark.parametrize("scope", ["per_agent", "shared"])
@pytest.mark.parametrize("dies_where", ["won", "lost"])
def test_who_is_dead_does_not_tip_the_balance(dies_where: str, scope: str) -> None:
    """Where neither place nor action says anything C is ½, though one agent dies early in one kind of episode.

    Networks that are shared may learn that it is an end to be alive: C(o) says so, and confidence leaves it out.
    """
    spec = task(2)
    operator = memory(spec, scope=scope, lr=3e-3, batches=16, batch_size=256, capacity=20_000, members=1)
    for seed in range(40):
        won = seed % 2 == 0
        td = batch(spec, seed, 20)
        td.get(("next", *K.reward)).zero_()[-1] = 1.0 if won else -1.0
        if won == (dies_where == "won"):
            td.get(K.alive)[3:, :, 1] = False
        operator.write(td)
    for _ in range(25):
        operator.learn()
    net, td = operator.networks, batch(spec, 99, 200)
    judged = net.both(net.seen(td.get(K.observation)), None, td.get(K.action))
    certain, outlook = judged.logits[..., 0].mean((0, 1)), judged.outlook.mean((0, 1))
    if scope == "per_agent":
        torch.testing.assert_close(certain.sigmoid(), torch.full((2,), 0.5), atol=0.06, rtol=0)
        torch.testing.assert_close(outlook.sigmoid(), torch.full((2,), 0.5), atol=0.06, rtol=0)
    torch.testing.assert_close((certain - outlook).sigmoid(), torch.full((2,), 0.5), atol=0.06, rtol=0)


def test_a_prediction_that_became_narrow_becomes_wide_again() -> None:
    spec = task(1, actions=1)
    operator = memory(spec, lr=3e-2, batches=100)
    log_std = operator.networks.log_std
    assert log_std is not None
    for spread, above in ((0.0, False), (0.9, True)):
        for part in (operator.successes, operator.failures):
            part.clear()
        g = Generator().manual_seed(0)
        for seed in range(6):
            td = batch(spec, seed, 20)
            td.get(K.action).copy_(spread * (2 * torch.rand(20, 2, 1, 1, generator=g) - 1))
            operator.write(td)
        for _ in range(4):
            operator.learn()
        assert log_std.min() >= NARROWEST and bool((log_std > NARROWEST + 1).all()) == above


def test_agents_apart_have_scales_of_their_own() -> None:
    spec = task(2)
    for scope in ("per_agent", "shared"):
        operator = memory(spec, scope=scope)
        td = batch(spec, 0, 100)
        td.get(K.observation)[..., 0, 0] *= 1000.0
        operator.write(td)
        operator.learn()
        deviations = operator.networks.observed(td.get(K.observation))[..., 0].std((0, 1))
        assert (deviations[1] > 0.9) == (scope == "per_agent") and deviations[0] > 0.9


@pytest.mark.parametrize("own", [False, True])
def test_absent_agents_are_no_part_of_a_states_scales(own: bool) -> None:
    spec = task(2, state=3 if own else None)
    operator = memory(spec, scope="centralized")
    for seed in range(3):
        td = batch(task(2), seed, 100)
        state = torch.randn(100, 2, 3) if own else td.get(K.observation).flatten(-2)
        td.update({K.state: state + 100.0, ("next", K.state): state + 100.0})
        td.get(K.alive)[1:, :, 1] = False
        operator.write(td)
        operator.learn()
    stated = operator.networks.stated
    assert stated is not None and (stated.moments.mean - 100).abs().max() < 2 and stated.moments.std.max() < 3
    assert stated.moments.count[0].tolist() == ([600] * 3 if own else [600, 600, 6, 6])
    alive, action = torch.tensor([[True, False]]), torch.zeros(1, 2, 2)
    nobody = torch.full((1, spec.state_size), 100.0)
    if not own:  # what stands in the place of the dead is nothing
        nobody[:, 2:] = 7.0
        other = nobody.clone()
        other[:, 2:] = -40.0
        teams = [operator.networks.team_confidence(x, action, alive) for x in (nobody, other)]
        assert torch.equal(*teams)


def test_nothing_is_learnt_before_there_are_enough_successes() -> None:
    operator = memory(task(), least=8)
    operator.write(batch(operator.spec, 0))
    assert operator.learn() == {} and len(operator) > 0 and not operator.ready.any()


def test_a_teams_judge_tells_the_agents_what_it_knows() -> None:
    """Alone no agent's action says anything, together they do: the joint judge knows, the others learn ½ of it."""
    spec = task(2, actions=2, continuous=False)
    operator = memory(spec, scope="centralized", batches=300, batch_size=256, lr=3e-3, alike=200, window=2000)
    g = Generator().manual_seed(0)
    for i in range(200):
        td = batch(spec, i, 1, 2, observation=torch.ones(1, 2, 2, 2))
        td.get(K.action_mask).fill_(True)
        td.get(K.action).copy_(torch.randint(2, (1, 2, 2), generator=g))
        same = (td.get(K.action)[..., 0] == td.get(K.action)[..., 1]).float()
        td.get(("next", *K.reward)).copy_(same.view(1, 2, 1, 1).expand(1, 2, 2, 1))
        operator.write(td)
    report = operator.learn()
    assert set(report) == {"loss/prediction", "loss/reflection", "loss/distillation", "loss/outlook"}
    pairs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    alive, net = torch.ones(4, 2, dtype=torch.bool), operator.networks
    joint = net.team_confidence(torch.ones(4, 4), pairs, alive).sigmoid().mean(-1).flatten()
    assert joint[[0, 3]].min() > 0.9 and joint[[1, 2]].max() < 0.1
    allowed = torch.ones(4, 2, 2, dtype=torch.bool)
    alone = net.both(net.seen(torch.ones(4, 2, 2)), allowed, pairs)[2].sigmoid()
    torch.testing.assert_close(alone, torch.full_like(alone, 0.5), atol=0.15, rtol=0)


# -------------------------------------------------------------------------------------------------------- how it acts


def acted(operator: Reflection, td: TensorDict, **changes: Any) -> TensorDictBase:
    for name, value in changes.items():
        setattr(operator, name, value)
    return operator(td.clone())


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_memory_takes_over_where_it_is_confident(scope: str, continuous: bool) -> None:
    spec = task(2, features=(3, 2), actions=(3, 2), continuous=continuous)
    operator, td = taught(memory(spec, scope=scope)), batch(spec, 50, 30)
    td.get(K.alive)[::3, :, 1] = False
    out = acted(operator, td)
    taken, confidence = out.get(K.taken), out.get(K.confidence)
    assert torch.equal(taken, (confidence > 0.3) & td.get(K.alive)) and taken.any()
    changed = (out.get(K.action) != td.get(K.action)).reshape(*taken.shape, -1).any(-1)
    assert not changed[~taken].any() and changed.any()
    if not continuous:
        assert td.get(K.action_mask).gather(-1, out.get(K.action).unsqueeze(-1)).all()
    assert torch.equal(out.get(K.act_weight), taken.float())


def test_at_kappa_1_strength_0_or_empty_the_policy_acts() -> None:
    spec = task(2)
    td = batch(spec, 50)
    sure = memory(spec, kappa=1.0)
    for operator in (memory(spec), taught(sure), taught(memory(spec, strength=0.0))):
        before = operator.generator.get_state()
        out = operator(td.clone())
        assert torch.equal(out.get(K.action), td.get(K.action)) and not out.get(K.taken).any()
        assert not out.get(K.act_weight).any() and torch.equal(before, operator.generator.get_state())


def test_the_least_of_the_ensemble_counts() -> None:
    spec = task()
    operator, td = taught(memory(spec, members=3, kappa=0.01)), batch(spec, 51)
    net = operator.networks
    seen = net.seen(td.get(K.observation))
    each, outlook = net.both(seen, None)[2:]
    assert each.shape[-1] == 3 and (each[..., 0] != each[..., 1]).all() and (outlook > 0).any() and (outlook < 0).any()
    expected = torch.minimum(each.amin(-1), each.amin(-1) - outlook).sigmoid()
    torch.testing.assert_close(operator(td.clone()).get(K.confidence), expected)


def test_strength_is_how_often_memory_takes_over() -> None:
    spec = task(2)
    operator, td = taught(memory(spec, kappa=0.001)), batch(spec, 52, 200, 4)
    operator.n_envs = 4
    out = acted(operator, td, strength=0.3)
    assert (out.get(K.act_weight) == 0.3).float().mean() > 0.9
    assert out.get(K.taken).float().mean().item() == pytest.approx(0.3, abs=0.06)
    greedy = acted(operator, td, greedy=True)
    assert greedy.get(K.taken)[greedy.get(K.act_weight) > 0].all()


@pytest.mark.parametrize("continuous", [False, True])
def test_acting_records_no_gradients(continuous: bool) -> None:
    spec = task(2, continuous=continuous)
    operator, td = taught(memory(spec, kappa=0.001)), batch(spec, 53)
    if continuous:
        td.get(K.action).requires_grad_()
    with torch.enable_grad():
        out = acted(operator, td)
    assert out.get(K.taken).any()
    assert not any(x.requires_grad for key in (K.action, *operator.entries) if (x := out.get(key)) is not None)


@pytest.mark.parametrize("schedule", ["constant", "linear", "adaptive"])
def test_the_threshold_follows_its_schedule(schedule: str) -> None:
    final = 0.9 if schedule == "linear" else None
    operator = memory(task(), kappa=0.6, kappa_schedule=schedule, kappa_final=final, kappa_quantile=0.75)
    operator.set_progress(10, 0.5)
    assert operator.threshold.value == pytest.approx({"linear": 0.75}.get(schedule, 0.6))
    operator.threshold.take(torch.linspace(0, 1, 1001))
    assert operator.threshold.value == pytest.approx({"linear": 0.75, "adaptive": 0.75}.get(schedule, 0.6))
    operator.threshold.take(torch.full((3000,), 0.1))
    assert operator.threshold.value == pytest.approx({"linear": 0.75, "adaptive": 0.5}.get(schedule, 0.6))
    assert operator.threshold.logit == pytest.approx(torch.tensor(operator.threshold.value).logit().item(), abs=1e-6)


def test_an_adaptive_threshold_takes_no_zeros_for_confidences_and_stays_below_1() -> None:
    spec = task()
    for options, kappa in (({"strength": 0.0}, 0.6), ({"kappa": 1.0}, 1.0)):
        operator = taught(memory(spec, **{"kappa": 0.6, "kappa_schedule": "adaptive", **options}))
        operator.write(operator(batch(spec, 50).exclude("act")))
        assert operator.threshold.value == kappa
    operator = taught(memory(spec, kappa=0.6, kappa_schedule="adaptive"))
    assert operator.threshold.value == 0.5  # of the zeros that the batches come with
    operator.threshold.clear()
    operator.threshold.take(torch.tensor([math.nan, 0.8, math.inf]))
    assert operator.threshold.value == pytest.approx(0.8)
    operator.threshold.take(torch.ones(2048))
    assert operator.threshold.value < 1 and not operator.threshold.closed
    assert (torch.tensor(30.0) > operator.threshold.logit).all()


# -------------------------------------------------------------------------------------------- on-policy correctness


HOSTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ippo": {"share_parameters": True},
    "mappo": {"centralised_critic": True, "share_parameters": True},
}


def host_of(spec: TaskSpec, **options: Any) -> PPO:
    return PPO(spec=spec, network=BODY, seed=3, **{"minibatches": 2, "epochs": 2, **options})


def collected(host: PPO, operators: Memory, seed: int) -> TensorDict:
    """A batch of the host's actions, and memory's in their place."""
    from marl_memory.memory.operator import Stage

    td = batch(host.spec, seed).exclude("act")
    host.actor(td)
    operators.act(Stage.ACT, td)
    for key, entry in (host.learn_entries | operators.entries).items():
        td.set(key, entry.zeros(tuple(td.batch_size), torch.float32))
    return td.lock_()


def trained(host: PPO, operators: Memory, steps: int = 5) -> list[dict[str, Tensor]]:
    """Iterations as `OnPolicyIteration` has them."""
    from marl_memory.memory.operator import Stage

    losses = []
    for step in range(steps):
        td = collected(host, operators, step)
        operators.write("collection", td)
        host.derive_rewards(td)
        host.compute_advantages(td)
        operators.act(Stage.REGION, td)
        losses += [host.update(minibatch) for minibatch in host.minibatches(td)]
        host.finish_update(td)
        operators.write("update", td)
        operators.learn()
    return losses


@pytest.mark.parametrize(("name", "scope"), list(zip(HOSTS, SCOPES, strict=True)))
@pytest.mark.parametrize("continuous", [False, True])
def test_off_or_empty_it_is_the_host_bit_for_bit(name: str, scope: str, continuous: bool) -> None:
    spec = task(2, actions=(3, 2), continuous=continuous)
    hosts, cases = (
        {},
        {"absent": None, "off": {"strength": 0.0}, "closed": {"kappa": 1.0}, "empty": {"least": 15}, "acts": {}},
    )
    for case, options in cases.items():
        hosts[case] = host_of(spec, **HOSTS[name], normalise_observations=True)
        operator = None if options is None else memory(spec, scope=scope, **options)
        operators = Memory() if operator is None else Memory([("own", operator), ("copy", Cloning(spec=spec))])
        losses = trained(hosts[case], operators)
        assert any(f"loss/{NAME}" in loss for loss in losses) == (case == "acts")
        assert all(x.isfinite() for loss in losses for x in loss.values())
        assert operator is None or (len(operator) > 0 and bool(operator.ready.any()) == (case != "empty"))
    bare = dict(hosts["absent"].named_parameters())
    same = {case: all(torch.equal(x, bare[key]) for key, x in h.named_parameters()) for case, h in hosts.items()}
    assert same == {case: case != "acts" for case in cases}


@pytest.mark.parametrize("continuous", [False, True])
def test_log_probabilities_are_exact(continuous: bool) -> None:
    """log π of what was executed, and log b of the mixture, from probabilities written out."""
    spec = task(2, actions=(3, 2), continuous=continuous)
    host, operator = host_of(spec), taught(memory(spec, strength=0.6))
    td = collected(host, Memory([("own", operator)]), 60)
    sampled = td.get(K.log_prob).clone()
    host.derive_rewards(td)
    host.compute_advantages(td)
    taken, action = td.get(K.taken), td.get(K.action)
    assert taken.any() and not taken.all()
    policy = host.actor.distribution(td).log_prob(action)
    torch.testing.assert_close(td.get(K.log_prob), policy)
    if not continuous:
        assert torch.equal(td.get(K.log_prob)[~taken], sampled[~taken])
    net = operator.networks
    mask = None if continuous else td.get(K.action_mask)
    own = net.both(net.seen(td.get(K.observation)), mask)[0].log_prob(action)
    weight = 0.6 * (td.get(K.confidence) > 0.3)
    expected = (weight * own.exp() + (1 - weight) * policy.exp()).log()
    torch.testing.assert_close(td.get(K.behaviour_log_prob), expected, rtol=1e-4, atol=1e-4)


def test_where_memory_acted_the_policys_loss_has_no_gradient() -> None:
    """Nothing that was done there moves the policy, and everything that the policy did itself still does."""
    for continuous in (False, True):
        spec = task(2, actions=3, continuous=continuous)
        host, operator = host_of(spec, minibatches=1), taught(memory(spec, strength=0.5))
        td = collected(host, Memory([("own", operator)]), 61)
        host.derive_rewards(td)
        host.compute_advantages(td)
        taken = td.get(K.taken)
        assert taken.any() and not taken.all()
        rows = host.prepare(td)
        distribution = host.actor.distribution(rows)
        parameter = distribution.logits if not continuous else distribution.loc  # type: ignore[union-attr]
        loss, *_ = host._policy_terms(rows, distribution)
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        gradient = gradient.reshape(*taken.shape, -1)
        choice = torch.ones_like(taken) if continuous else td.get(K.action_mask).sum(-1) > 1
        assert (gradient[taken] == 0).all() and (gradient[~taken & choice] != 0).any(-1).all()
        # Leaving the mask out, the rows of memory would have moved it: the test can fail.
        rows.pop(K.taken)
        rows.get(K.advantage).fill_(1.0)
        loss, *_ = host._policy_terms(rows, distribution)
        (gradient,) = torch.autograd.grad(loss, parameter)
        assert (gradient.reshape(*taken.shape, -1)[taken] != 0).any()


def test_the_policys_loss_and_its_metrics_are_means_over_what_it_did_itself() -> None:
    spec = task(2, actions=3)
    host, operator = host_of(spec, minibatches=1, clip=0.2), taught(memory(spec, strength=0.5))
    td = collected(host, Memory([("own", operator)]), 61)
    td.get(K.alive)[:3, :, 0] = False
    host.derive_rewards(td)
    host.compute_advantages(td)
    rows = host.prepare(td)
    alive, taken = (rows.get(key) for key in (K.alive, K.taken))
    rows.set(K.log_prob, rows.get(K.log_prob) - 0.5 * (torch.arange(len(rows)) % 2).unsqueeze(-1))
    loss, _, kl, clipped = host._policy_terms(rows, host.actor.distribution(rows))
    log_ratio = host.actor.distribution(rows).log_density(rows.get(K.action)) - rows.get(K.log_prob)
    own, advantage = log_ratio[alive & ~taken], rows.get(K.advantage)[alive & ~taken]
    assert 0 < len(own) < int(alive.sum())
    torch.testing.assert_close(kl, (own.exp() - 1 - own).mean())
    torch.testing.assert_close(clipped, ((own.exp() - 1).abs() > 0.2).float().mean())
    expected = torch.minimum(own.exp() * advantage, own.exp().clamp(0.8, 1.2) * advantage)
    torch.testing.assert_close(-loss, expected.mean())


def test_advantages_are_corrected_where_memory_acted_only() -> None:
    spec = task(2)
    host, operator = host_of(spec, normalise_advantages=False, value_norm=False), taught(memory(spec, strength=0.5))
    td = collected(host, Memory([("own", operator)]), 62)
    host.derive_rewards(td)
    host.compute_advantages(td)
    taken, policy = td.get(K.taken), host.actor.distribution(td).log_prob(td.get(K.action))
    net = operator.networks
    own = net.both(net.seen(td.get(K.observation)), None)[0].log_prob(td.get(K.action))
    ratio = torch.where(taken, (policy - own).exp().clamp(max=1), 1.0)
    assert (ratio < 1).any()
    value, following = td.get(K.value)[..., 0], td.get(K.next_value)[..., 0]
    going_on, after = td.get(("next", *K.discount))[..., 0], torch.zeros(2, 2)
    for t in reversed(range(len(td))):
        delta = td.get(K.learn_reward)[t, ..., 0] + host.gamma * going_on[t] * following[t] - value[t]
        after = ratio[t] * (delta + host.gamma * host.gae_lambda * going_on[t] * after)
        torch.testing.assert_close(td.get(K.advantage)[t, ..., 0], after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(td.get(K.value_target)[..., 0], value + td.get(K.advantage)[..., 0])


def test_advantages_are_normalised_over_what_the_policy_did() -> None:
    spec = task(2)
    host, operator = host_of(spec), taught(memory(spec, strength=0.5))
    td = collected(host, Memory([("own", operator)]), 62)
    host.derive_rewards(td)
    host.compute_advantages(td)
    own = td.get(K.advantage)[..., 0][~td.get(K.taken)]
    assert own.mean().abs() < 1e-5 and own.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_a_batch_that_memory_took_whole_leaves_finite_numbers() -> None:
    spec = task(1)
    host, operator = host_of(spec), taught(memory(spec, kappa=1e-6))
    td = collected(host, Memory([("own", operator)]), 63)
    assert td.get(K.taken).all()
    host.derive_rewards(td)
    metrics = host.compute_advantages(td)
    losses = [host.update(minibatch) for minibatch in host.minibatches(td)]
    assert all(math.isfinite(x) for x in metrics.values())
    assert all(x.isfinite() for loss in losses for x in loss.values()) and losses[0]["loss/policy"] == 0


@pytest.mark.parametrize("continuous", [False, True])
def test_cloning_is_memorys_policy_where_it_acted(continuous: bool) -> None:
    spec = task(2, actions=(3, 2), continuous=continuous)
    host, operator = host_of(spec, minibatches=1), taught(memory(spec, strength=0.5))
    copy = Cloning(spec=spec, coefficient=0.7, strength=0.5)
    td = collected(host, Memory([("own", operator), ("copy", copy)]), 64)
    host.derive_rewards(td)
    host.compute_advantages(td)
    copy(td)
    taken = td.get(K.taken)
    assert torch.equal(td.get((*K.region, NAME, "weight")), 0.35 * taken)
    for name in copy.names:
        mine, valid = td.get((*K.region, NAME, name)), torch.tensor(spec.action_valid)
        assert torch.equal((mine * valid)[taken], (td.get(K.memory_policy(name)) * valid)[taken])
    (minibatch,) = list(host.minibatches(td))[:1]
    found = host._region_terms(minibatch, host.actor.distribution(minibatch))[f"loss/{NAME}"]
    ours = host.actor.of_parameters({name: td.get(K.memory_policy(name)) for name in copy.names})
    kl = host.actor.distribution(td).kl_from(host.actor.settled(ours.parameters))
    torch.testing.assert_close(found, (0.35 * taken * kl).mean(), rtol=1e-4, atol=1e-6)
    metrics = copy.metrics(td)
    assert metrics["used"] == taken.sum()


def test_settled_ratios_of_the_dead_are_1() -> None:
    spec = task(2)
    host, operator = host_of(spec), taught(memory(spec))
    td = collected(host, Memory([("own", operator)]), 65)
    td.get(K.alive)[..., 0] = False
    td.get(K.taken).fill_(True)
    ratio = settle(td, host.actor, host.actor.distribution(td), td.get(K.taken))
    assert (ratio[..., 0] == 1).all()


# -------------------------------------------------------------------------------------------------- state, reports


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    spec = task(2, continuous=False)
    operator = taught(memory(spec, kappa_schedule="adaptive", strength=0.5))
    stream = io.BytesIO()
    torch.save(operator.state_dict(), stream)
    stream.seek(0)
    other = memory(spec, kappa_schedule="adaptive", strength=0.5, seed=7)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for seed in range(20, 23):
        outs = [one(batch(spec, seed).exclude("act")) for one in (operator, other)]
        assert all(torch.equal(outs[0].get(key), outs[1].get(key)) for key in operator.out_keys)
        for one, out in zip((operator, other), outs, strict=True):
            one.write(out)
        assert operator.learn() == other.learn()
    for (name, x), y in zip(operator.state_dict().items(), other.state_dict().values(), strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y), name


@pytest.mark.parametrize("never", ["succeeded", "failed"])
def test_a_task_that_never_fails_or_never_succeeds_is_said_once(never: str) -> None:
    spec = task()
    object.__setattr__(spec, "has_success", True)
    operator = memory(spec, window=10)
    said = []
    for seed in range(8):
        td = batch(spec, seed)
        td.set(("next", K.success), td.get(("next", K.done)) & (never == "failed"))
        operator.write(td)
        operator.learn()
        said += operator.remarks()
    assert len(said) == 1 and f"none of the first 10 episodes of synthetic {never}" in said[0]
    assert not operator(batch(spec, 9)).get(K.taken).any()


def test_metrics_tell_what_memory_did() -> None:
    spec = task(2)
    host, operator = host_of(spec), taught(memory(spec, strength=0.5))
    td = collected(host, Memory([("own", operator)]), 66)
    host.derive_rewards(td)
    host.compute_advantages(td)
    found = {name: float(x) for name, x in operator.metrics(td).items()}
    taken, confidence = td.get(K.taken), td.get(K.confidence)
    assert found["used"] == taken.sum() and found["share"] == pytest.approx(taken.float().mean().item())
    assert sum(found[f"confidence_{i}"] for i in range(10)) == pytest.approx(1.0)
    assert found["confidence_4"] == pytest.approx(((confidence >= 0.4) & (confidence < 0.5)).float().mean().item())
    following = 0.99 * td.get(("next", *K.discount)) * td.get(K.next_value)
    gain = (td.get(K.learn_reward) + following - td.get(K.value))[..., 0][taken]
    assert found["included"] == pytest.approx((gain >= 0).float().mean().item()) and 0 < found["included"] < 1
    held = (operator.successes.held.sum(), operator.failures.held.sum())
    assert found["imbalance"] == pytest.approx(float((held[0] - held[1]) / (held[0] + held[1])))
    assert found["bytes"] == operator.bytes


@pytest.mark.parametrize("limit", [None, 0.1])
def test_the_critic_of_a_replays_host_judges_what_memory_did(limit: float | None) -> None:
    spec = replace(task(2), clip_rewards=limit)
    operator = taught(memory(spec, gamma=0.5))
    operator.off_policy = True
    td = operator(batch(spec, 67).exclude("act"))
    value = {True: 0.3, False: -0.2}
    operator.write(td)
    seen: list[bool] = []
    assert operator.spec.clip_rewards == limit

    def critic(rows: TensorDictBase) -> Tensor:
        seen.append(("next", K.done) in rows.keys(True))
        return torch.full((*rows.batch_size, 2, 2), value[seen[-1]])

    operator.refresh(critic)
    taken, going_on = td.get(K.taken), td.get(("next", *K.discount))[..., 0]
    reward = td.get(("next", *K.reward))[..., 0]
    gain = (reward if limit is None else reward.clamp(-limit, limit)) + 0.5 * going_on * -0.2 - 0.3
    assert taken.any() and sorted(seen) == [False, True]
    assert operator.judged.tolist() == [int((gain >= 0)[taken].sum()), int(taken.sum())]
    found = operator.metrics(td)["included"]
    assert float(found) == pytest.approx(float((gain >= 0)[taken].float().mean()))


def test_what_is_not_finite_is_refused_and_counted() -> None:
    spec = task()
    operator = taught(memory(spec))
    held, td = len(operator), batch(spec, 70)
    td.get(K.observation)[3] = torch.nan
    operator.write(td)
    td = batch(spec, 71)
    td.get(("next", *K.reward))[2] = torch.inf
    operator.write(td)
    assert len(operator) == held
    assert all(x.isfinite().all() for name, x in operator.successes.state_dict().items() if x.is_floating_point())


@pytest.mark.parametrize("scope", ["shared", "centralized"])
def test_what_is_not_finite_spoils_neither_scales_nor_later_episodes(scope: str) -> None:
    spec = task(2)
    operator = memory(spec, scope=scope)
    td = batch(spec, 0)
    td.get(("next", *K.reward))[2] = torch.inf
    td.get(K.observation)[3, 0, 1, 0] = torch.nan
    td.get(K.state)[4, 1, 0] = torch.nan
    operator.write(td)
    assert int(operator.rejected) == 2 and len(operator) == 0
    operator.learn()
    taught(operator)
    kept = {name: x for name, x in operator.state_dict().items() if isinstance(x, Tensor)}
    # The ring of the latest steps holds them as they came.
    assert {name for name, x in kept.items() if not x.isfinite().all()} <= {
        "trajectories.observation",
        "trajectories.state",
    }
    assert operator(batch(spec, 60)).get(K.confidence).isfinite().all()


def test_what_is_forgotten_is_not_learnt_from() -> None:
    spec = task()
    operator = taught(memory(spec))
    operator.write(batch(spec, 30, observation=torch.full((8, 2, 1, 2), 100.0)))
    operator.rejected += 3
    operator.clear()
    assert int(operator.rejected) == 0 and operator.learn() == {}
    assert operator.networks.observed.moments.count.sum() == 0
    taught(operator)
    assert operator.networks.observed.moments.mean.abs().max() < 1


@pytest.mark.parametrize("scope", ["shared", "centralized"])
@pytest.mark.parametrize("continuous", [False, True])
def test_pictures_stay_bytes_and_are_seen_by_a_convolutional_body(continuous: bool, scope: str) -> None:
    spec = replace(task(1, features=2 * 40 * 40, actions=3, continuous=continuous), picture=(2, 40, 40))
    operator = memory(spec, scope=scope, capacity=200, horizon=20, batches=2, batch_size=8, kappa=0.01)
    for seed in range(6):
        td = batch(spec, seed, 3)
        for prefix in ((), ("next",)):
            seen = (60 * td.get((*prefix, *K.observation)).abs()).clamp(0, 255).to(torch.uint8)
            td.update({(*prefix, *K.observation): seen, (*prefix, K.state): seen.flatten(-2)})
        operator.write(td)
        operator.learn()
    assert operator.successes.get_buffer("observation").dtype == torch.uint8
    assert type(operator.networks.policy).__name__ == "CNN"
    out = operator(td.exclude("act"))
    assert out.get(K.taken).any() and out.get(K.confidence).isfinite().all()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 0.0}, r"kappa=0.0 must lie in \(0, 1\]"),
        ({"kappa": 1.2}, r"kappa=1.2 must lie in \(0, 1\]"),
        ({"kappa_schedule": "linear", "kappa_final": 1.5}, r"kappa_final=1.5 must lie in \(0, 1\]"),
        ({"kappa_schedule": "linear"}, "kappa_final=None with kappa_schedule='linear'"),
        ({"kappa_final": 0.5}, "kappa_final=0.5 with kappa_schedule='constant'"),
        ({"kappa_schedule": "cosine"}, "kappa_schedule='cosine' must be 'constant', 'linear' or 'adaptive'"),
        ({"kappa_quantile": 1.0}, r"kappa_quantile=1.0 must lie in \(0, 1\)"),
        ({"upper": 0.2, "lower": 0.8}, "lower=0.8 and upper=0.2 must be quantiles"),
        ({"execution": "centralized"}, "execution='centralized': at execution agents see their own observations only"),
        ({"scope": "shared", "execution": "per_agent"}, "execution='per_agent' is another than scope='shared'"),
        ({"execution": "nobody"}, "execution='nobody' must be"),
        ({"scope": "nobody"}, "scope='nobody' must be one of"),
        ({"capacity": 3}, "capacity=3 leaves 0 steps of 2 agents in each of the two stores: no room for least=8"),
        ({"capacity": 28}, "capacity=28 leaves 7 steps of 2 agents"),
        ({"capacity": 400, "horizon": 13}, "horizon=13 must not exceed 12: capacity=400 leaves 100 steps of 2 agents"),
        ({"least": 30}, "least=30 must not exceed alike=20"),
        ({"balance": 1.0}, r"balance=1.0 must lie in \(0, 1\)"),
        ({"blame_decay": 1.5}, r"blame_decay=1.5 must lie in \(0, 1\]"),
        ({"members": 0}, "members=0 must be positive"),
        ({"strength": 1.5}, "strength=1.5 must lie in"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reflection(spec=task(2), **options)


def test_as_many_steps_are_known_as_let_enough_successes_in() -> None:
    """By default the time limit, and less where there is no room for it."""
    spec = replace(task(2), max_episode_steps=100)
    for capacity, horizon in ((100_000, 100), (1600, 50)):
        operator = Reflection(spec=spec, capacity=capacity, n_envs=2, upper=0.6, lower=0.4)
        assert operator.trajectories.horizon == horizon
    for seed in range(60):
        td = batch(spec, seed, 90)
        td.get(("next", *K.reward)).fill_(float(seed % 3))
        operator.write(td)
    assert int(operator.successes.held.sum()) == 8 and bool(operator.learn()) and operator.ready.all()


def test_two_memories_that_act_and_a_clone_of_nobody_are_refused() -> None:
    spec = task()
    host, make = host_of(spec), lambda: memory(spec)
    with pytest.raises(ValueError, match=r"memory=\[a,b\] act in the policy's place"):
        check_stages(host, Memory([("a", make()), ("b", make())]))
    with pytest.raises(ValueError, match="memory=copy reads act.taken: list a memory beside it that acts"):
        check_stages(host, Memory([("copy", Cloning(spec=spec))]))
    check_stages(host, Memory([("a", make()), ("copy", Cloning(spec=spec))]))


@pytest.mark.parametrize("kind", [SelfImitation, ReturnMemory, EpisodicReturn])
def test_rewards_of_a_moving_unit_are_not_to_be_remembered(kind: Any) -> None:
    spec = task()
    operators = Memory([("own", kind(spec=spec))])
    check_stages(host_of(spec), operators)
    with pytest.raises(ValueError, match=r"memory=own remembers rewards, and algorithm.scale_rewards=true keeps"):
        check_stages(host_of(spec, scale_rewards=True), operators)


def test_the_loss_of_judges_by_hand() -> None:
    loss = reflection_loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1.0]))
    torch.testing.assert_close(loss, torch.tensor([(math.log(2) + math.log(4 / 3)) / 2]))
