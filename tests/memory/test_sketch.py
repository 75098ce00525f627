"""The sketch in random Fourier features, against the sums that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from marl_memory.memory.sketch import WARM_UP, FourierSketch
from tests.memory.tasks import normal


def sketch(size: int = 4096, *, banks: int = 1, half_life: float | None = None, payloads: int = 1) -> FourierSketch:
    return FourierSketch(
        banks=banks,
        features=2,
        payloads=payloads,
        payload_size=3,
        size=size,
        neighbours=64,
        half_life=half_life,
        generator=Generator().manual_seed(0),
    )


def warmed(**options: object) -> FourierSketch:
    """After the rows that its scale is taken from, none of which it remembers."""
    memory = sketch(**options)  # type: ignore[arg-type]
    banks, payloads, _, _ = memory.sums.shape
    keys = normal(banks, WARM_UP, 2, seed=1)
    memory.write(keys, torch.ones(banks, WARM_UP, payloads, 3), torch.ones(banks, WARM_UP, payloads, dtype=torch.bool))
    assert len(memory) == 0 and not memory.sums.any()
    return memory


def field(keys: Tensor) -> Tensor:
    """``[G, R, 1, 3]``."""
    return torch.stack([keys.sum(-1), keys[..., 0].sin(), torch.ones_like(keys[..., 0])], -1).unsqueeze(2)


def test_it_reads_the_kernel_regression_of_what_was_written() -> None:
    memory = warmed()
    keys, queries = normal(1, 2000, 2, seed=2), 0.5 * normal(1, 64, 2, seed=3)
    live = torch.ones(1, 2000, 1, dtype=torch.bool)
    for part in range(0, 2000, 500):
        rows = slice(part, part + 500)
        memory.write(keys[:, rows], field(keys[:, rows]), live[:, rows])
    squared = torch.cdist(queries * memory.scale, keys * memory.scale).square()
    kernel = torch.exp(-squared / 2)
    exact = (kernel.unsqueeze(-1) * field(keys).squeeze(2).unsqueeze(1)).sum(2) / kernel.sum(-1, keepdim=True)
    mean, mass = memory.read(queries)
    assert len(memory) == 2000
    noise = 2000 * math.sqrt(2 / memory.size)  # of all mass, the docstring says
    assert (mass.squeeze(-1) - kernel.sum(-1)).abs().max() < noise
    near = kernel.sum(-1) > 4 * noise
    assert near.sum() > 10
    assert (mean.squeeze(2) - exact).abs()[near].max() < 0.35
    assert (mean.squeeze(2) - exact).abs()[near].mean() < 0.08


def test_far_away_there_is_nothing() -> None:
    memory = warmed()
    keys = normal(1, 500, 2, seed=2)
    memory.write(keys, field(keys), torch.ones(1, 500, 1, dtype=torch.bool))
    mean, mass = memory.read(torch.full((1, 4, 2), 100.0) + normal(1, 4, 2, seed=4))
    assert not mass.any() and not mean.any()


def test_rows_fade_by_half_in_a_half_life() -> None:
    memory, keys = warmed(half_life=1000.0), normal(1, 500, 2, seed=2)
    memory.write(keys, field(keys), torch.ones(1, 500, 1, dtype=torch.bool))
    before = memory.masses.clone()
    memory.now.fill_(1000)
    nobody = torch.zeros(1, 1, 1, dtype=torch.bool)
    memory.write(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 3), nobody)
    torch.testing.assert_close(memory.masses, before / 2)
    memory.write(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 3), nobody)
    torch.testing.assert_close(memory.masses, before / 2)


def test_the_dead_and_what_is_not_finite_enter_no_sum() -> None:
    memory, other = warmed(payloads=2), warmed(payloads=2)
    keys, payload = normal(1, 40, 2, seed=5), normal(1, 40, 2, 3, seed=6)
    live = torch.ones(1, 40, 2, dtype=torch.bool)
    live[:, :10, 1] = False
    payload[:, :10, 1] = torch.nan  # of the dead: nobody looks at it
    other.write(keys[:, :30], payload[:, :30].nan_to_num(), live[:, :30])
    payload[:, 30:35, 0, 0] = torch.inf
    keys[:, 35:] = torch.nan
    memory.write(keys, payload, live)
    assert memory.rejected.tolist() == [10]
    torch.testing.assert_close(memory.masses, other.masses)
    torch.testing.assert_close(memory.sums, other.sums)


def test_the_scale_is_that_of_the_first_rows_and_stays() -> None:
    memory, keys = warmed(), normal(1, WARM_UP, 2, seed=1)
    std = keys[0].std(0, correction=0)
    distances = torch.cdist(keys[0] / std, keys[0] / std)
    distances.fill_diagonal_(torch.inf)
    bandwidth = distances.sort(-1).values[:, 63].median()
    torch.testing.assert_close(memory.scale[0], 1 / (std * bandwidth))
    scale = memory.scale.clone()
    far = 50 * normal(1, 300, 2, seed=9)
    memory.write(far, field(far), torch.ones(1, 300, 1, dtype=torch.bool))
    assert torch.equal(memory.scale, scale)


def test_banks_warm_up_each_in_its_own_time() -> None:
    memory = sketch(64, banks=2)
    keys = normal(2, WARM_UP, 2, seed=1)
    live = torch.ones(2, WARM_UP, 1, dtype=torch.bool)
    live[1, 500:] = False
    memory.write(keys, torch.ones(2, WARM_UP, 1, 3), live)
    assert memory.scale[0].all() and not memory.scale[1].any()
    memory.write(keys, torch.ones(2, WARM_UP, 1, 3), torch.ones_like(live))
    assert memory.held.tolist() == [WARM_UP, 500]
    assert memory.scale[1].all()


@pytest.mark.parametrize("forget", [True, False])
def test_its_state_is_all_it_knows(forget: bool) -> None:
    memory, other = warmed(), sketch()
    keys = normal(1, 100, 2, seed=2)
    memory.write(keys, field(keys), torch.ones(1, 100, 1, dtype=torch.bool))
    if forget:
        memory.clear()
        assert len(memory) == 0 and not memory.read(keys)[1].any()
        return
    other.load_state_dict(memory.state_dict())
    for one, two in zip(memory.read(keys), other.read(keys), strict=True):
        assert torch.equal(one, two)
