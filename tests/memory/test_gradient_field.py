"""The gradient field against hand-worked numbers, the statistics it promises, and what must not matter."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.deterministic import DeterministicHost
from marl_memory.algorithms.td3 import TD3
from marl_memory.memory.gradient_field import REPORT, SUMS, GradientField, _Recalled
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.replay import ReplayRing
from tests.memory.tasks import SCOPES, K, normal, rows, task, uniform

torch.set_num_threads(1)  # tensors this small are not worth sharing out

E = math.exp


def field(spec: TaskSpec, **options: Any) -> GradientField:
    """One that acts from the first row on and, unless told, gives all to the memory and has no gates."""
    plain: dict[str, Any] = {
        "capacity": 64 * spec.n_agents,
        "policy": "fifo",
        "neighbours": 2,
        "half_life": None,
        "min_rows": 0,
        "beta": 1.0,
        "beta_rule": "mass",
        "mass_half": 1e-12,
        "action_bandwidth": None,
        "fixed_point_gate": False,
    }
    return GradientField(spec=spec, **{**plain, **options})


def batch(
    memory: GradientField,
    observation: Tensor,
    gradient: Tensor,
    *,
    action: Tensor | None = None,
    error: Tensor | float = 0.0,
    target: float = 0.0,
    reward: float = 0.0,
    **options: Any,
) -> TensorDict:
    """What a host hands to the operator: ``[B, A, F]`` observations, ``[B, A, P]`` gradients."""
    td = rows(memory.spec, observation, memory.entries, **options)
    td.set(K.action_gradient, gradient.clone())
    td.set(K.policy_action, torch.zeros_like(gradient) if action is None else action)
    td.set(K.td_error, torch.zeros_like(gradient[..., :1]) + error)
    td.get(K.value_target).fill_(target)
    td.get(K.learn_reward).fill_(reward)
    return td


def remember(memory: GradientField, *args: Any, **options: Any) -> TensorDict:
    td = batch(memory, *args, **options)
    memory(td)
    memory.write(td)
    return td


def fused(memory: GradientField, *args: Any, **options: Any) -> Tensor:
    return memory(batch(memory, *args, **options)).get(K.action_gradient)


def told(memory: GradientField, td: TensorDictBase, name: str) -> Tensor:
    return td.get(memory.report)[..., REPORT.index(name)]


def set_scales(memory: GradientField, *, rms: float | None = None, bandwidth: float | None = None) -> None:
    """Fix what is otherwise measured: keys as they are, h, and the gradients' root mean square."""
    store = memory.trace.store
    store.scale.fill_(1.0)
    store._rescale()
    if bandwidth is not None:
        store.bandwidth.fill_(bandwidth)
    if rms is not None:
        memory.square.sum.fill_(rms**2)
        memory.square.seen.fill_(1.0)


# ------------------------------------------------------------------------------------------------------- off is absent

ROWS = 16
SMALL: dict[str, Any] = {"batch_size": ROWS, "warmup_frames": ROWS, "capacity": 64}
BODY = partial(MLP, hidden=(16, 16))
HOSTS = [
    pytest.param(DDPG, {}, True, id="ddpg"),
    pytest.param(TD3, {}, True, id="td3"),
    pytest.param(DDPG, {"centralised_critic": True}, True, id="maddpg"),
    pytest.param(TD3, {"centralised_critic": True}, False, id="matd3-discrete"),
]
OFF = {
    "absent": None,
    "strength 0": {"strength": 0.0},
    "beta 0": {"beta": 0.0},
    "never ready": {"min_rows": 10**6},
    "shut gate": {"least_cosine": 1.1},
}


def drawn(host: DeterministicHost, memory: GradientField | None, seed: int) -> TensorDict:
    """Rows ``[B]`` as a replay gives them."""
    spec, shape = host.spec, (ROWS, host.spec.n_agents)
    alive = uniform(*shape, seed=seed) < 0.8
    alive[0] = True
    mask = uniform(*shape, spec.action_size, seed=seed + 1) < 0.6
    mask[..., 0] = True
    entries = {**host.learn_entries, **({} if memory is None else memory.asks | memory.entries)}
    td = TensorDict(batch_size=(ROWS,))
    for i, time in enumerate(((), ("next",))):
        observation = normal(*shape, spec.observation_size, seed=seed + 10 * i) * alive.unsqueeze(-1)
        now = rows(spec, observation, alive=alive, mask=mask).exclude("learn")
        for key in now.keys(include_nested=True, leaves_only=True):
            td.set((*time, *(key if isinstance(key, tuple) else (key,))), now.get(key))
    vectors = 2 * uniform(*shape, spec.action_size, seed=seed + 2) - 1
    td.set(K.action, vectors if spec.continuous else (vectors - 4.0 * ~mask).argmax(-1))
    td.set(("next", *K.reward), normal(*shape, 1, seed=seed + 3))
    td.set(("next", *K.discount), (uniform(*shape, 1, seed=seed + 4) < 0.9).float())
    td.set(K.row, torch.arange(ROWS) + ROWS * seed)
    for key, entry in entries.items():
        td.set(key, entry.zeros((ROWS,), torch.float32))
    return td


def trained(kind: type[DDPG] | type[TD3], spec: TaskSpec, memory: GradientField | None, **options: Any) -> Any:
    """A host after some updates, in the order of the way of the data."""
    host = kind(spec=spec, network=BODY, seed=1, **SMALL, **options)
    for step in range(6):
        td = drawn(host, memory, step)
        host.derive_rewards(td)
        host.compute_targets(td)
        host.update_critic(td)
        if host.actor_is_due:
            host.compute_action_gradient(td)
            if memory is not None:
                memory(td)
            host.update_actor(td)
            host.update_targets()
            if memory is not None:
                memory.write(td)
    return host


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "options", "continuous"), HOSTS)
def test_a_memory_that_is_off_or_empty_is_no_memory(
    kind: type[DDPG] | type[TD3], options: dict[str, Any], continuous: bool, scope: str
) -> None:
    spec = task(2, continuous=continuous)
    made = partial(GradientField, spec=spec, scope=scope, capacity=64, neighbours=2)
    memories = {name: None if keywords is None else made(**keywords) for name, keywords in OFF.items()}
    memories["acts"] = made(min_rows=0)
    hosts = {name: trained(kind, spec, memory, **options) for name, memory in memories.items()}
    bare = dict(hosts["absent"].named_parameters())
    same = {
        name: all(torch.equal(x, bare[key]) for key, x in host.named_parameters())
        for name, host in hosts.items()  #
    }
    assert same == {**dict.fromkeys(OFF, True), "acts": False}
    assert memories["acts"] is not None and len(memories["acts"]) > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_an_empty_memory_gives_back_the_gradient_to_the_bit(scope: str) -> None:
    memory = field(task(3), scope=scope)
    gradient = normal(8, 3, 2, seed=0)
    assert torch.equal(fused(memory, normal(8, 3, 2, seed=1), gradient), gradient)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_identical_neighbours_return_their_gradient() -> None:
    """Also after the root mean square has changed: g is divided by ρ = 5 when written, and multiplied by ρ' when read.

    ρ' is that of a running mean with decay 0.99, debiased: ρ'² = (0.99 · 5² + 1 · 10²) / 1.99.
    """
    memory = field(task(), neighbours=4)
    here, there = torch.tensor([1.0, 2.0]), torch.tensor([-30.0, 40.0])
    remember(memory, here.expand(4, 1, 2), torch.tensor([3.0, -4.0]).expand(4, 1, 2))
    query = here.expand(1, 1, 2)
    torch.testing.assert_close(fused(memory, query, torch.ones(1, 1, 2)), torch.tensor([[[3.0, -4.0]]]))
    remember(memory, there.expand(4, 1, 2), torch.tensor([10.0, 0.0]).expand(4, 1, 2))
    now = math.sqrt((0.99 * 25 + 100) / 1.99)
    expected = torch.tensor([[[3.0, -4.0]]]) * now / 5
    torch.testing.assert_close(fused(memory, query, torch.ones(1, 1, 2)), expected)


def two_neighbours(**options: Any) -> GradientField:
    """At (0.3, 0.4), three times: g = (1, 0), a = (0.5, 0), δ = 0.2; at (0, 1): g = (0, 2), a = 0, δ = −0.6.

    In units of the root mean square, 2 now; h = 0.5.
    """
    memory = field(task(), fixed_point_gate=True, gamma=0.99, action_bandwidth=0.5, **options)
    keys, gradients = torch.tensor([[[0.3, 0.4]], [[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    actions, errors = torch.tensor([[[0.5, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[0.2]], [[-0.6]]])
    td = remember(memory, keys, gradients, action=actions, error=errors, target=4.0, reward=0.02)
    assert not told(memory, td, "beta").any()
    store = memory.trace.store
    store.payload[0, :2, 0, :2] = gradients[:, 0]
    store.mass[0, 0, 0] = 3.0
    set_scales(memory, rms=2.0, bandwidth=0.5)
    return memory


W1, W2 = 3 * E(-0.5) * E(-0.5), E(-2.0)  # mass · exp(−d²/2h²) · exp(−|μ − a|²/2h_a²), d² = 0.25 and 1
W = W1 + W2  # 1.239
EFFECTIVE = W**2 / (W1**2 / 3 + W2**2)  # 3.618
AROUND = (2 * W1 / W, 2 * 2 * W2 / W)
DISTANCE = (W1 * 1 + W2 * 2) / W  # in units of h
ERROR = (0.3 + 0.2 * W1 - 0.6 * W2) / (1 + W)


@pytest.mark.parametrize(("slope", "reward_scale"), [(1.0, 0.02), (0.5, 0.02), (1.0, 0.1)])
def test_two_neighbours_by_hand_under_the_rule_of_mass(slope: float, reward_scale: float) -> None:
    memory = two_neighbours(beta=0.8, mass_half=1.5, gate_slope=slope, strength=0.5)
    assert memory.gate is not None
    memory.gate.squares.sum[..., 1] = reward_scale**2 * memory.gate.squares.seen[..., 1]
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.0, 1.0]]]), error=0.3))
    size = max(4.0, reward_scale / 0.01)  # targets of 4, or rewards over 1 − γ
    beta = 0.8 * 0.5 * W / (W + 1.5) * slope * abs(ERROR) / size
    expected = [(1 - beta) * 1 + beta * x for x in AROUND]
    torch.testing.assert_close(td.get(K.action_gradient), torch.tensor([[expected]]))
    for name, value in (("mass", W), ("effective_neighbours", EFFECTIVE), ("beta", beta), ("distance", DISTANCE)):
        assert told(memory, td, name).item() == pytest.approx(value, rel=1e-5)
    cosine = sum(AROUND) / math.sqrt(2) / math.hypot(*AROUND)
    assert told(memory, td, "cosine").item() == pytest.approx(cosine, rel=1e-5)
    kept = (1 - beta) ** 2 + beta**2 / EFFECTIVE
    assert told(memory, td, "variance_kept").item() == pytest.approx(kept, rel=1e-5)


def test_two_neighbours_by_hand_under_the_rule_of_variance() -> None:
    memory = two_neighbours(beta=0.8, beta_rule="variance")
    # Two pairs at squared distances x = 0 and 1 (units of h²) differ by y = 1 and 1.5: L² = 0.5, and σ² = 0.5, since
    # both neighbours are one gradient each, u = 1 + 1/1, and new.  The sums of u², ux, ut, uy, x², xt, xy, t², ty:
    memory.pairs.copy_(torch.tensor([8.0, 2.0, 0.0, 5.0, 1.0, 0.0, 1.5, 0.0, 0.0]))
    assert [x.item() for x in memory.regression()] == pytest.approx([0.5, 0.5, 0.0])
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.0, 1.0]]]), error=0.3))
    beta = 0.8 * 0.5 / (0.5 + 0.5 / EFFECTIVE + 0.5 * DISTANCE**2) * abs(ERROR) / 4
    assert told(memory, td, "beta").item() == pytest.approx(beta, rel=1e-5)
    expected = [1 - beta + beta * x for x in AROUND]
    torch.testing.assert_close(td.get(K.action_gradient), torch.tensor([[expected]]))


def test_what_age_explains_is_no_noise_by_hand() -> None:
    memory = two_neighbours(beta=0.8, beta_rule="variance")
    # Three pairs, u = 2: y = 1 at x = 0 and t = 0, 3 at x = 1 and t = 10, 4 at x = 0 and t = 20: σ² = 0.5, D = 0.15,
    # L² = 0.5.
    memory.pairs.copy_(torch.tensor([12.0, 2.0, 60.0, 16.0, 1.0, 10.0, 3.0, 500.0, 110.0]))
    assert [x.item() for x in memory.regression()] == pytest.approx([0.5, 0.5, 0.15], rel=1e-4)
    memory.set_progress(8, 0.0)  # the two were written at 0
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.0, 1.0]]]), error=0.3))
    assert told(memory, td, "age").item() == 8
    beta = 0.8 * 0.5 / (0.5 + 0.5 / EFFECTIVE + 0.5 * DISTANCE**2 + 0.15 * 8) * abs(ERROR) / 4
    assert told(memory, td, "beta").item() == pytest.approx(beta, rel=1e-4)


def test_a_row_is_as_old_as_what_is_averaged_in_it() -> None:
    """Written into one row at 0 and at 20, and read at 30, with a half-life of 10: (30/8 + 10/2) / (5/8) = 14."""
    memory = field(task(), capacity=2, policy="merge", half_life=10.0)
    for frames in (0, 20):
        memory.set_progress(frames, 0.0)
        remember(memory, torch.zeros(2, 1, 2), torch.ones(2, 1, 2))
    memory.set_progress(30, 0.0)
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.ones(1, 1, 2)))
    assert told(memory, td, "age").item() == pytest.approx(14.0)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**31), slope=st.floats(-1.0, 1.0), drift=st.floats(-0.1, 0.1), alike=st.floats(0.0, 1.0))
def test_the_regression_is_that_of_scipy(seed: int, slope: float, drift: float, alike: float) -> None:
    """Least squares with L² and D ≥ 0 as ``scipy.optimize.lsq_linear`` finds them, also where x and t are alike."""
    generator = np.random.default_rng(seed)
    u, x = 1 + 1 / generator.integers(1, 5, 64), generator.exponential(1.0, 64)
    t = 100 * (alike * x + (1 - alike) * generator.random(64)) + generator.random(64)
    y = 3 * u + slope * x + drift * t + 0.3 * generator.standard_normal(64)
    memory = field(task())
    pairs = [u * u, u * x, u * t, u * y, x * x, x * t, x * y, t * t, t * y]
    memory.pairs.copy_(torch.tensor([p.sum() for p in pairs]))
    found = lsq_linear(np.stack([u, x, t], 1), y, bounds=([-np.inf, 0, 0], np.inf), method="bvls", tol=1e-14).x
    assume(found[0] > 0.01 * (u * y).sum() / (u * u).sum())
    noise, slopes, drifts = (z.item() for z in memory.regression())
    predicted = (np.stack([u, x, t], 1) @ v for v in (found, np.array([noise, slopes, drifts])))
    ours, theirs = (((y - z) ** 2).sum() for z in predicted)
    assert min(slopes, drifts) >= 0 and ours == pytest.approx(theirs, rel=1e-3)


def test_the_gate_is_open_at_most_once_and_shut_where_the_error_is_0() -> None:
    memory = two_neighbours(beta=0.8, mass_half=1.5)
    shut = -(0.2 * W1 - 0.6 * W2)  # then the mean of δ is 0
    for error, share in ((shut, 0.0), (1e3, 1.0)):
        td = memory(batch(memory, torch.zeros(1, 1, 2), torch.ones(1, 1, 2), error=error))
        assert told(memory, td, "beta").item() == pytest.approx(share * 0.8 * W / (W + 1.5), abs=1e-7)


def test_rows_fade_with_age_by_hand() -> None:
    """Two neighbours at one place, written at 0 and 20: now, at 30 and with a half-life of 10, they weigh 1 : 4."""
    memory = field(task(), half_life=10.0, mass_half=1.0)
    place = torch.zeros(1, 1, 2)
    for frames, gradient in ((0, [1.0, 0.0]), (20, [0.0, 1.0])):
        memory.set_progress(frames, 0.0)
        remember(memory, place, torch.tensor([[gradient]]))
    memory.set_progress(30, 0.0)
    set_scales(memory, rms=1.0, bandwidth=1.0)
    store = memory.trace.store
    store.payload[0, :2, 0, :2] = torch.eye(2)
    td = memory(batch(memory, place, torch.zeros(1, 1, 2)))
    assert told(memory, td, "mass").item() == pytest.approx(1 / 8 + 1 / 2)
    beta = 0.625 / 1.625
    torch.testing.assert_close(td.get(K.action_gradient), torch.tensor([[[0.2 * beta, 0.8 * beta]]]))


def test_strength_follows_its_schedule_and_multiplies_beta() -> None:
    memory = field(task(), strength=1.0, strength_final=0.2, mass_half=1.0)
    remember(memory, torch.zeros(2, 1, 2), torch.ones(2, 1, 2))
    set_scales(memory, bandwidth=1.0)
    for progress, strength in ((0.0, 1.0), (0.5, 0.6), (1.0, 0.2), (2.0, 0.2)):
        memory.set_progress(0, progress)
        td = memory(batch(memory, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)))
        assert told(memory, td, "beta").item() == pytest.approx(strength * 2 / 3)
        assert memory.metrics(td)["strength"].item() == pytest.approx(strength)


def test_a_memory_that_contradicts_is_not_heard_where_that_is_asked() -> None:
    memory = field(task(), least_cosine=0.0)
    remember(memory, torch.zeros(2, 1, 2), torch.tensor([1.0, 0.0]).expand(2, 1, 2))
    gradients = torch.tensor([[[-0.1, 7.0]], [[0.1, 7.0]]])
    out = fused(memory, torch.zeros(2, 1, 2), gradients)
    assert torch.equal(out[0], gradients[0])
    torch.testing.assert_close(out[1], torch.tensor([[1.0, 0.0]]))


def test_what_a_batch_is_without_room_for_entries() -> None:
    """A script's TensorDict takes new keys; the gradient remembered is the critic's there, too, not the fused one."""
    memories = [field(task(), mass_half=1.0) for _ in range(2)]
    for memory, room in zip(memories, (True, False), strict=True):
        for step in range(3):
            td = batch(memory, normal(8, 1, 2, seed=step), normal(8, 1, 2, seed=10 + step))
            td = td if room else td.exclude(*memory.entries)
            before = td.get(K.action_gradient).clone()
            memory(td)
            assert torch.equal(td.get(memory.fresh), before)
            memory.write(td)
    assert not torch.equal(td.get(memory.fresh), td.get(K.action_gradient))
    for (name, x), y in zip(memories[0].state_dict().items(), memories[1].state_dict().values(), strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x, y), name


# ------------------------------------------------------------------------------------------------------------- discrete


def test_discrete_gradients_are_projected_on_what_is_allowed() -> None:
    """g = (1, 2, 6) with the third action forbidden is (−½, ½, 0)."""
    memory = field(task(actions=3, continuous=False))
    mask = torch.tensor([[[True, True, False]]])
    remember(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0, 6.0]]]), mask=mask)
    torch.testing.assert_close(memory.trace.store.payload[0, 0, 0, :3] * math.sqrt(0.5), torch.tensor([-0.5, 0.5, 0.0]))
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[100.0, 101.0, -7.0]]]), mask=mask))
    assert told(memory, td, "cosine").item() == pytest.approx(1.0)
    torch.testing.assert_close(td.get(K.action_gradient), torch.tensor([[[-0.5, 0.5, 0.0]]]))


def test_entries_of_neighbours_that_are_forbidden_now_are_dropped() -> None:
    """(3, 0, −3) without its third entry is (3, 0), of which 1.5 is common."""
    memory = field(task(actions=3, continuous=False))
    remember(memory, torch.zeros(1, 1, 2), torch.tensor([[[3.0, 0.0, -3.0]]]))
    mask = torch.tensor([[[True, True, False]], [[False, False, True]]])
    out = fused(memory, torch.zeros(2, 1, 2), torch.tensor([[[9.0, 1.0, 5.0]]]).expand(2, 1, 3), mask=mask)
    torch.testing.assert_close(out, torch.tensor([[[1.5, -1.5, 0.0]], [[0.0, 0.0, 0.0]]]))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), constant=st.floats(-50, 50), forbidden=st.floats(-50, 50))
def test_a_constant_and_forbidden_entries_change_nothing(seed: int, constant: float, forbidden: float) -> None:
    spec = task(2, actions=4, continuous=False)
    mask = uniform(6, 2, 4, seed=seed) < 0.6
    mask[..., 0] = True
    observation, gradient = normal(6, 2, 2, seed=seed), normal(6, 2, 4, seed=seed + 1)
    shifted = torch.where(mask, gradient + constant, forbidden)
    outs = []
    for g in (gradient, shifted):
        memory = field(spec, mass_half=1.0, beta=0.5)
        remember(memory, observation, g, mask=mask)
        outs.append(fused(memory, observation, g, mask=mask))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)
    assert not outs[0][~mask].any()
    assert outs[0].sum(-1).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------- what is not seen


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("continuous", [True, False])
def test_padding_enters_nothing(scope: str, continuous: bool) -> None:
    spec = task(3, features=(3, 3, 2), actions=(3, 3, 2), continuous=continuous)
    seen, done = torch.tensor(spec.observation_valid), torch.tensor(spec.action_valid)
    outs = []
    for garbage in (0.0, 1e3):
        memory = field(spec, scope=scope, action_bandwidth=0.5, beta_rule="variance", fixed_point_gate=True)
        for step in range(3):
            noise = garbage * normal(8, 3, 3, seed=30 + step)
            observation = torch.where(seen, normal(8, 3, 3, seed=step), noise)
            gradient = torch.where(done, normal(8, 3, 3, seed=10 + step), noise)
            action = torch.where(done, 0.2 * normal(8, 3, 3, seed=20 + step), noise)
            td = remember(memory, observation, gradient, action=action, error=1.0, target=1.0)
        outs.append(td)
        assert told(memory, td, "beta").max() > 0.1
    assert torch.equal(*(td.get(K.action_gradient)[:, done] for td in outs))
    assert torch.equal(*(td.get(memory.report) for td in outs))


def test_agents_change_places_and_so_do_their_gradients() -> None:
    spec, order = task(3), torch.tensor([2, 0, 1])
    straight, turned = (field(spec, scope="shared", action_bandwidth=0.5, mass_half=1.0) for _ in range(2))
    for step in range(3):
        parts = [normal(8, 3, 2, seed=10 * step + i) for i in range(3)]
        alive = uniform(8, 3, seed=step) < 0.7
        for memory in (straight, turned):  # h is a median over a sample of rows, in which their order counts
            set_scales(memory, bandwidth=0.5)
        a = remember(straight, *parts[:2], action=0.3 * parts[2], alive=alive)
        b = remember(turned, *(x[:, order] for x in parts[:2]), action=0.3 * parts[2][:, order], alive=alive[:, order])
    torch.testing.assert_close(a.get(K.action_gradient)[:, order], b.get(K.action_gradient))
    assert told(straight, a, "beta").max() > 0.1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_row_does_not_recall_itself(scope: str) -> None:
    spec = task(2)
    memory = field(spec, scope=scope)
    observation, numbers = 10 * torch.arange(8.0).view(8, 1, 1) * torch.ones(8, 2, 2), torch.arange(8) + 40
    observation[:, 1] += 5
    gradient = normal(8, 2, 2, seed=0)
    remember(memory, observation, gradient, numbers=numbers)
    set_scales(memory, bandwidth=0.1)
    own = batch(memory, observation, gradient, numbers=numbers)
    assert not told(memory, memory(own), "mass").any()
    assert torch.equal(own.get(K.action_gradient), gradient)
    other = batch(memory, observation, gradient, numbers=numbers + 8)
    torch.testing.assert_close(told(memory, memory(other), "mass"), torch.ones(8, 2))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_dead_are_neither_written_nor_recalled(scope: str) -> None:
    spec = task(2)
    memory, alive = field(spec, scope=scope), torch.ones(8, 2, dtype=torch.bool)
    alive[:3, 0] = False
    alive[0, 1] = False
    observation, gradient = normal(8, 2, 2, seed=0), torch.ones(8, 2, 2)
    gradient[~alive] = torch.nan
    td = batch(memory, observation, gradient, alive=alive)
    td.get(K.policy_action)[~alive] = torch.nan
    memory(td)
    memory.write(td)
    assert len(memory) == (7 if scope == "centralized" else 12)
    assert int(memory.trace.store.rejected.sum()) == 0
    out = fused(memory, observation, torch.zeros(8, 2, 2), alive=alive)
    torch.testing.assert_close(out[alive], torch.ones(12, 2))
    assert all(x.isfinite().all() for x in memory.metrics(td).values())


def test_it_learns_no_parameter_and_is_smaller_than_a_replay() -> None:
    """HalfCheetah's sizes: 17 observations, 6 actions; beside a replay of a million rows."""
    spec = task(features=17, actions=6)
    host = DDPG(spec=spec, network=BODY, seed=0, **SMALL)
    memory = GradientField(spec=spec, capacity=16_384)
    assert not list(memory.parameters())
    td = drawn(host, None, 0).unsqueeze(1)
    td.set(("next", K.done), torch.zeros(ROWS, 1, 1, dtype=torch.bool))
    replay = ReplayRing(
        capacity=ROWS, n_envs=1, batch_size=4, entries=host.replay_keys, learn_entries={}, keys=K, seed=0
    )
    replay.extend(td)
    million = replay.bytes / ROWS * 1e6
    assert memory.bytes < 0.03 * million
    size = memory.bytes
    for step in range(3):
        remember(memory, normal(64, 1, 17, seed=step), normal(64, 1, 6, seed=step))
    assert memory.bytes == size


def test_shuffled_payloads_lie_at_other_keys() -> None:
    memory = field(task(), payloads="shuffled", neighbours=1)
    observation = torch.arange(32.0).view(32, 1, 1).expand(32, 1, 2)
    remember(memory, observation, observation)
    store = memory.trace.store
    keys, signals = store.keys[0, :32, 0], store.payload[0, :32, 0, 0]
    signals = signals * memory.square.value.sqrt()[0, 0]
    torch.testing.assert_close(signals.sort().values, keys)
    assert (signals - keys).abs().gt(0.5).float().mean() > 0.8


# --------------------------------------------------------------------------------------------------------------- scopes


@pytest.mark.parametrize("agents", [1, 3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", ["merge", "fifo", "simhash"])
def test_every_scope_gives_finite_gradients(scope: str, agents: int, policy: str) -> None:
    memory = GradientField(spec=task(agents), scope=scope, capacity=24 * agents, policy=policy, neighbours=4)
    for step in range(8):
        sizes = (16, agents, 2)
        td = remember(
            memory,
            normal(*sizes, seed=step),
            normal(*sizes, seed=50 + step),
            action=0.3 * normal(*sizes, seed=99 + step),
            error=0.5,
            target=1.0,
            alive=uniform(16, agents, seed=step) < 0.8,
        )
        assert td.get(K.action_gradient).isfinite().all()
        assert td.get(memory.report).isfinite().all()
    assert all(x.isfinite().all() for x in memory.metrics(td).values())
    assert told(memory, td, "beta").max() > 0
    assert 0 < len(memory) <= memory.scope.banks * memory.trace.store.rows


def test_the_scopes_of_one_agent_are_one() -> None:
    memories = [GradientField(spec=task(), scope=scope, capacity=48, neighbours=4) for scope in SCOPES]
    for step in range(8):
        sizes = (16, 1, 2)
        alive, numbers = uniform(16, 1, seed=step) < 0.8, torch.arange(16) + 8 * step
        parts = (normal(*sizes, seed=step), normal(*sizes, seed=50 + step))
        tds = [remember(memory, *parts, error=0.5, target=1.0, alive=alive, numbers=numbers) for memory in memories]
        for td in tds[1:]:
            assert torch.equal(td.get(K.action_gradient), tds[0].get(K.action_gradient))
    assert not torch.equal(tds[0].get(K.action_gradient), parts[1])


# ------------------------------------------------------------------------------------------------- (M3), statistically

SLOPE = 0.4
"""Of the field g°(s) = (s_y, −s_x) · SLOPE: what it changes by over a distance, in any direction."""


def smooth(s: Tensor, slope: float = SLOPE) -> Tensor:
    """``[*B, 2] → [*B, 2]``."""
    return slope * torch.stack([s[..., 1], -s[..., 0]], -1)


def test_variance_and_error_are_those_of_the_formulas() -> None:
    r"""Var = (1 − β)² σ² + β² σ²/n_e, MSE = Var + β² b², and the bias |b| ≤ L R (M3).

    Keys stay, the noise of the memory and of the present gradient is drawn 400 times.
    """
    sigma, beta, repeats = 0.6, 0.5, 400
    memory = field(task(), capacity=2048, neighbours=16, mass_half=1e-9, beta=beta)
    keys = 3 * uniform(2048, 1, 2, seed=0)
    remember(memory, keys, torch.zeros(2048, 1, 2))
    set_scales(memory, rms=1.0)
    store = memory.trace.store
    store.bandwidth.fill_(0.15)
    query = 0.2 + 2.6 * uniform(100, 1, 2, seed=1)
    store.payload[..., :2] = smooth(store.keys).unsqueeze(2)
    td = memory(batch(memory, query, torch.zeros(100, 1, 2)))
    bias = td.get(K.action_gradient) / beta - smooth(query)
    size = bias.norm(dim=-1)
    assert size.max() > 1e-3
    assert (size <= SLOPE * 3 * 0.15 + 1e-5).all()  # R = 3h
    effective = told(memory, td, "effective_neighbours")[:, 0]
    assert effective.min() > 4 and effective.max() <= 16
    each = sigma / math.sqrt(2)  # σ² is that of both components together
    outs = []
    for i in range(repeats):
        store.payload[..., :2] = (smooth(store.keys) + each * normal(1, 2048, 2, seed=1000 + i)).unsqueeze(2)
        outs.append(fused(memory, query, smooth(query) + each * normal(100, 1, 2, seed=9000 + i)))
    found = torch.stack(outs)[:, :, 0]
    variance = found.var(0).sum(-1)
    error = (found - smooth(query)[:, 0]).square().sum(-1).mean(0)
    expected = (1 - beta) ** 2 * sigma**2 + beta**2 * sigma**2 / effective
    # One variance of 400 draws of two components is off by 5 % (one deviation), their mean over 100 states by 1 %.
    torch.testing.assert_close(variance, expected, rtol=0.25, atol=0)
    assert variance.mean().item() == pytest.approx(expected.mean().item(), rel=0.03)
    expected = expected + beta**2 * bias[:, 0].square().sum(-1)
    assert error.mean().item() == pytest.approx(expected.mean().item(), rel=0.03)
    assert error.mean() < 0.5 * sigma**2


@settings(deadline=None, max_examples=50)
@given(
    noise=st.floats(0.01, 1.0),
    slope=st.floats(0.0, 1.0),
    drift=st.floats(0.0, 1.0),
    effective=st.floats(1.0, 16.0),
    distance=st.floats(0.0, 2.0),
    age=st.floats(0.0, 2.0),
)
def test_the_rule_of_variance_is_the_best_beta(
    noise: float, slope: float, drift: float, effective: float, distance: float, age: float
) -> None:
    """With β_max = 1 the MSE of (M3) is least there, and below that of the gradient alone."""
    memory = field(task(), beta_rule="variance")
    # Three pairs with u = 2, at (x, t) = (0, 0), (1, 0) and (0, 1).
    uy, xy, ty = 12 * noise + 2 * slope + 2 * drift, 2 * noise + slope, 2 * noise + drift
    memory.pairs.copy_(torch.tensor([12.0, 2.0, 2.0, uy, 1.0, 0.0, xy, 1.0, ty]))
    b = slope * distance**2 + drift * age

    def mse(beta: float) -> float:
        return (1 - beta) ** 2 * noise + beta**2 * (noise / effective + b)

    one = torch.ones(1, 1)
    nothing = torch.zeros(1, 1, 2)
    recalled = _Recalled(nothing, one.expand(1, SUMS), one, effective * one, distance * one, age * one, one, one)
    living = TensorDict({memory.spec.keys.alive: torch.ones(1, 1, dtype=torch.bool)}, batch_size=(1,))
    beta = memory._blend(living, nothing, recalled)[0].item()
    assert beta == pytest.approx(noise / (noise + noise / effective + b), rel=1e-3)
    assert mse(beta) <= min(mse(beta - 0.01), mse(beta + 0.01))
    assert mse(beta) == pytest.approx(noise * (noise / effective + b) / (noise + noise / effective + b), rel=1e-3)
    assert mse(beta) < noise


@pytest.mark.parametrize("policy", ["fifo", "merge"])
@pytest.mark.parametrize(("sigma", "slope"), [(0.2, 0.4), (0.1, 2.0), (0.6, 0.0)])
def test_the_regression_finds_noise_and_slope(sigma: float, slope: float, policy: str) -> None:
    """‖g − g_i‖² = (1 + 1/n_i) σ² + L² d², in units of the gradients' mean square and of h²."""
    memory = field(task(), capacity=1024, neighbours=16, strength=0.0, policy=policy)
    for step in range(110):
        memory.set_progress(step, 0.0)
        keys = 3 * uniform(256, 1, 2, seed=step)
        gradient = smooth(keys, slope) + sigma / math.sqrt(2) * normal(256, 1, 2, seed=500 + step)
        remember(memory, keys, gradient)
        if step == 10:  # while a bank fills, h shrinks, and what was x in its units is not what it is later
            memory.pairs.zero_()
    store, unit = memory.trace.store, memory.square.value.item()
    noise, squared, drift = memory.regression()
    h = store.bandwidth.item() / store.scale.mean().item()
    # All pairs of a query share its noise: 16 000 count, of which the slope (in h²) is known to some 2 % of 2σ², and
    # the noise likewise, of what the pairs differ by.
    differ = 2 * sigma**2 + (slope * h) ** 2
    assert noise.item() * unit == pytest.approx(sigma**2, abs=0.05 * differ)
    assert squared.item() * unit == pytest.approx((slope * h) ** 2, abs=0.1 * differ)
    assert (drift * told(memory, memory(batch(memory, keys, gradient)), "age").mean()).item() * unit < 0.05 * differ


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_regression_tells_drift_from_noise(sigma: float) -> None:
    """With every step the critic moves by √D in a direction of its own: ‖g − g_i‖² = 2 σ² + D t, exactly so."""
    memory = field(task(actions=128), capacity=4096, neighbours=16, strength=0.0)
    moved, moves, drift = 10 * torch.eye(128)[-1], 0.2 * torch.eye(128), 0.04
    for step in range(120):
        memory.set_progress(1000 * step, 0.0)
        moved += moves[step]
        gradient = moved.expand(256, 1, 128) + sigma / math.sqrt(128) * normal(256, 1, 128, seed=step)
        remember(memory, 3 * uniform(256, 1, 2, seed=500 + step), gradient)
        if step == 20:  # from then on rows are 1 000 to 16 000 old
            memory.pairs.zero_()
    unit = memory.square.value.item()
    noise, _, drifted = (x.item() * unit for x in memory.regression())
    assert drifted * 1000 == pytest.approx(drift, rel=0.1)
    assert noise == pytest.approx(sigma**2, abs=0.1 * drift)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_drift_is_told_from_noise_where_all_rows_are_means_of_a_long_time(sigma: float) -> None:
    """As above, in a bank that averages all that comes: the ages of its means, some 7 000 steps, are all alike.

    A mean over times misses by less than its mean age would say: D is found too low.
    """
    options: dict[str, Any] = {"capacity": 64, "policy": "merge", "half_life": 5000 / math.log(2)}
    memory = field(task(actions=128), neighbours=16, strength=0.0, **options)
    moved, moves, drift = 10 * torch.eye(128)[-1], 0.2 * torch.eye(128), 0.04
    places = 3 * uniform(64, 1, 2, seed=500)
    for step in range(120):
        memory.set_progress(1000 * step, 0.0)
        moved += moves[step]
        gradient = moved.expand(256, 1, 128) + sigma / math.sqrt(128) * normal(256, 1, 128, seed=step)
        remember(memory, places.repeat(4, 1, 1), gradient)
        if step == 20:
            memory.pairs.zero_()
    unit, store = memory.square.value.item(), memory.trace.store
    assert len(memory) == 64 and float(store.mass.min()) > 10
    noise, _, drifted = (x.item() * unit for x in memory.regression())
    assert drift / 2 < drifted * 1000 < drift
    assert noise == pytest.approx(sigma**2, abs=drift / 2)


def test_of_a_row_the_newest_gradient_is_kept_beside_the_mean() -> None:
    memory = field(task(), capacity=2, policy="merge")
    for frames, size in ((0, 1.0), (10, 3.0)):
        memory.set_progress(frames, 0.0)
        remember(memory, torch.zeros(2, 1, 2), torch.full((2, 1, 2), size))
    mean, action, error, time, last, last_time = memory.trace.store.payload[0, 0, 0].split([2, 2, 1, 1, 2, 1])
    now = memory.square.value.sqrt().item()  # what the second write divided by; the first by its own, √2
    torch.testing.assert_close(last, torch.full((2,), 3.0 / now))
    assert mean[0].item() == pytest.approx((1 / math.sqrt(2) + 2 * 3.0 / now) / 3)  # both came to the first row
    assert (time.item(), last_time.item()) == pytest.approx((20 / 3, 10.0))
    assert not action.any() and not error.any()


# ----------------------------------------------------------------------------------------------- what is no neighbour


@pytest.mark.parametrize(("sigma", "least", "most"), [(0.0, 0.0, 0.1), (0.2, 0.7, 1.0)])
def test_what_the_action_gate_shuts_out_is_not_in_the_regression(sigma: float, least: float, most: float) -> None:
    """A bang-bang policy in stripes: the gradient depends on the action, and only those of like actions are alike."""
    memory = field(
        task(), capacity=2048, neighbours=16, beta_rule="variance", action_bandwidth=0.5
    )  # β ≤ 1: what is found is what the rule says
    for seed in range(40):
        keys = 3 * uniform(256, 1, 2, seed=seed)
        sign = torch.where((keys[..., :1] / 0.3).floor() % 2 == 0, 1.0, -1.0)
        truth = torch.cat([sign, 0.5 * keys[..., 1:]], -1)
        gradient = truth + sigma / math.sqrt(2) * normal(256, 1, 2, seed=900 + seed)
        td = remember(memory, keys, gradient, action=torch.cat([0.95 * sign, 0 * sign], -1))
    noise = float(memory.regression()[0])
    assert noise == pytest.approx(sigma**2 / float(memory.square.value), rel=0.1, abs=1e-3)
    assert least <= told(memory, td, "beta").mean() <= most


@pytest.mark.parametrize("features", [2, 6])
def test_a_field_without_noise_has_none_where_its_rows_are_far_apart(features: int) -> None:
    """A linear field in a full bank: the newest gradient of a row lies off the mean key, and differs by no noise."""
    memory = field(task(features=features), capacity=256, policy="merge", neighbours=16, beta_rule="variance")
    for seed in range(80):
        if seed == 20:
            memory.pairs.zero_()  # those before the bank was full
        keys = 3 * uniform(256, 1, features, seed=seed)
        remember(memory, keys, torch.stack([keys[..., 1], -keys[..., 0]], -1))
    noise, slope, _ = memory.regression()
    assert memory.trace.store.full and noise < 0.02 * slope < 0.02


def test_where_the_newest_of_a_row_lies_by_hand() -> None:
    """Two keys in one row, at 0 and then at 2 in units of h: the mean at 1, the newest 1 off it."""
    memory = field(task(), policy="merge", capacity=2, neighbours=1)
    keys = torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])
    remember(memory, keys, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    set_scales(memory, bandwidth=1.0)
    memory.trace.store.merge_radius.fill_(10.0)
    memory.trace.store.measured.fill_(1000)
    memory.write(
        batch(memory, torch.tensor([[[2.0, 0.0]]]), torch.ones(1, 1, 2)).set(memory.fresh, torch.ones(1, 1, 2))
    )
    first = int(memory.trace.store.keys[0, :, 0].argmin())
    torch.testing.assert_close(memory.trace.store.keys[0, first], torch.tensor([1.0, 0.0]))
    assert memory.trace.store.offset[0].sum(-1).tolist() == [1.0 if i == first else 0.0 for i in range(2)]
    found = memory.trace.find(batch(memory, torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 2)))
    assert found.squared.item() == pytest.approx(4.0) and found.newest.item() == pytest.approx(5.0)


@pytest.mark.parametrize("policy", ["merge", "simhash"])
def test_a_dead_agent_leaves_the_newest_of_a_row_that_it_shares(policy: str) -> None:
    """Of two team rows that come to one place the second has its first agent dead: the first row is its newest."""
    memory = field(task(2), scope="centralized", policy=policy, capacity=8, neighbours=2)
    if policy == "merge":
        alone = torch.tensor([[False, True]] * 4)
        remember(memory, torch.zeros(4, 2, 2), torch.ones(4, 2, 2), alive=alone)
    memory.set_progress(100, 0.0)
    alive = torch.tensor([[True, True], [False, True]])
    remember(memory, torch.zeros(2, 2, 2), torch.full((2, 2, 2), 3.0), alive=alive)
    store = memory.trace.store
    row = store.payload[0, int(store.mass[0, :, 0].argmax()), 0]
    signal, time, last, last_time = (row.split(memory.parts)[i] for i in (0, 3, 5, 6))
    assert time == last_time == 100 and torch.equal(signal, last) and (last > 0).all()


def test_actions_forbidden_then_or_now_are_compared_on_what_both_had_by_hand() -> None:
    """(3, 0, −3) with all allowed, and (1.5, −1.5, ·) with the third forbidden, differ by a constant alone."""
    memory = field(task(actions=3, continuous=False))
    everything = torch.tensor([[[3.0, 0.0, -3.0]]])
    remember(memory, torch.zeros(1, 1, 2), everything)
    set_scales(memory, rms=18**0.5, bandwidth=1.0)
    mask = torch.tensor([[[True, True, False]]])
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.5, -1.5, 0.0]]]), mask=mask))
    assert td.get(memory.moments)[0, 0, 3] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(td.get(K.action_gradient), torch.tensor([[[1.5, -1.5, 0.0]]]))
    memory.clear()
    remember(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.5, -1.5, 0.0]]]), mask=mask)
    set_scales(memory, rms=1.0, bandwidth=1.0)
    memory.trace.store.payload[0, 0, 0, :3] = torch.tensor([1.5, -1.5, 0.0])
    recalled = fused(memory, torch.zeros(1, 1, 2), torch.tensor([[[1.0, 1.0, -2.0]]]))
    # What is known of the first two is that they differ by 3; the third, and their mean, stay what they are.
    torch.testing.assert_close(recalled, torch.tensor([[[2.5, -0.5, -2.0]]]))


def test_a_constant_field_under_masks_that_change_has_no_noise() -> None:
    memory = field(task(actions=4, continuous=False), capacity=256, policy="merge", neighbours=8, beta_rule="variance")
    gradient = torch.tensor([3.0, 1.0, 0.0, -2.0]).expand(64, 1, 4)
    for seed in range(40):
        mask = uniform(64, 1, 4, seed=seed) < 0.6
        mask[..., :2] = True
        td = remember(memory, normal(64, 1, 2, seed=500 + seed), gradient, mask=mask)
    # Means of projections under several masks have constants of their own: a little is left.
    assert memory.regression()[0] < 0.005
    truth = memory._project(gradient, td)
    wrong = (td.get(K.action_gradient) - truth).square().sum() / truth.square().sum()
    assert wrong < 0.01


def test_a_gradient_that_is_not_finite_is_forgotten() -> None:
    memory = field(task(), beta_rule="variance")
    for seed in range(6):
        gradient = normal(16, 1, 2, seed=seed)
        if seed == 3:
            gradient[0] = torch.nan
        td = remember(memory, normal(16, 1, 2, seed=50 + seed), gradient)
    assert memory.trace.store.rejected.tolist() == [1]
    assert all(x.isfinite() for x in memory.metrics(td).values())
    assert told(memory, td, "beta").mean() > 0.1


def test_an_agent_that_is_dead_for_a_while_keeps_its_running_mean() -> None:
    memory = field(task(2))
    for seed in range(20):
        remember(memory, normal(16, 2, 2, seed=seed), 1 + normal(16, 2, 2, seed=50 + seed))
    before = memory.averages.clone()
    alive = torch.tensor([True, False]).expand(16, 2)
    remember(memory, normal(16, 2, 2, seed=99), normal(16, 2, 2, seed=98), alive=alive)
    means = memory.averages[:, 0]
    assert torch.equal(means[:, 1], before[:, 0, 1]) and not torch.equal(means[:, 0], before[:, 0, 0])


@pytest.mark.parametrize("apart", [0.0, 2.0, 3.0])
def test_how_many_neighbours_there_are_does_not_depend_on_how_much_they_weigh(apart: float) -> None:
    """Eight equal neighbours whose actions lie ``apart``: W falls to 1e-15, n_e and their mean stay."""
    memory = field(task(), neighbours=8, action_bandwidth=0.5)
    remember(memory, torch.zeros(8, 1, 2), torch.ones(8, 1, 2))
    set_scales(memory, rms=1.0, bandwidth=1.0)
    memory.trace.store.payload[..., :2] = 1.0
    td = memory(batch(memory, torch.zeros(1, 1, 2), torch.ones(1, 1, 2), action=torch.full((1, 1, 2), apart)))
    assert told(memory, td, "effective_neighbours").item() == pytest.approx(8.0, rel=1e-4)
    assert told(memory, td, "cosine").item() == pytest.approx(1.0)
