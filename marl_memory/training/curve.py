"""What is left of a run to look at: a learning curve and a short summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marl_memory.training.checkpoint import CheckpointFolder, naming
from marl_memory.training.clock import SECTIONS, duration
from marl_memory.training.logging import MetricsFile

YLABELS = {
    "train/return": "return (sampled)",
    "train/success": "win rate (sampled)",
    "evaluation/return": "return (greedy)",
    "evaluation/success": "win rate (greedy)",
    "evaluation/overestimation": "estimated − true return",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Args:
        label: its name in the legend.
        x: ``[P]`` frames.
        y: ``[P]`` values.
        band: ``[P]`` each, what the line's band reaches from and to; None for no band.
        alpha: how much of the band's colour is seen.
        style: more keywords of matplotlib's ``plot``.
    """

    label: str
    x: Any
    y: Any
    band: tuple[Any, Any] | None = None
    alpha: float = 0.2
    style: Mapping[str, Any] = field(default_factory=dict)


def draw_panel(axes: Any, metric: str, lines: Sequence[Line], *, ylabel: str | None = None) -> None:
    """Draw ``lines`` of one metric over environment steps.

    A win rate's axis goes from 0 to 1, an over-estimation has a line at 0.
    """
    for line in lines:
        style = {"marker": "o", "markersize": 3} if metric.startswith("evaluation/") else {}
        (drawn,) = axes.plot(line.x, line.y, label=line.label, **{**style, **line.style})
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=drawn.get_color(), alpha=line.alpha, linewidth=0)
    axes.set(xlabel="environment steps", ylabel=ylabel or YLABELS.get(metric, metric))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
    axes.grid(alpha=0.3)
    if metric.endswith("/success"):
        axes.set_ylim(-0.02, 1.02)
    if metric.endswith("/overestimation"):
        axes.axhline(0.0, color="#555555", linewidth=0.8)


def draw(folder: Path) -> Path:
    """Draw ``curve.png`` of a run: return and, where the task tells it, success; training and greedy evaluation."""
    from matplotlib.figure import Figure

    metrics = MetricsFile(folder / "metrics.csv")
    names = [name for name in ("return", "success") if metrics.column(f"evaluation/{name}")[0]]
    figure = Figure(figsize=(4.8 * max(len(names), 1), 3.4), layout="constrained")
    looks = {
        "train": ("training (sampled)", {"color": "#9db4c8", "linewidth": 1, "marker": ""}),
        "evaluation": ("evaluation (greedy)", {"color": "#12476b"}),
    }
    for i, name in enumerate(names):
        columns = {kind: metrics.column(f"{kind}/{name}") for kind in looks}
        lines = [
            Line(label=label, x=columns[kind][0], y=columns[kind][1], style=style)
            for kind, (label, style) in looks.items()
        ]
        ylabel = {"success": "win rate"}.get(name, name)
        draw_panel(figure.add_subplot(1, len(names), i + 1), f"evaluation/{name}", lines, ylabel=ylabel)
    if names:
        figure.axes[0].legend(frameon=False)
    figure.suptitle("/".join(folder.resolve().parts[-4:]), fontsize=9)
    with naming(folder / "curve.png"):
        figure.savefig(folder / "curve.png", dpi=140)
    return folder / "curve.png"


def summarise(folder: Path, *, finished: bool) -> str:
    """A few lines: where the run stands, its evaluations, where the time went, and the next commands."""
    metrics = MetricsFile(folder / "metrics.csv")
    frames, returns = metrics.column("evaluation/return")
    _, success = metrics.column("evaluation/success")
    lines = [f"{'finished' if finished else 'stopped'} at {int(float(metrics.rows[-1]['frames'])):,} frames"]
    for name, values in (("greedy return", returns), ("greedy win rate", success)):
        if values:
            best = max(range(len(values)), key=values.__getitem__)
            lines.append(
                f"{name:<16}{values[0]:.2f} at the start, {values[-1]:.2f} at the end, "
                f"best {values[best]:.2f} at {int(frames[best]):,}"
            )
    lines += time_shares(metrics)
    lines += [f"learning curve  {folder / 'curve.png'}", f"numbers         {folder / 'metrics.csv'}"]
    if CheckpointFolder(folder / "checkpoints").named("best"):
        lines.append(f"next            marl-memory evaluate {folder} --episodes 128")
    if not finished:
        lines.append(f"continue        marl-memory resume {folder}")
    lines.append(f"watch           tensorboard --logdir {folder}")
    return "\n".join(lines)


def time_shares(metrics: MetricsFile) -> list[str]:
    """Each section's share of the wall time that the rows of a run tell of, a resumed run's earlier rows included."""
    seconds = {words: sum(metrics.column(f"time/{name}")[1]) for name, words in SECTIONS.items()}
    total = sum(seconds.values())
    if not total:
        return []
    shares = [f"{words} {spent / total:.1%}" for words, spent in seconds.items()]
    lines = [f"time            {duration(total)} in all"]
    return lines + [f"{'':16}{', '.join(shares[i : i + 4])}" for i in range(0, len(shares), 4)]
