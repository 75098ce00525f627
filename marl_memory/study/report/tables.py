"""The tables of a report, for machines.  Only `costs_csv` holds what a repetition does not give to the last digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from marl_memory.study.report.summary import QUANTITIES, Panel, Summary
from marl_memory.study.results import Results
from marl_memory.study.statistics import Estimate

ALL_TASKS = "(all)"
"""In the column ``task``, for scores of all tasks on their common scale."""

COSTS = (
    "wall_seconds",
    "frames_per_second",
    "peak_bytes",
    "memory_seconds",
    "memory_bytes",
    "memory_parameters",
    "rows",
    "payloads",
)


def results_csv(summary: Summary) -> str:
    """Every estimate, of arms and of pairs.

    Of arms ``final``, ``absolute`` and ``area``; of pairs ``difference``, ``area_difference`` and ``improvement``.
    """
    panels = [summary.overall] if summary.several else []
    rows = [row for panel in [*panels, *summary.tasks.values()] for row in _estimates(summary, panel)]
    return _csv(("task", "arm", "against", "quantity", "runs", "value", "low", "high"), rows)


def _estimates(summary: Summary, panel: Panel) -> Iterable[Sequence[object]]:
    task = panel.task if panel.task is not None else ALL_TASKS
    for arm, estimates in panel.arms.items():
        for quantity in QUANTITIES:
            if quantity in estimates:
                yield task, arm, "", quantity, sum(panel.runs[arm].values()), *_numbers(estimates[quantity])
    for arm in panel.arms:
        for against in panel.arms:
            pair = panel.pair(arm, against) if arm != against else None
            if pair is None:
                continue
            if pair.difference is not None:
                yield task, arm, against, "difference", sum(pair.seeds.values()), *_numbers(pair.difference)
            if pair.area is not None:
                yield task, arm, against, "area_difference", sum(pair.seeds.values()), *_numbers(pair.area)
            if pair.improvement is not None:
                runs = sum(panel.runs[arm].values())
                yield task, arm, against, "improvement", runs, *_numbers(pair.improvement)


def runs_csv(results: Results, summary: Summary) -> str:
    """Every run: its scores, the bits it ended in, or why it is missing."""
    rows = []
    for task in summary.study.tasks:
        for arm in summary.study.arms:
            for seed in summary.study.seeds:
                key = (task, arm, seed)
                record, run = results.records.get(key), summary.runs.get(key)
                rows.append(
                    (
                        *key,
                        "" if record is None else record.frames,
                        *(_text(None if run is None else run.scores.get(name)) for name in QUANTITIES),
                        "" if record is None else record.digest,
                        summary.left_out.get(key, ""),
                    )
                )
    return _csv(("task", "arm", "seed", "frames", *QUANTITIES, "digest", "missing"), rows)


def costs_csv(results: Results) -> str:
    """What every finished run cost."""
    rows = [
        (*key, record.frames, *(_text(record.costs.get(name)) for name in COSTS))
        for key, record in results.records.items()
    ]
    return _csv(("task", "arm", "seed", "frames", *COSTS), rows)


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    return _text(estimate.value), _text(estimate.low), _text(estimate.high)


def _text(number: float | None) -> str:
    return "" if number is None else repr(number)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return stream.getvalue()
