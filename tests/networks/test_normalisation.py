"""Running statistics against the reference's formulas and against NumPy over everything seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from marl_memory.networks.actor import AgentInput
from marl_memory.networks.normalisation import RunningMoments, ValueNorm
from marl_memory.spec import TaskSpec


def batches(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = Generator().manual_seed(0)
    return [
        (
            torch.randn(shape, generator=generator) * (i + 1) + 10 * i,
            torch.rand(shape[:2], generator=generator) < 0.7,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("decay", [0.9, 0.99999])
def test_value_norm_is_the_references(decay: float) -> None:
    norm = ValueNorm(decay)
    mean = mean_sq = debias = 0.0
    for target, mask in batches(6, 20, 3):
        norm.update(target, mask)
        kept = target.numpy().astype(np.float64)[mask.numpy()]
        mean = decay * mean + (1 - decay) * kept.mean()
        mean_sq = decay * mean_sq + (1 - decay) * (kept**2).mean()
        debias = decay * debias + (1 - decay)
        expected_mean = mean / debias
        expected_var = max(mean_sq / debias - expected_mean**2, 1e-2)
        assert norm.moments() == pytest.approx((expected_mean, expected_var**0.5), rel=1e-6)
        normalised = (target.numpy() - expected_mean) / expected_var**0.5
        np.testing.assert_allclose(norm.normalise(target).numpy(), normalised, rtol=1e-4, atol=1e-5)


def test_value_norm_has_a_floor_under_the_variance() -> None:
    norm = ValueNorm()
    norm.update(torch.full((5,), 3.0), torch.ones(5, dtype=torch.bool))
    assert norm.moments() == pytest.approx((3.0, 0.1), rel=1e-6)


def test_value_norm_there_and_back_is_the_identity() -> None:
    norm = ValueNorm(0.9)
    for target, mask in batches(3, 20, 3):
        norm.update(target, mask)
    x = torch.linspace(-100, 100, 41, dtype=torch.float64)
    torch.testing.assert_close(norm.denormalise(norm.normalise(x)), x)
    torch.testing.assert_close(norm.normalise(norm.denormalise(x)), x)


def test_value_norm_before_anything_was_seen_is_the_identity() -> None:
    norm, x = ValueNorm(), torch.randn(4)
    norm.update(x, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(norm.normalise(x), x)
    assert torch.equal(norm.denormalise(x), x)


def test_value_norm_looks_at_its_mask_only() -> None:
    target, mask = torch.tensor([1.0, torch.nan, 3.0, 1e30]), torch.tensor([True, False, True, False])
    norm, clean = ValueNorm(), ValueNorm()
    norm.update(target, mask)
    clean.update(torch.tensor([1.0, 3.0]), torch.ones(2, dtype=torch.bool))
    assert norm.moments() == clean.moments()


@pytest.mark.parametrize("banks", [1, 3])
def test_running_moments_are_those_of_all_rows_seen(banks: int) -> None:
    moments, seen = RunningMoments(banks, 4), []
    for x, mask in batches(5, 30, 3, 4):
        moments.update(x, mask.unsqueeze(-1))
        seen.append((x.double().numpy(), mask.numpy()))
        for bank in range(banks):
            agents = slice(None) if banks == 1 else slice(bank, bank + 1)
            rows = np.concatenate([x[:, agents][mask[:, agents]] for x, mask in seen])
            np.testing.assert_allclose(moments.mean[bank].numpy(), rows.mean(0), rtol=1e-10)
            np.testing.assert_allclose(moments.std[bank].numpy(), rows.std(0), rtol=1e-10)
            assert moments.count[bank].tolist() == [len(rows)] * 4


def test_running_moments_take_any_batch_shape() -> None:
    flat, nested = RunningMoments(2, 3), RunningMoments(2, 3)
    x, mask = torch.randn(24, 2, 3), torch.rand(24, 2) < 0.5
    flat.update(x, mask.unsqueeze(-1))
    nested.update(x.reshape(4, 6, 2, 3), mask.reshape(4, 6, 2, 1))
    assert torch.equal(flat.mean, nested.mean)
    assert torch.equal(flat.m2, nested.m2)
    torch.testing.assert_close(flat.normalise(x).reshape(4, 6, 2, 3), nested.normalise(x.reshape(4, 6, 2, 3)))


def test_running_moments_of_nothing_change_nothing() -> None:
    moments = RunningMoments(2, 3)
    moments.update(torch.full((5, 2, 3), torch.nan), torch.zeros(5, 2, 1, dtype=torch.bool))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(moments.normalise(x), x)
    moments.update(x, torch.tensor([[True], [False]]).expand(5, 2, 1))  # one bank sees something, the other nothing
    before = {name: buffer.clone() for name, buffer in moments.named_buffers()}
    moments.update(torch.full((5, 2, 3), torch.nan), torch.zeros(5, 2, 1, dtype=torch.bool))
    assert all(torch.equal(before[name], buffer) for name, buffer in moments.named_buffers())
    assert torch.equal(moments.std[1], torch.ones(3).double())


def test_running_moments_normalise_and_limit() -> None:
    moments = RunningMoments(1, 2)
    x = torch.randn(1000, 1, 2, generator=Generator().manual_seed(0)) * torch.tensor([2.0, 30.0]) + 7
    moments.update(x, torch.ones(1000, 1, 1, dtype=torch.bool))
    scaled = moments.normalise(x)
    torch.testing.assert_close(scaled.mean((0, 1)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 1), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert moments.normalise(torch.full((1, 1, 2), 1e6)).tolist() == [[[10.0, 10.0]]]
    assert moments.normalise(torch.full((1, 1, 2), -1e6), limit=3).tolist() == [[[-3.0, -3.0]]]


def test_running_moments_of_a_constant_feature_stay_finite() -> None:
    moments = RunningMoments(1, 1)
    x = torch.full((7, 1, 1), 0.1)
    for _ in range(50):
        moments.update(x, torch.ones(7, 1, 1, dtype=torch.bool))
    assert moments.normalise(x).abs().max() < 1
    assert moments.normalise(x + 1).isfinite().all()


def test_padding_enters_no_statistic_and_stays_zero() -> None:
    spec = TaskSpec(
        name="uneven", agents=("a", "b"), observation_sizes=(1, 2), action_sizes=(2, 2), continuous=False,
        state_size=4, own_state=False, common_reward=False,
    )  # fmt: skip
    seen = AgentInput(spec, share_parameters=True, normalise=True)
    x = torch.randn(50, 2, 2, generator=Generator().manual_seed(0)) + 3
    x[:, 0, 1] = 0.0  # the padding of agent a
    seen.update_moments(x, torch.ones(50, 2, dtype=torch.bool))
    assert seen.moments is not None
    torch.testing.assert_close(seen.moments.mean[0, 1], x[:, 1, 1].double().mean())
    features = seen(x)
    assert not features[:, 0, 1].any()
    torch.testing.assert_close(features[:, 1, 1].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
