"""A report as Markdown, with the figures' files as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from marl_memory.study.report import document as parts
from marl_memory.study.report.document import Block, Cell, Document, Link

MARKS = {"wrong": "Wrong", "warning": "Warning", "good": "Checked"}


def markdown(document: Document) -> str:
    """The file's text."""
    blocks = [f"# {text(document.title)}", text(document.subtitle), *(_block(block) for block in document.blocks)]
    return "\n\n".join(blocks) + "\n"


def text(plain: str) -> str:
    """Plain text, so that nothing in it is taken for markup."""
    found = re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(plain.split()))
    return re.sub(r"^([-+=]|\d+[.)])(?=\s|$)", r"\\\1", found)


def _block(block: Block) -> str:
    match block:
        case parts.Heading(title, _):
            return f"## {text(title)}"
        case parts.Text(plain, _):
            return text(plain)
        case parts.Answer(sentence, remarks):
            return "\n\n".join([f"**{text(sentence)}**", *([_list(remarks)] if remarks else [])])
        case parts.Notice(kind, title, items):
            lines = [f"**{MARKS[kind]}:** {text(title)}", *(["", *_list(items).split("\n")] if items else [])]
            return "\n".join(f"> {line}".rstrip() for line in lines)
        case parts.Table():
            return _table(block)
        case parts.Figures(figures):
            return "\n\n".join(f"![{text(figure.alt)}]({figure.file})\n\n*{text(figure.title)}*" for figure in figures)
        case parts.Items(items):
            return "\n".join(f"- **{text(term)}**: {text(plain)}" for term, plain in items)
        case parts.Code(plain):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", plain)), default=0))
            return f"{fence}\n{plain}\n{fence}"
        case parts.Details(title, inside):
            return "\n\n".join([f"### {text(title)}", *(_block(part) for part in inside)])
        case Link():
            return f"- {_cell(block)}"


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {text(item)}" for item in items)


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return text(cell)
    links = [cell] if isinstance(cell, Link) else cell
    return " ".join(f"[{text(link.text)}]({link.href})" for link in links)


def _table(table: parts.Table) -> str:
    titles = [f"{column.title} ({column.unit})" if column.unit else column.title for column in table.columns]
    rules = ["---:" if column.number else "---" for column in table.columns]
    rows = [[text(title) for title in titles], rules, *([_cell(cell) for cell in row] for row in table.rows)]
    return f"*{text(table.caption)}*\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
