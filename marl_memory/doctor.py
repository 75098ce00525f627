"""``marl-memory doctor``: what is installed, what this machine has, and how to get what is missing.

Packages and extras are read from the installed metadata, tasks from their configs: nothing is listed here again.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

DISTRIBUTION = "marl-memory"


@dataclass(frozen=True)
class Row:
    """One thing: its name, what was found, whether it is there, and how to get it if it is not."""

    name: str
    found: str
    there: bool = True
    hint: str = ""


def examine(folder: Path) -> dict[str, list[Row]]:
    """Every section's rows; only ``core`` where a part of it is missing, since little else can be asked then.

    Args:
        folder: where the command is given; runs are written below it.
    """
    core = _core()
    if not all(row.there for row in core):
        return {"core": core}
    return {
        "core": core,
        "machine": [*_machine(), *_here(folder)],
        "tasks": list(_tasks()),
        "extras": list(_extras()),
        "StarCraft II": list(_starcraft()),
    }


def report(sections: dict[str, list[Row]]) -> str:
    """The sections as a table of 80 columns, but for what can not be broken: paths and commands."""
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title] if lines else [title]
        for row in rows:
            lines.append(f"  {'ok' if row.there else '--'}  {row.name:<22} {row.found}".rstrip())
            lines += [f"{'':>6}{hint}" for hint in row.hint.splitlines()]
    return "\n".join(lines)


def _core() -> list[Row]:
    """Python, the library, and what it requires without any extra."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Row(DISTRIBUTION, "not installed", False, "in its checkout: pip install .")]
    if find_spec("packaging") is None:
        return [Row("packaging", "not installed", False, "pip install packaging")]
    rows = [Row("python", platform.python_version()), Row(DISTRIBUTION, version)]
    return rows + [_package(requirement) for requirement in _requirements("")]


def _requirements(extra: str) -> list[Any]:
    """What the library requires for ``extra`` (without its own extras), or with ``""`` what it always requires."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    always = [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    others = [(wanted, wanted.marker) for wanted in found if wanted not in always]
    return [wanted for wanted, marker in others if marker is not None and marker.evaluate({"extra": extra})]


def _package(wanted: Any) -> Row:
    """Whether a package is installed, in a version that fits."""
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Row(wanted.name, "not installed", False, f"pip install '{wanted.name}{wanted.specifier}'")
    if not wanted.specifier.contains(version, prereleases=True):
        return Row(
            wanted.name, f"{version}, not {wanted.specifier}", False, f"pip install '{wanted.name}{wanted.specifier}'"
        )
    return Row(wanted.name, version)


def _machine() -> Iterator[Row]:
    import torch
    from omegaconf import OmegaConf

    from marl_memory.training.config import config_dir

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Row("system", f"{platform.system()} {platform.machine()}")
    yield Row("cores", f"{usable} of {os.cpu_count()} can be used here")
    threads = OmegaConf.select(OmegaConf.load(config_dir() / "training" / "default.yaml"), "threads")
    yield Row("torch threads", f"{threads} a run (training.threads)")
    if torch.version.cuda is None:
        yield Row("CUDA", "none: torch is built without it")
    elif not torch.cuda.is_available():
        yield Row("CUDA", f"{torch.version.cuda}, but torch finds no device")
    else:
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield Row(f"cuda:{i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB (training is on the CPU)")


def _here(folder: Path) -> Iterator[Row]:
    from marl_memory.training.run import git_commit

    commit = git_commit()
    yield Row("git commit", commit or "none: installed, not a checkout")
    runs = folder / "runs"
    there = runs if runs.exists() else folder
    yield Row("disk of runs/", f"{shutil.disk_usage(there).free / 2**30:.1f} GiB free in {there.resolve()}")


def _tasks() -> Iterator[Row]:
    """One row for each suite and state of its tasks; a task of the user's own is no suite."""
    from marl_memory.training.config import config_dir
    from marl_memory.training.tasks import Task, list_tasks

    def suite(task: Task) -> tuple[str, bool]:
        return task.name.partition("/")[0], task.ready

    tasks = [task for task in list_tasks(config_dir() / "env") if "/" in task.name]
    for (name, ready), group in groupby(sorted(tasks, key=suite), key=suite):
        members = list(group)
        words = f"{len(members)} task{'s' if len(members) > 1 else ''}"
        yield Row(name, f"{words} ready" if ready else words, ready, "" if ready else members[0].hint)


def _extras() -> Iterator[Row]:
    for extra in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra == "all":
            continue
        packages = [_package(wanted) for wanted in _requirements(extra)]
        lacking = [f"{row.name} {row.found}" for row in packages if not row.there]
        if lacking:
            yield Row(extra, _shortened(lacking), False, f'pip install "{DISTRIBUTION}[{extra}]"')
        else:
            yield Row(extra, _shortened(f"{row.name} {row.found}" for row in packages))


def _shortened(words: Iterable[str], width: int = 51) -> str:
    """The words that fit into ``width`` columns, and whether there are more."""
    text = ", ".join(dict.fromkeys(words))
    return text if len(text) <= width else text[: width - 3].rpartition(", ")[0] + ", …"


def _starcraft() -> Iterator[Row]:
    """What SMAC needs beside the extra ``smac``, as its own module tells; it is named by its config."""
    from marl_memory.training.config import config_dir
    from marl_memory.training.tasks import load_task

    target: str = load_task(config_dir() / "env", "smac/task")["_target_"]
    for name, found, there, hint in import_module(f"{target.rpartition('.')[0]}_install").examine():
        yield Row(name, found, there, "" if there else hint)
