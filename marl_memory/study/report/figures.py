"""The drawings of a report, each as a PNG file and as an SVG whose colours are the page's variables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from marl_memory.study.definition import Study
from marl_memory.study.report.document import Figure, Key
from marl_memory.training.checkpoint import naming

INK, MUTED, PAPER = "ink", "muted", "paper"

LIGHT = {INK: "#1b1f24", MUTED: "#8b949e", PAPER: "#ffffff"}
SERIES = ("#0f6cb6", "#c2570c", "#0d8a5f", "#a83a86", "#8a6d00", "#5a55c8", "#0e8494", "#b3344a")
"""Colours of arms on white; `page.css` has the same, and those for a dark page.  All have a contrast of 4 or more."""

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
MARKS = 8
"""Markers on a curve, so that lines of the same colour to some eyes are told apart."""


@dataclass(frozen=True)
class Look:
    """How one arm is drawn.

    Args:
        colour: its number in `SERIES`; None for the baseline, which has the ink's.
        dashes: lengths of lines and gaps; none for a solid line.
        marker: as matplotlib names it.
    """

    colour: int | None
    dashes: tuple[float, ...]
    marker: str


def looks(study: Study) -> dict[str, Look]:
    """A look for each arm.

    Arms differ in colour and marker, every other one is dashed too.  Where they have levels, an arm looks the same at
    each but for the dashes.
    """
    found: dict[str, Look] = {}
    names = list(dict.fromkeys(_parts(study, arm)[0] for arm in study.arms))
    coloured = [name for name in names if name != study.baseline]
    for arm in study.arms:
        name, level = _parts(study, arm)
        number = coloured.index(name) if name in coloured else None
        dashes = level if study.levels else 0 if number is None else number // len(SERIES) + number % 2
        found[arm] = Look(
            colour=None if number is None else number % len(SERIES),
            dashes=DASHES[dashes % len(DASHES)],
            marker=MARKERS[0 if number is None else (number + 1) % len(MARKERS)],
        )
    return found


def _parts(study: Study, arm: str) -> tuple[str, int]:
    """An arm's name and the number of its level."""
    for number, level in enumerate(study.levels):
        if arm.endswith(f"+{level}"):
            return arm.removesuffix(f"+{level}"), number
    return arm, 0


def legend(styles: Mapping[str, Look]) -> list[Key]:
    """Entries for the page's own legend."""
    return [
        Key(arm, look.colour, " ".join(f"{2 * part:g}" for part in look.dashes), look.marker)
        for arm, look in styles.items()
    ]


@dataclass(frozen=True)
class Palette:
    """Colours that a drawing asks for by name."""

    names: Mapping[str, str]
    series: Sequence[str]

    def of(self, look: Look) -> str:
        """The colour of an arm."""
        return self.names[INK] if look.colour is None else self.series[look.colour]


# Colours that no drawing has by itself: each is replaced by a variable of the page.
_SENTINELS = {INK: "#0a0b01", MUTED: "#0a0b02", PAPER: "#0a0b03"}
_SENTINEL_SERIES = tuple(f"#0a0c{number:02d}" for number in range(len(SERIES)))
_VARIABLES = {
    **{colour: f"var(--{name})" for name, colour in _SENTINELS.items()},
    **{colour: f"var(--arm-{number})" for number, colour in enumerate(_SENTINEL_SERIES)},
}
_ON_PAGE, _IN_FILE = Palette(_SENTINELS, _SENTINEL_SERIES), Palette(LIGHT, SERIES)

Draw = Callable[[Any, Palette], None]
"""Draws into a figure's axes."""


def make_figure(
    draw: Draw,
    file: Path,
    *,
    title: str,
    alt: str,
    size: tuple[float, float],
    named: Mapping[str, Look] | None = None,
) -> Figure:
    """Draw twice: the file, which has its title and a legend in it, and the SVG for the page, which has them around it.

    Args:
        draw: what to draw.
        file: the PNG.
        title: above the drawing.
        alt: what it shows, for those who can not see it.
        size: width and height of the drawing, inches.
        named: arms of the legend; None where the axes name them.
    """
    from matplotlib import rc_context

    with rc_context(_settings(_ON_PAGE, file.stem)):
        stream = io.StringIO()
        _canvas(draw, _ON_PAGE, size).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    with rc_context(_settings(_IN_FILE, file.stem)):
        lines = (len(named) + 1) // 2 if named else 0
        figure = _canvas(draw, _IN_FILE, (size[0], size[1] + 0.25 + 0.22 * lines))
        figure.suptitle(title, fontsize=10)
        if named:
            figure.legend(handles=_handles(named), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        with naming(file):
            figure.savefig(file, dpi=160, metadata={"Software": None})
    return Figure(svg=_inline(stream.getvalue(), file.stem), file=f"figures/{file.name}", title=title, alt=alt)


def _canvas(draw: Draw, palette: Palette, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, palette)
    return figure


def _settings(palette: Palette, salt: str) -> Any:
    """Those of matplotlib; text stays text, in the page's font, and is never taken for a formula."""
    ink, muted = palette.names[INK], palette.names[MUTED]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.facecolor": palette.names[PAPER],
        "figure.facecolor": palette.names[PAPER],
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": muted,
    }


def _handles(named: Mapping[str, Look]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], label=arm, color=_IN_FILE.of(look), marker=look.marker, markersize=4, linestyle=dashed(look))
        for arm, look in named.items()
    ]


def dashed(look: Look) -> Any:
    """As matplotlib wants it."""
    return (0, look.dashes) if look.dashes else "-"


def _inline(svg: str, prefix: str) -> str:
    """An SVG that can stand in a page beside others: ids of its own, no addresses, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", svg)
    svg = re.sub(r'^(<svg[^>]*?)\s(?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?)\s(?:width|height)="[^"]*"', r"\1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A name for files and anchors for each of ``names``, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        base = slug = re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_").lower() or "x"
        number = 2
        while slug in found.values():
            slug, number = f"{base}_{number}", number + 1
        found[name] = slug
    return found


def limits(ends: Sequence[float]) -> tuple[float, float]:
    """What an axis must reach from and to, to show ``ends`` with room around."""
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def thresholds(scores: Sequence[float]) -> np.ndarray[Any, Any]:
    """Where a profile is drawn."""
    return np.linspace(*limits(scores), 161)
