"""Tables of a report that tell of single runs, and of what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from urllib.parse import quote

from marl_memory.study.report.document import Column, Link, Table
from marl_memory.study.report.summary import QUANTITIES, Summary
from marl_memory.study.report.wording import NOTHING, decimals_for, number
from marl_memory.study.results import Record, Results


def cost_table(results: Results, summary: Summary, task: str) -> Table:
    """Medians over the runs of each arm."""
    columns = [
        Column("Arm", number=False),
        Column("Runs"),
        Column("Wall-clock", "s"),
        Column("Wall-clock", "× baseline"),
        Column("Speed", "frames/s"),
        Column("Peak memory", "MB"),
        Column("Retrieval and writing", "s in operators"),
        Column("Rows", "held"),
        Column("Payloads", "single agents"),
        Column("Operators hold", "MB"),
        Column("Parameters", "added"),
    ]
    rows = []
    for arm in summary.study.arms:
        runs = _costs(results, task, arm)
        if runs:
            wall = _median(runs, "wall_seconds")
            reference = _median(_costs(results, task, summary.study.baseline_of(arm)), "wall_seconds")
            rows.append(
                (
                    arm,
                    str(len(runs)),
                    _three(wall),
                    NOTHING if wall is None or not reference else f"{wall / reference:.2f}",
                    _three(_median(runs, "frames_per_second")),
                    _three(_median(runs, "peak_bytes"), 1e-6),
                    _three(_median(runs, "memory_seconds")),
                    _three(_median(runs, "rows")),
                    _three(_median(runs, "payloads")),
                    _three(_median(runs, "memory_bytes"), 1e-6),
                    _three(_median(runs, "memory_parameters")),
                )
            )
    return Table(f"{task}: median over the runs of an arm; MB are 10⁶ bytes", columns, rows)


def _costs(results: Results, task: str, arm: str) -> list[Mapping[str, float]]:
    return [record.costs for key, record in results.records.items() if key[:2] == (task, arm)]


def _median(runs: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [run[name] for run in runs if name in run]
    return median(values) if values else None


def _three(value: float | None, scale: float = 1.0) -> str:
    """With three digits, whole numbers whole."""
    if value is None:
        return NOTHING
    value *= scale
    return number(value, 0 if value == int(value) or abs(value) >= 100 else decimals_for(abs(value) / 10))


def runs_table(results: Results, summary: Summary, task: str) -> Table:
    """Every run of a task, with links to what it left behind."""
    columns = [
        Column("Arm", number=False),
        Column("Seed"),
        Column("Frames"),
        Column("At the end"),
        Column("Absolute"),
        Column("Area"),
        Column("Parameters", "SHA-256", number=False),
        Column("Files, or why it is missing", number=False),
    ]
    least, greatest = summary.ranges.get(task, (0.0, 0.0))
    decimals = decimals_for((greatest - least) / 10)
    rows = []
    for arm in summary.study.arms:
        for seed in summary.study.seeds:
            key = (task, arm, seed)
            record, run = results.records.get(key), summary.runs.get(key)
            scores = {} if run is None else run.scores
            rows.append(
                (
                    arm,
                    str(seed),
                    NOTHING if record is None else number(record.frames, 0),
                    *(number(scores[name], decimals) if name in scores else NOTHING for name in QUANTITIES),
                    NOTHING if record is None else record.digest[:8],
                    summary.left_out.get(key) or _links(results, task, arm, seed, record),
                )
            )
    return Table(f"Every run on {task}: {summary.study.metric}", columns, rows)


def _links(results: Results, task: str, arm: str, seed: int, record: Record | None) -> Sequence[Link]:
    folder = results.run_folder(task, arm, seed)
    names = {"curve": "curve.png", "numbers": "metrics.csv", "configuration": "config.yaml", "run": "run.json"}
    which = f"of {task}, {arm}, seed {seed}"
    where = Path("..") / folder.relative_to(results.folder)
    found = [Link("folder", f"{quote(where.as_posix())}/", f"Folder {which}")] if record is not None else []
    return found + [
        Link(text, quote((where / name).as_posix()), f"{name} {which}")
        for text, name in names.items()
        if (folder / name).exists()
    ]
