"""Results as marl-eval reads them.

Its form is environment → task → algorithm → run → ``step_…`` and ``absolute_metrics``.  A step has a ``step_count`` and
a list of numbers for each metric; the absolute metrics are the same metrics.  It computes with arrays: all algorithms
must have the same runs on every task, and every run the same number of steps.  Names of algorithms may have no comma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from marl_memory.study.report.provenance import read_json
from marl_memory.study.report.summary import Key
from marl_memory.study.results import Record, Results

PREFIX = "evaluation/"


def marl_eval(results: Results) -> tuple[dict[str, Any], list[str]]:
    """What to write for marl-eval, and what had to be left out so that it can be read.

    A step holds the mean of an evaluation's episodes, as a list of one number; the absolute metrics hold one number for
    each of their ten times as many episodes.
    """
    usable, notes = _rectangle(results)
    metrics = _metrics(list(usable.values()))
    points = min((_points(record, metrics) for record in usable.values()), default=0)
    if any(_points(record, metrics) > points for record in usable.values()):
        notes.append(f"runs were evaluated a different number of times: the first {points} of each are there")
    suites = {task: environment(results, task) for task in results.study.tasks}
    found: dict[str, Any] = {}
    for (task, arm, seed), record in usable.items():
        algorithms = found.setdefault(suites[task], {}).setdefault(task, {})
        algorithms.setdefault(arm.replace(",", ";"), {})[f"seed_{seed}"] = _run(record, metrics, points)
    return (found if metrics else {}), notes if metrics else [*notes, "no metric has absolute values: it is empty"]


def environment(results: Results, task: str) -> str:
    """The suite of a task, as in ``mpe/simple_spread``; the study's name where a run's task has no suite."""
    for key in results.records:
        if key[0] == task:
            described = read_json(results.run_folder(*key) / "run.json").get("task") or {}
            suite, separator, _ = str(described.get("name", "")).partition("/")
            if separator:
                return suite
    return results.study.name


def _rectangle(results: Results) -> tuple[dict[Key, Record], list[str]]:
    """Records of the tasks, arms and seeds that leave no gap."""
    study, notes = results.study, []
    tasks = [task for task in study.tasks if any(key[0] == task for key in results.records)]
    arms = [arm for arm in study.arms if all(any(key[:2] == (task, arm) for key in results.records) for task in tasks)]
    seeds = [
        seed for seed in study.seeds if all((task, arm, seed) in results.records for task in tasks for arm in arms)
    ]
    for name, kept, all_of_them in (("arms", arms, study.arms), ("seeds", seeds, study.seeds)):
        gone = [str(value) for value in all_of_them if value not in kept]
        if gone:
            notes.append(f"{name} without a finished run everywhere are left out: {', '.join(gone)}")
    keys = [(task, arm, seed) for task in tasks for arm in arms for seed in seeds]
    return {key: results.records[key] for key in keys}, notes


def _metrics(records: Sequence[Record]) -> list[str]:
    """Metrics that every record has as a curve and as an absolute metric, both finite."""
    names = list(dict.fromkeys(name.removeprefix(PREFIX) for record in records for name in record.curves))
    return [name for name in names if all(_has(record, name) for record in records)]


def _has(record: Record, name: str) -> bool:
    numbers = [*record.curves.get(PREFIX + name, ((), ()))[1], *record.absolute.get(name, ())]
    return bool(record.absolute.get(name)) and PREFIX + name in record.curves and all(map(math.isfinite, numbers))


def _points(record: Record, metrics: Sequence[str]) -> int:
    return min((len(record.curves[PREFIX + name][0]) for name in metrics), default=0)


def _run(record: Record, metrics: Sequence[str], points: int) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for i in range(points):
        frames = record.curves[PREFIX + metrics[0]][0][i]
        steps[f"step_{i}"] = {
            "step_count": int(frames),
            **{name: [float(record.curves[PREFIX + name][1][i])] for name in metrics},
        }
    steps["absolute_metrics"] = {name: [float(value) for value in record.absolute[name]] for name in metrics}
    return steps
