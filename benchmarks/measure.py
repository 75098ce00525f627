"""How a figure is taken: two ways of doing one thing take turns, and the median of the turns' ratios counts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One line of the table.

    Args:
        name: its key in ``bounds.toml``.
        values: the figure at each repeat.
        unit: what the figure is: a ratio (``×``), µs, s or MB.
        details: sizes and settings, and the seconds behind the ratio.
    """

    name: str
    values: list[float]
    unit: str = "×"
    details: dict[str, Any] = field(default_factory=dict)
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def value(self) -> float:
        """The median over repeats."""
        return statistics.median(self.values)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def turns(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, *, warm_up: int = 2
) -> list[tuple[float, float]]:
    """Seconds of ``first`` and of ``second``, called in turns, so that whatever else runs falls on both."""
    for _ in range(warm_up):
        first(), second()
    return [(seconds(first), seconds(second)) for _ in range(repeats)]


def ratio(name: str, timed: list[tuple[float, float]], *, calls: int = 1, **details: Any) -> Row:
    """A row with first / second, and µs of a call of each (their medians)."""
    both = [statistics.median(column) / calls * 1e6 for column in zip(*timed, strict=True)]
    details |= {"µs": round(both[0], 1), "µs beside it": round(both[1], 1)}
    return Row(name, [a / b for a, b in timed], details=details)
