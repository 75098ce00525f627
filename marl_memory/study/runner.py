"""Runs a plan: what is finished stays, what was interrupted goes on, what failed is named and tried again next time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marl_memory.study.executors import Running, job_words, make_executor
from marl_memory.study.job import STOPPED
from marl_memory.study.plan import Plan, Run, as_json, other_study
from marl_memory.study.progress import Progress
from marl_memory.study.results import (
    PLAN,
    STUDY,
    DamagedRecordError,
    Record,
    StudyError,
    failure,
    failure_file,
    run_folder,
)
from marl_memory.training.checkpoint import write_atomically

POLL = 0.02
"""Seconds between looks at what runs."""


@dataclass
class Outcome:
    """How the runs of a study stand when its runner leaves.

    Args:
        finished: with a record.
        failed: why, by run.
        left: not finished because a signal asked to leave.
    """

    finished: list[Run] = field(default_factory=list)
    failed: dict[Run, str] = field(default_factory=dict)
    left: list[Run] = field(default_factory=list)


def slots(plan: Plan) -> int:
    """Runs at a time: as `StudyFile.workers` says; else as many as there are cores for, and Ray decides itself."""
    if plan.file.workers is not None:
        return plan.file.workers
    if plan.file.executor == "ray":
        return len(plan.configs)
    return max(len(os.sched_getaffinity(0)) // threads_of(plan), 1)


def threads_of(plan: Plan) -> int:
    """The most threads that a run computes with."""
    return max(config["training"]["threads"] for config in plan.configs.values())


def run_study(plan: Plan, *, words: list[str], say: Callable[[str], None] = print) -> Outcome:
    """Run what is not finished yet.

    Args:
        plan: the runs.
        words: the command line, kept for the report.
        say: takes notes and, where there is no terminal, a line for every run that ends.

    Raises:
        StudyError: if the folder is another study's, or another process is at it.
        ValueError, ImportError: if the executor can not be made.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _locked(plan.folder):
        check_folder(plan)
        launch = make_executor(
            plan.file.executor, plan.file.executor_options, folder=plan.folder, threads=threads_of(plan)
        )
        write_atomically(plan.folder / PLAN, json.dumps(as_json(plan)))
        definition = {"study": plan.study.to_dict(), "command": ["marl-memory study", *words]}
        write_atomically(plan.folder / STUDY, json.dumps(definition, indent=1))
        lay_damaged_aside(plan, say)
        outcome = Outcome(finished=finished_runs(plan))
        finished = set(outcome.finished)
        waiting = [run for run in plan.configs if run not in finished]
        with _stopped_by_signals() as stopped, Progress(plan, outcome, say) as progress:
            _execute(plan, waiting, launch, outcome, progress, stopped)
        outcome.left += waiting
    return outcome


def _execute(
    plan: Plan, waiting: list[Run], launch: Any, outcome: Outcome, progress: Progress, stopped: Callable[[], bool]
) -> None:
    """Keep ``slots`` runs going until none waits, or a signal asks to leave; ``waiting`` keeps what was not begun."""
    running: dict[Run, Running] = {}
    asked, at_once = False, slots(plan)
    while running or (waiting and not stopped()):
        while waiting and len(running) < at_once and not stopped():
            run = waiting.pop(0)
            folder = run_folder(plan.folder, *run)
            folder.parent.mkdir(parents=True, exist_ok=True)
            failure_file(folder).unlink(missing_ok=True)
            log = folder.parent / f"{folder.name}.log"
            running[run] = launch(job_words(plan.folder, *run, "--tied"), log)
        if stopped() and not asked:
            asked = True
            for one in running.values():
                one.stop()
        progress.show(list(running))
        time.sleep(POLL)
        for run, status in [(run, one.poll()) for run, one in running.items()]:
            if status is None:
                continue
            del running[run]
            _settle(plan, run, status, outcome, left=asked)
            progress.ended(run)


def _settle(plan: Plan, run: Run, status: int, outcome: Outcome, *, left: bool) -> None:
    """Book a run whose process has ended."""
    folder = run_folder(plan.folder, *run)
    try:
        Record.read(folder)
        outcome.finished.append(run)
        return
    except FileNotFoundError:
        pass
    except DamagedRecordError as error:
        outcome.failed[run] = str(error)
        return
    if status == STOPPED or left:
        outcome.left.append(run)
        return
    why = failure(folder)
    if why is None:
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        why = f"its process {ended}; what it printed lies in {folder.parent / folder.name}.log"
        failure_file(folder).write_text(f"{why}\n")
    outcome.failed[run] = why


def finished_runs(plan: Plan) -> list[Run]:
    """Runs with a record that is as it was written."""
    return [run for run in plan.configs if not isinstance(_state(plan, run), Exception)]


def _state(plan: Plan, run: Run) -> Record | FileNotFoundError | DamagedRecordError:
    try:
        return Record.read(run_folder(plan.folder, *run))
    except (FileNotFoundError, DamagedRecordError) as error:
        return error


def lay_damaged_aside(plan: Plan, say: Callable[[str], None]) -> None:
    """Make room for the runs whose record, or metrics, were changed: they are repeated."""
    for run in plan.configs:
        if isinstance(error := _state(plan, run), DamagedRecordError):
            folder = run_folder(plan.folder, *run)
            aside = folder.parent / f"{folder.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"{error}; the run is repeated, and what was there lies in {aside}")


def check_folder(plan: Plan) -> None:
    """Raise StudyError if the folder holds something else than this study."""
    if not (plan.folder / PLAN).exists():
        foreign = (
            sorted(path.name for path in plan.folder.iterdir() if path.name != ".lock") if plan.folder.is_dir() else []
        )
        if foreign:
            raise StudyError(
                f"study.folder={plan.folder} holds no study, but {', '.join(foreign[:5])}: choose an empty folder"
            )
        return
    try:
        before = json.loads((plan.folder / PLAN).read_text())
    except ValueError as error:
        raise StudyError(f"{plan.folder / PLAN} can not be read: {error}") from error
    if (why := other_study(before, plan)) is not None:
        raise StudyError(f"study.folder={plan.folder} is another study's: {why}; choose another study.folder")


@dataclass(frozen=True)
class Estimate:
    """What the runs that are left may take.

    Args:
        seconds: of wall time.
        bytes: resident at a time.
        arms: that were tried out.
    """

    seconds: float
    bytes: float
    arms: list[str]


def estimate(plan: Plan, left: list[Run]) -> Estimate | None:
    """Try some arms of each task out for some seconds, as many at a time as will run later; None without a probe.

    Raises:
        StudyError: if one fails, with what it said.
    """
    from concurrent.futures import ThreadPoolExecutor
    from tempfile import TemporaryDirectory

    arms, n = list(plan.study.arms), plan.file.probe
    if not n or not left:
        return None
    chosen = list(dict.fromkeys(arms[round(i * (len(arms) - 1) / max(n - 1, 1))] for i in range(n)))
    with TemporaryDirectory(prefix="marl-memory-study-") as folder, ThreadPoolExecutor(slots(plan)) as threads:
        (Path(folder) / PLAN).write_text(json.dumps(as_json(plan)))

        def tried(task: str, arm: str) -> dict[str, float]:
            words = job_words(Path(folder), task, arm, plan.study.seeds[0], "--probe")
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise StudyError(f"task {task}, arm {arm} fails: {done.stderr.strip().splitlines()[-1]}")
            return json.loads(done.stdout.splitlines()[-1])

        found = {task: list(threads.map(lambda arm, task=task: tried(task, arm), chosen)) for task in plan.study.tasks}
    seconds = sum(sum(one["seconds"] for one in found[task]) / len(found[task]) for task, _, _ in left)
    most = max(one["bytes"] for task in found for one in found[task])
    at_once = min(slots(plan), len(left))
    return Estimate(seconds=seconds / at_once, bytes=most * at_once, arms=chosen)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(f"{folder} is being run by another process: wait for it, or stop it") from error
        yield


@contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM lets what runs save and leave, and starts nothing more; a second one leaves at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, previous[number])
        print("\nleaving: runs finish their iteration and save", file=sys.stderr, flush=True)

    previous = {int(number): signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
