"""The newest states of each bank, from which an operator's own networks learn."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor, nn


class RecentRows(nn.Module):
    """A ring of rows for each of G banks: the newest stay.

    Args:
        banks: G.
        features: F, numbers of a row.
        size: N, rows of a bank.
        dtype: of the numbers.
    """

    def __init__(self, banks: int, features: int, *, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        self.rows: Tensor
        self.written: Tensor
        self.register_buffer("rows", torch.zeros(banks, size, features, dtype=dtype))
        self.register_buffer("written", torch.zeros(banks, dtype=torch.int64))

    @property
    def held(self) -> Tensor:
        """``[G]``: rows of each bank."""
        return self.written.clamp(max=self.size)

    def clear(self) -> None:
        """Forget all rows."""
        self.rows.zero_()
        self.written.zero_()

    def write(self, rows: Tensor, live: Tensor) -> None:
        """Take in rows ``[G, R, F]`` where ``live`` ``[G, R]`` is True; of more than there is room for, the last."""
        total = live.sum(1, keepdim=True)
        rank = live.cumsum(1) - 1
        kept = live & (rank >= total - self.size)
        banks = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        at = ((self.written.unsqueeze(1) + rank) % self.size + banks * self.size)[kept]
        self.rows.flatten(0, 1)[at] = cast(Tensor, rows[kept]).to(self.rows.dtype)
        self.written += total.squeeze(1)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Rows ``[G, count, F]``, uniformly and with replacement; of a bank without rows, zeros."""
        share = torch.rand(len(self.rows), count, generator=generator, dtype=torch.float64).to(self.rows.device)
        at = (share * self.held.unsqueeze(1)).long()
        return self.rows[torch.arange(len(self.rows), device=at.device).unsqueeze(1), at]
