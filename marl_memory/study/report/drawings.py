"""What the figures of a report show: curves, intervals, profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from marl_memory.study.report.document import Figure
from marl_memory.study.report.figures import (
    INK,
    MARKS,
    MUTED,
    Look,
    Palette,
    dashed,
    limits,
    make_figure,
    slugs,
    thresholds,
)
from marl_memory.study.report.summary import Run, Summary
from marl_memory.study.statistics import Estimate, iqm_band, profile_band
from marl_memory.training.curve import YLABELS, Line, draw_panel

CURVE_SIZE = (5.4, 3.5)
FEW, FAINT = 3, 0.1
"""Bands of more arms are fainter."""
NAME_WIDTH = 26
"""Letters of an arm's name on one line of an axis."""


def curves(summary: Summary, styles: Mapping[str, Look], folder: Path) -> list[Figure]:
    """A panel for each task, and for each baseline there: interquartile mean over seeds, in a band of its interval."""
    panels = {
        (task, baseline): {
            arm: _curve(runs)
            for arm in summary.arms
            if summary.study.baseline_of(arm) == baseline
            and (runs := [run for key, run in summary.runs.items() if key[:2] == (task, arm)])
        }
        for task in summary.tasks
        for baseline in summary.families
    }
    panels = {key: lines for key, lines in panels.items() if lines}
    titles = {
        (task, baseline): ", ".join([task, *([_level(summary, baseline)] if len(summary.families) > 1 else [])])
        for task, baseline in panels
    }
    names = slugs(list(titles.values()))
    found = []
    for (task, baseline), lines in panels.items():
        title = titles[task, baseline]
        shown = [line for key, others in panels.items() if key[0] == task for line in others.values()]
        ends = [end for line in shown for end in _ends(line)]

        def draw(axes: Any, palette: Palette, lines: Any = lines, ends: Any = ends) -> None:
            alpha = FAINT if len(lines) > FEW else 0.2
            drawn = [
                Line(label=arm, x=x, y=y, band=band, alpha=alpha, style=_style(styles[arm], palette, len(x)))
                for arm, (x, y, band) in lines.items()
            ]
            draw_panel(axes, summary.study.metric, drawn)
            if not summary.study.metric.endswith("/success"):
                axes.set_ylim(limits(ends))

        found.append(
            make_figure(
                draw,
                folder / f"curves_{names[title]}.png",
                title=title,
                alt=f"Learning curves on {title}: {_label(summary)} over environment steps, one line for each arm",
                size=CURVE_SIZE,
                named={arm: styles[arm] for arm in lines},
            )
        )
    return found


def _level(summary: Summary, baseline: str) -> str:
    return baseline.removeprefix(f"{summary.study.baseline}+")


def _ends(line: tuple[Any, Any, Any]) -> Sequence[float]:
    """The least and the greatest that a line shows."""
    _, middle, band = line
    low, high = (middle, middle) if band is None else band
    return float(np.min([low, middle])), float(np.max([high, middle]))


def _curve(runs: Sequence[Run]) -> tuple[Any, Any, Any]:
    """Frames, interquartile mean and band where all runs have values; in between they are interpolated."""
    begin, end = max(run.frames[0] for run in runs), min(run.frames[-1] for run in runs)
    grid = np.unique([x for run in runs for x in run.frames if begin <= x <= end])
    middle, band = iqm_band(np.stack([np.interp(grid, run.frames, run.values) for run in runs], axis=-1))
    return grid, middle, band


def _style(look: Look, palette: Palette, points: int) -> dict[str, Any]:
    return {
        "color": palette.of(look),
        "linestyle": dashed(look),
        "linewidth": 2.0 if look.colour is None else 1.5,
        "marker": look.marker,
        "markersize": 4,
        "markevery": max(1, points // MARKS),
        "zorder": 2 if look.colour is None else 2.5,  # an arm that equals the baseline is seen upon it, dashed
    }


def intervals(
    rows: Mapping[str, Estimate],
    styles: Mapping[str, Look],
    file: Path,
    *,
    title: str,
    alt: str,
    xlabel: str,
    reference: float | None = None,
    within: tuple[float, float] | None = None,
) -> Figure:
    """One row for each arm: a point in its interval, and a line at the value of no difference."""

    def draw(axes: Any, palette: Palette) -> None:
        for i, (arm, estimate) in enumerate(rows.items()):
            colour = palette.of(styles[arm])
            if estimate.interval is not None:
                axes.plot(estimate.interval, (i, i), color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(estimate.value, i, color=colour, marker=styles[arm].marker, markersize=7)
        if reference is not None:
            axes.axvline(reference, color=palette.names[INK], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        ends = [end for estimate in rows.values() for end in (estimate.value, *(estimate.interval or ()))]
        axes.set_xlim(*(within or limits([*ends, *([] if reference is None else [reference])])))
        axes.set_yticks(range(len(rows)), [_broken(arm) for arm in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", alpha=0.3, color=palette.names[MUTED])
        axes.set_axisbelow(True)
        axes.set_xlabel(fill(xlabel, 32))

    lines = sum(_broken(arm).count("\n") + 1 for arm in rows)
    return make_figure(draw, file, title=title, alt=alt, size=(4.5, 0.8 + 0.34 * max(len(rows), lines * 0.7)))


def profile(summary: Summary, styles: Mapping[str, Look], file: Path, *, xlabel: str) -> Figure:
    """The share of runs above every score, in a pointwise band."""
    samples = {arm: list(found.values()) for arm, found in summary.overall.samples.items()}
    where = thresholds([float(score) for found in samples.values() for task in found for score in task])
    lines = {arm: profile_band(found, where) for arm, found in samples.items()}

    def draw(axes: Any, palette: Palette) -> None:
        for arm, (share, band) in lines.items():
            colour, look = palette.of(styles[arm]), styles[arm]
            axes.plot(
                where,
                share,
                color=colour,
                linestyle=dashed(look),
                linewidth=2.0 if look.colour is None else 1.5,
                drawstyle="steps-post",
                marker=look.marker,
                markersize=4,
                markevery=len(where) // MARKS,
            )
            if band is not None:
                axes.fill_between(where, *band, color=colour, alpha=0.08, linewidth=0, step="post")
        axes.set(xlabel=xlabel, ylabel="share of runs above", ylim=(-0.02, 1.02), xlim=(where[0], where[-1]))
        axes.grid(alpha=0.3)

    return make_figure(
        draw,
        file,
        title="Share of runs above each score",
        alt="Share of runs whose score is greater than each value, one line for each arm",
        size=(5.6, 3.4),
        named={arm: styles[arm] for arm in lines},
    )


def _broken(arm: str) -> str:
    """An arm's name on an axis, on lines that are not too long."""
    parts = [arm] if len(arm) <= NAME_WIDTH else arm.replace("+", "\n+").split("\n")
    return "\n".join(fill(part, NAME_WIDTH) for part in parts)


def _label(summary: Summary) -> str:
    return YLABELS.get(summary.study.metric, summary.study.metric)
