"""One display for all runs of a study: a few live lines on a terminal, a line for every run that ends elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_memory.study.plan import Plan, Run, frames_of
from marl_memory.study.results import Record, run_folder
from marl_memory.training.clock import duration

if TYPE_CHECKING:
    from marl_memory.study.runner import Outcome

REFRESH = 0.5
"""Seconds between pictures."""


class Progress:
    """Where a study stands.

    Args:
        plan: its runs.
        outcome: of the runs that have ended, followed as it grows.
        say: takes the lines that are printed where there is no terminal, and those that stay above the live ones.
    """

    def __init__(self, plan: Plan, outcome: Outcome, say: Callable[[str], None]) -> None:
        self.plan, self.outcome, self.say = plan, outcome, say
        self.frames = frames_of(plan)
        self.total = sum(self.frames[task] for task, _, _ in plan.configs)
        self.before = self._done([])
        self.began = self.drawn = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console()
            if not console.is_dumb_terminal:
                self.live = Live(console=console, auto_refresh=False)
                self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.update("\n".join(self.lines([])), refresh=True)
            self.live.stop()

    def show(self, running: Sequence[Run]) -> None:
        """Draw the present state, now and then."""
        if self.live is not None and time.monotonic() - self.drawn >= REFRESH:
            self.drawn = time.monotonic()
            self.live.update("\n".join(self.lines(running)), refresh=True)

    def ended(self, run: Run) -> None:
        """One line on a run that has ended, unless it was asked to."""
        task, arm, seed = run
        name, of = f"{task} {arm} seed {seed}", f"[{self._ended()}/{len(self.plan.configs)}]"
        if run in self.outcome.failed:
            self._print(f"{of} {name} failed: {self.outcome.failed[run]}")
        elif run in self.outcome.finished:
            record = Record.read(run_folder(self.plan.folder, *run))
            metric = self.plan.study.metric
            _, values = record.curves.get(metric, ((), ()))
            last = f"  {metric} {values[-1]:.4g}" if values else ""
            self._print(f"{of} {name} finished in {duration(record.costs['wall_seconds'])}{last}")

    def lines(self, running: Sequence[Run]) -> list[str]:
        """What stands on a terminal."""
        done, counts = self._done(running), self.outcome
        share, elapsed = done / self.total, time.monotonic() - self.began
        gone = done - self.before
        remaining = duration((self.total - done) * elapsed / gone) if gone and elapsed > 10 else "-"
        filled = int(40 * share)
        head = [
            f"{'━' * filled}{'─' * (40 - filled)}  {share:.0%}  {duration(elapsed)}  ETA {remaining}",
            f"runs {len(self.plan.configs)}  finished {len(counts.finished)}  running {len(running)}"
            f"  failed {len(counts.failed)}",
        ]
        return head + [
            f"  {task} {arm} seed {seed}  {self._frames_of(run):,} / {self.frames[task]:,} frames"
            for run in running
            for task, arm, seed in [run]
        ]

    def _print(self, line: str) -> None:
        if self.live is not None:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            self.say(line)

    def _ended(self) -> int:
        return len(self.outcome.finished) + len(self.outcome.failed)

    def _done(self, running: Sequence[Run]) -> int:
        ended = (*self.outcome.finished, *self.outcome.failed)
        return sum(self.frames[task] for task, _, _ in ended) + sum(self._frames_of(run) for run in running)

    def _frames_of(self, run: Run) -> int:
        """Of the last whole row of a run's metrics."""
        return last_frames(run_folder(self.plan.folder, *run) / "metrics.csv")


def last_frames(file: Path) -> int:
    """The frames in the last whole row of a metrics.csv; 0 where there is none."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        column = stream.readline().decode().strip().split(",").index("frames")
        stream.seek(max(file.stat().st_size - 8192, stream.tell()))
        rows = stream.read().decode().rpartition("\n")[0].splitlines()
    try:
        return int(rows[-1].split(",")[column])
    except (IndexError, ValueError):
        return 0
