"""Which neighbours a row of the replay had, so that they need not be searched for again at every draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marl_memory.memory.store import Neighbours, RingStore


class KeptNeighbours(nn.Module):
    """For each bank a table of M rows, found by their number modulo M, with the K neighbours each had.

    What is kept are places in the store: what lies there now is measured anew, so that a neighbour that moved, or gave
    way to another row, has the distance that it has.  Only who else came near since is not known before P writes later.

    Args:
        banks: G.
        rows: M.
        neighbours: K.
        updates: P, writes for which neighbours are kept.
    """

    def __init__(self, banks: int, rows: int, neighbours: int, updates: int) -> None:
        super().__init__()
        self.rows, self.updates = rows, updates
        self.places: Tensor
        self.numbers: Tensor
        self.found: Tensor
        self.writes: Tensor
        self.register_buffer("places", torch.zeros(banks * rows, neighbours, dtype=torch.int32))
        self.register_buffer("numbers", torch.full((banks * rows,), -1))
        self.register_buffer("found", torch.zeros(banks * rows, dtype=torch.int64))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64))
        self.offsets: Tensor
        self.register_buffer("offsets", torch.arange(banks).unsqueeze(1) * rows, persistent=False)

    def clear(self) -> None:
        """Forget everything."""
        self.numbers.fill_(-1)
        self.writes.zero_()

    def nearest(self, store: RingStore, keys: Tensor, numbers: Tensor) -> Neighbours:
        """As ``store.nearest(keys)`` for the rows ``numbers`` ``[G, R]``, searching for those not known only."""
        if min(store.held.tolist()) < store.neighbours:  # what is not there has no place to be measured at
            return store.nearest(keys)
        at = numbers % self.rows + self.offsets
        known = self._known(at, numbers)
        places = self.places[at].long()
        if missing := int((~known).sum(1).max()):
            which = known.long().argsort(dim=1, stable=True)[:, :missing]
            queries = keys.gather(1, which.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
            places = places.scatter(
                1, which.unsqueeze(-1).expand(-1, -1, places.shape[-1]), store.nearest(queries).rows
            )
        return store.measured_at(keys, places)

    def keep(self, found: Neighbours, numbers: Tensor) -> None:
        """Take in the neighbours ``[G, R, K]`` that rows ``numbers`` ``[G, R]`` have; the known keep their date.

        Rows with fewer than K are not taken in: what they lack comes with the next write.
        """
        at = numbers % self.rows + self.offsets
        date = torch.where(self._known(at, numbers), self.found[at], self.writes)
        numbers = torch.where(found.squared.isfinite().all(-1), numbers, -1)
        self.places[at], self.numbers[at], self.found[at] = found.rows.int(), numbers, date
        self.writes.add_(1)

    def _known(self, at: Tensor, numbers: Tensor) -> Tensor:
        return (self.numbers[at] == numbers) & (self.writes - self.found[at] < self.updates)
