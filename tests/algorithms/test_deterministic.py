"""DDPG and TD3, their independent and centralised forms: against a plain transcript, and what must not matter."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from benchmarks import plain_ddpg as plain
from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.deterministic import DeterministicHost, mean_square_logit
from marl_memory.algorithms.td3 import TD3
from marl_memory.keys import Keys
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec

K = Keys()
FEATURES, ACTIONS, STATE, ROWS = 5, 3, 7, 16
BODY = partial(MLP, hidden=(16, 16))
SMALL: dict[str, Any] = {"batch_size": ROWS, "warmup_frames": ROWS, "capacity": 64}

torch.set_num_threads(1)  # tensors this small are not worth sharing out


def task(agents: int = 3, *, continuous: bool = True, common: bool = False, unequal: bool = False) -> TaskSpec:
    sizes = (ACTIONS,) * (agents - unequal) + (ACTIONS - 1,) * unequal
    bounds: dict[str, Any] = {}
    if continuous:
        pads = [(0.0,) * (ACTIONS - size) for size in sizes]
        bounds["action_low"] = tuple((-1.0, -2.0, 0.0)[:n] + pad for n, pad in zip(sizes, pads, strict=True))
        bounds["action_high"] = tuple((1.0, 2.0, 3.0)[:n] + pad for n, pad in zip(sizes, pads, strict=True))
    return TaskSpec(
        name="synthetic",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(FEATURES,) * agents,
        action_sizes=sizes,
        continuous=continuous,
        state_size=FEATURES if agents == 1 else STATE,
        own_state=agents > 1,
        common_reward=common,
        **bounds,
    )


def draw(host: DeterministicHost, seed: int, dtype: torch.dtype = torch.float64) -> TensorDict:
    """Rows ``[B]`` as a replay gives them, with deaths, terminations and masks."""
    spec, g = host.spec, Generator().manual_seed(seed)
    a = spec.n_agents
    rows = TensorDict(batch_size=(ROWS,))
    vectors = torch.rand(ROWS, a, ACTIONS, generator=g, dtype=dtype) * 2 - 1
    for time in ((), ("next",)):
        alive = torch.rand(ROWS, a, generator=g) < 0.8
        alive[0] = True
        observation = torch.randn(ROWS, a, FEATURES, generator=g, dtype=dtype) * alive.unsqueeze(-1)
        state = observation[:, 0] if a == 1 else torch.randn(ROWS, STATE, generator=g, dtype=dtype)
        rows.set((*time, *K.observation), observation)
        rows.set((*time, K.state), state)
        rows.set((*time, *K.alive), alive)
        if not spec.continuous:
            mask = torch.rand(ROWS, a, ACTIONS, generator=g) < 0.6
            mask[..., 0] = True
            rows.set((*time, *K.action_mask), mask)
    if spec.continuous:
        vectors = vectors * torch.tensor(spec.action_valid)
        rows.set(K.action, host.actor.vectors.decode(vectors))
    else:
        rows.set(K.action, (vectors - 2.0 * ~rows.get(K.action_mask)).argmax(-1))
    reward = torch.randn(ROWS, a, 1, generator=g, dtype=dtype)
    rows.set(("next", *K.reward), reward[:, :1].expand(-1, a, -1).clone() if spec.common_reward else reward)
    rows.set(("next", *K.discount), (torch.rand(ROWS, a, 1, generator=g) < 0.9).to(dtype))
    for key, entry in host.learn_entries.items():
        rows.set(key, entry.zeros((ROWS,), dtype))
    return rows


def update(host: DeterministicHost, rows: TensorDictBase) -> dict[str, Tensor]:
    host.derive_rewards(rows)
    host.compute_targets(rows)
    report = host.update_critic(rows)
    if host.actor_is_due:
        host.compute_action_gradient(rows)
        report |= host.update_actor(rows)
        host.update_targets()
    return report


def as_plain(host: DeterministicHost, rows: TensorDictBase) -> dict[str, Tensor]:
    data = {"reward": rows["next", "agents", "reward"][..., 0], "discount": rows["next", "agents", "discount"][..., 0]}
    for prefix, td in (("", rows), ("next_", rows["next"])):
        data |= {
            prefix + "observation": td[K.observation],
            prefix + "state": td[K.state],
            prefix + "alive": td[K.alive],
        }
        if not host.spec.continuous:
            data[prefix + "mask"] = td[K.action_mask]
    return {**data, "action": host.actor.vectors.encode(rows[K.action])}


def parameters_of(host: DeterministicHost, name: str) -> list[Tensor]:
    """Of the networks that ``name`` names, one list entry per agent, flattened."""
    module = getattr(host, name)
    bodies = module.twins if hasattr(module, "twins") else [module.body]
    found = []
    for i in range(host.spec.n_agents):
        parts = []
        for body in bodies:
            for layer in body.layers:
                weights, biases = plain.weights_and_biases(layer)
                parts += [weights[i].flatten(), biases[i].flatten()]
        found.append(torch.cat(parts))
    return found


CASES = [
    pytest.param(DDPG, {}, {}, id="ddpg"),
    pytest.param(TD3, {}, {}, id="td3"),
    pytest.param(DDPG, {}, {"agents": 1}, id="ddpg-one"),
    pytest.param(TD3, {}, {"agents": 1}, id="td3-one"),
    pytest.param(DDPG, {"centralised_critic": True}, {}, id="maddpg"),
    pytest.param(TD3, {"centralised_critic": True}, {"common": True}, id="matd3-common"),
    pytest.param(DDPG, {"centralised_critic": True, "actor_gradient": "joint"}, {}, id="maddpg-joint"),
    pytest.param(DDPG, {"centralised_critic": True}, {"continuous": False}, id="maddpg-discrete"),
    pytest.param(TD3, {"centralised_critic": True}, {"continuous": False, "common": True}, id="matd3-discrete"),
    pytest.param(DDPG, {"centralised_critic": True, "logit_penalty": 0.3}, {"continuous": False}, id="logit-penalty"),
    pytest.param(TD3, {"logit_penalty": 0.3}, {"continuous": False}, id="td3-logit-penalty"),
    pytest.param(DDPG, {"centralised_critic": True}, {"unequal": True}, id="maddpg-unequal"),
]


@pytest.mark.parametrize(("kind", "options", "of_task"), CASES)
def test_a_hundred_updates_equal_the_plain_transcript(
    kind: type[DDPG] | type[TD3], options: dict[str, Any], of_task: dict[str, Any]
) -> None:
    spec = task(**of_task)
    host = kind(spec=spec, network=BODY, seed=1, actor_lr=1e-2, critic_lr=1e-2, tau=0.05, **SMALL, **options).double()
    twins = kind is TD3
    settings = plain.Settings(
        centralised=host.critic.centralised,
        common_reward=spec.common_reward,
        continuous=spec.continuous,
        joint=host.actor_gradient == "joint",
        tau=0.05,
        policy_delay=2 if twins else 1,
        logit_penalty=host.logit_penalty or 0.0,
    )
    other = plain.like(host, settings)
    before = parameters_of(host, "actor")
    for step in range(100):
        rows = draw(host, step)
        if settings.joint:  # what the others' choice means to a dead agent's critic is nobody's definition
            rows[K.alive].fill_(True)
        noise = host.generator.clone_state()
        shape, dtype = (ROWS, spec.n_agents, ACTIONS), torch.float64
        target_noise = u = None
        tiny = torch.finfo(dtype).tiny
        if twins and spec.continuous:
            target_noise = torch.randn(shape, generator=noise, dtype=dtype) * torch.tensor(spec.action_valid)
        elif twins:
            target_noise = torch.rand(shape, generator=noise, dtype=dtype).clamp(min=tiny)
        if not spec.continuous:
            u = torch.rand(shape, generator=noise, dtype=dtype).clamp(min=tiny)
        update(host, rows)
        data = as_plain(host, rows)
        if of_task.get("unequal"):  # the plain learner knows no padding: its outputs there must not matter
            pad = torch.tensor(spec.action_valid, dtype=dtype)
            other.output = partial(padded_output, plain.Learner.output, other, pad)  # type: ignore[method-assign]
        other.update(data, target_noise=target_noise, u=u)
    for name, nets in (("actor", other.actors), ("critic", other.critics), ("target_critic", other.target_critics)):
        for mine, net in zip(parameters_of(host, name), nets, strict=True):
            torch.testing.assert_close(mine, torch.nn.utils.parameters_to_vector(net.parameters()), rtol=0, atol=1e-6)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, parameters_of(host, "actor"), strict=True))


def padded_output(
    plain_output: Any, learner: Any, pad: Tensor, actor: Any, rows: Any, i: int, prefix: str = ""
) -> Tensor:
    return plain_output(learner, actor, rows, i, prefix) * pad[i]


@pytest.mark.parametrize("kind", [DDPG, TD3])
@pytest.mark.parametrize("continuous", [True, False])
def test_one_agent_is_the_single_agent_algorithm(kind: type[DDPG] | type[TD3], continuous: bool) -> None:
    spec = task(1, continuous=continuous)
    forms = [
        kind(
            spec=spec,
            network=BODY,
            seed=3,
            centralised_critic=centralised,
            share_actor=shared,
            share_critic=shared,
            **SMALL,
        )
        for centralised, shared in ((False, False), (False, True), (True, False), (True, True))
    ]
    for step in range(10):
        for host in forms:
            update(host, draw(host, step, torch.float32))
    for host in forms[1:]:
        for (name, a), b in zip(forms[0].named_parameters(), host.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("centralised", [True, False])
@pytest.mark.parametrize("kind", [DDPG, TD3])
def test_own_gradient_passes_through_no_other_critic(kind: type[DDPG] | type[TD3], centralised: bool) -> None:
    host = kind(spec=task(), network=BODY, seed=0, centralised_critic=centralised, **SMALL)
    rows = draw(host, 0, torch.float32)
    chosen = torch.rand(ROWS, 3, ACTIONS, requires_grad=True)
    others = host.actor.vectors.encode(rows[K.action])
    value = host.critic.of_own_actions(rows, chosen, others, critics=slice(0, 1))  # [B, A, 1]
    for i in range(3):
        (gradient,) = torch.autograd.grad(value[:, i].sum(), chosen, retain_graph=True)
        assert gradient[:, i].abs().max() > 0
        assert not gradient[:, [j for j in range(3) if j != i]].any()
    joint = host.critic(rows, chosen, critics=slice(0, 1))
    (gradient,) = torch.autograd.grad(joint[:, 0].sum(), chosen)
    assert gradient[:, 1].any() == centralised


@pytest.mark.parametrize("continuous", [True, False])
def test_the_explicit_gradient_is_the_policy_gradient(continuous: bool) -> None:
    host = DDPG(spec=task(1, continuous=continuous), network=BODY, seed=0, **SMALL).double()
    rows = draw(host, 0)
    rows[K.alive].fill_(True)
    state = host.generator.get_state()
    host.compute_action_gradient(rows)
    host.actor_optimiser.zero_grad()
    gain = (rows[K.action_gradient] * host._chosen).sum(-1).mean()  # type: ignore[operator]
    explicit = torch.autograd.grad(-gain, list(host.actor.parameters()))
    host.generator.set_state(state)
    direct = torch.autograd.grad(
        -host.critic(rows, host.actor.relaxed(rows, host.generator)[0]).mean(), list(host.actor.parameters())
    )
    for a, b in zip(explicit, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_logit_penalty_by_hand() -> None:
    logits = torch.tensor([[[1.0, -2.0, 3.0], [4.0, torch.finfo().min, 2.0], [5.0, 5.0, 5.0]]])
    allowed = torch.tensor([[[True, True, True], [True, False, True], [False, False, False]]])
    assert mean_square_logit(logits, allowed).tolist() == [[[pytest.approx(14 / 3)], [10.0], [0.0]]]


@pytest.mark.parametrize("penalty", [None, 0.3])
def test_dead_rows_change_no_parameter(penalty: float | None) -> None:
    """What stands in the entries of agents that do not act reaches no gradient."""
    spec = task(common=True, continuous=penalty is None)
    hosts = [
        DDPG(
            spec=spec,
            network=BODY,
            seed=0,
            share_actor=shared,
            share_critic=shared,
            logit_penalty=penalty,
            **SMALL,
        )
        for shared in (False, True)
        for _ in range(2)
    ]
    for a, b in (hosts[:2], hosts[2:]):
        rows = draw(a, 0, torch.float32)
        corrupted = rows.clone()
        dead = ~rows[K.alive]
        assert dead.any()
        corrupted[K.observation][dead] = 1e6
        corrupted[K.action][dead] = 3.0 if spec.continuous else 2
        update(a, rows)
        update(b, corrupted)
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("kind", "continuous"), [(DDPG, True), (DDPG, False), (TD3, True), (TD3, False)])
def test_a_restored_learner_continues_bit_for_bit(kind: type[DDPG] | type[TD3], continuous: bool) -> None:
    def made(seed: int) -> DDPG | TD3:
        explored = {"exploration": "ou"} if continuous else {}
        host = kind(spec=task(continuous=continuous), network=BODY, seed=seed, **SMALL, **explored)  # type: ignore[arg-type]
        host.behaviour.uniform = False
        return host

    first, second = made(0), made(1)
    for step in range(3):
        update(first, draw(first, step, torch.float32))
        first.behaviour(draw(first, step, torch.float32))
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    for host in (first, second):
        for step in range(3, 6):
            update(host, draw(host, step, torch.float32))
    assert torch.equal(*(host.behaviour(draw(host, 9, torch.float32))[K.action] for host in (first, second)))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("kind", [DDPG, TD3])
def test_lent_values_draw_nothing(kind: type[DDPG] | type[TD3], continuous: bool) -> None:
    host = kind(spec=task(continuous=continuous), network=BODY, seed=0, **SMALL).double()
    rows, before = draw(host, 0), host.generator.get_state()
    first = host.bootstrap_values(rows)
    assert first.shape == (*rows.batch_size, 3, 1 if kind is DDPG else 2)
    assert torch.equal(first, host.bootstrap_values(rows))
    assert torch.equal(before, host.generator.get_state())


def test_td3_waits_with_the_actor_and_smooths_the_target() -> None:
    host = TD3(spec=task(1), network=BODY, seed=0, policy_delay=3, **SMALL)
    moved = []
    for step in range(6):
        before = [p.clone() for p in (*host.actor.parameters(), *host.target_critic.parameters())]
        update(host, draw(host, step, torch.float32))
        after = [*host.actor.parameters(), *host.target_critic.parameters()]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert moved == [False, False, True] * 2
    rows = draw(host, 0, torch.float32)["next"]
    plain_choice, smoothed = (
        host.target_actor.output(rows),
        torch.stack([host._smoothed(rows, host.generator) for _ in range(200)]),
    )
    assert smoothed.abs().max() <= 1
    inner = (plain_choice.abs() < 0.4).unsqueeze(0).expand_as(smoothed)
    shift = (smoothed - plain_choice)[inner]
    assert shift.abs().max() == pytest.approx(0.5, abs=1e-6)
    assert shift.std().item() == pytest.approx(0.2, abs=0.01)


BAD = [
    ({"exploration": "ou"}, False, "algorithm.exploration='ou' must be gumbel for discrete actions"),
    ({"exploration": "gumbel"}, True, "must be gaussian or ou for continuous actions"),
    ({"noise": 0.2}, False, "algorithm.noise=0.2 has no effect on discrete actions"),
    ({"temperature": 0.5}, True, "algorithm.temperature=0.5 has no effect on continuous actions"),
    ({"logit_penalty": 0.1}, True, "algorithm.logit_penalty=0.1 has no effect on continuous actions"),
    ({"logit_penalty": -0.1}, False, "algorithm.logit_penalty=-0.1 must be positive"),
    ({"noise": -0.1}, True, "algorithm.noise=-0.1 must not be negative"),
    ({"actor_gradient": "mine"}, True, "algorithm.actor_gradient='mine' must be 'own' or 'joint'"),
    ({"tau": 2.0}, True, "algorithm.tau=2.0 must lie in"),
    ({"capacity": 8}, True, "algorithm.capacity=8 must hold at least a batch, algorithm.batch_size=16"),
    ({"warmup_frames": 100}, True, "algorithm.warmup_frames=100 must lie between algorithm.batch_size=16"),
    ({"agent_indicator": False}, True, "algorithm.agent_indicator=False has no effect where agents share no network"),
    ({"storage": "disk"}, True, "algorithm.storage='disk' must be 'ram' or 'memmap'"),
    ({"updates_per_frame": 0.0}, True, "algorithm.updates_per_frame=0.0 must be positive"),
]


@pytest.mark.parametrize(("options", "continuous", "message"), BAD)
def test_bad_options_are_named(options: dict[str, Any], continuous: bool, message: str) -> None:
    with pytest.raises(ValueError, match=r".*".join(message.split("…"))):
        DDPG(spec=task(continuous=continuous), network=BODY, seed=0, **{**SMALL, **options})


@pytest.mark.parametrize("shared", ["share_actor", "share_critic"])
def test_unequal_agents_that_share_a_network_must_be_told_apart(shared: str) -> None:
    equal = task()
    unequal = replace(equal, observation_sizes=(equal.observation_size, *[2] * (equal.n_agents - 1)))
    options = {**SMALL, shared: True, "centralised_critic": False, "agent_indicator": False}
    features = DDPG(spec=equal, network=BODY, seed=0, **options).actor.input.features
    assert features == equal.observation_size
    with pytest.raises(
        ValueError, match=r"agent_indicator=false does not fit .*, whose agents differ .* set it to true"
    ):
        DDPG(spec=unequal, network=BODY, seed=0, **options)


def test_a_second_critic_of_ddpg_learns_from_its_own_target_and_moves_no_actor() -> None:
    one, two = (DDPG(spec=task(), network=BODY, seed=0, critics=critics, **SMALL) for critics in (1, 2))
    for step in range(5):
        first, second = (draw(host, step, torch.float32) for host in (one, two))
        update(one, first), update(two, second)
        assert torch.equal(first[K.value_target], second[K.value_target][..., :1])
        assert not torch.equal(second[K.value_target][..., 0], second[K.value_target][..., 1])
    for a, b in zip(one.actor.parameters(), two.actor.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_actor_may_follow_the_mean_of_all_critics() -> None:
    host = TD3(spec=task(1), network=BODY, seed=0, critics=4, actor_uses="mean", **SMALL).double()
    rows = draw(host, 0)
    assert rows[K.value_target].shape[-1] == 4
    host.compute_action_gradient(rows)
    chosen = host.actor.output(rows).detach().requires_grad_()
    (expected,) = torch.autograd.grad(host.critic(rows, chosen).mean(-1).sum(), chosen)
    torch.testing.assert_close(rows[K.action_gradient], expected)


def test_targets_move_when_they_are_due() -> None:
    host = TD3(spec=task(1), network=BODY, seed=0, target_every=4, tau=0.5, **SMALL)
    moved = []
    for step in range(8):
        before = next(host.target_critic.parameters()).clone()
        update(host, draw(host, step, torch.float32))
        moved.append(not torch.equal(before, next(host.target_critic.parameters())))
    assert moved == [False, False, False, True] * 2


@pytest.mark.parametrize("centralised", [True, False])
def test_critics_may_read_the_actions_twice(centralised: bool) -> None:
    """With the first layer blind to actions, they are seen all the same; without the second reading they are not."""
    for twice in (True, False):
        host = TD3(
            spec=task(), network=BODY, seed=0, centralised_critic=centralised, action_twice=twice, **SMALL
        ).double()
        rows = draw(host, 0)
        vectors = host.actor.vectors.encode(rows[K.action])
        seen = vectors.shape[-1] * (3 if centralised else 1)
        for twin in host.critic.twins:
            twin.layers[0].weight.data[:, -seen:] = 0.0  # [G, in, out]
        values = host.critic(rows, vectors), host.critic(rows, -vectors)
        assert torch.equal(*values) == (not twice)


def test_options_of_td3_are_named() -> None:
    for options, message in (
        ({"critics": 1}, "algorithm.critics=1 must be at least 2"),
        ({"target_every": 3}, "algorithm.target_every=3 must be a multiple of algorithm.policy_delay=2"),
        ({"actor_uses": "q2"}, "algorithm.actor_uses='q2' must be 'first' or 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            TD3(spec=task(), network=BODY, seed=0, **SMALL, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="algorithm.critics=3 must be 1 or 2"):
        DDPG(spec=task(), network=BODY, seed=0, critics=3, **SMALL)
    with pytest.raises(ValueError, match="network.hidden=.* has no layer after the first"):
        TD3(spec=task(), network=partial(MLP, hidden=()), seed=0, action_twice=True, **SMALL)
    with pytest.raises(ValueError, match="algorithm.target_noise=0.1 has no effect on discrete actions"):
        TD3(spec=task(continuous=False), network=BODY, seed=0, target_noise=0.1, **SMALL)
    with pytest.raises(ValueError, match="algorithm.policy_delay=0 must be at least 1"):
        TD3(spec=task(), network=BODY, seed=0, policy_delay=0, **SMALL)


def test_update_actor_needs_its_gradient() -> None:
    host = DDPG(spec=task(), network=BODY, seed=0, **SMALL)
    with pytest.raises(RuntimeError, match="compute_action_gradient"):
        host.update_actor(draw(host, 0, torch.float32))
