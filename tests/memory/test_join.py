"""BarycenterRegion in scripts of TorchRL: the divergence, what it leaves alone, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import IndependentNormal, MaskedCategorical, ProbabilisticActor, TanhNormal, TruncatedNormal

from marl_memory import TaskSpec
from marl_memory.functional.transport import categorical_kl, gaussian_kl
from marl_memory.memory.barycenter_region import BarycenterRegion
from marl_memory.memory.stock import allowed_by, parameters_of

B, F, P = 64, 3, 4


def continuous_actor(squash: bool = True) -> ProbabilisticActor:
    torch.manual_seed(0)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(F, 2 * P), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal if squash else IndependentNormal,
        return_log_prob=True,
    )


def team_actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    return ProbabilisticActor(
        TensorDictModule(nn.Linear(F, P), in_keys=[("team", "observation")], out_keys=[("team", "logits")]),
        in_keys={"logits": ("team", "logits"), "mask": ("team", "mask_of_actions")},
        out_keys=[("team", "action")],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )


def spec_of(team: bool) -> TaskSpec:
    if team:
        return TaskSpec.of_sizes(observation_size=F, n_actions=P, agents=2, group="team")
    return TaskSpec.of_sizes(observation_size=F, action_low=(-1.0,) * P, action_high=(1.0,) * P)


def make_region(team: bool = False, **options: Any) -> BarycenterRegion:
    return BarycenterRegion(spec=spec_of(team), **{"min_rows": 8, "capacity": 512, "fixed_point_gate": False} | options)


def batch(team: bool = False, *shape: int, seed: int = 0) -> TensorDict:
    g, shape = torch.Generator().manual_seed(seed), shape or (B,)
    agents = (2,) if team else ()
    observation = torch.randn(*shape, *agents, F, generator=g)
    own = {"observation": observation, "state_value": torch.randn(*shape, *agents, 1, generator=g)}
    if team:
        mask = torch.rand(*shape, 2, P, generator=g) > 0.4
        mask[..., 0] = True
        own["mask_of_actions"] = mask
    td = TensorDict({"value_target": torch.randn(*shape, *agents, 1, generator=g)}, shape)
    td.update({"team": own} if team else own)
    return td.set(("next", "reward"), torch.randn(*shape, 1, generator=g))


def moved(actor: ProbabilisticActor) -> ProbabilisticActor:
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return actor


# ------------------------------------------------------------------------------------------------------- distributions


def test_parameters_of_gaussians_give_the_divergence_of_torch() -> None:
    a, b = (D.Independent(D.Normal(torch.randn(5, P), torch.rand(5, P) + 0.1), 1) for _ in range(2))
    expected = D.kl_divergence(a, b)
    for make in (
        lambda x: x,
        lambda x: D.TransformedDistribution(x, [D.TanhTransform()]),
        lambda x: IndependentNormal(x.base_dist.loc, x.base_dist.scale),
        lambda x: TanhNormal(x.base_dist.loc, x.base_dist.scale, low=-3.0, high=0.5),
        lambda x: x.base_dist,
    ):
        p, q = parameters_of(make(a)), parameters_of(make(b))
        torch.testing.assert_close(gaussian_kl(p["loc"], p["scale"], q["loc"], q["scale"]), expected)


def test_parameters_of_categoricals_give_the_divergence_of_torch() -> None:
    first, second = torch.randn(5, P), torch.randn(5, P)
    expected = D.kl_divergence(D.Categorical(logits=first), D.Categorical(logits=second))
    for make in (D.Categorical, D.OneHotCategorical):
        p, q = (parameters_of(make(logits=x))["log_probs"] for x in (first, second))
        torch.testing.assert_close(categorical_kl(p, q), expected)
        assert allowed_by(make(logits=first)).all()  # pyright: ignore[reportOptionalMemberAccess]
        shut = first.masked_fill(torch.tensor([False, True, False, False]), -1e8)
        assert allowed_by(make(logits=shut))[:, 1].eq(False).all()  # pyright: ignore[reportOptionalSubscript]
    assert allowed_by(D.Normal(torch.zeros(2), torch.ones(2))) is None
    mask = torch.tensor([True, False, True, True]).expand(5, P)
    masked = MaskedCategorical(logits=first, mask=mask)
    torch.testing.assert_close(parameters_of(masked)["log_probs"].exp(), masked.probs)
    assert torch.equal(allowed_by(masked), mask)  # pyright: ignore[reportArgumentType]


def test_other_distributions_are_refused_by_name() -> None:
    for distribution in (D.Beta(torch.ones(2), torch.ones(2)), TruncatedNormal(torch.zeros(2), torch.ones(2))):
        with pytest.raises(TypeError, match=type(distribution).__name__):
            parameters_of(distribution)


# ------------------------------------------------------------------------------------------------------------- the term


def kl_of(team: bool, region: BarycenterRegion, td: TensorDict, actor: ProbabilisticActor) -> Tensor:
    """KL(p*‖π) ``[B, A]`` by torch.distributions."""
    reference = {name: td[key] for name, key in region.references.items()}
    now = actor.get_dist(td.clone())
    if team:
        return D.kl_divergence(D.Categorical(logits=reference["log_probs"].clamp(min=-1e9)), now)
    best = D.Independent(D.Normal(reference["loc"].squeeze(1), reference["scale"].squeeze(1)), 1)
    base = now.base_dist if isinstance(now, TanhNormal) else now
    return D.kl_divergence(best, D.Independent(D.Normal(base.base_dist.loc, base.base_dist.scale), 1)).unsqueeze(1)


@pytest.mark.parametrize("team", [False, True], ids=["one agent", "team"])
def test_penalty_is_the_weighted_divergence_and_trains_the_actor(team: bool) -> None:
    region, actor = make_region(team), team_actor() if team else continuous_actor()
    joined = region.join(actor)
    joined.remember(joined.recall(batch(team)))
    assert len(region) == B * (2 if team else 1)
    moved(actor)
    td = joined.recall(batch(team, seed=1))
    metrics = joined.metrics(td)
    assert metrics["rows"] == len(region) and metrics["omega"] > 0
    moved(actor)
    rows = td[torch.randperm(B)[:16]]
    penalty = joined.penalty(rows)
    expected = (rows[region.weight] * kl_of(team, region, rows, actor)).mean()
    torch.testing.assert_close(penalty, expected)
    assert penalty > 0
    penalty.backward()
    gradients = [p.grad for p in actor.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    torch.testing.assert_close(joined.penalty(rows, actor.get_dist(rows.clone())), expected)
    if team:
        forbidden = ~td["team", "mask_of_actions"]
        assert (td[region.references["log_probs"]].exp()[forbidden] == 0).all()


def test_rows_are_found_by_features_of_the_scripts_own() -> None:
    region, actor = make_region(True, keys="features", feature_size=6), team_actor()
    joined = region.join(actor, features="seen")
    seen = torch.randn(B, 2, 6)
    td = joined.recall(batch(True).set("seen", seen))
    joined.remember(td)
    assert torch.equal(region.trace.store.keys[0, : 2 * B], seen.flatten(0, 1))
    assert joined.metrics(joined.recall(td))["neighbours"] > 0 and "features" not in td["learn"]


def test_penalty_of_w2() -> None:
    region, actor = make_region(divergence="w2"), continuous_actor(squash=False)
    joined = region.join(actor)
    joined.remember(joined.recall(batch()))
    td = joined.recall(batch(seed=1))
    moved(actor)
    base = actor.get_dist(td.clone()).base_dist
    w2 = (td[region.references["loc"]].squeeze(1) - base.loc).square() + (
        td[region.references["scale"]].squeeze(1) - base.scale
    ).square()
    torch.testing.assert_close(joined.penalty(td), (td[region.weight].squeeze(1) * w2.sum(-1)).mean())


def test_the_dead_neither_count_nor_are_remembered() -> None:
    region, actor = make_region(True), team_actor()
    joined = region.join(actor, alive=("team", "mask"))
    alive = torch.rand(B, 2) > 0.5
    td = batch(True).set(("team", "mask"), alive)
    joined.remember(joined.recall(td))
    assert len(region) == alive.sum()
    again = joined.recall(batch(True, seed=1).set(("team", "mask"), alive))
    moved(actor)
    divergence = (again[region.weight] * kl_of(True, region, again, actor))[alive]
    torch.testing.assert_close(joined.penalty(again), divergence.mean())


def test_a_batch_may_have_time() -> None:
    region, actor = make_region(), continuous_actor()
    joined = region.join(actor)
    joined.remember(joined.recall(batch(False, 8, 4)))
    assert len(region) == 32
    assert joined.recall(batch(False, 8, 4, seed=1))[region.weight].shape == (8, 4, 1)


# ------------------------------------------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize(
    "options", [{"strength": 0.0}, {"min_rows": 10_000}], ids=["strength 0", "not yet full enough"]
)
def test_without_effect_the_penalty_is_a_constant_0(options: dict[str, Any]) -> None:
    region, actor = make_region(**options), continuous_actor()
    joined = region.join(actor)
    assert joined.penalty(joined.recall(batch())).item() == 0  # empty
    joined.remember(joined.recall(batch()))
    assert len(region) == B
    penalty = joined.penalty(joined.recall(batch(seed=1)))
    assert penalty.item() == 0 and not penalty.requires_grad


@pytest.mark.parametrize("team", [False, True], ids=["one agent", "team"])
def test_recall_adds_to_learn_only_and_draws_nothing(team: bool) -> None:
    region, actor = make_region(team), team_actor() if team else continuous_actor()
    joined, td = region.join(actor), batch(team)
    before, state = td.clone(), torch.get_rng_state()
    joined.recall(td)
    joined.remember(td)
    joined.penalty(td)
    assert torch.equal(torch.get_rng_state(), state)
    assert {key for key in td.keys() if key not in before.keys()} == {"learn"}
    assert (td.exclude("learn") == before).all()


def test_the_gate_reads_what_gae_leaves() -> None:
    """δ is target − value, S of the targets: with the value at its target the gate is shut."""
    region, actor = make_region(fixed_point_gate=True), continuous_actor()
    joined = region.join(actor)
    td = batch()
    td["value_target"] = td["state_value"].clone()
    joined.remember(joined.recall(td))
    shut = joined.recall(td.exclude("learn"))
    assert not shut[region.weight].any()
    wrong = batch()
    wrong["value_target"] = wrong["state_value"] + 1
    opened = joined.recall(wrong)
    assert (opened[region.weight] > 0).any()


def test_a_common_reward_and_value_are_every_agents() -> None:
    region, actor = make_region(True, fixed_point_gate=True), team_actor()
    joined = region.join(actor, value="value")
    td = batch(True).set("value", torch.randn(B, 1)).set("value_target", torch.randn(B, 1))
    joined.remember(joined.recall(td))
    assert len(region) == 2 * B


# --------------------------------------------------------------------------------------------------------- the refusals


def test_what_it_refuses() -> None:
    region, actor = make_region(), continuous_actor()
    joined = region.join(actor)
    with pytest.raises(ValueError, match=r"recall\(batch\) before minibatches"):
        joined.penalty(batch())
    with pytest.raises(ValueError, match=r"recall\(batch\) first"):
        joined.remember(batch())
    with pytest.raises(TypeError, match=r"get_dist"):
        region.join(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"unknown entries \['values'\]"):
        region.join(actor, values="v")
    gated = make_region(fixed_point_gate=True).join(actor)
    with pytest.raises(ValueError, match="there is no value at .*state_value: say where it is, by value=KEY"):
        gated.recall(batch().exclude("state_value"))
    one = TaskSpec.of_sizes(observation_size=F, n_actions=P)
    with pytest.raises(ValueError, match="the policy is a TanhNormal; the spec's actions are discrete"):
        BarycenterRegion(spec=one).join(actor).recall(batch())
    wide = TaskSpec.of_sizes(observation_size=5, action_low=(-1.0,) * P, action_high=(1.0,) * P)
    with pytest.raises(ValueError, match="observations have 3 features, not 5"):
        BarycenterRegion(spec=wide).join(actor).recall(batch())
    with pytest.raises(ValueError, match=r"alive must be \[64, 2\] for 2 agents"):
        make_region(True).join(team_actor(), alive="dead").recall(batch(True).set("dead", torch.ones(B, 3)))
