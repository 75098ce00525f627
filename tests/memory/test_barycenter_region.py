"""The barycenter region against the functions it is made of, and in PPO's loss."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.algorithms.ppo import PPO
from marl_memory.functional.transport import (
    categorical_barycenter,
    categorical_kl,
    gaussian_barycenter,
    gaussian_kl,
    gaussian_w2,
    ordinal_cost,
    sinkhorn_divergence,
    structured_cost,
    value_cost,
)
from marl_memory.memory.barycenter_region import REPORT, BarycenterRegion
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from tests.memory.tasks import SCOPES, K, normal, rows, task, uniform

torch.set_num_threads(1)  # tensors this small are not worth sharing out

E = math.exp


def region(spec: TaskSpec, **options: Any) -> BarycenterRegion:
    """One that acts from the first row on; λ stays, and there is no gate."""
    plain: dict[str, Any] = {
        "capacity": 64 * spec.n_agents,
        "policy": "fifo",
        "neighbours": 2,
        "half_life": None,
        "min_rows": 0,
        "radius": None,
        "coefficient": 1.0,
        "fixed_point_gate": False,
    }
    return BarycenterRegion(spec=spec, **{**plain, **options})


def batch(
    memory: BarycenterRegion, observation: Tensor, *policy: Tensor, advantage: Tensor | float = 0.0, **options: Any
) -> TensorDict:
    """What a host hands to the operator; ``policy``: log-probabilities, or loc and scale, ``[B, A, P]``."""
    td = rows(memory.spec, observation, memory.asks | memory.entries, **options)
    for name, x in zip(("loc", "scale") if memory.spec.continuous else ("log_probs",), policy, strict=True):
        td.get(K.policy(name)).copy_(x)
    td.get(K.advantage).add_(advantage)
    return td


def remember(memory: BarycenterRegion, *args: Any, **options: Any) -> TensorDict:
    td = batch(memory, *args, **options)
    memory(td)
    memory.write(td)
    return td


def told(memory: BarycenterRegion, td: TensorDictBase, name: str) -> Tensor:
    return td.get(memory.report)[..., REPORT.index(name)]


def set_bandwidth(memory: BarycenterRegion, h: float) -> None:
    """Fix what is otherwise measured: keys as they are, and h."""
    memory.trace.store.scale.fill_(1.0)
    memory.trace.store._rescale()
    memory.trace.store.bandwidth.fill_(h)


def policies(spec: TaskSpec, b: int, seed: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Parameters ``[B, A, P]``."""
    shape = (b, spec.n_agents, spec.action_size)
    if spec.continuous:
        return normal(*shape, seed=seed), (0.5 * normal(*shape, seed=seed + 1)).exp()
    logits = normal(*shape, seed=seed)
    allowed = torch.tensor(spec.action_valid) if mask is None else mask
    return (torch.where(allowed, logits, torch.finfo(logits.dtype).min).log_softmax(-1),)


def reference(memory: BarycenterRegion, td: TensorDictBase) -> tuple[Tensor, ...]:
    return tuple(td.get(key) for key in memory.references.values())


# ------------------------------------------------------------------------------------------------------- off is absent

BODY = partial(MLP, hidden=(16, 16))
STEPS, N = 6, 4


def ppo(spec: TaskSpec, **options: Any) -> PPO:
    return PPO(spec=spec, network=BODY, seed=3, epochs=2, minibatches=2, **options)


def collected(host: PPO, memory: BarycenterRegion | None, seed: int) -> TensorDict:
    """A batch ``[T, N]`` as environments and the policy write it, with deaths and masks."""
    spec, shape = host.spec, (STEPS, N)
    alive = uniform(STEPS * N, spec.n_agents, seed=seed) < 0.8
    alive[:, 0] = True
    mask = uniform(STEPS * N, spec.n_agents, spec.action_size, seed=seed + 1) < 0.7
    mask[..., 0] = True
    td = TensorDict(batch_size=shape)
    for i, time in enumerate(((), ("next",))):
        observation = normal(STEPS * N, spec.n_agents, spec.observation_size, seed=seed + 10 * i)
        now = rows(spec, observation, alive=alive, mask=mask).exclude("learn")
        for key in now.keys(include_nested=True, leaves_only=True):
            x = now.get(key)
            td.set((*time, *(key if isinstance(key, tuple) else (key,))), x.view(*shape, *x.shape[1:]))
    td.set(("next", *K.reward), normal(*shape, spec.n_agents, 1, seed=seed + 2))
    td.set(("next", *K.discount), torch.ones(*shape, spec.n_agents, 1))
    for name in (K.done, K.terminated, K.truncated):
        td.set(("next", name), torch.zeros(*shape, 1, dtype=torch.bool))
    host.actor(td)
    entries = {**host.learn_entries, **({} if memory is None else memory.asks | memory.entries)}
    for key, entry in entries.items():
        td.set(key, entry.zeros(shape, torch.float32))
    return td


def updated(host: PPO, memory: BarycenterRegion | None, td: TensorDict) -> list[dict[str, Tensor]]:
    """One update in the order of the way of the data."""
    host.derive_rewards(td)
    host.compute_advantages(td)
    if memory is not None:
        memory(td)
    losses = [host.update(minibatch) for minibatch in host.minibatches(td)]
    host.finish_update(td)
    if memory is not None:
        memory.write(td)
    return losses


OFF = {"absent": None, "strength 0": {"strength": 0.0}, "never ready": {"min_rows": 10**6}}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("centralised", [True, False])
def test_a_memory_that_is_off_or_empty_is_no_memory(continuous: bool, scope: str, centralised: bool) -> None:
    spec = task(2, continuous=continuous)
    made = partial(BarycenterRegion, spec=spec, scope=scope, capacity=256, neighbours=2)
    memories = {name: None if options is None else made(**options) for name, options in OFF.items()}
    memories["acts"] = made(min_rows=0)
    hosts = {}
    for name, memory in memories.items():
        hosts[name] = ppo(spec, centralised_critic=centralised, share_parameters=centralised)
        for step in range(4):
            updated(hosts[name], memory, collected(hosts[name], memory, step))
    bare = dict(hosts["absent"].named_parameters())
    same = {name: all(torch.equal(x, bare[key]) for key, x in h.named_parameters()) for name, h in hosts.items()}
    assert same == {**dict.fromkeys(OFF, True), "acts": False}
    assert memories["acts"] is not None and len(memories["acts"]) > 0


@pytest.mark.parametrize("continuous", [True, False])
def test_a_batch_never_recalls_itself(continuous: bool) -> None:
    """It is written after the update: the first one is exactly the host's, the second is not."""
    spec = task(2, continuous=continuous)
    memory = region(spec)
    with_memory, without = ppo(spec), ppo(spec)
    for step, expected in enumerate((False, True)):
        td = collected(with_memory, memory, step)
        losses = updated(with_memory, memory, td)
        updated(without, None, collected(without, None, step))
        assert bool(td.get(memory.weight).any()) == expected
        assert all(("loss/barycenter_region" in loss) == expected for loss in losses)
        same = [torch.equal(x, y) for x, y in zip(with_memory.parameters(), without.parameters(), strict=True)]
        assert all(same) != expected
    assert len(memory) > 0


# ------------------------------------------------------------------------------------------------------------- by hand


def two_neighbours(spec: TaskSpec, **options: Any) -> tuple[BarycenterRegion, tuple[Tensor, ...]]:
    """At (0.3, 0.4), three times, and at (0, 1), with δ = 0.2 and −0.6; h = 0.5."""
    memory = region(spec, **options)
    past = policies(spec, 2, 11)
    td = batch(memory, torch.tensor([[[0.3, 0.4]], [[0.0, 1.0]]]), *past)
    td.get(K.value).copy_(torch.tensor([[[3.8]], [[4.6]]]))
    td.get(K.value_target).fill_(4.0)
    td.get(K.learn_reward).fill_(0.02)
    memory(td)
    memory.write(td)
    memory.trace.store.mass[0, 0, 0] = 3.0
    set_bandwidth(memory, 0.5)
    return memory, past


W1, W2 = 3 * E(-0.5), E(-2.0)  # mass · exp(−d²/2h²), d² = 0.25 and 1
W = W1 + W2  # 1.955
EFFECTIVE = W**2 / (W1**2 / 3 + W2**2)


@pytest.mark.parametrize("gate", [True, False])
def test_omega_by_hand(gate: bool) -> None:
    memory, _ = two_neighbours(
        task(), mass_half=1.5, coefficient=0.3, strength=0.5, fixed_point_gate=gate, gate_slope=0.8
    )
    td = batch(memory, torch.zeros(1, 1, 2), *policies(memory.spec, 1, 0))
    td.get(K.value).fill_(3.5)
    td.get(K.value_target).fill_(4.0)
    memory(td)
    share = 0.8 * abs((0.5 + 0.2 * W1 - 0.6 * W2) / (1 + W)) / 4.0 if gate else 1.0
    omega = W / (W + 1.5) * 0.5 * share
    for name, value in (("mass", W), ("effective_neighbours", EFFECTIVE), ("omega", omega)):
        assert told(memory, td, name).item() == pytest.approx(value, rel=1e-5)
    assert td.get(memory.weight).item() == pytest.approx(0.3 * omega, rel=1e-5)


def test_strength_follows_its_schedule_and_rows_fade() -> None:
    spec = task()
    memory = region(spec, strength=1.0, strength_final=0.2, half_life=10.0, mass_half=0.5)
    remember(memory, torch.zeros(2, 1, 2), *policies(spec, 2, 0))
    memory.set_progress(20, 0.5)
    td = memory(batch(memory, torch.zeros(1, 1, 2), *policies(spec, 1, 1)))
    assert told(memory, td, "mass").item() == pytest.approx(0.5)  # two rows after two half-lives
    assert told(memory, td, "omega").item() == pytest.approx(0.6 * 0.5)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("actions", [1, 3])
def test_the_reference_is_what_the_function_gives_for_gaussians(lam: float, actions: int) -> None:
    memory, (means, stds) = two_neighbours(task(actions=actions), lam=lam, mass_half=1.5)
    mean, std = policies(memory.spec, 1, 0)
    td = memory(batch(memory, torch.zeros(1, 1, 2), mean, std))
    shares, omega = torch.tensor([[[W1 / W, W2 / W]]]), torch.tensor([[W / (W + 1.5)]])
    neighbours = (x.transpose(0, 1).unsqueeze(0) for x in (means, stds))
    expected = gaussian_barycenter(mean, std, *neighbours, shares, omega / actions, lam)
    for x, y in zip(reference(memory, td), expected, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(told(memory, td, "kl"), gaussian_kl(*expected, mean, std))


EMBEDDING = ((0.0, 0.0), (3.0, 4.0), (0.0, 4.0))
QUALITIES = torch.tensor([[[1.0, 5.0, 2.0]]])
COSTS = {
    "one_hot": None,
    "ordinal": ordinal_cost(3),
    "structured": structured_cost(torch.tensor(EMBEDDING)),
    "value": value_cost(QUALITIES),
}


@pytest.mark.parametrize("lam", [0.1, 10.0])
@pytest.mark.parametrize("cost", sorted(COSTS))
def test_the_reference_is_what_the_function_gives_for_categoricals(lam: float, cost: str) -> None:
    spec = task(actions=3, continuous=False, embedding=EMBEDDING)
    memory, (past,) = two_neighbours(spec, lam=lam, mass_half=1.5, cost=cost, eps=0.2, iterations=40)
    (present,) = policies(spec, 1, 0)
    td = batch(memory, torch.zeros(1, 1, 2), present)
    assert (K.action_values in memory.asks) == (cost == "value")
    td.set(K.action_values, QUALITIES)
    memory(td)
    shares, omega = torch.tensor([[[W1 / W, W2 / W]]]), torch.tensor([[W / (W + 1.5)]])
    past = past.transpose(0, 1).unsqueeze(0)
    expected = categorical_barycenter(present, past, shares, omega, lam, cost=COSTS[cost], eps=0.2, iterations=40)
    torch.testing.assert_close(*(x.exp() for x in (*reference(memory, td), expected)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told(memory, td, "kl"), categorical_kl(expected, present), atol=1e-5, rtol=1e-3)


BAD = [
    ({"cost": "cheap"}, True, "cost='cheap' must be one of one_hot, ordinal, structured, value"),
    ({"cost": "ordinal"}, True, "cost='ordinal' is one between discrete actions"),
    ({"cost": "structured"}, False, "cost='structured' needs an embedding of the actions, which synthetic does not"),
    ({"divergence": "w2"}, False, "divergence='w2' is one between Gaussians; synthetic has discrete actions"),
    ({"divergence": "tv"}, True, "divergence='tv' must be 'kl' or 'w2'"),
    ({"lam": 0.0}, True, "lam=0.0 must be positive"),
    ({"radius": 0.0}, True, "radius=0.0 must be positive"),
    ({"quality": -1.0}, True, "quality=-1.0 must be positive"),
    ({"strength": 1.5}, True, "strength=1.5 must lie in"),
    ({"gate_slope": 2.0, "fixed_point_gate": True}, True, "gate_slope=2.0 must lie in"),
    ({"scope": "team"}, True, "scope='team' must be one of"),
    ({"payloads": "none"}, True, "payloads='none' must be 'own' or 'shuffled'"),
]


@pytest.mark.parametrize(("options", "continuous", "said"), BAD)
def test_options_that_do_not_fit(options: dict[str, Any], continuous: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        region(task(continuous=continuous), **options)


def test_better_rows_count_more_by_hand() -> None:
    """Two rows at one place with normalised advantages 1 and −1, τ = 0.5; what is beyond ±5 is cut."""
    spec = task(actions=1)
    memory = region(spec, quality=0.5, lam=1e4, mass_half=1e-6)
    means, stds = torch.tensor([[[1.0]], [[-1.0]]]), torch.ones(2, 1, 1)
    remember(memory, torch.zeros(2, 1, 2), means, stds, advantage=torch.tensor([[[1.0]], [[-1.0]]]))
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
    assert told(memory, td, "mass").item() == pytest.approx(E(2.0) + E(-2.0), rel=1e-5)
    assert td.get(memory.references["loc"]).item() == pytest.approx(math.tanh(2.0), rel=1e-3)
    remember(memory, torch.full((1, 1, 2), 50.0), means[:1], stds[:1], advantage=100.0)
    assert memory.trace.store.payload[0, 2, 0, -1].item() == pytest.approx(E(5.0))


def test_lambda_moves_towards_the_radius() -> None:
    spec = task(2)
    memory = region(spec, radius=0.02, lam=50.0, capacity=256)
    for step in range(30):
        td = remember(memory, normal(32, 2, 2, seed=step), *policies(spec, 32, step))
        if step == 1:
            assert memory.lam.item() == pytest.approx(25.0)  # by a factor of 2 at most
    median = told(memory, td, "kl")[told(memory, td, "mass") > 0].median().item()
    assert median == pytest.approx(0.02, rel=0.35)
    before = memory.lam.item()
    td = batch(memory, normal(8, 2, 2, seed=99), *policies(spec, 8, 99))
    memory(td)
    half = median_of(told(memory, td, "kl")[told(memory, td, "mass") > 0])
    memory.write(td)
    assert memory.lam.item() == pytest.approx(before * min(max(0.02 / half, 0.5), 2.0), rel=1e-4)
    memory.clear()
    assert memory.lam.item() == 50.0


def median_of(x: Tensor) -> float:
    return x.flatten().median().item()


# ------------------------------------------------------------------------------------------------------------------- T1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), lam=st.sampled_from([0.05, 0.5, 5.0]), continuous=st.booleans())
def test_the_region_is_no_larger_than_the_memory_disagrees(seed: int, lam: float, continuous: bool) -> None:
    """T1: KL(p*‖π) ≤ λ ω Σ a D(π, ν), and p* is nearer to the neighbours than π is."""
    spec = task(actions=4, continuous=continuous)
    memory = region(spec, lam=lam, neighbours=3, capacity=3, mass_half=0.5, iterations=200)
    past = policies(spec, 3, seed)
    remember(memory, 0.1 * normal(3, 1, 2, seed=seed), *past)
    set_bandwidth(memory, 1.0)
    present = policies(spec, 5, seed + 7)
    query = 0.5 * normal(5, 1, 2, seed=seed + 1)
    td = memory(batch(memory, query, *present))
    mass = told(memory, td, "mass")
    squared = (query.squeeze(1).unsqueeze(1) - memory.trace.store.keys[0]).square().sum(-1)
    shares = torch.exp(-squared / 2) / torch.exp(-squared / 2).sum(-1, keepdim=True)

    def disagreement(*policy: Tensor) -> Tensor:
        total = torch.zeros(5)
        for i in range(3):
            one = [x[i].expand(5, 4) for x in past]
            policy_ = [x.squeeze(1) for x in policy]
            d = gaussian_w2(*policy_, *one) / 4 if continuous else sinkhorn_divergence(*policy_, *one, eps=0.1)
            total += shares[:, i] * d
        return total * (mass / (mass + 0.5)).squeeze(1)

    bound = lam * disagreement(*present)
    assert (told(memory, td, "kl").squeeze(1) <= bound * (1 + 1e-3) + 1e-4).all()
    assert (disagreement(*reference(memory, td)) <= disagreement(*present) + 1e-4).all()


# ----------------------------------------------------------------------------------------------------- what is not seen


def test_forbidden_actions_have_probability_0() -> None:
    spec = task(2, actions=4, continuous=False)
    memory = region(spec, lam=100.0)
    for step in range(3):
        mask = uniform(16, 2, 4, seed=step) < 0.5
        mask[..., step] = True
        td = remember(memory, normal(16, 2, 2, seed=step), *policies(spec, 16, step, mask), mask=mask)
    assert told(memory, td, "omega").max() > 0.1
    best = td.get(memory.references["log_probs"]).exp()
    assert not best[~mask].any()
    torch.testing.assert_close(best.sum(-1), torch.ones(16, 2))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("continuous", [True, False])
def test_padding_and_the_dead_enter_nothing(scope: str, continuous: bool) -> None:
    spec = task(3, features=(3, 3, 2), actions=(3, 3, 2), continuous=continuous)
    seen, done = torch.tensor(spec.observation_valid), torch.tensor(spec.action_valid)
    outs = []
    for garbage in (0.0, 1e3):
        memory, lived = region(spec, scope=scope, fixed_point_gate=True), 0
        for step in range(3):
            alive = uniform(8, 3, seed=step) < 0.7
            alive[:, 0] = True
            lived += int(alive.sum())
            observation = torch.where(seen & alive.unsqueeze(-1), normal(8, 3, 3, seed=step), garbage)
            parts = policies(spec, 8, step)
            if continuous:
                parts = tuple(torch.where(done, x, 1 + garbage) for x in parts)
            state = torch.where(alive.unsqueeze(-1), observation, 0.0).flatten(1)  # the dead see nothing
            td = batch(memory, observation, *parts, alive=alive, state=state)
            for name in ("log_probs", "loc", "scale"):
                if K.policy(name) in memory.asks:
                    td.get(K.policy(name))[~alive] = torch.nan if garbage else 0.5
            td.get(K.value_target).fill_(1.0)
            memory(td)
            memory.write(td)
        assert int(memory.trace.store.rejected.sum()) == 0
        assert told(memory, td, "omega")[alive].max() > 0.1
        assert not td.get(memory.weight)[~alive].any()
        assert all(x.isfinite().all() for x in memory.metrics(td).values())
        outs.append((memory, td))
    live = alive.unsqueeze(-1) & done
    (a, x), (b, y) = outs
    for one, other in zip(reference(a, x), reference(b, y), strict=True):
        assert torch.equal(one[live], other[live])
    assert torch.equal(x.get(a.report)[alive], y.get(b.report)[alive])
    assert a.trace.store.mass.sum() == lived


@pytest.mark.parametrize("agents", [1, 3])
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", ["merge", "fifo", "simhash"])
def test_every_scope_gives_finite_regions(scope: str, agents: int, continuous: bool, policy: str) -> None:
    spec = task(agents, continuous=continuous)
    memory = BarycenterRegion(spec=spec, scope=scope, capacity=24 * agents, policy=policy, neighbours=4)
    for step in range(6):
        td = batch(memory, normal(16, agents, 2, seed=step), *policies(spec, 16, step))
        td.get(K.value_target).fill_(1.0)
        memory(td)
        memory.write(td)
        for x in (*reference(memory, td), td.get(memory.report), td.get(memory.weight)):
            assert x.isfinite().all()
    assert told(memory, td, "omega").max() > 0
    assert 0 < len(memory) <= memory.scope.banks * memory.trace.store.rows
    assert not list(memory.parameters())


@pytest.mark.parametrize("continuous", [True, False])
def test_the_scopes_of_one_agent_are_one(continuous: bool) -> None:
    spec = task(continuous=continuous)
    memories = [BarycenterRegion(spec=spec, scope=scope, capacity=48, neighbours=4) for scope in SCOPES]
    for step in range(6):
        alive = uniform(16, 1, seed=step) < 0.8
        tds = []
        for memory in memories:
            td = batch(memory, normal(16, 1, 2, seed=step), *policies(spec, 16, step), alive=alive)
            td.get(K.value_target).fill_(1.0)
            memory(td)
            memory.write(td)
            tds.append(td)
        for memory, td in zip(memories[1:], tds[1:], strict=True):
            assert torch.equal(td.get(memory.report), tds[0].get(memory.report))
            assert all(map(torch.equal, reference(memory, td), reference(memories[0], tds[0])))
    assert told(memory, td, "omega").max() > 0.1


@pytest.mark.parametrize("continuous", [True, False])
def test_agents_change_places_and_so_do_their_regions(continuous: bool) -> None:
    spec, order = task(3, continuous=continuous), torch.tensor([2, 0, 1])
    straight, turned = (region(spec, scope="shared") for _ in range(2))
    for step in range(3):
        observation, parts = normal(8, 3, 2, seed=step), policies(spec, 8, step)
        for memory in (straight, turned):  # h is a median over a sample of rows, in which their order counts
            set_bandwidth(memory, 0.5)
        a = remember(straight, observation, *parts)
        b = remember(turned, observation[:, order], *(x[:, order] for x in parts))
    for x, y in zip(reference(straight, a), reference(turned, b), strict=True):
        torch.testing.assert_close(x[:, order], y)
    torch.testing.assert_close(a.get(straight.weight)[:, order], b.get(turned.weight))


def test_shuffled_payloads_lie_at_other_keys() -> None:
    spec = task(actions=1)
    memory = region(spec, payloads="shuffled")
    observation = torch.arange(32.0).view(32, 1, 1)
    remember(memory, observation.expand(32, 1, 2), observation, torch.ones(32, 1, 1))
    store = memory.trace.store
    assert torch.equal(store.payload[0, :32, 0, 0].sort().values, store.keys[0, :32, 0])
    assert (store.payload[0, :32, 0, 0] != store.keys[0, :32, 0]).float().mean() > 0.8


# ------------------------------------------------------------------------------------------------------- in PPO's loss


@pytest.mark.parametrize(("continuous", "divergence"), [(True, "kl"), (True, "w2"), (False, "kl")])
def test_the_loss_is_weight_times_divergence_and_draws_the_policy_there(continuous: bool, divergence: str) -> None:
    spec = task(2, continuous=continuous)
    memory = region(spec, coefficient=5.0, lam=20.0, divergence=divergence, capacity=512)
    host = ppo(spec, entropy_coef=0.0, lr=3e-3)
    for step in range(2):  # what is remembered is another policy's
        td = collected(host, memory, step)
        host.compute_advantages(td)
        for name in ("log_probs", "loc"):
            if (x := td.get(K.policy(name), None)) is not None:
                x.copy_(torch.tensor([0.1, 0.9]).log().expand_as(x) if name == "log_probs" else x + 1.0)
        memory(td)
        memory.write(td)
    td = collected(host, memory, 9)
    if not continuous:
        td.get(K.action_mask).fill_(True)
        host.actor(td)
    host.compute_advantages(td)
    memory(td)
    td.get(K.advantage).zero_()
    alive, weight = td.get(K.alive), td.get(memory.weight)
    assert weight[alive].min() > 0
    assert (memory.weight[-1] == "w2_weight") == (divergence == "w2")

    def term() -> Tensor:
        parameters = tuple(host.actor.distribution(td).parameters.values())
        between = {"kl": gaussian_kl if continuous else categorical_kl, "w2": gaussian_w2}[divergence]
        return (weight * between(*reference(memory, td), *parameters))[alive].sum() / alive.sum()

    first = term().item()
    rows_ = host.prepare(td)
    report = host.update(rows_)
    assert report["loss/barycenter_region"].item() == pytest.approx(first, rel=1e-5)
    for _ in range(150):
        host.update(rows_)
    assert term().item() < 0.5 * first


# ---------------------------------------------------------------------------------- what agrees with π leaves it alone


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities ``[B, 1, P]`` of constant ``logits`` ``[P]`` where ``mask`` allows."""
    return torch.where(mask, logits, torch.finfo(torch.float32).min).log_softmax(-1)


@pytest.mark.parametrize("actions", [2, 4, 9])
def test_a_policy_that_never_changes_is_its_own_region(actions: int) -> None:
    """λ grows to its bound, as nothing is ever away from π; p* stays π, and is no bonus of entropy."""
    spec = task(actions=actions, continuous=False)
    memory = region(spec, radius=0.015, capacity=512, neighbours=16)
    log_probs = (2 * normal(actions, seed=5)).log_softmax(-1).expand(128, 1, actions)
    for seed in range(12):
        td = remember(memory, normal(128, 1, 2, seed=seed), log_probs)
    assert memory.lam == memory.bounds[1] == 100 and told(memory, td, "omega").mean() > 0.5
    assert told(memory, td, "kl").abs().max() < 1e-5
    torch.testing.assert_close(reference(memory, td)[0], log_probs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", ["fifo", "merge"])
def test_constant_logits_under_masks_that_change_are_no_disagreement(policy: str) -> None:
    spec, logits = task(actions=4, continuous=False), torch.tensor([1.0, 0.0, -0.5, 0.5])
    memory = region(spec, policy=policy, capacity=256, neighbours=8, lam=5.0)
    for seed in range(8):
        mask = uniform(32, 1, 4, seed=seed) < 0.6
        mask[..., 0] |= ~mask.any(-1)
        td = remember(memory, normal(32, 1, 2, seed=seed), masked(logits, mask), mask=mask)
    assert told(memory, td, "kl").max() < 1e-5
    assert told(memory, td, "omega").mean() > 0.3


def test_neighbours_that_know_nothing_of_what_is_allowed_are_none() -> None:
    memory = region(task(actions=4, continuous=False), neighbours=1, lam=5.0)
    mask = torch.tensor([[[True, True, False, False]]])
    remember(memory, torch.zeros(1, 1, 2), masked(torch.zeros(4), mask), mask=mask)
    log_probs = masked(torch.tensor([0.0, 0.0, 3.0, 0.0]), ~mask)
    td = memory(batch(memory, torch.zeros(1, 1, 2), log_probs, mask=~mask))
    assert td.get(memory.weight).item() == told(memory, td, "mass").item() == told(memory, td, "neighbours").item() == 0
    assert torch.equal(reference(memory, td)[0], log_probs)


def test_what_was_forbidden_is_as_likely_as_the_policy_says_by_hand() -> None:
    """ν knew the first two of three actions, 1 : 3; π gives these 0.8: with all weight on memory 0.2, 0.6 and 0.2."""
    memory = region(task(actions=3, continuous=False), neighbours=1, lam=100.0, mass_half=1e-6, iterations=300)
    mask = torch.tensor([[[True, True, False]]])
    log_probs = masked(torch.tensor([0.25, 0.75, 1.0]).log(), mask)
    remember(memory, torch.zeros(1, 1, 2), log_probs, mask=mask)
    td = batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[0.4, 0.4, 0.2]]]).log())
    payload, *_ = memory.trace.find(td)
    past, share, _, _ = payload.split(memory.parts, -1)
    nu, known = memory._completed(td, past, share)
    torch.testing.assert_close(nu[0, 0, 0, 0], torch.tensor([0.2, 0.6, 0.2]))
    assert known.all()


@pytest.mark.parametrize("policy", ["fifo", "merge", "simhash"])
def test_good_rows_count_more_also_where_they_are_merged_with_bad_ones(policy: str) -> None:
    """At one state half the rows go to 1 and were good by 2 τ, half to −1 and bad: their mean is tanh 2."""
    few = {"fifo": 64, "merge": 2, "simhash": 4}[policy]
    options = {"lam": 1e4, "mass_half": 1e-6, "capacity": few, "neighbours": 64 if policy == "fifo" else 1}
    memory = region(task(actions=1), quality=0.5, policy=policy, **options)
    ways = torch.tensor([1.0, -1.0] * 32).view(64, 1, 1)
    for i in range(0, 64, 2):
        way = ways[i : i + 2]
        remember(memory, torch.zeros(2, 1, 2), way, torch.ones(2, 1, 1), advantage=way.clone())
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
    assert reference(memory, td)[0].item() == pytest.approx(math.tanh(2), abs=2e-3)


@pytest.mark.parametrize("forbidden", [0.0, -1e3, math.inf, -math.inf])
def test_values_of_forbidden_actions_are_no_cost(forbidden: float) -> None:
    memory, _ = two_neighbours(task(actions=3, continuous=False), cost="value", lam=100.0, mass_half=0.1)
    mask = torch.tensor([[[True, True, False]]])
    td = batch(memory, torch.zeros(1, 1, 2), masked(torch.tensor([2.0, 0.0, 0.0]), mask), mask=mask)
    other = td.clone()
    td.set(K.action_values, torch.tensor([[[0.0, 1.0, forbidden]]]))
    other.set(K.action_values, torch.tensor([[[0.0, 1.0, 1.0]]]))
    assert torch.equal(reference(memory, memory(td))[0], reference(memory, memory(other))[0])
    assert told(memory, td, "kl").isfinite().all()


# ------------------------------------------------------------------------------------------------------- what λ follows


def test_a_row_that_is_not_finite_leaves_no_trace_in_lam() -> None:
    spec = task(2)
    memory = region(spec, scope="per_agent", radius=0.02)
    remember(memory, normal(4, 2, 2, seed=0), *policies(spec, 4, 0))
    broken, alive = policies(spec, 4, 1), torch.tensor([[True, False]] * 4)
    alive[0, 1], broken[0][0, 1] = True, math.nan
    remember(memory, normal(4, 2, 2, seed=0), *broken, alive=alive)
    assert memory.lam.isfinite().all() and memory.trace.store.rejected.tolist() == [0, 1]


def test_lam_follows_the_rows_where_memory_weighs_something() -> None:
    """After twenty half lives ω is 10⁻⁶: KL is 0 there whatever memory says, and λ stays."""
    memory = region(task(), radius=0.015, half_life=10.0)
    remember(memory, torch.zeros(4, 1, 2), *policies(memory.spec, 4, 0))
    before = memory.lam.clone()
    memory.set_progress(200, 0.0)
    td = memory(batch(memory, torch.zeros(4, 1, 2), *policies(memory.spec, 4, 1)))
    memory._adapt(td.get(memory.report), td.get(K.alive))
    assert 0 < told(memory, td, "omega").max() < 1e-4 and torch.equal(memory.lam, before)


@pytest.mark.parametrize(("continuous", "lam"), [(True, 1e5), (True, 1e-4), (False, 200.0)])
def test_a_lam_out_of_bounds_is_refused(continuous: bool, lam: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0.001 and 1"):
        region(task(continuous=continuous), lam=lam, radius=0.015)
    region(task(continuous=continuous), lam=lam)  # it stays what it is


def test_effective_neighbours_do_not_fall_with_their_weight() -> None:
    memory = region(task(), half_life=10.0, neighbours=1)
    remember(memory, torch.zeros(1, 1, 2), *policies(memory.spec, 1, 0))
    memory.set_progress(300, 0.0)
    td = memory(batch(memory, torch.zeros(1, 1, 2), *policies(memory.spec, 1, 0)))
    assert told(memory, td, "mass") < 1e-8 and told(memory, td, "effective_neighbours").item() == pytest.approx(1.0)
