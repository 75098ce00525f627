"""How a store's rows are searched: all of them, or those of a few lists."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.neighbours import InvertedLists, assign, fit_centroids, invert, nearest_listed

SEARCHES = ("exact", "lists")

ROWS_PER_LIST = 64
"""Many small lists find more for the rows looked at than few large ones."""

PIECE_ROWS = 8
"""See `InvertedLists`."""


class Lists(nn.Module):
    """An inverted-file index over G banks of N rows, for banks too large to search through.

    Rows are put into the list of their nearest centroid when they are written; the lists themselves are made anew after
    a share of the bank was written, so that a row is found a little after it was.  Of a row that was overwritten since,
    the place is found where its old key lay; its distance is that of its present key.  Everything is a buffer: what is
    found does not depend on when a run was interrupted.

    Args:
        banks, rows, features: G, N, F.
        probes: how many lists are looked at for a query.
        generator: where the first centroids are drawn from.

    Raises:
        ValueError: for banks too small to be worth it.
    """

    def __init__(self, banks: int, rows: int, features: int, *, probes: int, generator: Generator) -> None:
        super().__init__()
        self.lists = rows // ROWS_PER_LIST
        if self.lists < probes:
            raise ValueError(
                f"search='lists' with banks of {rows} rows would look at all of their {self.lists} lists "
                f"(probes={probes}): use search='exact' below {probes * ROWS_PER_LIST:,} rows"
            )
        self.probes, self.generator, self.every = probes, generator, max(rows // 64, 1)
        pieces = -(-rows // PIECE_ROWS) + self.lists + 2
        self.centroids: Tensor
        self.assigned: Tensor
        self.pieces: Tensor
        self.numbers: Tensor
        self.offsets: Tensor
        self.counts: Tensor
        self.register_buffer("centroids", torch.zeros(banks, self.lists, features))
        self.register_buffer("assigned", torch.full((banks, rows), self.lists))
        self.register_buffer("pieces", torch.full((banks, pieces, PIECE_ROWS, features), torch.inf))
        self.register_buffer("numbers", torch.zeros(banks, pieces, PIECE_ROWS, dtype=torch.int64))
        self.register_buffer("offsets", torch.zeros(banks, self.lists + 1, dtype=torch.int64))
        # Rows written since the lists were made; rows held when the centroids were fitted.
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))

    @property
    def ready(self) -> bool:
        """Whether there are lists yet."""
        return bool(self.counts[1] > 0)

    def clear(self) -> None:
        """Forget everything."""
        self.counts.zero_()
        self.assigned.fill_(self.lists)

    def nearest(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `functional.neighbours.nearest`; ``rows`` ``[G, N, F]`` are the keys as they are now."""
        lists = InvertedLists(self.centroids, self.pieces, self.numbers, self.offsets)
        stale, found = nearest_listed(queries, lists, k, probes=self.probes)
        bank = torch.arange(len(rows), device=rows.device).view(-1, 1, 1) * rows.shape[1]
        near = rows.flatten(0, 1).index_select(0, (found + bank).flatten()).view(*found.shape, -1)
        squared = (near - queries.unsqueeze(2)).square().sum(-1).masked_fill(stale.isinf(), torch.inf)
        squared, order = squared.sort(-1)
        return squared, found.gather(-1, order)

    def note(self, rows: Tensor, held: int, at: Tensor, touched: Tensor) -> None:
        """Rows ``at`` ``[G, R]`` (of all G·N) changed where ``touched``; the smallest bank holds ``held``."""
        if self.ready:
            changed = rows.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, -1)
            self.assigned.view(-1)[at[touched]] = assign(changed, self.centroids)[touched]
            self.counts[0] += touched.sum()
        enough = self.lists * 8
        if held >= max(enough, 2 * int(self.counts[1])) or (
            held == rows.shape[1] and int(self.counts[1]) < held and held >= enough
        ):
            self._fit(rows, held)
        elif self.ready and int(self.counts[0]) >= self.every * len(rows):
            self._invert(rows)

    def _fit(self, rows: Tensor, held: int) -> None:
        valid = (torch.arange(rows.shape[1], device=rows.device) < held).expand(len(rows), -1)
        self.centroids.copy_(fit_centroids(rows, self.lists, self.generator, valid=valid))
        self.assigned.copy_(assign(rows, self.centroids, valid=valid))
        self.counts[1] = held
        self._invert(rows)

    def _invert(self, rows: Tensor) -> None:
        made = invert(rows, self.assigned, self.centroids)
        for name in ("pieces", "numbers", "offsets"):
            getattr(self, name).copy_(getattr(made, name))
        self.counts[0] = 0
