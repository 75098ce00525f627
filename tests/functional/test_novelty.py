"""Novelty: by hand, and by property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marl_memory.functional.novelty import (
    autoencoder_loss,
    fine_novelty,
    hoyer,
    intrinsic_reward,
    reconstruction_error,
)

codes = st.lists(st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=40).map(
    torch.tensor
)


def test_sparsity_by_hand() -> None:
    """n = 4: (2 − ‖z‖₁/‖z‖₂) / 1."""
    code = torch.tensor([[0.0, -3, 0, 0], [1, 1, -1, 1], [3, 4, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    expected = torch.tensor([1.0, 0.0, 2 - 7 / 5, 2 - math.sqrt(2), 1.0])
    torch.testing.assert_close(hoyer(code), expected)
    torch.testing.assert_close(fine_novelty(code, sign=1), 1 - expected)
    torch.testing.assert_close(fine_novelty(code, sign=-1), expected)


@given(codes, st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_sparsity_lies_in_0_to_1_and_knows_neither_scale_nor_sign_nor_order(z: Tensor, scale: float, rng) -> None:  # type: ignore[no-untyped-def]
    value = hoyer(z)
    assert 0 <= value <= 1
    order = list(range(len(z)))
    rng.shuffle(order)
    signs = torch.tensor([rng.choice([-1.0, 1.0]) for _ in order])
    torch.testing.assert_close(hoyer(scale * signs * z[order]), value, atol=1e-4, rtol=0)


@given(codes)
def test_sparsity_is_hoyers_formula(z: Tensor) -> None:
    if not bool(z.any()):
        return
    root, z = math.sqrt(len(z)), z.double()
    expected = (root - z.abs().sum() / z.norm()) / (root - 1)
    torch.testing.assert_close(hoyer(z), expected.clamp(0, 1), atol=1e-6, rtol=0)


@given(codes)
def test_moving_mass_to_one_entry_makes_a_code_sparser(z: Tensor) -> None:
    """Pigou and Dalton: what is taken from the smallest and given to the largest makes the code less equal."""
    size = z.abs().sort().values
    moved = size.clone()
    step = 0.5 * size[0]
    moved[0] -= step
    moved[-1] += step
    assert hoyer(moved) >= hoyer(size) - 1e-5


def test_tiny_and_huge_codes_have_a_sparsity_too() -> None:
    code = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [3, 4, 0, 0]])
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(hoyer(scale * code), hoyer(code))


def test_errors_are_means_over_what_is_no_padding() -> None:
    s, y = torch.tensor([[1.0, 2, 9], [0, 0, 9]]), torch.tensor([[0.0, 4, 0], [1, 0, 0]])
    valid = torch.tensor([True, True, False])
    assert reconstruction_error(s, y, valid).tolist() == [2.5, 0.5]
    assert reconstruction_error(s[:, :2], y[:, :2]).tolist() == [2.5, 0.5]
    y[:, 2] = torch.nan
    assert reconstruction_error(s, y, valid).tolist() == [2.5, 0.5]


def test_padding_has_no_gradient() -> None:
    y = torch.tensor([[0.0, 4, torch.nan]], requires_grad=True)
    reconstruction_error(torch.ones(1, 3), y, torch.tensor([True, True, False])).sum().backward()
    assert y.grad is not None and y.grad.tolist() == [[-1.0, 3.0, 0.0]]


def test_the_loss_by_hand() -> None:
    """0.5 + 0.1 · (|1| + |−3|) / 2."""
    code = torch.tensor([[1.0, -3.0]])
    assert autoencoder_loss(torch.tensor([0.5]), code, sparsity=0.1).item() == pytest.approx(0.7)


def test_the_reward_by_hand() -> None:
    """r_c = 3 at σ 2, r_f = 0.2 at σ 0.1, ζ = 0.5: 1.5 + 1, and 1.5 · (1 + 1); around 0.3 1.5 − 0.5, and 1.5 · 0.5."""
    coarse, fine, scales = torch.tensor([3.0]), torch.tensor([0.2]), torch.tensor([2.0, 0.1])
    for level, added, multiplied in ((0.0, 2.5, 3.0), (0.3, 1.0, 0.75), (0.6, -0.5, 0.0)):
        for combine, expected in (("add", added), ("mul", multiplied)):
            reward = intrinsic_reward(coarse, fine, scales, level, zeta=0.5, combine=combine)
            assert reward.item() == pytest.approx(expected, abs=1e-6)
            # without the fine term both are the coarse one
            assert intrinsic_reward(coarse, fine, scales, level, zeta=0, combine=combine).item() == pytest.approx(1.5)


@given(st.floats(0, 1e3), st.floats(0, 1), st.floats(1e-3, 1e2), st.floats(1e-3, 1), st.floats(0, 10), st.floats(0, 1))
def test_the_reward_grows_with_both(c: float, f: float, a: float, b: float, zeta: float, level: float) -> None:
    scales = torch.tensor([a, b])
    for combine in ("add", "mul"):

        def at(c: float, f: float, how: str = combine, level: float = level) -> Tensor:
            return intrinsic_reward(torch.tensor(c), torch.tensor(f), scales, level, zeta=zeta, combine=how)

        assert at(c + 1, f) >= at(c, f) and at(c, f + 0.1) >= at(c, f)
        assert at(c, f, level=0.0) >= 0
        assert combine == "add" or at(c, f) >= 0
