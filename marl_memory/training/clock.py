"""Where a run's wall time goes, by section."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SECTIONS = {
    "environment": "environment",
    "policy": "policy",
    "learn": "update",
    "memory": "memory",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "logging": "logging",
    "other": "other",
}
"""The sections, as in the columns ``time/…`` of ``metrics.csv``, and what a reader calls them."""


class Clock:
    """Wall seconds by section; each moment is booked once, under the innermost section that is open.

    A section opened within another one takes its time away from it; outside of all it is ``other``.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, and begin now."""
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.open, self.since = "other", time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Book the time within under ``name``.

        Raises:
            KeyError: if ``name`` is not one of `SECTIONS`.
        """
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def take(self) -> dict[str, float]:
        """The seconds of each section since the last call, as ``time/…``; sections that are open go on."""
        self._switch(self.open)
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        return taken

    def _switch(self, name: str) -> str:
        now, before = time.perf_counter(), self.open
        self.seconds[before] += now - self.since
        self.open, self.since = name, now
        self.seconds[name] += 0.0  # an unknown name fails where it is opened
        return before


def collecting_and_learning(seconds: Mapping[str, float]) -> float:
    """What an iteration takes, without what comes now and then: seconds as `Clock.take` gives them."""
    return sum(seconds[f"time/{name}"] for name in ("environment", "policy", "memory", "learn"))


def duration(seconds: float) -> str:
    """As in 0:02:48."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
