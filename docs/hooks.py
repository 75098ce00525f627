"""What the site needs beyond Markdown: formulas as MathML, and the tables of the configuration reference.

MkDocs calls `on_page_markdown` and `on_page_content` for every page.  Nothing is fetched; formulas need no script in a
reader's browser.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
MARKER = re.compile(r"<!-- (keys|tasks|experiments|source|file): *(.*?) *-->")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``<!-- keys: FILES of OBJECTS -->``, ``<!-- tasks: FOLDER -->`` and ``<!-- experiments: -->`` by tables,
    ``<!-- source: OBJECT -->`` by its code, and ``<!-- file: PATH -->`` by the file, without its module docstring.
    """
    makers = {"keys": _keys, "tasks": _tasks, "experiments": _experiments, "source": _source, "file": _file}
    return MARKER.sub(lambda found: makers[found[1]](found[2]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas that arithmatex found by MathML, which browsers draw by themselves."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(formula, content)


def _keys(text: str) -> str:
    """Keys, values and meanings of config files that have the same keys; each object's ``Args`` explain some."""
    names, _, objects = text.partition(" of ")
    files = {name.rpartition("/")[2]: _read(CONFIGS / f"{name}.yaml") for name in names.split()}
    first = CONFIGS / f"{names.split()[0]}.yaml"
    meanings = _comments(first)
    for path in objects.split():
        meanings = _arguments(path) | meanings
    rows = [
        (f"`{key}`", _values({name: file[key] for name, file in files.items()}), meanings[key])
        for key in _read(first)
        if not key.startswith("_") and key != "defaults"
    ]
    return _table(("key", "default", "meaning"), rows)


def _tasks(folder: str) -> str:
    """One row per task config of ``folder``: what makes it, with which arguments, and what it declares."""
    rows = []
    for file in sorted((CONFIGS / "env" / folder).rglob("*.yaml")):
        name = file.relative_to(CONFIGS / "env").with_suffix("").as_posix()
        config = _read_task(name)
        made = config.get("factory") or config["_target_"] + (f"(map={config['map']})" if "map" in config else "")
        kwargs = ", ".join(f"{key}={value}" for key, value in (config.get("kwargs") or {}).items())
        common = "common" if config.get("common_reward", "map" in config) else "each agent's own"
        rows.append((f"`{name}`", f"`{made}`", f"`{kwargs}`" if kwargs else "–", common))
    return _table(("`env=`", "made by", "`env.kwargs`", "reward"), rows)


def _experiments(_: str) -> str:
    """One row per experiment: its name and the comment at its head."""
    folder = CONFIGS / "experiment"
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    rows = [(f"`{name}`", (folder / f"{name}.yaml").read_text().splitlines()[1].removeprefix("# ")) for name in names]
    return _table(("`experiment=`", "what it is"), rows)


def _source(path: str) -> str:
    """The code of a method, as it stands in the library."""
    owner, _, name = path.rpartition(".")
    return f"```python\n{textwrap.dedent(inspect.getsource(getattr(_object(owner), name)))}```"


def _file(path: str) -> str:
    file = ROOT / path
    text, language = file.read_text(), {".py": "python", ".yaml": "yaml"}[file.suffix]
    if language == "python":
        text = "".join(text.splitlines(keepends=True)[ast.parse(text).body[0].end_lineno :]).lstrip()
    title = "/".join(Path(path).parts[2:]) or file.name  # as seen from the example's own folder
    return f'```{language} title="{title}"\n{text}```'


def _object(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def _read_task(name: str) -> dict[str, Any]:
    """A task's config with what it shares with its family, as `marl_memory.training.tasks.load_task` reads it."""
    config = _read(CONFIGS / "env" / f"{name}.yaml")
    for shared in config.pop("defaults", []):
        if isinstance(shared, str) and shared.endswith("@_here_"):
            config = _read_task(shared.removesuffix("@_here_")) | config
    return config


def _values(values: dict[str, Any]) -> str:
    """One value where all files agree, else each with the files that have it."""
    shown: dict[str, list[str]] = {}
    for name, value in values.items():
        text = "required" if value == "???" else f"`{yaml.safe_dump(value, default_flow_style=True)}`"
        shown.setdefault(text.replace("\n...\n", "").replace("\n", ""), []).append(name)
    if len(shown) == 1:
        return next(iter(shown))
    return "<br>".join(f"{text} ({', '.join(names)})" for text, names in shown.items())


def _comments(file: Path) -> dict[str, str]:
    """What follows ``#`` on the line of a key."""
    return dict(re.findall(r"^(\w+):.*? # (.*)$", file.read_text(), re.MULTILINE))


def _arguments(path: str) -> dict[str, str]:
    """The ``Args`` section of an object's docstring, by argument."""
    text = inspect.getdoc(_object(path)) or ""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", text, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(meaning.split()).rstrip(".") for names, meaning in entries for name in names.split(", ")}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
