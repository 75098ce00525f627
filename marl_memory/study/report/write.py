"""The report on a study: one page, the same as Markdown with pictures, and its tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from marl_memory.study.report.checks import notices
from marl_memory.study.report.document import Block, Column, Details, Document, Figures, Heading, Key, Link, Table, Text
from marl_memory.study.report.drawings import curves, intervals, profile
from marl_memory.study.report.figures import Look, legend, looks
from marl_memory.study.report.markdown import markdown
from marl_memory.study.report.marl_eval import marl_eval
from marl_memory.study.report.page import page
from marl_memory.study.report.provenance import provenance
from marl_memory.study.report.run_tables import cost_table, runs_table
from marl_memory.study.report.scoring import summarise
from marl_memory.study.report.sections import (
    arms_table,
    estimates_table,
    improvement_table,
    methods,
    repeat,
)
from marl_memory.study.report.summary import Summary
from marl_memory.study.report.tables import costs_csv, results_csv, runs_csv
from marl_memory.study.report.wording import answer, count, metric_name, number
from marl_memory.study.results import Results, read_results
from marl_memory.training.checkpoint import naming

REPORT = "report"

UNFOLDED = 20
"""Runs whose table is shown without being asked for."""

SCALE = (
    "Scores of a task are put on a scale from 0, the least value of any evaluation of any run there, to 1, the "
    "greatest; tables of each task in its own unit follow below."
)

FILES = (
    ("results.csv", "every estimate with its interval; the same records give the same bytes"),
    ("runs.csv", "every run: its scores and the hash of its parameters; the same records give the same bytes"),
    ("costs.csv", "what every run cost; timings differ from machine to machine"),
    ("marl_eval.json", "for marl-eval"),
    ("report.md", "this report as Markdown"),
    ("figures/", "its figures as PNG"),
)


def write_report(folder: Path) -> Path:
    """Write the report on the study in ``folder`` to ``folder/report``, in place of one that is there.

    Returns:
        The page, ``folder/report/index.html``.

    Raises:
        StudyError: if there is no study, or no run of it has finished, or none has its metric.
        NotWrittenError: if a file can not be written.
    """
    results = read_results(folder)
    summary = summarise(results)
    out = folder / REPORT
    shutil.rmtree(out / "figures", ignore_errors=True)
    with naming(out):
        (out / "figures").mkdir(parents=True)
    for_marl_eval, left_out = marl_eval(results)
    document = build(results, summary, out / "figures", left_out)
    texts = {
        "results.csv": results_csv(summary),
        "runs.csv": runs_csv(results, summary),
        "costs.csv": costs_csv(results),
        "marl_eval.json": json.dumps(for_marl_eval, indent=1),
        "report.md": markdown(document),
        "index.html": page(document),
    }
    for name, text in texts.items():
        with naming(out / name):
            (out / name).write_text(text, encoding="utf-8", newline="")
    return out / "index.html"


def build(results: Results, summary: Summary, figures: Path, left_out: list[str]) -> Document:
    """The report, with its figures drawn to the folder ``figures``."""
    study, made = summary.study, provenance(results)
    styles = looks(study)
    shown = legend({arm: styles[arm] for arm in summary.arms})
    finished = f"{len(summary.runs)} of {len(summary.runs) + len(summary.left_out)} runs"
    frames = sorted({record.frames for record in results.records.values()})
    spent = number(frames[0], 0) if len(frames) == 1 else f"{number(frames[0], 0)} to {number(frames[-1], 0)}"
    sizes = {"arm": len(study.arms), "task": len(study.tasks), "seed": len(study.seeds)}
    subtitle = " · ".join(
        (
            f"Study {study.name}",
            " × ".join(count([n], word) for word, n in sizes.items()),
            f"{finished} finished",
            f"{spent} frames each",
            f"metric {study.metric}",
        )
    )
    known = notices(results, summary, made)
    blocks: list[Block] = [
        *(notice for notice in known if notice.kind == "wrong"),
        answer(summary),
        *(notice for notice in known if notice.kind != "wrong"),
        *_compared(summary, styles, figures),
        Heading("Learning curves", "curves"),
        Text(
            f"Interquartile mean of {study.metric} over seeds, in its 95 % interval (no band with fewer than three "
            "seeds); greedy evaluations. Environment steps count frames of all environments.",
            small=True,
        ),
        Figures(curves(summary, styles, figures), shown, wide=True),
        *_by_task(summary),
        *_profile(summary, styles, figures, shown),
        Heading("Probability of improvement", "improvement"),
        improvement_table(summary),
        Heading("Cost", "cost"),
        *(cost_table(results, summary, task) for task in summary.tasks),
        Heading("Arms", "arms"),
        arms_table(summary),
        Heading("Runs", "runs"),
        *_runs(results, summary),
        *repeat(summary, made),
        Heading("Files", "files"),
        _files(left_out),
        *methods(),
    ]
    return Document(title=study.question, subtitle=subtitle, blocks=blocks)


def _compared(summary: Summary, styles: dict[str, Look], folder: Path) -> list[Block]:
    """Arms at the end of training, the baseline first in mind."""
    overall, metric = summary.overall, metric_name(summary)
    found = [
        intervals(
            {arm: overall.arms[arm]["final"] for arm in summary.arms},
            styles,
            folder / "iqm.png",
            title="Interquartile mean at the end",
            alt=f"Interquartile mean of {metric} for each arm, with its 95 % interval",
            xlabel=metric,
        )
    ]
    pairs = {arm: summary.beside_baseline(overall, arm) for arm in summary.others}
    baseline = summary.study.baseline if len(summary.families) == 1 else "the baseline of each level"
    differences = {
        arm: pair.difference for arm, pair in pairs.items() if pair is not None and pair.difference is not None
    }
    chances = {
        arm: pair.improvement for arm, pair in pairs.items() if pair is not None and pair.improvement is not None
    }
    if differences:
        found.append(
            intervals(
                differences,
                styles,
                folder / "difference.png",
                title=f"Difference to {baseline}",
                alt=f"Difference of each arm's interquartile mean to that of {baseline}, paired by seeds",
                xlabel="difference",
                reference=0.0,
            )
        )
    if chances:
        found.append(
            intervals(
                chances,
                styles,
                folder / "improvement.png",
                title=f"Probability of improvement over {baseline}",
                alt=f"Probability that a run of each arm scores higher than one of {baseline}",
                xlabel="probability of a higher score",
                reference=0.5,
                within=(-0.03, 1.03),
            )
        )
    where = "all tasks, scores on a common scale" if summary.several else next(iter(summary.tasks))
    blocks: list[Block] = [Heading("Arms compared", "compared")]
    if summary.several:
        blocks.append(
            Text(SCALE, small=True),
        )
    return [
        *blocks,
        Figures(found),
        estimates_table(summary, overall, f"{metric[0].upper()}{metric[1:]} over {where}; 95 % intervals in brackets"),
    ]


def _by_task(summary: Summary) -> list[Block]:
    if not summary.several:
        return []
    tables = [
        estimates_table(summary, panel, f"{task}: {summary.study.metric}; 95 % intervals in brackets")
        for task, panel in summary.tasks.items()
    ]
    return [Heading("Each task", "tasks"), *tables]


def _profile(summary: Summary, styles: dict[str, Look], folder: Path, shown: list[Key]) -> list[Block]:
    drawn = profile(summary, styles, folder / "profile.png", xlabel=f"score τ ({metric_name(summary)})")
    return [Heading("Performance profile", "profile"), Figures([drawn], shown, wide=True)]


def _runs(results: Results, summary: Summary) -> list[Block]:
    """A table for each task, folded away where it is long."""
    tables = {task: runs_table(results, summary, task) for task in summary.study.tasks}
    if sum(len(table.rows) for table in tables.values()) <= UNFOLDED:
        return list(tables.values())
    return [Details(f"{task}: {len(table.rows)} runs", [table]) for task, table in tables.items()]


def _files(left_out: list[str]) -> Table:
    """What lies beside the page."""
    rows = [
        (Link(name, name), "; ".join([text, *left_out]) if name == "marl_eval.json" else text) for name, text in FILES
    ]
    return Table("Beside this page", [Column("File", number=False), Column("Holds", number=False)], rows)
