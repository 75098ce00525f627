"""GradientField in losses of TorchRL: units, bits, copies, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import ValueOperator
from torchrl.objectives import DDPGLoss, SoftUpdate, TD3Loss

from marl_memory import TaskSpec
from marl_memory.memory.gradient_field import GradientField
from marl_memory.memory.stock import StockEntries
from marl_memory.memory.tap import ActionTap

B, F, P = 32, 3, 2
LOW, HIGH = (-2.0, 0.0), (2.0, 1.0)
HALF, CENTRE = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 0.5])


def spec_of(agents: int = 1) -> TaskSpec:
    return TaskSpec.of_sizes(observation_size=F, action_low=LOW, action_high=HIGH, agents=agents)


class Fake:
    """In the place of a field: ``change`` makes the fused gradient of the one it is given."""

    gate, scope, trace = None, SimpleNamespace(joint=False), SimpleNamespace(feature_size=None)

    def __init__(self, spec: TaskSpec, change: Any) -> None:
        self.spec, self.change = spec, change
        self.given: list[Tensor] = []
        self.rows: list[TensorDict] = []

    def __call__(self, td: TensorDict) -> None:
        gradient = td.get(self.spec.keys.action_gradient)
        self.given.append(gradient.clone())
        gradient.copy_(self.change(gradient))

    def write(self, td: TensorDict) -> None:
        self.rows.append(td)


class Critic(nn.Module):
    """Q(o, a) = −|a − Wo|² + o·a, with a gradient that differs from state to state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(F, P)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return -(action - self.linear(observation)).square().sum(-1, keepdim=True) + action.sum(-1, keepdim=True)


def make_actor(prefix: tuple[str, ...] = ()) -> TensorDictModule:
    observation, action = (*prefix, "observation"), (*prefix, "action")
    return TensorDictModule(nn.Linear(F, P), in_keys=[observation], out_keys=[action])


def batch(*shape: int, seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    entries = {
        "observation": torch.randn(*shape, F, generator=g),
        "action": torch.rand(*shape, P, generator=g),
        "index": torch.arange(torch.Size(shape).numel()).view(shape),
        "next": {
            "observation": torch.randn(*shape, F, generator=g),
            "reward": torch.randn(*shape, 1, generator=g),
            "done": torch.zeros(*shape, 1, dtype=torch.bool),
            "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        },
    }
    return TensorDict(entries, batch_size=shape)


def make_loss(kind: str, field: GradientField | None) -> tuple[Any, Any]:
    """The actor, tapped if there is a field, and its loss."""
    torch.manual_seed(0)
    actor, critic = make_actor(), ValueOperator(Critic(), in_keys=["observation", "action"])
    if field is not None:
        actor = field.tap(actor)
    bounds = (torch.tensor(LOW), torch.tensor(HIGH))
    loss = DDPGLoss(actor, critic, delay_actor=True) if kind == "ddpg" else TD3Loss(actor, critic, bounds=bounds)
    loss.make_value_estimator(gamma=0.9)
    return actor, loss


def train(kind: str, field: GradientField | None, updates: int = 8) -> tuple[Any, Any]:
    actor, loss = make_loss(kind, field)
    optimiser, targets = torch.optim.Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.1)
    torch.manual_seed(1)
    for i in range(updates):
        terms = loss(batch(B, seed=i))
        (terms["loss_actor"] + terms["loss_value" if kind == "ddpg" else "loss_qvalue"]).backward()
        optimiser.step()
        optimiser.zero_grad()
        targets.step()
    return actor, loss


def make_field(agents: int = 1, **options: Any) -> GradientField:
    return GradientField(spec=spec_of(agents), **{"fixed_point_gate": False, "min_rows": 32, "capacity": 256} | options)


def equal(a: Any, b: Any) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# ------------------------------------------------------------------------------------------------------------ the units


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(B,), (4, 8)])
def test_the_field_sees_the_gradient_of_q_in_units_of_the_box(shape: tuple[int, ...], reduction: Any) -> None:
    field = Fake(spec_of(), lambda g: 2 * g)
    tap = ActionTap(field, StockEntries(field.spec, {}), "action", reduction)  # pyright: ignore[reportArgumentType]
    actor, critic, rows = make_actor(), Critic(), batch(*shape).exclude("action")
    action = actor(rows.clone())["action"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(critic(rows["observation"], action).sum(), action)

    tapped = TensorDictSequential(actor, tap)(rows.clone())
    value = critic(rows["observation"], tapped["action"])
    (gradient,) = torch.autograd.grad(-getattr(value, reduction)(), actor.module.bias)
    torch.testing.assert_close(field.given[0], (expected * HALF).unsqueeze(-2))
    count = B if reduction == "mean" else 1
    torch.testing.assert_close(gradient, -2 * expected.flatten(0, -2).sum(0) / count)  # the doubled gradient
    k, written = field.spec.keys, field.rows[0]
    torch.testing.assert_close(written[k.policy_action], ((action.detach() - CENTRE) / HALF).unsqueeze(-2))
    assert torch.equal(written[k.row], rows["index"])
    assert written[k.alive].all() and written[k.alive].shape == (*shape, 1)


def test_ddpg_and_td3_divide_by_the_rows_of_a_batch() -> None:
    for kind in ("ddpg", "td3"):
        field = make_field()
        actor, loss = make_loss(kind, field)
        rows = batch(B)
        loss(rows)["loss_actor"].backward()
        critic = Critic()
        source = loss.value_network_params if kind == "ddpg" else loss.qvalue_network_params[0]
        critic.load_state_dict({name: source["module", *name.split(".")].detach() for name in critic.state_dict()})
        action = actor(rows.select("observation"))["action"].detach().requires_grad_()
        (expected,) = torch.autograd.grad(critic(rows["observation"], action).sum(), action)
        torch.testing.assert_close(actor[-1].last[field.fresh], (expected * HALF).unsqueeze(1))


def test_teams_have_their_own_dimension() -> None:
    field = Fake(spec_of(2), lambda g: g)
    actor = make_actor(("agents",))
    tap = ActionTap(field, StockEntries(field.spec, {}), ("agents", "action"), "sum")  # pyright: ignore[reportArgumentType]
    rows = TensorDict(
        {("agents", "observation"): torch.randn(B, 2, F), ("agents", "alive"): torch.rand(B, 2) > 0.5}, [B]
    )
    weight = torch.randn(B, 2, P)
    (TensorDictSequential(actor, tap)(rows.clone())["agents", "action"] * -weight).sum().backward()
    torch.testing.assert_close(field.given[0], weight * HALF)
    assert torch.equal(field.rows[0][field.spec.keys.alive], rows["agents", "alive"])
    assert torch.equal(field.rows[0]["state"], rows["agents", "observation"].flatten(1))


def test_the_gradient_of_the_dead_is_left_alone() -> None:
    field = Fake(spec_of(2), lambda g: g + 1)
    tap = ActionTap(field, StockEntries(field.spec, {}), ("agents", "action"), "sum")  # pyright: ignore[reportArgumentType]
    alive, action = torch.rand(B, 2) > 0.5, torch.zeros(B, 2, P, requires_grad=True)
    own = {"observation": torch.randn(B, 2, F), "alive": alive, "action": action}
    tap(TensorDict({"agents": TensorDict(own, [B, 2])}, [B]))["agents", "action"].sum().backward()
    assert action.grad is not None
    assert (action.grad[~alive] == 1).all() and (action.grad[alive] != 1).all()


# ------------------------------------------------------------------------------------------------------------- the bits


def test_what_memory_leaves_alone_keeps_its_bits() -> None:
    """B and the range are no powers of two here: there and back would move bits."""

    def change(g: Tensor) -> Tensor:
        g = g.clone()
        g[0] *= 3
        return g

    spec = TaskSpec.of_sizes(observation_size=F, action_low=(-0.3, -0.7), action_high=(0.4, 0.9))
    torch.manual_seed(0)
    rows, weight = torch.randn(29, F), torch.randn(29, P)
    seen = {}
    for name, how in {"none": None, "same": lambda g: g.clone(), "one": change}.items():
        td = TensorDict({"observation": rows, "action": (rows[:, :P] * 1).requires_grad_()}, [29])
        before = td["action"]
        if how is not None:
            ActionTap(Fake(spec, how), StockEntries(spec, {}), "action", "mean")(td)  # pyright: ignore[reportArgumentType]
        assert td["action"] is before
        (-(td["action"] * weight).mean()).backward()
        seen[name] = before.grad
    assert torch.equal(seen["none"], seen["same"])
    assert torch.equal(seen["none"][1:], seen["one"][1:])
    torch.testing.assert_close(seen["one"][0], 3 * seen["none"][0])


@pytest.mark.parametrize("kind", ["ddpg", "td3"])
@pytest.mark.parametrize(
    "options", [{"strength": 0.0}, {"min_rows": 10_000}], ids=["strength 0", "not yet full enough"]
)
def test_without_effect_the_parameters_are_those_of_the_stock_loss(kind: str, options: dict[str, Any]) -> None:
    (_, stock), field = train(kind, None), make_field(**options)
    _, tapped = train(kind, field)
    assert len(field) > 100
    assert equal(stock, tapped)


@pytest.mark.parametrize("kind", ["ddpg", "td3"])
def test_memory_acts(kind: str) -> None:
    (_, stock), field = train(kind, None), make_field(beta=1.0)
    actor, tapped = train(kind, field)
    metrics = actor[-1].metrics()
    assert metrics["rows"] > 100 and metrics["beta"] > 0.05
    assert not equal(stock, tapped)
    fresh, fused = (actor[-1].last[key] for key in (field.fresh, field.spec.keys.action_gradient))
    assert not torch.equal(fresh, fused)  # what is remembered is the gradient as the critic gave it


# ----------------------------------------------------------------------------------------------------------- the copies


def test_the_operator_is_in_no_state_and_no_copy() -> None:
    field = make_field()
    actor, loss = train("td3", field)
    assert [name for name, _ in actor.named_parameters()] == ["module.0.module.weight", "module.0.module.bias"]
    assert list(actor.state_dict()) == ["module.0.module.weight", "module.0.module.bias"]
    assert not [*actor.buffers()] and field not in [*actor.modules(), *loss.modules()]
    assert not [name for name in loss.state_dict() if "store" in name or "half_range" in name]
    for other in (copy.deepcopy(actor), pickle.loads(pickle.dumps(actor))):
        held = field.state_dict()
        before = {name: x.clone() for name, x in held.items() if isinstance(x, Tensor)}
        other(batch(B))["action"].sum().backward()
        assert other[-1].metrics() == {}
        assert all(torch.equal(before[name], field.state_dict()[name]) for name in before)


def test_it_writes_once_for_each_backward_pass_to_the_actor_and_never_else() -> None:
    field = make_field(capacity=4096)
    actor, loss = make_loss("ddpg", field)
    terms = loss(batch(B))
    terms["loss_value"].backward()
    with torch.no_grad():
        actor(batch(B))
    assert len(field) == 0
    terms["loss_actor"].backward()
    assert len(field) == B
    loss(batch(B, seed=1))["loss_actor"].backward()
    assert len(field) == 2 * B


def test_a_functional_call_is_tapped_too() -> None:
    field = make_field()
    actor = field.tap(make_actor())
    params = TensorDict.from_module(actor).apply(lambda x: x.detach().clone().requires_grad_())
    with params.to_module(actor):
        actor(batch(B))["action"].sum().backward()
    assert len(field) == B
    assert all(x.grad is not None for x in params.values(True, True))
    assert all(x.grad is None for x in actor.parameters())


# ----------------------------------------------------------------------------------------------------------- the scopes


@pytest.mark.parametrize(("scope", "rows"), [("shared", 2 * B), ("per_agent", 2 * B), ("centralized", B)])
def test_teams_in_every_scope(scope: str, rows: int) -> None:
    field = make_field(agents=2, scope=scope, capacity=1024)
    actor = field.tap(make_actor(("agents",)))
    td = TensorDict({("agents", "observation"): torch.randn(B, 2, F)}, [B])
    actor(td)["agents", "action"].square().mean().backward()
    assert len(field) == rows


def test_entries_by_other_names() -> None:
    field = make_field()
    actor = field.tap(
        TensorDictModule(nn.Linear(F, P), in_keys=["pixels"], out_keys=["act"]), observation="pixels", row=None
    )
    actor(TensorDict({"pixels": torch.randn(B, F)}, [B]))["act"].sum().backward()
    assert len(field) == B
    assert "index" not in actor.in_keys and ("index",) not in actor.in_keys


# ------------------------------------------------------------------------------------------------------- the refusals


def test_rows_are_found_by_features_of_the_scripts_own() -> None:
    """Observations that tell nothing apart, features that do: only what lies near in them is remembered."""
    field = make_field(keys="features", feature_size=5, neighbours=4)
    tap = ActionTap(field, StockEntries(field.spec, {"features": "seen"}), "action", "mean")
    seen = torch.randn(B, 5)
    rows = tap._rows(field, batch(B).set("seen", seen).set("observation", torch.zeros(B, F)), torch.zeros(B, P))
    assert torch.equal(rows[field.spec.keys.features], seen.unsqueeze(-2)) and "seen" in tap.in_keys
    rows.set(field.spec.keys.action_gradient, seen[:, None, :P].clone())
    field.write(field(rows))
    assert torch.equal(field.trace.store.keys[0, :B], seen)
    with pytest.raises(ValueError, match="features are 4 wide, not feature_size=5"):
        tap._rows(field, batch(B).set("seen", seen[:, :4]), torch.zeros(B, P))
    with pytest.raises(ValueError, match="there is no features at agents/features or features: say where it is"):
        ActionTap(field, StockEntries(field.spec, {}), "action", "mean")._rows(field, batch(B), torch.zeros(B, P))


def test_the_gate_needs_entries_that_stock_losses_do_not_have() -> None:
    field = make_field(fixed_point_gate=True)
    actor, _ = make_loss("ddpg", field)
    with pytest.raises(ValueError, match=r"fixed_point_gate=False"):
        actor(batch(B))
    with torch.no_grad():
        actor(batch(B))  # acting needs no gate
    td = batch(B).set("delta", torch.randn(B, 1)).set("value_target", torch.randn(B, 1))
    gated = field.tap(make_actor(), td_error="delta")
    gated(td)["action"].sum().backward()
    assert len(field) == B and field.gate is not None and field.gate.scale > 0


def test_what_it_refuses() -> None:
    discrete = TaskSpec.of_sizes(observation_size=F, n_actions=3)
    with pytest.raises(ValueError, match="continuous actions"):
        GradientField(spec=discrete, fixed_point_gate=False).tap(make_actor())
    field = make_field()
    with pytest.raises(ValueError, match="reduction='none' must be"):
        field.tap(make_actor(), reduction="none")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"unknown entries \['obs'\]"):
        field.tap(make_actor(), obs="pixels")
    with pytest.raises(ValueError, match="there is no observation at pixels: say where it is, by observation=KEY"):
        field.tap(make_actor(), observation="pixels")(batch(B))
