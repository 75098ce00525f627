"""Where coarse and fine novelty see differences: in the dark chamber, and over the map of four rooms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator

from benchmarks.novelty import dark_chamber, four_rooms, learner
from marl_memory.memory.novelty import StateNovelty

SMALL: dict[str, Any] = {"hidden": (64,), "latent": 32, "lr": 3e-4, "batch_size": 64, "collections": 4}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_fine_novelty_tells_dark_pictures_apart_that_coarse_novelty_does_not(seed: int) -> None:
    """Neighbouring cells differ by 8 of 324 pixels, hardly brighter; noise is an eighth of that."""
    coarse, fine = dark_chamber(seed, pictures=True, **SMALL)
    assert (coarse > 1).float().mean() < 0.2
    assert (fine > 1).float().mean() > 0.35
    assert fine.median() > 2 * coarse.median()


def test_coarse_novelty_tells_vectors_apart_by_itself() -> None:
    """Normalised, the pixels of a cell are as loud as all the others: the fine term adds nothing there."""
    coarse, fine = dark_chamber(0, pictures=False, **SMALL)
    assert (coarse > 1).float().mean() > (fine > 1).float().mean()


def test_rooms_that_were_not_seen_are_new() -> None:
    coarse, _, seen = four_rooms(0, collections=4)
    old, new = coarse[seen == 1], coarse[seen == 0]
    assert new.min() > old.max()


def test_pictures_stay_bytes_and_are_drawn_in_shares_of_the_brightest() -> None:
    model = learner(64, 0, picture=(1, 8, 8), hidden=(8,), latent=4, size=16)
    states = torch.randint(0, 256, (1, 16, 64), generator=Generator().manual_seed(0)).to(torch.uint8)
    model.write(states, torch.ones(1, 16, dtype=torch.bool))
    assert model.recent.rows.dtype == torch.uint8 and model.moments is None
    torch.testing.assert_close(model.normalised(states), states.float() / 255)
    before = model.of(states).coarse.mean()
    model.learn(50, 16)
    assert model.of(states).coarse.mean() < before


def test_many_states_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner(5, 0, hidden=(8,), latent=4, size=16)
    states = torch.randn(1, 50, 5, generator=Generator().manual_seed(0))
    whole = model.of(states)
    monkeypatch.setattr("marl_memory.memory.novelty.TOGETHER", 7)
    for a, b in zip(whole, model.of(states), strict=True):
        torch.testing.assert_close(a, b)


def test_a_picture_has_no_normaliser_in_its_state() -> None:
    def names(model: StateNovelty) -> set[str]:
        return {name.partition(".")[0] for name in model.state_dict()}

    small = {"hidden": (8,), "latent": 4, "size": 4}
    assert names(learner(64, 0, **small)) - names(learner(64, 0, picture=(1, 8, 8), **small)) == {"moments"}
