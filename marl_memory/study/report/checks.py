"""What a reader must know before the numbers: missing runs, arms that are one, too few seeds, runs that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from marl_memory.study.report.document import Notice
from marl_memory.study.report.provenance import Provenance
from marl_memory.study.report.summary import Summary, too_few
from marl_memory.study.results import Results
from marl_memory.study.statistics import LEAST_RUNS

LISTED = 12
"""Runs that a notice names one by one."""


def notices(results: Results, summary: Summary, provenance: Provenance) -> list[Notice]:
    """All of them, the gravest first."""
    return [
        *_broken_promises(results),
        *_one_arm(results),
        *_missing(summary),
        *_intervals(summary),
        *_unequal(summary),
        *_differences(provenance),
        *_kept_promises(results),
    ]


def same_bits(results: Results) -> list[tuple[list[str], list[str]]]:
    """Groups of arms that end in the same bits at every seed that they share, each with the tasks where they do."""
    found: dict[tuple[str, ...], list[str]] = {}
    for task in results.study.tasks:
        digests = {arm: _digests(results, task, arm) for arm in results.study.arms}
        groups: list[list[str]] = []
        for arm in results.study.arms:
            group = next((group for group in groups if all(_equal(digests[arm], digests[a]) for a in group)), None)
            if group is None:
                groups.append([arm])
            else:
                group.append(arm)
        for group in groups:
            if len(group) > 1:
                found.setdefault(tuple(group), []).append(task)
    return [(list(group), tasks) for group, tasks in found.items()]


def _equal(a: Mapping[int, str], b: Mapping[int, str]) -> bool:
    common = [seed for seed in a if seed in b]
    return bool(common) and all(a[seed] == b[seed] for seed in common)


def _digests(results: Results, task: str, arm: str) -> dict[int, str]:
    keys = [(task, arm, seed) for seed in results.study.seeds]
    return {key[2]: results.records[key].digest for key in keys if key in results.records}


def _one_arm(results: Results) -> list[Notice]:
    """Arms that should differ and do not: all in a group, or (if it is promised) beyond the promise."""
    promised = [set(group) for group in results.study.equal]
    items = []
    for group, tasks in same_bits(results):
        if any(set(group) <= equal for equal in promised):
            continue
        where = "on every task" if len(tasks) == len(results.study.tasks) else f"on {_and(tasks)}"
        items.append(f"{_and(group)}: same parameters {where}, at every seed that they share")
    title = "Arms that end in the same bits: what they vary had no effect, so there the axis is not one"
    return [Notice("warning", title, items)] if items else []


def _promises(results: Results) -> tuple[list[str], list[str], list[str]]:
    """What breaks, keeps, and can not tell of each group that must be equal."""
    broken, kept, unknown = [], [], []
    for group in results.study.equal:
        compared, differing = 0, []
        for task in results.study.tasks:
            digests = {arm: _digests(results, task, arm) for arm in group}
            for a, b in combinations(group, 2):
                common = [seed for seed in digests[a] if seed in digests[b]]
                compared += len(common)
                seeds = [seed for seed in common if digests[a][seed] != digests[b][seed]]
                if seeds:
                    differing.append(f"{a} and {b} differ on {task} at {_seeds(seeds)}")
        if differing:
            broken += differing
        elif compared:
            kept.append(f"{_and(list(group))}: {compared} {'pair' if compared == 1 else 'pairs'} of runs compared")
        else:
            unknown.append(f"{_and(list(group))}: no seed at which two of them finished")
    return broken, kept, unknown


def _broken_promises(results: Results) -> list[Notice]:
    broken, _, unknown = _promises(results)
    found = []
    if broken:
        found.append(Notice("wrong", "Arms that must end in the same bits do not: do not trust this study", broken))
    if unknown:
        found.append(Notice("warning", "Arms that must end in the same bits could not be compared", unknown))
    return found


def _kept_promises(results: Results) -> list[Notice]:
    kept = _promises(results)[1]
    return [Notice("good", "Arms that must end in the same bits do", kept)] if kept else []


def _missing(summary: Summary) -> list[Notice]:
    if not summary.left_out:
        return []
    items = [f"{task}, {arm}, seed {seed}: {why}" for (task, arm, seed), why in summary.left_out.items()]
    if len(items) > LISTED:
        items = [*items[: LISTED - 1], f"and {len(items) - LISTED + 1} more: see the table of runs"]
    total = len(summary.runs) + len(summary.left_out)
    title = (
        f"{len(summary.left_out)} of {total} runs are missing; the report is drawn from the others, "
        "and paired comparisons from the seeds that both arms have"
    )
    return [Notice("warning", title, items)]


def _intervals(summary: Summary) -> list[Notice]:
    arms = too_few(summary)
    if not arms:
        return []
    which = "any arm" if len(arms) == len(summary.arms) else _and(arms)
    return [
        Notice(
            "warning",
            f"Too few seeds for an interval of {which}: {LEAST_RUNS} on each task is the least, 5 or more are better",
        )
    ]


def _unequal(summary: Summary) -> list[Notice]:
    """Arms without any run of some task: what is pooled is not the same."""
    items = []
    for arm, counts in summary.overall.runs.items():
        without = [task for task, n in counts.items() if not n]
        if without:
            items.append(f"{arm} has no run of {_and(without)}")
    gone = [arm for arm in summary.study.arms if arm not in summary.overall.arms]
    items += [f"{arm} has no run at all" for arm in gone]
    return (
        [Notice("warning", "Not every arm played every task: numbers over all tasks compare unlike things", items)]
        if items
        else []
    )


def _differences(provenance: Provenance) -> list[Notice]:
    found = []
    if provenance.differences:
        found.append(
            Notice("warning", "Runs were not all made with the same versions and settings", provenance.differences)
        )
    if provenance.edited:
        found.append(
            Notice(
                "warning",
                "The library's checkout was changed but not committed when runs were made: "
                "its commit alone does not repeat them",
            )
        )
    return found


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {_and([str(seed) for seed in seeds])}"
