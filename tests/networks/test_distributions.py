"""Action distributions against torch.distributions, quadrature and what they draw."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Generator, Tensor
from torch.distributions import AffineTransform, Categorical, Normal, TanhTransform, TransformedDistribution

from marl_memory.networks import distributions
from marl_memory.networks.distributions import Box, Distribution, MaskedCategorical, TanhNormal


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def random_masked(rows: int = 50, actions: int = 6) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(rows, 2, actions, generator=seeded(1), dtype=torch.float64)
    mask = torch.rand(rows, 2, actions, generator=seeded(2)) < 0.5
    mask[..., 3] = True
    return logits, mask


def test_categorical_is_torchs_with_infinite_logits() -> None:
    logits, mask = random_masked()
    found, torchs = MaskedCategorical(logits, mask), Categorical(logits=logits.masked_fill(~mask, -torch.inf))
    action = found.sample(seeded())[0]
    assert mask.gather(-1, action.unsqueeze(-1)).all()
    torch.testing.assert_close(found.log_prob(action), torchs.log_prob(action))
    torch.testing.assert_close(found.entropy(seeded()), torchs.entropy())
    assert torch.equal(found.mode, torchs.probs.argmax(-1))


def test_categorical_gradients_are_torchs() -> None:
    logits, mask = random_masked()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, torchs = MaskedCategorical(ours, mask), Categorical(logits=theirs.masked_fill(~mask, -torch.inf))
    action = found.mode
    (found.log_prob(action) + found.entropy(seeded())).sum().backward()
    (torchs.log_prob(action) + torchs.entropy()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture(params=[0, 10**9], ids=["by inversion", "by a race"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Categoricals of any size draw in one way."""
    monkeypatch.setattr(distributions, "FEW", request.param)


@pytest.mark.usefixtures("either_way")
def test_categorical_draws_with_the_right_frequencies() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    mask = torch.tensor([True, True, True, False, True])
    draws = 20_000
    distribution = MaskedCategorical(logits.expand(draws, 1, 5), mask.expand(draws, 1, 5))
    counts = torch.bincount(distribution.sample(seeded(5))[0].flatten(), minlength=5)
    probs = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)
    kept = mask.nonzero().squeeze(-1)
    expected = probs[kept].double()
    assert counts[3] == 0
    assert chisquare(counts[kept].numpy(), (expected / expected.sum() * draws).numpy()).pvalue > 1e-3


@pytest.mark.usefixtures("either_way")
def test_categorical_never_draws_a_forbidden_action() -> None:
    shape = (100_000, 1, 4)
    logits = torch.tensor([50.0, -60.0, 30.0, -80.0]).expand(shape)  # the forbidden ones would be sure
    mask = torch.tensor([False, True, False, True]).expand(shape)
    action = MaskedCategorical(logits, mask).sample(seeded())[0]
    assert set(action.unique().tolist()) <= {1, 3}


def test_a_clock_of_zero_does_not_ring_for_a_forbidden_action(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator: self.zero_())
    mask = torch.tensor([False, True, False, True]).expand(10, 1, 4)
    action = MaskedCategorical(torch.zeros(10, 1, 4), mask).sample(seeded())[0]
    assert set(action.unique().tolist()) <= {1, 3}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("make", [lambda: MaskedCategorical(*random_masked()), lambda: squashed()])
def test_a_sample_comes_with_its_log_probability(make: Callable[[], Distribution]) -> None:
    distribution = make()
    action, log_prob = distribution.sample(seeded())
    torch.testing.assert_close(log_prob, distribution.log_prob(action))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_with_one_allowed_action(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[1e4, -3.0, 5.0]]], dtype=dtype, requires_grad=True)
    distribution = MaskedCategorical(logits, torch.tensor([[[False, True, False]]]))
    action = distribution.sample(seeded())[0]
    log_prob, entropy = distribution.log_prob(action), distribution.entropy(seeded())
    (log_prob + entropy).sum().backward()
    assert (action.item(), distribution.mode.item(), log_prob.item(), entropy.item()) == (1, 1, 0.0, 0.0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# ------------------------------------------------------------------------------------------------------- tanh-normal

LOW, HIGH = torch.tensor([[-1.0, 0.5], [-3.0, -2.0]]).double(), torch.tensor([[1.0, 2.5], [3.0, 0.0]]).double()


def squashed(rows: int = 40, valid: Tensor | None = None) -> TanhNormal:
    loc = torch.randn(rows, 2, 2, generator=seeded(3), dtype=torch.float64)
    scale = torch.rand(rows, 2, 2, generator=seeded(4), dtype=torch.float64) + 0.3
    return TanhNormal(loc, scale.log(), Box(LOW, HIGH, torch.ones(2, 2, dtype=torch.bool) if valid is None else valid))


def torchs(distribution: TanhNormal) -> TransformedDistribution:
    affine = AffineTransform((HIGH + LOW) / 2, (HIGH - LOW) / 2)
    normal = Normal(distribution.loc, distribution.scale)
    return TransformedDistribution(normal, [TanhTransform(), affine], validate_args=False)


def test_tanh_normal_is_torchs() -> None:
    distribution = squashed()
    action = distribution.sample(seeded())[0]
    assert ((action >= LOW) & (action <= HIGH)).all()
    torch.testing.assert_close(distribution.log_prob(action), torchs(distribution).log_prob(action).sum(-1))
    expected_mode = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * distribution.loc.tanh()
    torch.testing.assert_close(distribution.mode, expected_mode)


def test_tanh_normal_draws_its_own_density() -> None:
    # The median of a squashed Gaussian is its squashed mean; so are the other quantiles.
    shape = (50_000, 1, 1)
    loc, scale = torch.full(shape, 0.4), torch.full(shape, 0.7)
    bound = torch.ones(1, 1)
    action = TanhNormal(loc, scale.log(), Box(-bound, bound, bound.bool())).sample(seeded())[0].flatten()
    z = Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9]))
    shares = (action.unsqueeze(-1) < torch.tanh(0.4 + 0.7 * z)).float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.5, 0.9]), atol=0.01, rtol=0)


def test_tanh_normal_integrates_to_one_and_its_entropy_estimate_is_right() -> None:
    low, high = torch.tensor([[-1.0]]).double(), torch.tensor([[3.0]]).double()
    grid = torch.linspace(-1, 3, 200_003, dtype=torch.float64)[1:-1]
    width, rows = 4 / 200_002, len(grid)
    loc, scale = torch.full((rows, 1, 1), 0.3).double(), torch.full((rows, 1, 1), 0.6).double()
    distribution = TanhNormal(loc, scale.log(), Box(low, high, torch.ones(1, 1, dtype=torch.bool)))
    density = distribution.log_prob(grid.reshape(-1, 1, 1)).squeeze(-1).exp()
    assert (density.sum() * width).item() == pytest.approx(1, abs=1e-4)
    by_quadrature = -(density * density.log().nan_to_num(neginf=0.0)).sum() * width
    assert distribution.entropy(seeded()).mean().item() == pytest.approx(by_quadrature.item(), abs=0.01)


def test_tanh_normal_ignores_padding() -> None:
    valid = torch.tensor([[True, True], [True, False]])
    distribution, action = squashed(valid=valid), squashed().sample(seeded())[0]
    expected = torch.where(valid, torchs(distribution).log_prob(action), 0.0).sum(-1)
    torch.testing.assert_close(distribution.log_prob(action), expected)
    action[:, 1, 1] = 0.123
    torch.testing.assert_close(distribution.log_prob(action), expected)


def test_tanh_normal_padded_with_empty_bounds_has_finite_values_and_gradients() -> None:
    # Environments pad unequal agents' bounds with low = high = 0.
    valid = torch.tensor([[True, True], [True, False]])
    loc = torch.zeros(3, 2, 2, requires_grad=True)
    log_std = torch.zeros(2, 2, requires_grad=True)
    low, high = torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    distribution = TanhNormal(loc, log_std, Box(low, high, valid))
    action = distribution.sample(seeded())[0].detach()
    value = distribution.log_prob(action) + distribution.entropy(seeded())
    value.sum().backward()
    assert value.isfinite().all()
    assert (action[:, 1, 1] == 0).all()
    assert loc.grad.isfinite().all()
    assert log_std.grad.isfinite().all()
    assert (loc.grad[:, 1, 1] == 0).all()


def test_tanh_normal_on_the_bounds_is_finite() -> None:
    shape = (2, 1, 1)
    loc = torch.tensor([50.0, -50.0]).reshape(shape).requires_grad_()
    bound = torch.full((1, 1), 2.0)
    distribution = TanhNormal(loc, torch.zeros(shape), Box(-bound, bound, torch.ones(1, 1, dtype=torch.bool)))
    action = distribution.sample(seeded())[0]
    assert (action.abs() <= 2).all()
    log_prob = distribution.log_prob(torch.tensor([2.0, -2.0]).reshape(shape))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert loc.grad.isfinite().all()


def test_the_generator_alone_decides_the_draws() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    categorical = MaskedCategorical(*random_masked())
    for draw in (
        lambda generator: squashed().sample(generator)[0],
        squashed().entropy,
        lambda generator: categorical.sample(generator)[1],
    ):
        assert torch.equal(draw(seeded(7)), draw(seeded(7)))
        assert not torch.equal(draw(seeded(7)), draw(seeded(8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_entropy_estimate_is_reparameterised() -> None:
    log_std = torch.zeros(1, requires_grad=True)
    bound = torch.full((1, 1), 1e3)  # wide and near the middle: the squashing is almost linear, H = log σ + const
    loc = torch.zeros(20_000, 1, 1)
    distribution = TanhNormal(loc, log_std + math.log(1e-3), Box(-bound, bound, torch.ones(1, 1).bool()))
    entropy = distribution.entropy(seeded()).mean()
    entropy.backward()
    assert entropy.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.02)
    assert log_std.grad.item() == pytest.approx(1.0, abs=0.02)
