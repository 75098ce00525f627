"""Checkpoints on disk: written atomically, verified when read, loaded without running any pickled code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["scheduled", "signal", "best"]


class DamagedCheckpointError(RuntimeError):
    """A checkpoint's files do not hold what was written."""


class NoCheckpointError(RuntimeError):
    """A run has no checkpoint that can be read."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: a folder with ``state.pt`` and ``meta.json`` (which holds the state's SHA-256)."""

    path: Path

    @property
    def meta(self) -> dict[str, Any]:
        """What was written beside the state.

        Raises:
            DamagedCheckpointError: if it can not be read.
        """
        try:
            meta = json.loads((self.path / "meta.json").read_text())
            if not isinstance(meta, dict):
                raise ValueError(f"an object was written, found {type(meta).__name__}")
            return meta
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{self.path}: meta.json can not be read ({error})") from error

    def load(self) -> dict[str, Any]:
        """The state, after its checksum was verified.

        Raises:
            DamagedCheckpointError: if it is missing, cut short or altered.
        """
        expected, file = self.meta.get("sha256"), self.path / "state.pt"
        if not file.exists():
            raise DamagedCheckpointError(f"{self.path}: state.pt is missing")
        found = _sha256(file)
        if found != expected:
            raise DamagedCheckpointError(f"{self.path}: state.pt has SHA-256 {found[:12]}…, written was {expected}")
        return torch.load(file, weights_only=True, map_location="cpu")


class CheckpointFolder:
    """The checkpoints of one run.

    ``frames_000000123456`` are the scheduled ones (the newest ``keep`` of them stay), ``signal`` is where a signal left
    the run, ``best`` the policy that evaluated best.

    Args:
        path: the folder; whoever writes calls `recover` first.
        keep: how many scheduled checkpoints stay.
    """

    def __init__(self, path: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"training.keep_checkpoints={keep} must be at least 1")
        self.path, self.keep = path, keep

    def recover(self) -> None:
        """Put right what a kill left half done.  Only for whoever writes here: a reader would disturb a live run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for moved in self.path.glob(".writing-old-*"):  # killed while replacing: what moved aside comes back
            final = self.path / moved.name.removeprefix(".writing-old-")
            if not final.exists():
                moved.rename(final)
        for leftover in self.path.glob(".writing-*"):  # killed while writing
            shutil.rmtree(leftover)

    def drop_after(self, frames: int) -> None:
        """Remove what lies ahead of a restored state: damaged checkpoints that were passed over, and their best."""
        best = self.named("best")
        ahead = [c for c in self.scheduled() if _frames_of(c) > frames]
        if best is not None and best.meta["frames"] > frames:
            ahead.append(best)
        for checkpoint in ahead:
            shutil.rmtree(checkpoint.path)

    def save(self, state: dict[str, Any], kind: Kind, *, frames: int, **meta: Any) -> Checkpoint:
        """Write ``state`` whole or not at all; a scheduled one lets the oldest go, and an earlier signal's."""
        name = f"frames_{frames:012d}" if kind == "scheduled" else kind
        writing = self.path / f".writing-{name}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        torch.save(state, writing / "state.pt")
        meta = {"kind": kind, "frames": frames, "sha256": _sha256(writing / "state.pt"), **meta}
        (writing / "meta.json").write_text(json.dumps(meta, indent=1))
        for file in writing.iterdir():
            _flush(file)
        final = self.path / name
        if final.exists():  # a folder can not replace a full one in one step: the old one moves aside first
            old = self.path / f".writing-old-{name}"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            writing.rename(final)
            shutil.rmtree(old)
        else:
            writing.rename(final)
        _flush(self.path)
        if kind == "scheduled":  # from here on, where a signal once left the run is the past
            shutil.rmtree(self.path / "signal", ignore_errors=True)
            for checkpoint in self.scheduled()[self.keep :]:
                shutil.rmtree(checkpoint.path)
        return Checkpoint(final)

    def scheduled(self) -> list[Checkpoint]:
        """Scheduled checkpoints, newest first."""
        return [Checkpoint(path) for path in sorted(self.path.glob("frames_*"), reverse=True)]

    def newest_frames(self) -> int | None:
        """The frame count of the newest scheduled checkpoint."""
        scheduled = self.scheduled()
        return _frames_of(scheduled[0]) if scheduled else None

    def named(self, name: str) -> Checkpoint | None:
        """``signal`` or ``best``, if there is one."""
        path = self.path / name
        return Checkpoint(path) if path.exists() else None

    def newest(self, warn: Any) -> tuple[dict[str, Any], Checkpoint]:
        """The newest scheduled checkpoint that can be read; each damaged one is named through ``warn(text)``.

        Raises:
            NoCheckpointError: if there is none.
        """
        for checkpoint in self.scheduled():
            try:
                return checkpoint.load(), checkpoint
            except DamagedCheckpointError as error:
                warn(f"damaged checkpoint passed over: {error}")
        raise NoCheckpointError(f"{self.path} holds no checkpoint that can be read: start anew in another folder")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""
    writing = path.with_name(f".writing-{path.name}")
    writing.write_text(text)
    _flush(writing)
    writing.replace(path)


def _frames_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.path.name.removeprefix("frames_"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
