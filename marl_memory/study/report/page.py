"""A report as one HTML page that needs nothing but itself: style and drawings are in it, and there is no script."""

from __future__ import annotations

from html import escape
from importlib import resources

from marl_memory.study.report import document as parts
from marl_memory.study.report.document import Block, Cell, Document, Link

MARKERS = {
    "o": "M17 10a7 7 0 1 0 14 0a7 7 0 1 0-14 0z",
    "s": "M18 4h12v12h-12z",
    "^": "M24 2l8 15h-16z",
    "D": "M24 2l8 8l-8 8l-8-8z",
    "v": "M24 18l8-15h-16z",
    "P": "M21 3h6v4h4v6h-4v4h-6v-4h-4v-6h4z",
    "X": "M19 2l5 5l5-5l3 3l-5 5l5 5l-3 3l-5-5l-5 5l-3-3l5-5l-5-5z",
    "p": "M24 2l8 6l-3 9h-10l-3-9z",
}
"""Paths of the legend's markers, named as in matplotlib."""


def page(document: Document) -> str:
    """The page."""
    style = resources.files("marl_memory.study.report").joinpath("page.css").read_text(encoding="utf-8")
    headings = [block for block in document.blocks if isinstance(block, parts.Heading)]
    links = "".join(f'<li><a href="#{heading.anchor}">{escape(heading.text)}</a></li>' for heading in headings)
    first = next((i for i, block in enumerate(document.blocks) if isinstance(block, parts.Heading)), 0)
    before, after = document.blocks[:first], document.blocks[first:]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(document.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(document.title)}</h1>
<p class="subtitle">{escape(document.subtitle)}</p>
</header>
<main>
{_blocks(before)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
{_blocks(after)}
</main>
</body>
</html>
"""


def _blocks(blocks: parts.Sequence[Block]) -> str:
    return "\n".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    match block:
        case parts.Heading(text, anchor):
            return f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'
        case parts.Text(text, small):
            return f'<p class="small">{escape(text)}</p>' if small else f"<p>{escape(text)}</p>"
        case parts.Answer(sentence, remarks):
            answer = f'<p class="sentence">{escape(sentence)}</p>'
            return f'<section class="answer" aria-label="Answer">{answer}{_list(remarks)}</section>'
        case parts.Notice(kind, title, items):
            return f'<section class="notice {kind}" role="note"><p>{escape(title)}</p>{_list(items)}</section>'
        case parts.Table():
            return _table(block)
        case parts.Figures():
            return _figures(block)
        case parts.Items(items):
            return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in items) + "</dl>"
        case parts.Code(text):
            return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        case parts.Details(title, inside):
            return f"<details><summary>{escape(title)}</summary>{_blocks(inside)}</details>"
        case Link():
            return f"<p>{_link(block)}</p>"


def _list(items: parts.Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def _link(link: Link) -> str:
    title = f' title="{escape(link.title)}"' if link.title else ""
    return f'<a href="{escape(link.href)}"{title}>{escape(link.text)}</a>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return _link(cell) if isinstance(cell, Link) else " ".join(_link(link) for link in cell)


def _table(table: parts.Table) -> str:
    """In a box that scrolls by itself where it is too narrow."""
    looks = [' class="number"' if column.number else "" for column in table.columns]
    units = [f"<small>{escape(column.unit)}</small>" if column.unit else "" for column in table.columns]
    head = "".join(
        f'<th scope="col"{look}>{escape(column.title)}{unit}</th>'
        for column, look, unit in zip(table.columns, looks, units, strict=True)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{_cell(first)}</th>'
        + "".join(f"<td{look}>{_cell(cell)}</td>" for cell, look in zip(rest, looks[1:], strict=True))
        + "</tr>"
        for first, *rest in table.rows
    )
    caption = escape(table.caption)
    return (
        f'<p class="caption" aria-hidden="true">{caption}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">\n'
        f'<table aria-label="{caption}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>'
    )


def _figures(block: parts.Figures) -> str:
    found = []
    for figure in block.figures:
        svg = figure.svg.replace("<svg", f'<svg role="img" aria-label="{escape(figure.alt)}"', 1)
        png = f'<a href="{escape(figure.file)}" title="{escape(figure.title)} as PNG">PNG</a>'
        found.append(f"<figure><figcaption>{escape(figure.title)}{png}</figcaption>\n{svg}\n</figure>")
    keys = "".join(_key(key) for key in block.legend)
    legend = f'<ul class="legend" aria-label="Legend">{keys}</ul>\n' if keys else ""
    return f'{legend}<div class="figures{" wide" * block.wide}">\n' + "\n".join(found) + "\n</div>"


def _key(key: parts.Key) -> str:
    colour = "var(--ink)" if key.colour is None else f"var(--arm-{key.colour})"
    line = (
        f'stroke="{colour}" stroke-width="{5 if key.colour is None else 4}" stroke-dasharray="{key.dashes or "none"}"'
    )
    drawn = f'<line x1="0" y1="10" x2="48" y2="10" {line}/><path d="{MARKERS[key.marker]}" fill="{colour}"/>'
    return f'<li><svg viewBox="0 0 48 20" aria-hidden="true">{drawn}</svg>{escape(key.arm)}</li>'
