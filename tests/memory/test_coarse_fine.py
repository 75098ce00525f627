"""Novelty as a reward: by hand, whose state it is, what is learnt, and what is new then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marl_memory.functional.novelty import hoyer
from marl_memory.keys import Keys
from marl_memory.memory.coarse_fine import REPORT, CoarseFineNovelty
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.spec import TaskSpec
from tests.memory.tasks import SCOPES, normal, task

K = Keys()
SMALL: dict[str, Any] = {"hidden": (8,), "latent": 4, "batches": 4, "batch_size": 16, "capacity": 60}


def memory(spec: TaskSpec, **options: Any) -> CoarseFineNovelty:
    return CoarseFineNovelty(spec=spec, **{**SMALL, **options})


def steps(spec: TaskSpec, count: int, seed: int = 0) -> TensorDict:
    """Steps ``[count]`` as a host collects them; everybody lives, all rewards are 1."""
    a = spec.n_agents
    td = TensorDict(batch_size=(count,))
    valid = torch.tensor(spec.observation_valid)
    for prefix in ((), ("next",)):
        observation = torch.where(valid, normal(count, a, spec.observation_size, seed=seed + len(prefix)), 0.0)
        state = normal(count, spec.state_size, seed=seed + 9) if spec.own_state else observation.flatten(1)
        td.set((*prefix, *K.observation), observation)
        td.set((*prefix, K.state), state)
        td.set((*prefix, *K.alive), torch.ones(count, a, dtype=torch.bool))
    td.set(("next", *K.reward), torch.ones(count, a, 1))
    return td.set(K.learn_reward, torch.ones(count, a, 1))


def taught(operator: CoarseFineNovelty, *batches: TensorDict) -> CoarseFineNovelty:
    for td in batches:
        operator.write(td)
        operator.learn()
    return operator


def told(operator: CoarseFineNovelty, td: TensorDict) -> dict[str, Tensor]:
    """By name what the operator reports ``[B, A]``, and the reward that is left."""
    after = operator(td.clone())
    return {
        **dict(zip(REPORT, after.get(operator.report).unbind(-1), strict=True)),
        "reward": after.get(K.learn_reward),
    }


def normaliser(operator: CoarseFineNovelty) -> RunningMoments:
    """Of an operator that reads vectors."""
    assert operator.model.moments is not None
    return operator.model.moments


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(("combine", "sign"), [("add", 1), ("mul", 1), ("add", -1)])
def test_the_reward_of_a_linear_autoencoder_by_hand(combine: str, sign: int, centre: bool) -> None:
    """E(s) = (s₁, s₂/2), D(z) = (z₁, z₁), states normalised by 1, σ_c = 2, σ_f = 0.5 and μ_f = 0.25: written out."""
    options = {"hidden": (), "latent": 2, "combine": combine, "fine_sign": sign, "centre": centre, "zeta": 0.5}
    operator = taught(memory(task(), **options), steps(task(), 8))
    model = operator.model
    model.level.fill_(0.25)
    first, first_bias, second, second_bias = model.autoencoder.parameters()
    first.data.copy_(torch.tensor([[1.0, 0], [0, 0.5]]))
    second.data.copy_(torch.tensor([[1.0, 0], [1, 0]]))
    for bias in (first_bias, second_bias):
        bias.data.zero_()
    moments = normaliser(operator)
    moments.mean.zero_()
    moments.m2.copy_(moments.count)
    model.scales.m2.copy_(model.scales.count * torch.tensor([4.0, 0.25], dtype=torch.float64))
    td = steps(task(), 2)
    td.get(("next", *K.observation)).copy_(torch.tensor([[3.0, 0.0], [1.0, 2.0]]).view(2, 1, 2))
    operator.eta, operator.strength = 0.1, 0.5
    said = told(operator, td)
    # codes (3, 0) and (1, 1), drawn as (3, 3) and (1, 1): errors of 0 + 9 and 0 + 1
    coarse, sparse = torch.tensor([[4.5], [0.5]]), torch.tensor([[1.0], [0.0]])
    fine = 1 - sparse if sign == 1 else sparse
    c, f = coarse / 2, 0.5 * (fine - (0.25 if centre else 0.0)) / 0.5
    intrinsic = c + f if combine == "add" else c * (1 + f)
    for name, expected in (("coarse", coarse), ("fine", fine), ("intrinsic", intrinsic), ("bonus", 0.05 * intrinsic)):
        torch.testing.assert_close(said[name], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said["reward"].squeeze(-1), 1 + 0.05 * intrinsic)
    assert torch.equal(td.get(("next", *K.reward)), torch.ones(2, 1, 1))


def test_eta_and_strength_follow_their_schedules() -> None:
    operator = memory(task(), eta=0.2, eta_final=0.1, strength=1.0, strength_final=0.5)
    for progress, expected in ((0.0, 0.2), (0.5, 0.15 * 0.75), (1.0, 0.05), (1.5, 0.05)):
        operator.set_progress(0, progress)
        assert operator.strength * operator.eta == pytest.approx(expected)


def test_one_step_of_learning_is_adam_on_the_loss() -> None:
    """Beside PyTorch's Adam, on the rows that the same generator draws."""
    operator = memory(task(features=3), batches=3, sparsity=0.1, lr=0.01)
    operator.write(steps(operator.spec, 40))
    model, other = operator.model, memory(task(features=3)).model
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "extra" not in k}, strict=False)
    moments, states = normaliser(operator), [model.recent.draw(16, model.generator) for _ in range(3)]
    model.generator.manual_seed(model.seed)
    adam, losses = torch.optim.Adam(other.autoencoder.parameters(), lr=0.01), []
    for state in states:
        s = ((state - moments.mean) / moments.std).float().clamp(-10, 10)
        z = other.autoencoder.encoder(s)
        losses.append(((s - other.autoencoder.decoder(z)) ** 2).mean() + 0.1 * z.abs().mean())
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    report = operator.learn()
    assert report["loss/autoencoder"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for p, q in zip(model.autoencoder.parameters(), other.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_scales_are_deviations_of_what_was_learnt_from() -> None:
    operator = memory(task(features=3), batches=1, batch_size=16)
    operator.write(steps(operator.spec, 40))
    model, seen = operator.model, []
    of = model._coarse
    model._coarse = lambda *args: seen.append(of(*args)) or seen[-1]  # type: ignore[method-assign]
    for _ in range(5):
        operator.learn()
    coarse, code = (torch.cat([one[i].detach() for one in seen], 1).squeeze(0) for i in (0, 1))
    fine = 1 - hoyer(code)
    expected = torch.stack([coarse.std(correction=0), fine.std(correction=0)])
    torch.testing.assert_close(model.deviations[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.level[0], fine[-16:].mean())  # of the last learning only
    told = model.of(model.recent.rows)
    torch.testing.assert_close(told.fine, 1 - hoyer(told.code))


# ------------------------------------------------------------------------------------------------------- what is novel


def test_what_is_learnt_is_less_novel_than_what_is_not() -> None:
    """Two places; one of them is learnt."""
    operator = memory(task(features=4), hidden=(32,), batches=300, lr=1e-3, capacity=256)
    here, there = steps(operator.spec, 64, 1), steps(operator.spec, 64, 50)
    for td, direction in ((here, 0), (there, 3)):
        td.get(("next", *K.observation)).mul_(0.3)[..., direction] += 2.0
    taught(operator, here)
    old, new = told(operator, here), told(operator, there)
    assert old["coarse"].mean() < 0.2 * new["coarse"].mean()
    assert old["bonus"].mean() < new["bonus"].mean()
    before = new["coarse"].mean()
    taught(operator, there, there)
    assert told(operator, there)["coarse"].mean() < 0.2 * before


def test_units_do_not_matter() -> None:
    """The same states in metres and in millimetres: the normaliser takes them out."""
    spec, said = task(features=3), []
    for unit in (1.0, 1024.0):
        td = steps(spec, 40)
        td.get(("next", *K.observation)).mul_(unit)
        said.append(told(taught(memory(spec), td), td)["reward"])
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)


def test_a_batch_is_rewarded_before_it_is_learnt_from() -> None:
    operator, td = memory(task()), steps(task(), 20)
    operator.write(td)
    assert torch.equal(told(operator, td)["reward"], td.get(K.learn_reward))  # nothing is known of any state yet
    operator.learn()
    before = told(operator, td)
    assert (before["bonus"] != 0).all()
    operator.write(steps(task(), 20, 5))
    assert operator.model.learnt.item() == 4  # a write alone teaches nothing


# --------------------------------------------------------------------------------------------------------- whose state


@pytest.mark.parametrize("scope", SCOPES)
def test_each_agents_bonus_is_its_own_banks(scope: str) -> None:
    """An agent alone with its bank is told what it is told beside the others."""
    spec = task(3, features=3)
    operator = taught(memory(spec, scope=scope), steps(spec, 30), steps(spec, 30, 7))
    td = steps(spec, 10, 3)
    said = told(operator, td)
    assert (said["bonus"] != 0).all()
    for agent in range(3):
        other = td.clone()
        for name in (K.observation, (K.state,)):
            x = other.get(("next", *name))
            (x[:, agent] if x.ndim == 3 else x[:, 3 * agent : 3 * agent + 3]).add_(1.0)
        changed = (told(operator, other)["bonus"] != said["bonus"]).any(0).tolist()
        assert changed == [True] * 3 if scope == "centralized" else changed == [i == agent for i in range(3)]
    if scope == "centralized":
        assert (said["bonus"] == said["bonus"][:, :1]).all()


def test_banks_learn_as_if_they_were_alone() -> None:
    """``per_agent``: what one agent sees does not move another's autoencoder."""
    spec, states = task(2, features=3), []
    for other in (0.0, 5.0):
        td = steps(spec, 30)
        td.get(("next", *K.observation))[:, 1].add_(other * normal(30, 3, seed=8))
        operator = taught(memory(spec, scope="per_agent"), td, td)
        states.append([p.detach().clone() for p in operator.parameters()])
    for p, q in zip(*states, strict=True):
        assert torch.equal(p[0], q[0])
        assert not torch.equal(p[1], q[1]) or not p.any()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_dead_and_terminal_states_are_worth_nothing(scope: str) -> None:
    spec = task(3, features=3)
    operator = taught(memory(spec, scope=scope), steps(spec, 30))
    td = steps(spec, 4)
    td.get(K.alive)[0, 0] = False
    td.get(("next", *K.alive))[1, 1] = False  # dies
    td.get(("next", *K.alive))[2] = False  # the episode terminates
    paid = told(operator, td)["bonus"] != 0
    assert paid.tolist() == [[False, True, True], [True, False, True], [False] * 3, [True] * 3]
    written = len(operator)
    operator.write(td)
    assert len(operator) == min(
        written + (3 if scope == "centralized" else 7), operator.model.recent.size * operator.scope.banks
    )


def test_a_common_reward_of_the_state_counts_for_the_dead() -> None:
    spec = replace(task(3, features=3, state=4), common_reward=True)
    operator = taught(memory(spec, scope="centralized"), steps(spec, 30))
    td = steps(spec, 3)
    td.get(("next", *K.alive))[0, 0] = False
    td.get(("next", *K.alive))[1] = False
    said = told(operator, td)
    assert (said["bonus"] != 0).tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert (said["reward"] == said["reward"][:, :1]).all()
    assert operator.metrics(operator(td.clone()))["used"] == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_is_no_dimension_of_the_error(scope: str) -> None:
    """Agents of 4 and 2 features: an autoencoder that draws 0 everywhere errs by the mean square of what is real."""
    spec = task(2, features=(4, 2), actions=(2, 1))
    operator = taught(memory(spec, scope=scope), steps(spec, 30))
    for p in operator.parameters():
        p.data.zero_()
    td = steps(spec, 5)
    td.get(("next", *K.observation))[:, 1, 2:] = 77.0
    td.get(("next", K.state)).copy_(td.get(("next", *K.observation)).flatten(1))
    moments, x = normaliser(operator), td.get(("next", *K.observation)).clone()
    if scope == "centralized":
        s = moments.normalise(x.flatten(1)).view(5, 2, 4)
        expected = (s[:, 0].square().sum(-1) + s[:, 1, :2].square().sum(-1)) / 6
        expected = expected.unsqueeze(1).expand(5, 2)
    else:
        s = moments.normalise(x)
        expected = torch.stack([s[:, 0].square().mean(-1), s[:, 1, :2].square().mean(-1)], 1)
    torch.testing.assert_close(told(operator, td)["coarse"], expected)


def test_absent_agents_are_no_dimension_of_a_state_of_observations() -> None:
    """The team's state has their zeros in it: they enter neither the scales nor the error."""
    spec = task(2, features=2)
    operator, td = memory(spec, scope="centralized"), steps(spec, 60)
    td.get(("next", *K.observation)).add_(100.0)
    td.get(("next", *K.alive))[20:, 1] = False
    td.get(("next", K.state)).copy_(td.get(("next", *K.observation)).flatten(1))
    taught(operator, td)
    moments, x = normaliser(operator), td.get(("next", K.state)).double()
    mean = torch.cat([x[:, :2].mean(0), x[:20, 2:].mean(0)])
    torch.testing.assert_close(moments.mean[0], mean)
    torch.testing.assert_close(moments.std[0, 2:], x[:20, 2:].std(0, correction=0))
    for p in operator.parameters():
        p.data.zero_()
    own = moments.normalise(td.get(("next", K.state)))
    expected = torch.cat([own[:20].square().mean(1), own[20:, :2].square().mean(1)])
    torch.testing.assert_close(told(operator, td)["coarse"][:, 0], expected)
    assert operator.learn()["loss/autoencoder"].isfinite()


def test_states_that_are_not_finite_are_refused_and_worth_nothing() -> None:
    operator = taught(memory(task()), steps(task(), 20))
    td = steps(task(), 3)
    td.get(("next", *K.observation))[1, 0, 0] = torch.nan
    said = told(operator, td)
    assert said["reward"].isfinite().all() and (said["bonus"] != 0).flatten().tolist() == [True, False, True]
    operator.write(td)
    assert operator.rejected.item() == 1 and len(operator) == 22
    assert operator.learn()["loss/autoencoder"].isfinite()


@pytest.mark.parametrize("scope", SCOPES)
def test_pictures_are_seen_as_pictures_and_kept_as_bytes(scope: str) -> None:
    spec = replace(task(2, features=2 * 8 * 9), picture=(2, 8, 9))
    td = steps(spec, 12)
    for prefix in ((), ("next",)):
        x = torch.randint(0, 256, (12, 2, 144), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        td.set((*prefix, *K.observation), x)
        td.set((*prefix, K.state), x.flatten(1))
    operator = taught(memory(spec, scope=scope), td)
    assert operator.model.recent.rows.dtype == torch.uint8 and operator.model.autoencoder.eye is not None
    channels = operator.model.autoencoder.eye.sizes[0][0]
    assert channels == (4 if scope == "centralized" else 2)
    said = told(operator, td)
    assert (said["bonus"] != 0).all()
    td.get(("next", *K.alive))[0, 0] = False
    assert (told(operator, td)["bonus"][0] != 0).tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------------- the rest


def test_adams_numbers_count_as_bytes() -> None:
    operator = memory(task())
    parameters = sum(p.numel() for p in operator.parameters())
    states = 60 * 2
    assert operator.bytes >= 4 * (3 * parameters + states)
    assert operator.bytes == taught(operator, steps(task(), 30)).bytes
    assert operator.payloads == (30, 60)


def test_what_is_forgotten_is_learnt_anew_alike() -> None:
    td = steps(task(), 30)
    fresh, used = memory(task()), taught(memory(task()), td, td)
    used.clear()
    used.model.generator.manual_seed(used.model.seed)
    for operator in (fresh, used):
        taught(operator, td)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), used.parameters(), strict=True))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"latent": 1}, "latent=1 must be at least 2"),
    ({"fine_sign": 0}, r"fine_sign=0 must be 1 .* or -1"),
    ({"combine": "max"}, "combine='max' must be one of add, mul"),
    ({"eta": -0.1}, "eta=-0.1 must not be negative"),
    ({"eta_final": -1}, "eta_final=-1 must not be negative"),
    ({"zeta": -1}, "zeta=-1 must not be negative"),
    ({"sparsity": -1}, "sparsity=-1 must not be negative"),
    ({"lr": 0}, "lr=0 must be positive"),
    ({"capacity": 0}, "capacity=0 must be positive"),
    ({"batches": 0}, "batches=0 must be positive"),
    ({"batch_size": 0}, "batch_size=0 must be positive"),
    ({"hidden": (8, 0)}, r"^hidden=\[8, 0\] must hold positive widths"),
    ({"capacity": 1}, "capacity=1 .*leaves no row in a bank"),
    ({"strength": 2}, r"strength=2 must lie in \[0, 1\]"),
    ({"scope": "everybody"}, "scope='everybody' must be one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_input(options: dict[str, Any], message: str) -> None:
    make: Callable[[], Any] = lambda: memory(task(2), **{"scope": "per_agent", **options})  # noqa: E731
    with pytest.raises(ValueError, match=message):
        make()
