"""Where a run's wall time goes, by section."""

from __future__ import annotations

import time
from collections.abc import Mapping

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


class Section:
    """What `Clock.section` gives: time within its ``with`` block is booked under its name.

    One object serves every block of its name: the environment's is entered at every vector step, where a generator made
    into a context manager costs several times as much.
    """

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.clock.around.append(self.clock.switch(self.name))

    def __exit__(self, *_: object) -> None:
        self.clock.switch(self.clock.around.pop())


class Clock:
    """Wall seconds by section; each moment is booked once, under the innermost section that is open.

    A section opened within another one takes its time away from it; outside of all it is ``other``.
    """

    def __init__(self) -> None:
        self.sections = {name: Section(self, name) for name in SECTIONS}
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, and begin now."""
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.around: list[str] = []
        self.open, self.since = "other", time.perf_counter()

    def section(self, name: str) -> Section:
        """For ``with``: book the time within under ``name``.

        Raises:
            KeyError: if ``name`` is not one of `SECTIONS`.
        """
        return self.sections[name]

    def take(self) -> dict[str, float]:
        """The seconds of each section since the last call, as ``time/…``; sections that are open go on."""
        self.switch(self.open)
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        return taken

    def switch(self, name: str) -> str:
        """Book the time so far, and what follows under ``name``; returns what was open before."""
        now, before = time.perf_counter(), self.open
        self.seconds[before] += now - self.since
        self.open, self.since = name, now
        return before


def collecting_and_learning(seconds: Mapping[str, float]) -> float:
    """What an iteration takes, without what comes now and then: seconds as `Clock.take` gives them."""
    return sum(seconds[f"time/{name}"] for name in ("environment", "policy", "memory", "learn"))


def duration(seconds: float) -> str:
    """As in 0:02:48."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
