"""Where a write goes: the ways in which a bounded store keeps some rows and lets others go."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from marl_memory.memory.store import Neighbours, RingStore


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

    def place(self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None) -> Placement:
        """Places for rows ``[G, R]``, of which ``live`` ``[G, R]`` count.

        ``keys`` ``[G, R, F]`` are as they come; ``nearest`` is what lies near them now, if known.
        """
        ...


def _rank(live: Tensor) -> Tensor:
    """The how-manieth live row of its bank each is, from 0: ``[G, R]``."""
    return live.cumsum(1) - 1


class Fifo(nn.Module):
    """The newest rows stay: the uncompressed control."""

    def place(self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None) -> Placement:
        """Round the ring; of more rows than it holds, the last."""
        total = live.sum(1, keepdim=True)
        rank = _rank(live)
        slot = (store.written.unsqueeze(1) + rank) % store.rows
        store.written += total.squeeze(1)
        torch.clamp(store.written, max=store.rows, out=store.held)
        return Placement(slot, live & (rank >= total - store.rows), torch.zeros_like(live))


class Merge(nn.Module):
    """Rows are appended until the bank is full; then a row near another is averaged into it.

    Near is within ρ, the bank's median distance between nearest neighbours.  A row that is near none takes the place of
    the one with the least mass × age decay.
    """

    def place(self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None) -> Placement:
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

    def place(self, store: RingStore, keys: Tensor, live: Tensor, nearest: Neighbours | None) -> Placement:
        """The signs of the projections, around the mean of the recent keys, are the row's number."""
        signs = ((store.scaled_keys(keys) - store.centre.unsqueeze(1)) @ self.planes) > 0
        slot = (signs.long() << torch.arange(self.bits, device=keys.device)).sum(-1)
        store.written += live.sum(1)
        return Placement(slot, torch.zeros_like(live), live)
