"""Where a write goes: the ways in which a bounded store keeps some rows and lets others go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from marl_memory.memory.store import Neighbours, RingStore


Score = Callable[[], Tensor]
"""How good the rows of a write are, worked out where a policy asks."""


class Placement(NamedTuple):
    """Where R offered rows go in each bank.

    Args:
        slot: ``[G, R]`` int64, the row of the bank.
        fresh: ``[G, R]`` bool, the row takes the slot, and what was there goes; no slot is given to two fresh rows.
        merged: ``[G, R]`` bool, the row is averaged into the slot.

    Rows that are neither are dropped.
    """

    slot: Tensor
    fresh: Tensor
    merged: Tensor


class Policy(Protocol):
    """Decides where rows go, and moves the store's counters."""

    def place(
        self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None, score: Score
    ) -> Placement:
        """Places for rows ``[G, R]``, of which ``live`` ``[G, R]`` count.

        ``keys`` ``[G, R, F]`` are as they come; ``nearest`` is what lies near them now, if known; ``score()`` gives
        the first number of their payloads, averaged over the living, ``[G, R]``.
        """
        ...


def _rank(live: Tensor) -> Tensor:
    """The how-manieth live row of its bank each is, from 0: ``[G, R]``."""
    return live.cumsum(1) - 1


class Fifo(nn.Module):
    """The newest rows stay: the uncompressed control."""

    def place(
        self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None, score: Score
    ) -> Placement:
        """Round the ring; of more rows than it holds, the last."""
        total = live.sum(1, keepdim=True)
        rank = _rank(live)
        slot = (store.written.unsqueeze(1) + rank) % store.rows
        store.written += total.squeeze(1)
        torch.clamp(store.written, max=store.rows, out=store.held)
        return Placement(slot, live & (rank >= total - store.rows), torch.zeros_like(live))


SAME = 1e-3
"""Keys that are no farther apart, in scaled units, are one to `Best`."""


class Best(nn.Module):
    """Of rows with the same key (within `SAME`) the one with the highest score stays; else the newest rows do.

    A row so belongs to one row of the run always: nothing is averaged.  What a write overwrites, as the oldest of its
    bank, is compared with nothing.

    Reference: Blundell et al., "Model-Free Episodic Control" (2016), equation 1, where the score is a return.
    """

    def place(
        self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None, score: Score
    ) -> Placement:
        """See the class."""
        scores, scaled = score(), store.scaled_keys(keys)
        if nearest is None:
            nearest = store.nearest_scaled(scaled, 1)
        row, near = nearest.rows[..., 0], nearest.squared[..., 0] <= SAME**2
        age = (row - store.written.unsqueeze(1)) % store.rows  # 0: the next to be overwritten
        total = torch.zeros_like(store.written).unsqueeze(1)
        while True:  # the more rows are added, the more of those they are compared with are overwritten by them
            known = live & near & (age >= total)
            best = live & _first_best(scores, live, self._groups(store, scaled, row, known)).view_as(live)
            added = best & ~known
            before, total = total, added.sum(1, keepdim=True)
            if torch.equal(total, before):
                break
        stored = store.take(store.values, row.unsqueeze(-1)).squeeze(2)
        better = scores > score_of(stored[..., 0], stored[..., -1] > 0)
        slot = torch.where(known, row, (store.written.unsqueeze(1) + _rank(added)) % store.rows)
        fresh = (added & (_rank(added) >= total - store.rows)) | (best & known & better)
        store.written += total.squeeze(1)
        torch.clamp(store.written, max=store.rows, out=store.held)
        return Placement(slot, fresh, torch.zeros_like(live))

    @staticmethod
    def _groups(store: RingStore, keys: Tensor, row: Tensor, known: Tensor) -> Tensor:
        """Numbers ``[G · R]`` of groups of equal rows: by the stored row if ``known``, else by the cell of the key."""
        cells = torch.where(known.unsqueeze(-1), 0.0, (keys / SAME).round()).to(torch.int64)
        of_bank = torch.stack([store.offsets.expand_as(row), torch.where(known, row, -1)], -1)
        return torch.cat([of_bank, cells], -1).flatten(0, 1).unique(dim=0, return_inverse=True)[1]


def score_of(x: Tensor, live: Tensor) -> Tensor:
    """Means ``[G, R]`` of ``x`` ``[G, R, S]`` over the payloads that are ``live``."""
    return torch.where(live, x, 0.0).sum(-1) / live.sum(-1).clamp(min=1)


def _first_best(score: Tensor, live: Tensor, group: Tensor) -> Tensor:
    """``[G · R]`` bool: the first live row with the highest ``score`` ``[G, R]`` of each ``group`` ``[G · R]``."""
    score, number = torch.where(live, score, -torch.inf).flatten(), torch.arange(len(group), device=group.device)
    highest = torch.full_like(score, -torch.inf).scatter_reduce(0, group, score, "amax")
    leading = live.flatten() & (score == highest[group])
    number = torch.where(leading, number, len(number))
    return leading & (number == torch.full_like(number, len(number)).scatter_reduce(0, group, number, "amin")[group])


class Merge(nn.Module):
    """Rows are appended until the bank is full; then a row near another is averaged into it.

    Near is within ρ, the bank's median distance between nearest neighbours.  A row that is near none takes the place of
    the one with the least mass × age decay.
    """

    def place(
        self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None, score: Score
    ) -> Placement:
        """See the class."""
        count = live.sum(1)
        store.written.add_(count)
        if store.full:
            slot, appended, late = store.offsets.new_zeros(()), torch.zeros_like(live), live
        else:
            slot = store.held.unsqueeze(1) + _rank(live)
            appended = live & (slot < store.rows)
            late = live & ~appended
            slot.clamp_(max=store.rows - 1)
        if nearest is None and bool(late.any()):
            nearest = store.nearest_scaled(store.scaled_keys(keys), 1)
        torch.clamp(store.held + count, max=store.rows, out=store.held)
        if nearest is None:
            return Placement(slot, appended, late)
        merged = late & (nearest.squared[..., 0] <= store.merge_radius.square().unsqueeze(1))
        slot = torch.where(merged, nearest.rows[..., 0], slot)
        evicting = late & ~merged
        if bool(evicting.any()):
            stays = live & ~evicting  # what this very write touches is not thrown out by it
            utility = store.utility.scatter_reduce(
                1, torch.where(stays, slot, 0), torch.where(stays, torch.inf, -torch.inf), "amax"
            )
            least, worst = utility.topk(min(live.shape[1], store.rows), largest=False)
            surplus = evicting.sum(1, keepdim=True) - (least < torch.inf).sum(1, keepdim=True)
            order = _rank(evicting) - surplus.clamp(min=0)
            evicting = evicting & (order >= 0)  # of more than can be replaced, the last
            slot = torch.where(evicting, worst.gather(1, order.clamp(0, worst.shape[1] - 1)), slot)
        return Placement(slot, appended | evicting, merged)


class SimHash(nn.Module):
    """A row for each sign pattern of random projections: keys with the same signs are averaged into one row.

    Args:
        features: F.
        rows: N; the largest power of two of them is used.
        generator: where the projections are drawn from.

    Reference: Charikar, "Similarity estimation techniques from rounding algorithms" (2002); Tang et al., "#Exploration"
    (2017), for states.
    """

    def __init__(self, features: int, rows: int, generator: Generator) -> None:
        super().__init__()
        self.bits = rows.bit_length() - 1
        self.planes: Tensor
        self.register_buffer("planes", torch.randn(features, self.bits, generator=generator))

    def place(
        self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None, score: Score
    ) -> Placement:
        """The signs of the projections, around the mean of the recent keys, are the row's number."""
        signs = ((store.scaled_keys(keys) - store.centre.unsqueeze(1)) @ self.planes) > 0
        slot = (signs.long() << torch.arange(self.bits, device=keys.device)).sum(-1)
        store.written += live.sum(1)
        return Placement(slot, torch.zeros_like(live), live)
