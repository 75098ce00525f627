"""The sections of a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from marl_memory.study.report.document import Block, Code, Column, Details, Heading, Items, Link, Table, Text
from marl_memory.study.report.provenance import Provenance
from marl_memory.study.report.summary import QUANTITIES, Panel, Summary
from marl_memory.study.report.wording import NOTHING, common_decimals, number, verdict, write, write_chance
from marl_memory.study.statistics import Estimate

METHODS = (
    ("Score", "the metric's value in the evaluation at the end of a run: the last policy's."),
    (
        "Interquartile mean (IQM)",
        "the mean of the runs of all tasks without the least and the greatest quarter of them (each rounded down to "
        "whole runs).",
    ),
    (
        "Interval",
        "95 %, percentile bootstrap stratified by task: runs are drawn anew within each task, 10 000 times "
        "(2 000 times for bands), from a fixed seed. It tells of seeds, not of tasks that were not played; "
        "with five seeds it is rather too narrow.",
    ),
    (
        "Difference",
        "of interquartile means; runs of both arms with the same seed are drawn together, and only seeds that both "
        "have count.",
    ),
    (
        "Probability of improvement",
        "that a run of one arm scores higher than a run of the other on the same task, ties by half, as a mean over "
        "tasks (Mann–Whitney U divided by the number of pairs).",
    ),
    ("Performance profile", "for every score, the share of runs that score more."),
    (
        "Area under the curve",
        "the mean height of the learning curve (trapezoid rule): greater where learning is faster.",
    ),
    (
        "Absolute metric",
        "that of the policy that evaluated best in a run, played anew for ten times the episodes of an evaluation.",
    ),
)

REFERENCES = (
    (
        "Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021",
        "2108.13264",
    ),
    (
        "Gorsane et al., Towards a Standardised Performance Evaluation Protocol for Cooperative MARL, NeurIPS 2022",
        "2209.10485",
    ),
)


def estimates_table(summary: Summary, panel: Panel, caption: str) -> Table:
    """Arms in the rows: what they score, and how they compare with the baseline."""
    columns = [
        Column("Arm", number=False),
        Column("Runs"),
        Column("IQM at the end"),
        Column("Difference", "to baseline"),
        Column("P(better)", "than baseline"),
        Column("Interval says", number=False),
        Column("Absolute metric", "IQM"),
        Column("Area under curve", "IQM"),
        Column("Difference of areas", "to baseline"),
    ]
    pairs = {arm: summary.beside_baseline(panel, arm) for arm in panel.arms}
    scores = {name: _column([found.get(name) for found in panel.arms.values()]) for name in QUANTITIES}
    difference, area = (
        _column([None if pair is None else getattr(pair, name) for pair in pairs.values()], sign=True)
        for name in ("difference", "area")
    )
    rows = []
    for i, arm in enumerate(panel.arms):
        pair = pairs.get(arm)
        rows.append(
            (
                arm,
                _runs(list(panel.runs[arm].values())),
                scores["final"][i],
                difference[i],
                NOTHING if pair is None else write_chance(pair.improvement),
                "baseline" if arm == summary.study.baseline_of(arm) else verdict(pair),
                scores["absolute"][i],
                scores["area"][i],
                area[i],
            )
        )
    return Table(caption, columns, rows)


def _runs(counts: Sequence[int]) -> str:
    """As in ``3 × 5`` for five runs on each of three tasks, or ``5 + 4``."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} × {counts[0]}"
    return " + ".join(map(str, counts))


def _column(estimates: Iterable[Estimate | None], *, sign: bool = False) -> list[str]:
    """With the same decimals in every row."""
    estimates = list(estimates)
    decimals = common_decimals(estimates)
    return [write(estimate, sign=sign, decimals=decimals) for estimate in estimates]


def improvement_table(summary: Summary) -> Table:
    """The probability of improvement of every arm over every other."""
    arms = summary.arms
    pairs = {(a, b): summary.overall.pair(a, b) for a in arms for b in arms if a != b}
    rows = [
        [a, *(write_chance(pair.improvement) if (pair := pairs.get((a, b))) is not None else NOTHING for b in arms)]
        for a in arms
    ]
    columns = [Column("Row better than column", number=False), *(Column(arm) for arm in arms)]
    return Table("Probability that a run of the row scores higher than one of the column", columns, rows)


def arms_table(summary: Summary) -> Table:
    """What each arm changes."""
    study = summary.study
    rows = [
        (f"{arm} (baseline)" if arm == study.baseline_of(arm) else arm, " ".join(map(str, overrides)) or "nothing")
        for arm, overrides in study.arms.items()
    ]
    return Table(
        "What each arm changes of the configuration",
        [Column("Arm", number=False), Column("Overrides", number=False)],
        rows,
    )


def repeat(summary: Summary, made: Provenance) -> list[Block]:
    """Versions, commands and seeds."""
    study = summary.study
    blocks: list[Block] = [Heading("Repeat it", "repeat")]
    if made.command is not None:
        blocks += [Text("The command that ran this study:"), Code(made.command)]
    facts = [
        ("Seeds", ", ".join(map(str, study.seeds))),
        *((f"Task {task}", shlex.join(map(str, overrides)) or "nothing") for task, overrides in study.tasks.items()),
    ]
    if study.budget is not None:
        facts.append(("Frames of each run", number(study.budget, 0)))
    blocks.append(Items(facts))
    if made.common:
        columns = [Column("Package or setting", number=False), Column("Version or value", number=False)]
        blocks.append(Table("What all runs were made with", columns, list(made.common.items())))
    if made.runs:
        lines = "\n".join(f"# {task}, {arm}, seed {seed}\n{text}" for (task, arm, seed), text in made.runs.items())
        blocks.append(
            Details(
                f"Commands of the {len(made.runs)} single runs",
                [Text("Every run also keeps its whole configuration, config.yaml.", small=True), Code(lines)],
            )
        )
    return blocks


def methods() -> list[Block]:
    """What the words mean, and where they come from."""
    return [
        Heading("How to read this", "methods"),
        Items(METHODS),
        *(Link(title, f"https://arxiv.org/abs/{number}") for title, number in REFERENCES),
    ]
