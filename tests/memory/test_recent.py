"""The newest states of each bank, beside a plain list."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from marl_memory.memory.recent import RecentRows

writes = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9), max_size=6)


@given(writes, st.integers(1, 7))
def test_the_newest_stay(batches: list[list[tuple[bool, bool]]], size: int) -> None:
    ring, kept, count = RecentRows(2, 1, size=size), ([], []), 0
    for batch in batches:
        live = torch.tensor(batch, dtype=torch.bool).reshape(-1, 2).T
        rows = torch.arange(2 * len(batch), dtype=torch.float32).view(2, -1, 1) + count
        count += 2 * len(batch)
        ring.write(rows, live)
        for bank in range(2):
            kept[bank].extend(rows[bank, live[bank], 0].tolist())
    assert ring.held.tolist() == [min(len(bank), size) for bank in kept]
    for bank in range(2):
        assert sorted(ring.rows[bank, : ring.held[bank], 0].tolist()) == sorted(kept[bank][-size:])


def test_every_row_that_is_held_is_drawn_alike() -> None:
    ring, generator = RecentRows(3, 2, size=8), Generator().manual_seed(0)
    rows = torch.arange(1.0, 13.0).view(1, 12, 1).expand(3, -1, 2)
    live = torch.zeros(3, 12, dtype=torch.bool)
    live[0], live[1, :3] = True, True
    ring.write(rows, live)
    drawn = ring.draw(20_000, generator)
    assert drawn.shape == (3, 20_000, 2)
    for bank, expected in ((0, range(5, 13)), (1, range(1, 4))):
        values, counts = drawn[bank, :, 0].unique(return_counts=True)
        assert values.tolist() == list(expected)
        assert (counts / 20_000 * len(values) - 1).abs().max() < 0.1
    assert not drawn[2].any()


def test_bytes_stay_bytes() -> None:
    ring = RecentRows(1, 4, size=2, dtype=torch.uint8)
    ring.write(torch.full((1, 1, 4), 255, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.bool))
    assert ring.draw(1, Generator().manual_seed(0)).dtype == torch.uint8
    assert ring.rows.element_size() == 1 and ring.rows[0, 0].tolist() == [255] * 4
