"""What a study leaves behind: one checked record a run, and all of them together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from marl_memory.study.definition import Study
from marl_memory.training.checkpoint import write_atomically

RECORD = "result.json"
STUDY = "study.json"
PLAN = "plan.json"
"""The configuration of every run."""


class DamagedRecordError(ValueError):
    """A run's record, or what it vouches for, is not what was written."""


class StudyError(ValueError):
    """A folder is not the study that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished run gives to its study.

    Args:
        task, arm, seed: which run it is.
        frames: at its end.
        curves: frames and values, ``[P]`` each, of every ``evaluation/…`` metric, from 0 frames to the end.
        absolute: of the best policy, played anew for ten times the episodes of an evaluation: ``return``, and
            ``success`` where the task has it, one number an episode.
        digest: SHA-256 of the learner's parameters at the end.
        costs: ``wall_seconds``, ``frames_per_second`` (of collecting and learning), ``peak_bytes``
            (resident, of the process), ``memory_seconds`` (in operators), ``memory_bytes`` (of operators),
            ``memory_parameters`` (that operators add), ``rows`` and ``payloads`` (held at the end; payloads are
            counted in single agents).
        files: SHA-256 of the files beside it that the report reads.
    """

    task: str
    arm: str
    seed: int
    frames: int
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    absolute: Mapping[str, Sequence[float]]
    digest: str
    costs: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """To ``folder/result.json``, with a checksum, whole or not at all."""
        record = asdict(self)
        write_atomically(folder / RECORD, json.dumps({"record": record, "sha256": _checksum(record)}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The inverse of `write`.

        Raises:
            FileNotFoundError: if the run has not finished.
            DamagedRecordError: if the record, or a file it vouches for, was edited or cut off.
        """
        text = (folder / RECORD).read_text()
        try:
            stored = json.loads(text)
            record, checksum = stored["record"], stored["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRecordError(f"{folder / RECORD} can not be read: {error!r}") from error
        if checksum != _checksum(record):
            raise DamagedRecordError(f"{folder / RECORD} is not what the run wrote: its checksum differs")
        for name, expected in record["files"].items():
            if not (folder / name).exists() or sha256(folder / name) != expected:
                raise DamagedRecordError(f"{folder / name} is not what the run wrote: its checksum differs")
        return cls(**record)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A study and the runs that have finished.

    Args:
        study: its definition.
        folder: where it lies.
        records: of the finished runs, by task, arm and seed in the study's order.
        missing: why there is none, for every other run.
    """

    study: Study
    folder: Path
    records: Mapping[tuple[str, str, int], Record]
    missing: Mapping[tuple[str, str, int], str]

    def run_folder(self, task: str, arm: str, seed: int) -> Path:
        """Where a run lies."""
        return run_folder(self.folder, task, arm, seed)


def run_folder(study: Path, task: str, arm: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return study / "runs" / task / arm / f"seed_{seed}"


def read_results(folder: Path) -> Results:
    """What there is of the study in ``folder``.

    Raises:
        StudyError: if there is no study.
    """
    if not (folder / STUDY).exists():
        raise StudyError(f"{folder} holds no study (no {STUDY})")
    try:
        study = Study.from_dict(json.loads((folder / STUDY).read_text())["study"])
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{folder / STUDY} can not be read: {error!r}; right is what the study wrote there") from error
    records: dict[tuple[str, str, int], Record] = {}
    missing: dict[tuple[str, str, int], str] = {}
    for task in study.tasks:
        for arm in study.arms:
            for seed in study.seeds:
                where = run_folder(folder, task, arm, seed)
                try:
                    records[task, arm, seed] = Record.read(where)
                except FileNotFoundError:
                    missing[task, arm, seed] = failure(where) or "not finished"
                except DamagedRecordError as error:
                    missing[task, arm, seed] = str(error)
    return Results(study=study, folder=folder, records=records, missing=missing)


def failure(run: Path) -> str | None:
    """What ended a run that failed."""
    file = failure_file(run)
    return file.read_text().strip().splitlines()[-1] if file.exists() else None


def failure_file(run: Path) -> Path:
    """Beside the folder of a run: why it failed."""
    return run.parent / f"{run.name}.failed.txt"


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
