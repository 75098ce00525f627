"""What a study was made with: versions, machines and commands, as its runs wrote them down."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_memory.study.report.summary import Key
from marl_memory.study.results import STUDY, Results
from marl_memory.training.run import SURROUNDINGS

NAMES = {"git_commit": "commit", "threads": "torch threads"}


@dataclass(frozen=True)
class Provenance:
    """What it takes to repeat a study.

    Args:
        command: that made the study, if it was written down.
        runs: the command of each run.
        common: versions and settings that all runs share.
        differences: those that they do not, each with its values and the number of runs.
        edited: whether a run's commit is not all that it was made with.
    """

    command: str | None
    runs: Mapping[Key, str]
    common: Mapping[str, str]
    differences: list[str]
    edited: bool


def provenance(results: Results) -> Provenance:
    """What the files of a study and its runs tell."""
    described = {key: read_json(results.run_folder(*key) / "run.json") for key in results.records}
    facts = {key: _facts(run) for key, run in described.items() if run}
    names = list(dict.fromkeys(name for fact in facts.values() for name in fact))
    common, differences = {}, []
    for name in names:
        values: dict[str, int] = {}
        for fact in facts.values():
            value = fact.get(name, "nothing")
            values[value] = values.get(value, 0) + 1
        if len(values) == 1:
            common[name] = next(iter(values))
        else:
            differences.append(
                f"{name}: " + "; ".join(f"{value} in {n} run{'s' * (n > 1)}" for value, n in values.items())
            )
    commands = {key: _command(run.get("command")) for key, run in described.items() if run}
    return Provenance(
        command=_command(read_json(results.folder / STUDY).get("command")),
        runs={key: command for key, command in commands.items() if command},
        common=common,
        differences=differences,
        edited=any(fact.get("commit", "").endswith("-dirty") for fact in facts.values()),
    )


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made with; where it was resumed with another value, both."""
    found: dict[str, list[str]] = {}
    session: Any
    for session in [run, *run.get("resumed", [])]:
        facts: dict[str, Any] = {key: session.get(key) for key in SURROUNDINGS}
        for name, value in (facts | session.get("versions", {})).items():
            values = found.setdefault(str(NAMES.get(name, name)), [])
            if value is not None and str(value) not in values:
                values.append(str(value))
    return {name: ", then ".join(values) for name, values in found.items() if values}


def _command(words: Any) -> str | None:
    """As it is given in a shell; the first word has a space of its own."""
    if not isinstance(words, list) or not words:
        return None
    first, *rest = map(str, words)
    if Path(first).parts[-2:] == ("study", "job.py"):  # a study's runs are started as a module, tied to their study
        first, rest = "python -m marl_memory.study.job", [word for word in rest if word != "--tied"]
    return " ".join([first, *map(shlex.quote, rest)])


def read_json(file: Path) -> dict[str, Any]:
    """Of a JSON file, or nothing: a report is drawn without it."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
