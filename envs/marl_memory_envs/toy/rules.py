"""How a toy task is written: its rules over N copies at once, as NumPy functions without state of their own.

One copy is the special case N = 1, so a task has one transition function, whether it is stepped alone or in a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from marl_memory.spec import TaskSpec

Copies = dict[str, np.ndarray]
"""What N copies of a task are in: by name, arrays ``[N, …]``, never written to once they are made."""

Draw = Callable[[int], np.ndarray]
"""``draw(k)``: k numbers in [0, 1) for every copy, ``[N, k]`` float64, each from its copy's own stream."""

GOLDEN, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
BITS = tuple(np.uint64(x) for x in (30, 27, 31, 11))


class Moved(NamedTuple):
    """What a step of N copies gives.

    Args:
        copies: after it.
        reward: ``[N]``, the team's.
        terminated: ``[N]``, whether the task itself ended the episode.
        success: ``[N]``, whether the episode would count as won if it ended here.
    """

    copies: Copies
    reward: np.ndarray
    terminated: np.ndarray
    success: np.ndarray


class Rules(ABC):
    """The rules of one task.  A subclass sets ``spec``, whose time limit is imposed for it, and is immutable."""

    spec: TaskSpec

    @abstractmethod
    def start(self, draw: Draw, n: int) -> Copies:
        """``n`` copies at the start of an episode."""

    @abstractmethod
    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """One step of N copies with ``actions``, ``[N, A]`` int64, or ``[N, A, P]`` float32 within their bounds."""

    @abstractmethod
    def observe(self, copies: Copies) -> np.ndarray:
        """What the agents see, ``[N, A, F]`` float32: an array of its own."""

    def state(self, copies: Copies) -> np.ndarray:
        """The global state, ``[N, S]`` float32; only where ``spec.own_state``."""
        raise NotImplementedError(f"{self.spec.name} has no state beyond its observations")

    @abstractmethod
    def picture(self, copies: Copies) -> np.ndarray:
        """Copy 0 as a picture, ``[height, width, 3]`` uint8."""


class Streams:
    """N independent streams of uniform numbers, drawn for all of them at once (SplitMix64: Steele, Lea, Flood, 2014).

    Number i of a stream is a hash of its seed and i, so its state is two integers, and what a copy draws does not
    depend on how many others there are.

    Args:
        seeds: one per stream.
    """

    def __init__(self, seeds: list[int]) -> None:
        self.origins = np.zeros(len(seeds), np.uint64)
        self.counts = np.zeros(len(seeds), np.uint64)
        self.seed(slice(None), seeds)

    def seed(self, rows: slice | np.ndarray, seeds: list[int]) -> None:
        """Begin the streams ``rows`` anew."""
        self.origins[rows] = _mix(np.array(seeds, np.uint64) + GOLDEN)
        self.counts[rows] = 0

    def draw(self, rows: slice | np.ndarray, k: int) -> np.ndarray:
        """``[n, k]``: the next k numbers in [0, 1) of each of the streams ``rows``."""
        index = self.counts[rows, None] + np.arange(1, k + 1, dtype=np.uint64)
        self.counts[rows] += np.uint64(k)
        return (_mix(self.origins[rows, None] + GOLDEN * index) >> BITS[3]) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of 64-bit integers; products wrap."""
    x = (x ^ (x >> BITS[0])) * FIRST
    x = (x ^ (x >> BITS[1])) * SECOND
    return x ^ (x >> BITS[2])


def thermometer(position: np.ndarray, size: int) -> np.ndarray:
    """``[…, size]`` float32: a position in [0, size] as the filling of ``size`` unit cells: 2.5 of 4 is 1, 1, ½, 0.

    Near positions have near codes, and any function of a whole position is linear in its code (Osband et al., 2016,
    who found it better than one-hot codes on the chain).
    """
    cells = np.asarray(position)[..., None] - np.arange(size)
    return np.minimum(np.maximum(cells, 0.0), 1.0).astype(np.float32)


def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    """``[…, size]`` float32: 1 at the index, 0 elsewhere; nothing but zeros for −1."""
    return (np.asarray(index)[..., None] == np.arange(size)).astype(np.float32)


def pick(uniform: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers below ``count``, from numbers in [0, 1)."""
    return (uniform * count).astype(np.int64)


def check_options(least: Mapping[str, tuple[int, int]], shares: Mapping[str, float]) -> None:
    """Raise for an option out of range: ``least`` maps names to ``(value, smallest)``, ``shares`` to probabilities.

    Raises:
        ValueError: naming the option, its value and what would be right.
    """
    for key, (value, smallest) in least.items():
        if isinstance(value, bool) or value != int(value) or value < smallest:
            raise ValueError(f"{key}={value} must be a whole number, at least {smallest}")
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{key}={share} must lie in [0, 1)")
