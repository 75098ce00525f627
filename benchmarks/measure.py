"""How a figure is taken: two ways of doing one thing take turns, and the median of the turns' ratios counts.

Whatever else a machine does falls on both sides, but not alike: what uses more memory loses more when the caches are
shared.  So turns go on until enough of them were calm, that is, took hardly longer than the shortest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar


@dataclass
class Row:
    """One line of the table.

    Args:
        name: its key in ``bounds.toml``.
        values: the figure at each repeat.
        unit: what the figure is: a ratio (``×``), µs, s or MB.
        details: sizes and settings, and the seconds behind the ratio.
        earlier: figures of earlier measurements in this run that missed the bound.
    """

    name: str
    values: list[float]
    unit: str = "×"
    details: dict[str, Any] = field(default_factory=dict)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    earlier: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The median over repeats."""
        return statistics.median(self.values)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


CALM = 1.1
"""A turn is calm that took at most so many times the shortest."""

PATIENCE = 8
"""So many times the turns asked for are made at most."""


T = TypeVar("T")


def calmest(turn: Callable[[], T], seconds_of: Callable[[T], float], repeats: int) -> tuple[list[T], str]:
    """What the ``repeats`` calmest turns gave, and how many of how many turns these are, in words."""
    found: list[T] = []
    for _ in range(PATIENCE * repeats):
        found.append(turn())
        limit = CALM * min(map(seconds_of, found))
        if sum(seconds_of(one) <= limit for one in found) >= repeats:
            break
    return sorted(found, key=seconds_of)[:repeats], f"{repeats} of {len(found)}"


@dataclass
class Turns:
    """Seconds of both sides in the calmest turns, and how many of how many these are."""

    pairs: list[tuple[float, float]]
    kept: str


def turns(first: Callable[[], Any], second: Callable[[], Any], repeats: int, *, warm_up: int = 2) -> Turns:
    """``first`` and ``second`` called in turns; both sides' time together decides which turns were calm."""
    for _ in range(warm_up):
        first(), second()
    return Turns(*calmest(lambda: (seconds(first), seconds(second)), sum, repeats))


def ratio(name: str, timed: Turns, *, calls: int = 1, **details: Any) -> Row:
    """A row with first / second, and µs of a call of each (their medians)."""
    both = [statistics.median(column) / calls * 1e6 for column in zip(*timed.pairs, strict=True)]
    details |= {"µs": round(both[0], 1), "µs beside it": round(both[1], 1), "calm turns": timed.kept}
    return Row(name, [a / b for a, b in timed.pairs], details=details)
