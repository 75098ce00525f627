"""DQN and IDQN: against a plain transcript, by hand-worked numbers, and what must not matter."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from benchmarks import plain_dqn as plain
from benchmarks.off_policy import update
from marl_memory.algorithms.dqn import DQN, taken
from marl_memory.keys import Keys
from marl_memory.networks.cnn import CNN
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec

K = Keys()
FEATURES, ACTIONS, ROWS = 5, 4, 16
BODY = partial(MLP, hidden=(16, 16))
SMALL: dict[str, Any] = {"batch_size": ROWS, "warmup_frames": ROWS, "capacity": 64}

torch.set_num_threads(1)  # tensors this small are not worth sharing out


def task(agents: int = 3, *, common: bool = False, unequal: bool = False) -> TaskSpec:
    sizes = (ACTIONS,) * (agents - unequal) + (ACTIONS - 2,) * unequal
    return replace(
        TaskSpec.of_sizes(observation_size=FEATURES, n_actions=ACTIONS, agents=agents),
        action_sizes=sizes,
        common_reward=common,
    )


def made(spec: TaskSpec, seed: int = 0, **options: Any) -> DQN:
    return DQN(spec=spec, network=BODY, seed=seed, **{**SMALL, **options})


def draw(host: DQN, seed: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Rows ``[B]`` as a replay gives them, with deaths, terminations and masks."""
    spec, g = host.spec, Generator().manual_seed(seed)
    a = spec.n_agents
    rows = TensorDict(batch_size=(ROWS,))
    for time in ((), ("next",)):
        alive = torch.rand(ROWS, a, generator=g) < 0.8
        alive[0] = True
        observation = torch.randn(ROWS, a, FEATURES, generator=g, dtype=dtype) * alive.unsqueeze(-1)
        mask = (torch.rand(ROWS, a, ACTIONS, generator=g) < 0.6) & torch.tensor(spec.action_valid)
        mask[..., 0] |= ~mask.any(-1)
        for key, value in ((K.observation, observation), (K.alive, alive), (K.action_mask, mask)):
            rows.set((*time, *key), value)
    rows.set(K.action, (torch.rand(ROWS, a, ACTIONS, generator=g) - 2.0 * ~rows.get(K.action_mask)).argmax(-1))
    reward = torch.randn(ROWS, a, 1, generator=g, dtype=dtype)
    rows.set(("next", *K.reward), reward[:, :1].expand(-1, a, -1).clone() if spec.common_reward else reward)
    rows.set(("next", *K.discount), (torch.rand(ROWS, a, 1, generator=g) < 0.9).to(dtype))
    for key, entry in host.learn_entries.items():
        rows.set(key, entry.zeros((ROWS,), dtype))
    return rows


def as_plain(rows: TensorDict) -> dict[str, Tensor]:
    data = {"reward": rows["next", "agents", "reward"][..., 0], "discount": rows["next", "agents", "discount"][..., 0]}
    for prefix, td in (("", rows), ("next_", rows["next"])):
        data |= {prefix + "observation": td[K.observation], prefix + "alive": td[K.alive]}
    return {**data, "next_mask": rows["next", "agents", "action_mask"], "action": rows[K.action]}


def parameters_of(host: DQN, name: str) -> list[Tensor]:
    """Of the networks that ``name`` names, one list entry per set of parameters, flattened."""
    module = getattr(host, name)
    found = []
    for i in range(module.input.banks):
        parts = []
        for body in module.twins:
            for layer in body.layers:
                weights, biases = plain.weights_and_biases(layer)
                parts += [weights[i].flatten(), biases[i].flatten()]
        found.append(torch.cat(parts))
    return found


CASES = [
    pytest.param({}, {"agents": 1}, id="dqn-one"),
    pytest.param({"double": False, "loss": "mse"}, {"agents": 1}, id="dqn-one-of-2015"),
    pytest.param({"dueling": True, "max_grad_norm": 0.5}, {"agents": 1}, id="dqn-one-dueling-clipped"),
    pytest.param({"critics": 2, "tau": 0.05, "target_every": 1}, {"agents": 1}, id="dqn-one-twins-soft"),
    pytest.param({}, {}, id="dqn-team"),
    pytest.param({"critics": 2, "dueling": True}, {"unequal": True, "common": True}, id="dqn-team-unequal"),
    pytest.param({"share_parameters": True, "max_grad_norm": 0.5}, {"common": True}, id="idqn-common"),
    pytest.param({"share_parameters": True, "dueling": True, "double": False}, {"unequal": True}, id="idqn-unequal"),
    pytest.param({"share_parameters": True, "critics": 2, "loss": "mse", "double": False}, {}, id="idqn-twins"),
]


@pytest.mark.parametrize(("options", "of_task"), CASES)
def test_a_hundred_updates_equal_the_plain_transcript(options: dict[str, Any], of_task: dict[str, Any]) -> None:
    spec = task(**of_task)
    options = {"lr": 1e-2, "target_every": 7, "max_grad_norm": None, **options}
    host = made(spec, 1, **options).double()
    settings = plain.Settings(
        sizes=spec.action_sizes,
        shared=host.actor.input.banks == 1,
        double=options.get("double", True),
        dueling=options.get("dueling", False),
        huber=options.get("loss", "huber") == "huber",
        common_reward=spec.common_reward,
        tau=options.get("tau", 1.0),
        target_every=options["target_every"],
        max_grad_norm=options["max_grad_norm"],
    )
    other, before = plain.like(host, settings), parameters_of(host, "actor")
    for step in range(100):
        rows = draw(host, step, torch.float64)
        update(host, rows)
        other.update(as_plain(rows))
    for name, nets in (("actor", other.nets), ("target", other.targets)):
        for mine, net in zip(parameters_of(host, name), nets, strict=True):
            torch.testing.assert_close(mine, torch.nn.utils.parameters_to_vector(net.parameters()), rtol=0, atol=1e-6)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(before, parameters_of(host, "actor"), strict=True))


def test_errors_below_the_target_count_under_weight_times() -> None:
    """As the transcript with the same weights, which TARGET operators set between targets and critic step."""
    host = made(task(), 1, lr=1e-2, max_grad_norm=None, loss="mse").double()
    other = plain.like(host, plain.Settings(sizes=host.spec.action_sizes, huber=False))
    for step in range(20):
        rows = draw(host, step, torch.float64)
        weight = torch.rand(ROWS, 3, 1, generator=Generator().manual_seed(step), dtype=torch.float64)
        host.derive_rewards(rows)
        host.compute_targets(rows)
        assert (rows[K.under_weight] == 1).all()
        rows[K.under_weight].copy_(weight)
        host.update_critic(rows)
        other.update({**as_plain(rows), "under_weight": weight[..., 0]})
    for mine, net in zip(parameters_of(host, "actor"), other.nets, strict=True):
        torch.testing.assert_close(mine, torch.nn.utils.parameters_to_vector(net.parameters()), rtol=0, atol=1e-6)


class Fixed(torch.nn.Module):
    """A body whose values are what it is told."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.out = torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.out.expand(*x.shape[:-1], -1)


def with_values(host: DQN, present: list[list[float]], target: list[list[float]]) -> DQN:
    host.actor.twins = torch.nn.ModuleList(Fixed(values) for values in present)
    host.target.twins = torch.nn.ModuleList(Fixed(values) for values in target)
    return host


@pytest.mark.parametrize(
    ("double", "lent", "value"),
    [(True, [20.0, 7.0], 7.0), (False, [30.0, 9.0], 9.0)],
)
def test_targets_by_hand(double: bool, lent: list[float], value: float) -> None:
    """Action 3 is forbidden; the present first critic likes 1, the targets 2 and 0."""
    host = made(task(1), critics=2, double=double, gamma=0.5)
    with_values(host, [[1, 2, 0, 9], [5, 0, 0, 9]], [[10, 20, 30, 99], [9, 7, 8, 99]])
    rows = draw(host, 0)
    rows["next", "agents", "action_mask"].copy_(torch.tensor([True, True, True, False]))
    after = rows["next"]
    assert host.bootstrap_values(after).tolist() == [[lent]] * ROWS
    assert host.actor.choose(after).tolist() == [[1]] * ROWS
    host.derive_rewards(rows)
    host.compute_targets(rows)
    reward, discount = rows["next", "agents", "reward"], rows["next", "agents", "discount"]
    assert torch.equal(rows[K.value_target], (reward + 0.5 * discount * value).expand(-1, -1, 2))
    assert (discount == 0).any()


def test_dueling_values_by_hand() -> None:
    """V + A − mean A over the actions that each agent has; padding counts for nothing."""
    host = made(task(2, unequal=True), dueling=True)
    host.actor.twins = torch.nn.ModuleList([Fixed([1.0, 2.0, 3.0, 6.0, 10.0])])
    values = host.actor.values(draw(host, 0))
    assert values.shape == (ROWS, 2, ACTIONS, 1)
    assert values[0, :, :, 0].tolist() == [[8.0, 9.0, 10.0, 13.0], [9.5, 10.5, 11.5, 14.5]]


def test_the_loss_is_hubers_or_the_square() -> None:
    values = torch.tensor([0.5, -0.5, 3.0, -3.0]).view(4, 1, 1)
    for loss, each in (("huber", [0.125, 0.125, 2.5, 2.5]), ("mse", [0.25, 0.25, 9.0, 9.0])):
        host = made(task(1), loss=loss)
        rows = draw(host, 0)[:4]
        rows[K.value_target].zero_()
        rows[K.alive].fill_(True)
        rows[K.under_weight].fill_(0.5)
        weighted = [e * w for e, w in zip(each, [1, 0.5, 1, 0.5], strict=True)]
        found = host.critic_loss(rows, values, apart=False, huber=host.loss == "huber")
        assert found.item() == pytest.approx(sum(weighted) / 4)


def test_targets_are_copies_renewed_on_time_or_follow_slowly() -> None:
    for tau, every in ((1.0, 3), (0.25, 1)):
        host = made(task(1), tau=tau, target_every=every)
        for step in range(1, 7):
            before = [p.clone() for p in host.target.parameters()]
            update(host, draw(host, step))
            for old, new, present in zip(before, host.target.parameters(), host.actor.parameters(), strict=True):
                expected = old if step % every else old.lerp(present, tau)
                assert torch.equal(new, expected)
                assert tau < 1 or step % every or torch.equal(new, present)


@pytest.mark.parametrize("options", [{}, {"critics": 2, "dueling": True}])
def test_one_agent_is_the_single_agent_algorithm(options: dict[str, Any]) -> None:
    forms = [made(task(1), 3, share_parameters=shared, **options) for shared in (False, True)]
    for step in range(10):
        for host in forms:
            update(host, draw(host, step))
    for (name, a), b in zip(forms[0].named_parameters(), forms[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dead_rows_change_no_parameter() -> None:
    """What stands in the entries of agents that do not act reaches no gradient."""
    for shared in (False, True):
        a, b = (made(task(common=True), share_parameters=shared) for _ in range(2))
        rows = draw(a, 0)
        corrupted, dead = rows.clone(), ~rows[K.alive]
        assert dead.any()
        corrupted[K.observation][dead] = 1e6
        corrupted[K.action][dead] = 3
        corrupted["next", "agents", "observation"][~rows["next", "agents", "alive"]] = 1e6
        update(a, rows)
        update(b, corrupted)
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)


def test_forbidden_actions_are_never_taken() -> None:
    host, taken_by = made(task(unequal=True), seed=5), set[tuple[float, bool]]()
    for step in range(50):
        rows = draw(host, step)
        for epsilon, uniform in ((0.0, False), (0.5, False), (1.0, True)):
            host.behaviour.uniform, host.behaviour.scale = uniform, epsilon
            action = host.behaviour(rows.clone())[K.action]
            assert rows[K.action_mask].gather(-1, action.unsqueeze(-1)).all()
            if (action != host.actor(rows.clone())[K.action]).any():
                taken_by.add((epsilon, uniform))
    assert taken_by == {(0.5, False), (1.0, True)}


def test_exploration_is_uniform_over_what_is_allowed_and_as_frequent_as_epsilon_says() -> None:
    host = made(task(1))
    td = TensorDict({K.observation: torch.zeros(20_000, 1, FEATURES)}, batch_size=(20_000,))
    td.set(K.action_mask, torch.tensor([True, True, False, True]).expand(20_000, 1, -1))
    greedy = host.actor.choose(td)[0, 0]
    shares = host.behaviour(td)[K.action].flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3, atol=0.02, rtol=0)
    host.behaviour.uniform, host.behaviour.scale = False, 0.3
    other = (host.behaviour(td)[K.action] != greedy).double().mean().item()
    assert other == pytest.approx(0.3 * 2 / 3, abs=0.01)


def test_epsilon_falls_linearly_in_its_share_of_the_run() -> None:
    host = made(task(1), epsilon=1.0, epsilon_final=0.2, epsilon_fraction=0.5)
    found = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        host.set_progress(progress)
        found.append(host.behaviour.scale)
    assert found == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])


def test_the_step_size_falls_linearly_if_it_is_to() -> None:
    for final, expected in ((None, [0.1, 0.1, 0.1]), (0.0, [0.1, 0.05, 0.0])):
        host, found = made(task(1), lr=0.1, lr_final=final), []
        for progress in (0.0, 0.5, 1.0):
            host.set_progress(progress)
            before = [p.detach().clone() for p in host.actor.parameters()]
            update(host, draw(host, 0))
            found.append(host.optimiser.param_groups[0]["lr"])
            moved = any(not torch.equal(a, b) for a, b in zip(before, host.actor.parameters(), strict=True))
            assert moved == (found[-1] > 0)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"critics": 2, "dueling": True, "share_parameters": True, "target_every": 2}])
def test_a_restored_learner_continues_bit_for_bit(options: dict[str, Any]) -> None:
    first, second = (made(task(), seed, **options) for seed in (0, 1))
    for host in (first, second):
        host.behaviour.uniform = False
    for step in range(3):
        update(first, draw(first, step))
        first.behaviour(draw(first, step))
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    for host in (first, second):
        for step in range(3, 6):
            update(host, draw(host, step))
    assert torch.equal(*(host.behaviour(draw(host, 9))[K.action] for host in (first, second)))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("critics", [1, 2])
def test_lent_values_draw_nothing_and_are_one_for_each_critic(critics: int) -> None:
    host = made(task(), critics=critics)
    rows, before = draw(host, 0), host.behaviour.generator.get_state()
    first = host.bootstrap_values(rows)
    assert first.shape == (ROWS, 3, critics)
    assert torch.equal(first, host.bootstrap_values(rows))
    assert torch.equal(before, host.behaviour.generator.get_state())
    assert torch.equal(host.bootstrap_values(rows.expand(2, ROWS)), first.expand(2, -1, -1, -1))


def test_td_errors_are_written_where_a_memory_asks() -> None:
    host = made(task(), critics=2)
    rows = draw(host, 0)
    rows.set(K.td_error, torch.zeros(ROWS, 3, 1))
    host.derive_rewards(rows)
    host.compute_targets(rows)
    value = taken(host.actor.values(rows)[..., :1], rows[K.action])
    host.update_critic(rows)
    expected = torch.where(rows[K.alive].unsqueeze(-1), rows[K.value_target][..., :1] - value, 0.0)
    torch.testing.assert_close(rows[K.td_error], expected.detach())


@pytest.mark.parametrize("options", [{}, {"dueling": True, "share_parameters": True}])
def test_pictures_are_valued_by_a_convolutional_network(options: dict[str, Any]) -> None:
    """Bytes all the way to the network; the body is the one difference."""
    spec = replace(task(2), observation_sizes=(64, 64), state_size=128, picture=(1, 8, 8))
    body = partial(CNN, picture=spec.picture, channels=(4,), kernels=(3,), strides=(2,), hidden=(8,))
    host = DQN(spec=spec, network=body, seed=0, **SMALL, **options)
    rows, g = draw(host, 0), Generator().manual_seed(0)
    for td in (rows, rows["next"]):
        td.set(K.observation, torch.randint(256, (ROWS, 2, 64), generator=g, dtype=torch.uint8))
    before = [p.detach().clone() for p in host.actor.parameters()]
    update(host, rows)
    assert all(not torch.equal(a, b) for a, b in zip(before, host.actor.parameters(), strict=True))
    host.behaviour.uniform, host.behaviour.scale = False, 0.0
    assert torch.equal(host.behaviour(rows)[K.action], host.actor.choose(rows))


BAD = [
    ({"critics": 3}, "algorithm.critics=3 must be 1 or 2"),
    ({"loss": "l1"}, "algorithm.loss='l1' must be 'huber' or 'mse'"),
    ({"target_every": 0}, "algorithm.target_every=0 must be at least 1"),
    ({"tau": 0.0}, "algorithm.tau=0.0 must be positive"),
    ({"tau": 2.0}, "algorithm.tau=2.0 must lie in [0, 1]"),
    ({"gamma": -0.1}, "algorithm.gamma=-0.1 must lie in [0, 1]"),
    ({"lr": 0.0}, "algorithm.lr=0.0 must be positive"),
    ({"lr_final": -0.1}, "algorithm.lr_final=-0.1 must not be negative"),
    ({"adam_eps": 0.0}, "algorithm.adam_eps=0.0 must be positive"),
    ({"max_grad_norm": 0.0}, "algorithm.max_grad_norm=0.0 must be positive"),
    ({"epsilon": 1.5}, "algorithm.epsilon=1.5 must lie in [0, 1]"),
    ({"epsilon_final": -0.1}, "algorithm.epsilon_final=-0.1 must lie in [0, 1]"),
    ({"epsilon_fraction": 0.0}, "algorithm.epsilon_fraction=0.0 must lie in (0, 1]"),
    ({"agent_indicator": False}, "algorithm.agent_indicator=False has no effect where agents share no network"),
    ({"capacity": 8}, "algorithm.capacity=8 must hold at least a batch, algorithm.batch_size=16"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        made(task(), **options)


def test_unequal_agents_that_share_a_network_must_be_told_apart() -> None:
    alike = made(task(), share_parameters=True, agent_indicator=False)
    assert alike.actor.input.features == FEATURES
    with pytest.raises(ValueError, match=r"agent_indicator=false does not fit .*, whose agents differ"):
        made(task(unequal=True), share_parameters=True, agent_indicator=False)
