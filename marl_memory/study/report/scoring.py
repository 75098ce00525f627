"""From the records of a study to its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from marl_memory.study.definition import Study
from marl_memory.study.report.summary import QUANTITIES, Key, Pair, Panel, Run, Summary
from marl_memory.study.results import Record, Results, StudyError
from marl_memory.study.statistics import (
    Array,
    Estimate,
    area_under_curve,
    difference_estimate,
    improvement_estimate,
    iqm_estimate,
    normalise,
)

Scores = Mapping[str, Mapping[int, float]]
"""Of one arm, by task and seed."""


def summarise(results: Results) -> Summary:
    """The numbers of a study.

    Raises:
        StudyError: if no run has finished, or none has the metric.
    """
    study = results.study
    runs, left_out = _score_runs(results)
    tasks = [task for task in study.tasks if any(key[0] == task for key in runs)]
    ranges = {
        task: (
            float(min(run.values.min() for key, run in runs.items() if key[0] == task)),
            float(max(run.values.max() for key, run in runs.items() if key[0] == task)),
        )
        for task in tasks
    }
    several = len(tasks) > 1
    panels = {task: _panel(study, runs, [task], lambda _, scores: scores, every_pair=not several) for task in tasks}
    overall = panels[tasks[0]]
    if several:
        overall = _panel(study, runs, tasks, lambda task, scores: normalise(scores, *ranges[task]), every_pair=True)
    return Summary(study=study, runs=runs, left_out=left_out, ranges=ranges, overall=overall, tasks=panels)


def _score_runs(results: Results) -> tuple[dict[Key, Run], dict[Key, str]]:
    metric, records = results.study.metric, results.records
    if not records:
        reasons = "; ".join(f"{_name(key)}: {reason}" for key, reason in list(results.missing.items())[:3])
        raise StudyError(f"{results.folder}: no run has finished, so there is nothing to report ({reasons})")
    known = sorted({name for record in records.values() for name in record.curves})
    if metric not in known:
        raise StudyError(f"{results.folder}: no run has metric={metric!r}; they have {', '.join(known) or 'none'}")
    runs: dict[Key, Run] = {}
    left_out = dict(results.missing)
    for key, record in records.items():
        found = _score(record, metric)
        if isinstance(found, Run):
            runs[key] = found
        else:
            left_out[key] = found
    if not runs:
        raise StudyError(f"{results.folder}: no run has a usable {metric} ({_name(key)}: {left_out[key]})")
    study = results.study
    order = [(task, arm, seed) for task in study.tasks for arm in study.arms for seed in study.seeds]
    return {key: runs[key] for key in order if key in runs}, {key: left_out[key] for key in order if key in left_out}


def _score(record: Record, metric: str) -> Run | str:
    """The run of a record, or why it has none."""
    frames, values = (np.asarray(part, dtype=np.float64) for part in record.curves.get(metric, ((), ())))
    if not len(values):
        return f"it has no {metric}"
    if not np.isfinite(values).all():
        return f"its {metric} is not finite everywhere"
    scores = {"final": float(values[-1]), "area": area_under_curve(frames, values)}
    absolute = record.absolute.get(metric.removeprefix("evaluation/"), ())
    if len(absolute):
        scores["absolute"] = float(np.mean(absolute))
    return Run(frames=frames, values=values, scores=scores)


def _panel(
    study: Study,
    runs: Mapping[Key, Run],
    tasks: Sequence[str],
    scale: Callable[[str, Array], Array],
    *,
    every_pair: bool,
) -> Panel:
    """Estimates over ``tasks``; pairs of all arms, or those with the baseline only."""
    scores = {
        quantity: {arm: _by_task(runs, arm, tasks, quantity, scale) for arm in study.arms} for quantity in QUANTITIES
    }
    final, area = scores["final"], scores["area"]
    arms = [arm for arm in study.arms if final[arm]]
    order = sorted(arms, key=lambda arm: arm == study.baseline_of(arm))  # a baseline is the second of its pairs
    pairs = [(a, b) for a, b in combinations(order, 2) if every_pair or b == study.baseline_of(a)]
    return Panel(
        task=tasks[0] if len(tasks) == 1 else None,
        runs={arm: {task: len(final[arm].get(task, ())) for task in tasks} for arm in arms},
        arms={
            arm: {
                name: iqm_estimate([np.array(list(by_seed.values())) for by_seed in scores[name][arm].values()])
                for name in QUANTITIES
                if scores[name][arm]
            }
            for arm in arms
        },
        pairs={(a, b): _pair(final[a], final[b], _difference(area[a], area[b])) for a, b in pairs},
        samples={arm: {task: np.array(list(found.values())) for task, found in final[arm].items()} for arm in arms},
    )


def _by_task(
    runs: Mapping[Key, Run],
    arm: str,
    tasks: Sequence[str],
    quantity: str,
    scale: Callable[[str, Array], Array],
) -> dict[str, dict[int, float]]:
    """Scores of an arm by task and seed; tasks without any are left out."""
    found = {}
    for task in tasks:
        scores = {
            key[2]: run.scores[quantity]
            for key, run in runs.items()
            if key[:2] == (task, arm) and quantity in run.scores
        }
        if scores:
            found[task] = dict(zip(scores, scale(task, np.array(list(scores.values()))).tolist(), strict=True))
    return found


def _common(a: Scores, b: Scores) -> dict[str, list[int]]:
    """Seeds that both have, by task."""
    found = {task: [seed for seed in a[task] if seed in b[task]] for task in a if task in b}
    return {task: seeds for task, seeds in found.items() if seeds}


def _difference(a: Scores, b: Scores) -> Estimate | None:
    common = _common(a, b)
    if not common:
        return None
    return difference_estimate(
        *([np.array([scores[task][seed] for seed in seeds]) for task, seeds in common.items()] for scores in (a, b))
    )


def _pair(a: Scores, b: Scores, area: Estimate | None) -> Pair:
    both, common = [task for task in a if task in b], _common(a, b)
    improvement = None
    if both:
        improvement = improvement_estimate(
            *([np.array(list(scores[task].values())) for task in both] for scores in (a, b))
        )
    return Pair(
        seeds={task: len(seeds) for task, seeds in common.items()},
        difference=_difference(a, b),
        area=area,
        improvement=improvement,
        same=bool(common) and all(a[task][seed] == b[task][seed] for task in common for seed in common[task]),
    )


def _name(key: Key) -> str:
    return f"{key[0]}, {key[1]}, seed {key[2]}"
