"""Numbers as a reader wants them, and the sentence that answers a study's question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from marl_memory.study.report.document import Answer
from marl_memory.study.report.summary import Pair, Summary
from marl_memory.study.statistics import LEAST_RUNS, Estimate

NOTHING = "–"
SPACE = "\u00a0"
"""One that does not break."""

VERDICTS = {
    "above": "Above {} (the interval lies above 0)",
    "below": "Below {} (the interval lies below 0)",
    "not told apart": "Not told apart from {} (the interval includes 0)",
    "the same": "With the same score as {} at every seed",
    "too few seeds": "Beside {}, without an interval (too few seeds)",
    "not comparable": "Without a seed in common with {}",
}
"""What an interval of a difference to the baseline allows to say."""


def number(value: float, decimals: int) -> str:
    """With a minus sign, and thousands apart."""
    text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")  # no minus before a zero
    return text.replace("-", "−").replace(",", "\u202f")


def decimals_for(width: float) -> int:
    """So many that ``width`` is 5 to 49 steps of the last of them."""
    return min(6, max(0, 1 + math.ceil(-math.log10(width / 0.5)))) if width > 0 else 2


def _decimals(estimate: Estimate) -> int:
    if estimate.interval is None or estimate.interval[1] == estimate.interval[0]:
        return decimals_for(abs(estimate.value) / 10)
    return decimals_for(estimate.interval[1] - estimate.interval[0])


def common_decimals(estimates: Iterable[Estimate | None]) -> int:
    """For all numbers of a column."""
    return round(median([_decimals(estimate) for estimate in estimates if estimate is not None] or [2]))


def write(estimate: Estimate | None, *, sign: bool = False, decimals: int | None = None) -> str:
    """As in ``1.3 [0.4, 2.2]``; by itself, with as many decimals as its interval bears."""
    if estimate is None:
        return NOTHING
    decimals = _decimals(estimate) if decimals is None else decimals
    plus = "+" if sign and round(estimate.value, decimals) > 0 else ""
    text = plus + number(estimate.value, decimals)
    return text + _brackets(estimate, lambda end: number(end, decimals))


def write_chance(estimate: Estimate | None) -> str:
    """A probability with two decimals."""
    if estimate is None:
        return NOTHING
    return f"{estimate.value:.2f}" + _brackets(estimate, lambda end: f"{end:.2f}")


def _brackets(estimate: Estimate, text: Callable[[float], str]) -> str:
    """An interval, which no line's end breaks."""
    return "" if estimate.interval is None else f"{SPACE}[{f',{SPACE}'.join(map(text, estimate.interval))}]"


def verdict(pair: Pair | None) -> str:
    """What an interval of a difference allows to say."""
    if pair is None or pair.difference is None:
        return "not comparable"
    if pair.same:
        return "the same"
    if pair.difference.interval is None:
        return "too few seeds"
    if not pair.difference.excludes(0.0):
        return "not told apart"
    return "above" if pair.difference.value > 0 else "below"


def metric_name(summary: Summary) -> str:
    """The metric, and whether it is on a common scale."""
    return f"normalised {summary.study.metric}" if summary.several else summary.study.metric


def count(numbers: Mapping[str, int] | Sequence[int], word: str) -> str:
    """As in ``5 seeds``, or ``3 to 5 seeds`` where tasks differ."""
    values = sorted(numbers.values() if isinstance(numbers, Mapping) else numbers)
    if not values:
        return f"no {word}"
    few, many = values[0], values[-1]
    text = str(few) if few == many else f"{few} to {many}"
    return f"{text} {word}" if many == 1 else f"{text} {word}s"


def answer(summary: Summary) -> Answer:
    """A sentence with its uncertainty for each baseline, then how every arm compares with its own."""
    where = f"Over {len(summary.tasks)} tasks" if summary.several else f"On {next(iter(summary.tasks))}"
    families = {name: arms for name, arms in summary.families.items() if arms or name in summary.arms}
    unit = f"difference of interquartile means of {metric_name(summary)}"
    sentences = [
        _sentence(summary, name, arms, where=where, unit=unit if i == 0 else "the same difference")
        for i, (name, arms) in enumerate(families.items())
    ]
    best = max(summary.arms, key=lambda arm: summary.overall.arms[arm]["final"].value)
    remarks = [f"Greatest interquartile mean: {best}, {write(summary.overall.arms[best]['final'])}."]
    for name, arms in families.items():
        remarks += _verdicts(summary, name, arms)
    if len(summary.others) > len(families):
        remarks.append(
            "Intervals are not corrected for the number of arms, and the best arm was picked after the runs: "
            "both flatter it."
        )
    return Answer(" ".join(sentences), remarks)


def _sentence(summary: Summary, baseline: str, others: Sequence[str], *, where: str, unit: str) -> str:
    """The best arm beside the baseline; where that is the best, the arm that comes nearest."""
    scores = {arm: estimates["final"] for arm, estimates in summary.overall.arms.items()}
    pairs = {arm: summary.beside_baseline(summary.overall, arm) for arm in others}
    differing = [arm for arm, pair in pairs.items() if pair is None or not pair.same]  # an equal arm tells nothing
    arm = max(differing or others, key=lambda arm: scores[arm].value, default=baseline)
    several = len(others) > 1
    if arm == baseline:
        return f"{where}, {arm} scores {write(scores[arm])} ({metric_name(summary)}); no other arm has a finished run."
    pair = pairs[arm]
    if pair is None or pair.difference is None:
        why = "has no finished run" if baseline not in scores else "shares no seed with it"
        return (
            f"{where}, {arm} scores {write(scores[arm])} ({metric_name(summary)}), but nothing can be told: "
            f"the baseline {baseline} {why}."
        )
    difference, seeds = pair.difference, _paired_seeds(summary, pair)
    far = f"{write(Estimate(abs(difference.value), *_turned(difference)))} {_side(difference)} {baseline}"
    unit = f"{unit} over {seeds}"
    if pair.same:
        who = f"every arm scores the same as {baseline}" if several else f"{arm} scores the same as {baseline}"
        return f"{where}, {who} at {seeds} ({metric_name(summary)})."
    if difference.interval is None:
        return (
            f"{where}, no difference can be told: {arm} is {far} ({unit}), "
            f"but an interval takes {LEAST_RUNS} seeds on each task."
        )
    unit += ", with its 95 % interval"
    if not difference.excludes(0.0):
        above = [other for other in others if verdict(pairs[other]) == "above"]
        told = f"no arm can be told to be better than {baseline}" if several else "no difference can be told"
        if above:
            told = f"{arm}, which scores best, can not be told from {baseline}, but {', '.join(above)} can"
        of_them = f"the best of the others, {arm}," if several else arm
        return f"{where}, {told} at {seeds}: {of_them} is {far} ({unit}); the interval includes 0."
    if difference.value < 0:
        lead = f"{baseline} is best: the nearest arm, {arm}, is" if several else f"{arm} is"
    else:
        lead = f"{arm} is best:" if several else f"{arm} is"
    return f"{where}, {lead} {far} ({unit}); the interval excludes 0."


def _paired_seeds(summary: Summary, pair: Pair) -> str:
    """As in ``5 paired seeds on each of 2 tasks``."""
    seeds, tasks = count(pair.seeds, "paired seed"), len(summary.tasks)
    if len(pair.seeds) < tasks:
        return f"{seeds} on {len(pair.seeds)} of {tasks} tasks"
    return f"{seeds} on each of {tasks} tasks" if summary.several else seeds


def _turned(difference: Estimate) -> tuple[float, ...]:
    """Ends of the interval of the difference's size, in the direction that the sentence says."""
    if difference.interval is None:
        return ()
    low, high = difference.interval
    return (low, high) if difference.value >= 0 else (-high, -low)


def _side(difference: Estimate) -> str:
    return "above" if difference.value >= 0 else "below"


def _verdicts(summary: Summary, baseline: str, others: Sequence[str]) -> list[str]:
    by_verdict: dict[str, list[str]] = {}
    for arm in others:
        by_verdict.setdefault(verdict(summary.beside_baseline(summary.overall, arm)), []).append(arm)
    return [
        f"{words.format(baseline)}: {', '.join(by_verdict[name])}."
        for name, words in VERDICTS.items()
        if name in by_verdict
    ] + _areas(summary, baseline, others)


def _areas(summary: Summary, baseline: str, others: Sequence[str]) -> list[str]:
    """Arms whose curves lie above or below the baseline's as a whole, wherever they end."""
    pairs = {arm: summary.beside_baseline(summary.overall, arm) for arm in others}
    areas = {arm: pair.area for arm, pair in pairs.items() if pair is not None and pair.area is not None}
    sides: dict[str, list[str]] = {}
    for arm, area in areas.items():
        if area.excludes(0.0):
            sides.setdefault(_side(area), []).append(arm)
    return [
        f"With an area under the curve {side} that of {baseline} (the interval excludes 0): {', '.join(arms)}."
        for side, arms in sorted(sides.items())
    ]
