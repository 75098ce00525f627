"""What a report is made of, before it is a page or a file of Markdown.  Text is plain: writers escape it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Link:
    """Text that leads to ``href``, relative to the report's folder; ``title`` says more."""

    text: str
    href: str
    title: str = ""


Cell = str | Link | Sequence[Link]
"""What a table holds: text, or where it leads."""


@dataclass(frozen=True)
class Heading:
    """Of a section; ``anchor`` is what links to it name."""

    text: str
    anchor: str


@dataclass(frozen=True)
class Text:
    """A paragraph; ``small`` if it explains what stands beside it."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Answer:
    """The sentence that the study was made for, and what else is to be known of it."""

    sentence: str
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Notice:
    """What a reader must know before the numbers: ``wrong`` is against the study's own word, ``good`` was checked."""

    kind: Literal["wrong", "warning", "good"]
    title: str
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Column:
    """Head of a table's column; ``number`` aligns it to the right."""

    title: str
    unit: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its head."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Key:
    """One arm in the legend: its colour's number (None: the ink's), dashes as in SVG, marker as in matplotlib."""

    arm: str
    colour: int | None
    dashes: str
    marker: str


@dataclass(frozen=True)
class Figure:
    """A drawing, as an SVG to be put into the page and as a file beside it."""

    svg: str
    file: str
    title: str
    alt: str


@dataclass(frozen=True)
class Figures:
    """Drawings beside each other, under one legend; none if it is empty.  ``wide`` ones are two in a row at most."""

    figures: Sequence[Figure]
    legend: Sequence[Key] = ()
    wide: bool = False


@dataclass(frozen=True)
class Items:
    """A list, a term before each text if it has one."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under ``title``."""

    title: str
    blocks: Sequence[Block]


Block = Heading | Text | Answer | Notice | Table | Figures | Items | Code | Details | Link


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    blocks: Sequence[Block]
