"""The density of a mixture, truncated ratios, and the advantages that they correct."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from marl_memory.functional.mixture import mixture_log_prob, truncated_ratio
from marl_memory.functional.returns import gae

log_probs = st.floats(-30.0, 3.0)


@given(st.floats(0.0, 1.0), log_probs, log_probs)
def test_the_mixtures_density_is_the_weighted_sum(weight: float, p: float, q: float) -> None:
    found = mixture_log_prob(*(torch.tensor(x, dtype=torch.float64) for x in (weight, p, q))).item()
    assert found == pytest.approx(math.log(weight * math.exp(p) + (1 - weight) * math.exp(q)), abs=1e-9)


def test_a_mixture_of_one_is_exactly_that_one() -> None:
    weight, p, q = (
        torch.tensor([0.0, 1.0, 0.0]),
        torch.tensor([-0.3, -0.7, -math.inf]),
        torch.tensor([-1.1, -math.inf, -2]),
    )
    assert torch.equal(mixture_log_prob(weight, p, q), torch.tensor([-1.1, -0.7, -2.0]))


def test_ratios_by_hand() -> None:
    taken = torch.tensor([True, True, False, False])
    target, behaviour = torch.tensor([0.2, 0.6, 0.1, math.nan]).log(), torch.tensor([0.8, 0.3, 0.9, 0.0]).log()
    torch.testing.assert_close(truncated_ratio(taken, target, behaviour), torch.tensor([0.25, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_corrected_advantages_are_those_of_a_plain_loop(lam: float) -> None:
    g, (t, n) = Generator().manual_seed(3), (17, 5)
    reward, value, following = (torch.randn(t, n, generator=g, dtype=torch.float64) for _ in range(3))
    discount = (torch.rand(t, n, generator=g) < 0.9).double()
    cut = (torch.rand(t, n, generator=g) < 0.2) | (discount == 0)
    ratio = torch.where(torch.rand(t, n, generator=g) < 0.5, torch.rand(t, n, generator=g), 1.0).double()
    found = gae(reward, value, following, discount, cut, gamma=0.9, lam=lam, ratio=ratio)
    for j in range(n):
        after = 0.0
        for i in reversed(range(t)):
            delta = reward[i, j] + 0.9 * discount[i, j] * following[i, j] - value[i, j]
            after = float(ratio[i, j] * (delta + (0.0 if cut[i, j] else 0.9 * lam * after)))
            assert found[i, j].item() == pytest.approx(after, abs=1e-12)


def test_ratios_of_1_are_plain_advantages_to_the_bit() -> None:
    g = Generator().manual_seed(4)
    reward, value, following = (torch.randn(40, 6, generator=g) for _ in range(3))
    cut = torch.rand(40, 6, generator=g) < 0.1
    plain, ones = (
        gae(reward, value, following, (~cut).float(), cut, gamma=0.99, lam=0.95, ratio=ratio)
        for ratio in (None, torch.ones(40, 6))
    )
    assert torch.equal(plain, ones)
