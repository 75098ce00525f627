"""What one watches while a run goes: a few live lines on a terminal, a plain line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from marl_memory.training.clock import SECTIONS, duration

LINE_EVERY = 0.05
"""Without a terminal: one line per this share of the run."""

WIDEST = 100
"""Columns used at most: what a terminal does not have to wrap when it is made narrower stays in order."""

Cell = tuple[str, str]
"""A label and what it says."""


class Pace:
    """How fast a session goes, from the rows that it logs.

    Args:
        total_frames: where the run ends.
        frames: where the session begins.
    """

    RECENT = 20
    """Speeds are means over as many rows."""

    def __init__(self, total_frames: int, frames: int) -> None:
        self.total, self.frames = total_frames, frames
        self.started = self.seen = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.recent: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=self.RECENT)
        self.evaluation: float | None = None

    def take(self, row: Mapping[str, float]) -> None:
        """Follow one row of metrics."""
        frames, self.seen = int(row["frames"]), time.monotonic()
        if frames > self.frames:
            self.recent.append((frames - self.frames, row))
            self.first = self.first or (frames, self.seen)
        if row.get("evaluation/episodes") and row.get("time/evaluate"):
            played = row["evaluation/episodes"] * row["evaluation/length"]
            self.evaluation = played / row["time/evaluate"]
        self.frames = frames

    def speed(self, *sections: str) -> float | None:
        """Frames collected per second that went into ``sections``; None where none did."""
        seconds = sum(row.get(f"time/{name}", 0.0) for _, row in self.recent for name in sections)
        return sum(frames for frames, _ in self.recent) / seconds if seconds else None

    def remaining(self) -> float | None:
        """Seconds to the end, at this session's wall time per frame (evaluations, checkpoints and logging in it).

        The first iteration is left out, which compiles; None before the second has ended.
        """
        if self.frames >= self.total:
            return 0.0
        if self.first is None or self.frames == self.first[0]:
            return None
        frames, at = self.first
        left = (self.total - self.frames) * (self.seen - at) / (self.frames - frames)
        return max(left - (time.monotonic() - self.seen), 0.0)


class Display:
    """Where a run stands: progress, frames/s of each part, newest results, and the time it still takes.

    Args:
        total_frames: where the run ends.
    """

    def __init__(self, total_frames: int) -> None:
        self.total, self.next_line = total_frames, 0.0
        self.known: dict[str, float] = {}
        self.pace = Pace(total_frames, 0)
        self.live: Any = None
        self.drawn: tuple[int, list[int]] | None = None  # columns of the terminal, and the lengths of the lines on it
        self.refreshed = 0.0

    def start(self, frames: int) -> None:
        """Begin at ``frames``; on a terminal the lines stay in their place from now on."""
        self.pace = Pace(self.total, frames)
        if not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        console = Console()
        if not console.is_dumb_terminal:
            # Its own thread moves the clock once a second, also during a long iteration.
            self.live = Live(console=console, get_renderable=lambda: self._redraw(console), refresh_per_second=1)
            self.live.start(refresh=True)

    def show(self, row: Mapping[str, float]) -> None:
        """Follow one row of metrics."""
        self.pace.take(row)
        self.known = {**self.known, **row}
        frames = self.pace.frames
        if self.live is not None:
            if time.monotonic() - self.refreshed > 0.25:  # short iterations are not worth a picture each
                self.live.refresh()
        elif frames >= self.next_line * self.total or frames >= self.total:
            self.next_line = frames / self.total + LINE_EVERY
            print("  ".join([f"{frames:>12,} / {self.total:,} frames", *self.describe(), self._eta()]), flush=True)

    def stop(self) -> None:
        """Leave the last state on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def describe(self) -> list[str]:
        """The newest of each number one wants to watch, for a plain line."""
        speed = self.known.get("time/frames_per_second")
        texts = [] if speed is None else [f"{speed:,.0f} frames/s"]
        return texts + [f"{label} {text}" for label, text in self._results()]

    def view(self, width: int) -> list[Any]:
        """The lines (rich's `Text`) on a terminal of ``width`` columns; none is longer."""
        from rich.text import Text

        width = min(width, WIDEST)
        lines = [*self._progress(width), *_flow(self._speeds(), width), *_flow(self._results(), width)]
        texts = [Text.assemble(*line, no_wrap=True, overflow="crop") for line in lines]
        for text in texts:
            text.truncate(width)
        return texts

    def _redraw(self, console: Any) -> Any:
        """The lines for the terminal as it is now."""
        from rich.console import Group

        width, self.refreshed = console.width, time.monotonic()
        if self.drawn is not None and width < self.drawn[0]:
            _leave_wrapped_lines(console, self.drawn[1], width)
        lines = self.view(width)
        self.drawn = (width, [line.cell_len for line in lines])
        return Group(*lines)

    def _progress(self, width: int) -> list[list[Any]]:
        share = min(self.pace.frames / self.total, 1.0)
        where = f"{self.pace.frames:,} / {self.total:,} frames"
        when = [f"{share:3.0%}", duration(time.monotonic() - self.pace.started), self._eta()]
        together = len("  ".join([where, *when]))
        if width >= together + 22:  # the bar between the two
            return [[where, "  ", *_bar(share, width - together - 2), "  ", "  ".join(when)]]
        return [*_flow([("", text.strip()) for text in (where, *when)], width), _bar(share, width)]

    def _speeds(self) -> list[Cell]:
        speed = self.pace.speed
        found = {
            "frames/s": speed(*SECTIONS),
            "collect": speed("environment", "policy"),
            "learn": speed("learn"),
            "memory": speed("memory"),
            "evaluate": self.pace.evaluation,
        }
        return [(label, "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}") for label, x in found.items()]

    def _results(self) -> list[Cell]:
        shown = [
            ("return", "train/return"),
            ("win", "train/success"),
            ("greedy return", "evaluation/return"),
            ("greedy win", "evaluation/success"),
        ]
        return [(label, f"{self.known[key]:.2f}") for label, key in shown if key in self.known]

    def _eta(self) -> str:
        remaining = self.pace.remaining()
        return "ETA -" if remaining is None else f"ETA {duration(remaining)}"


def _flow(cells: Sequence[Cell], width: int) -> list[list[Any]]:
    """As many cells on each line as fit; labels are dim."""
    lines: list[list[Any]] = []
    room = 0
    for label, text in cells:
        cell = [(f"{label} ", "dim"), (text, "bold")] if label else [text]
        length = len(label) + bool(label) + len(text)
        if lines and room >= length + 2:
            lines[-1] += ["  ", *cell]
            room -= length + 2
        else:
            lines.append(cell)
            room = width - length
    return lines


def _bar(share: float, width: int) -> list[Any]:
    """A bar whose done and undone parts differ without colours too."""
    done = int(share * width)
    return [("━" * done, "green"), ("─" * (width - done), "dim")]


def _leave_wrapped_lines(console: Any, lengths: Sequence[int], width: int) -> None:
    """Erase the rows that a narrower terminal added when it wrapped our lines; rich goes up by the lines it knows."""
    from rich.control import Control
    from rich.segment import ControlType

    added = sum(max(-(-length // width), 1) for length in lengths) - len(lengths)
    console.control(Control(*((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * added))
