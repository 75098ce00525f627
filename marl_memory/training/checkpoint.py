"""Checkpoints on disk: written atomically, verified when read, loaded without running any pickled code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import marl_memory

Kind = Literal["scheduled", "signal", "best"]

FORMAT = 2
"""The layout of ``state.pt``.  It moves on when a state can no longer be read by name and shape alone."""

PARTS = "replay"
"""The folder, beside the checkpoints, of what several of them share."""


class CheckpointError(RuntimeError):
    """A checkpoint can not be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files do not hold what was written."""


class IncompatibleCheckpointError(CheckpointError):
    """A checkpoint is whole, but made with another configuration or by another version."""


class NoCheckpointError(CheckpointError):
    """A run has no checkpoint that can be read."""


class NotWrittenError(OSError):
    """A file could not be written, as on a full disk."""


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

    @property
    def frames(self) -> int:
        """The run's frames when it was taken.

        Raises:
            DamagedCheckpointError: if they can not be read.
        """
        frames = self.meta.get("frames")
        if not isinstance(frames, int):
            raise DamagedCheckpointError(f"{self.path}: frames={frames!r} in meta.json must be a whole number")
        return frames

    def load(self) -> dict[str, Any]:
        """The state, after its checksum was verified.

        Raises:
            DamagedCheckpointError: if it is missing, cut short or altered, or holds more than tensors and plain values.
            IncompatibleCheckpointError: if its format is another.
        """
        meta, file = self.meta, self.path / "state.pt"
        if not file.exists():
            raise DamagedCheckpointError(f"{self.path}: state.pt is missing")
        found = _sha256(file)
        if found != meta.get("sha256"):
            raise DamagedCheckpointError(
                f"{self.path}: state.pt has SHA-256 {found[:12]}…, written was {meta.get('sha256')}"
            )
        if (written := meta.get("format", 1)) != FORMAT:  # the first ones carry no number
            raise IncompatibleCheckpointError(
                f"{self.path}: format={written!r} in meta.json, right is {FORMAT} for marl-memory "
                f"{marl_memory.__version__}; it was written by {meta.get('version')}: use that version"
            )
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise DamagedCheckpointError(
                f"{self.path}: state.pt holds something else than tensors and plain values; none of it was run"
            ) from error
        if not isinstance(state, dict):
            raise DamagedCheckpointError(f"{self.path}: state.pt holds a {type(state).__name__}, not a state")
        return state

    def parts(self) -> Iterator[dict[str, Any]]:
        """The parts that the state refers to, read one by one, oldest first.

        Raises:
            DamagedCheckpointError: at one that is missing, cut short or altered.
        """
        for name, written in self.meta.get("parts", {}).items():
            file = self.path.parent / PARTS / name
            if not file.exists():
                raise DamagedCheckpointError(f"{self.path}: its part {file} is missing")
            if (found := _sha256(file)) != written:
                raise DamagedCheckpointError(f"{self.path}: its part {file} has SHA-256 {found[:12]}…, not {written}")
            yield torch.load(file, weights_only=True, map_location="cpu")

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """While its state is given to what is to go on with it: names the checkpoint if the two do not fit.

        Raises:
            IncompatibleCheckpointError: instead of the KeyError, ValueError or RuntimeError of whoever reads the state.
        """
        try:
            yield
        except (KeyError, ValueError, RuntimeError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise IncompatibleCheckpointError(
                f"{self.path} does not fit this run: {problem}; it was written by marl-memory "
                f"{self.meta.get('version', 'of unknown version')}, this is {marl_memory.__version__}"
            ) from error


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
        for leftover in self.path.glob(f"{PARTS}/.writing-*"):
            leftover.unlink()

    def drop_after(self, frames: int, warn: Callable[[str], Any] = print) -> None:
        """Remove what lies ahead of a restored state: damaged checkpoints that were passed over, and their best."""
        best = self.named("best")
        ahead = [c for c in self.scheduled() if _frames_of(c) > frames]
        try:
            if best is not None and best.frames > frames:
                ahead.append(best)
        except DamagedCheckpointError as error:
            warn(f"damaged checkpoint left where it is: {error}")
        for checkpoint in ahead:
            shutil.rmtree(checkpoint.path)

    def add_part(self, name: str, data: bytes) -> str:
        """Write what several checkpoints will share, whole or not at all; returns its SHA-256, to be handed to `save`.

        Raises:
            NotWrittenError: if the disk is full, say.
        """
        folder = self.path / PARTS
        writing = folder / f".writing-{name}"
        with naming(folder / name, needs=len(data)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                writing.write_bytes(data)
                _flush(writing)
                writing.replace(folder / name)
                _flush(folder)
            finally:
                writing.unlink(missing_ok=True)
        return hashlib.sha256(data).hexdigest()

    def _drop_unused_parts(self) -> None:
        """Remove the parts that no checkpoint refers to."""
        folders = [path for path in self.path.iterdir() if (path / "meta.json").exists()]
        try:
            used = {name for path in folders for name in Checkpoint(path).meta.get("parts", {})}
        except DamagedCheckpointError:
            return  # what it refers to is not known
        for file in (self.path / PARTS).glob("*"):
            if file.name not in used:
                file.unlink()

    def save(
        self, state: dict[str, Any], kind: Kind, *, frames: int, parts: Mapping[str, str] | None = None, **meta: Any
    ) -> Checkpoint:
        """Write ``state`` whole or not at all; a scheduled one lets the oldest go, and an earlier signal's.

        Args:
            state: tensors and plain values.
            kind: see the class.
            frames: of the run.
            parts: names and checksums of the parts that the state refers to, oldest first (see `add_part`).
            meta: what is to be known without reading the state.

        Raises:
            NotWrittenError: if the disk is full, say; what was there before stays as it was.
        """
        name = f"frames_{frames:012d}" if kind == "scheduled" else kind
        writing = self.path / f".writing-{name}"
        shutil.rmtree(writing, ignore_errors=True)
        stream = io.BytesIO()
        torch.save(state, stream)
        data = stream.getbuffer()
        meta = {"parts": dict(parts or {}), **meta}
        about = {"kind": kind, "frames": frames, "format": FORMAT, "version": marl_memory.__version__}
        try:
            with naming(self.path / name, needs=len(data)):
                writing.mkdir(parents=True)
                (writing / "state.pt").write_bytes(data)
                about |= {"sha256": _sha256(writing / "state.pt"), **meta}
                (writing / "meta.json").write_text(json.dumps(about, indent=1))
                for file in writing.iterdir():
                    _flush(file)
        except NotWrittenError:
            shutil.rmtree(writing, ignore_errors=True)  # half of it only takes up room
            raise
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
            self._drop_unused_parts()
        return Checkpoint(final)

    def scheduled(self) -> list[Checkpoint]:
        """Scheduled checkpoints, newest first."""
        return [
            Checkpoint(path) for path in sorted(self.path.glob("frames_*"), reverse=True) if _NAME.fullmatch(path.name)
        ]

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
                for _ in checkpoint.parts():
                    pass  # each is read and checked
                return checkpoint.load(), checkpoint
            except DamagedCheckpointError as error:
                warn(f"damaged checkpoint passed over: {error}")
        raise NoCheckpointError(f"{self.path} holds no checkpoint that can be read: start anew in another folder")


@contextmanager
def naming(path: Path, *, needs: int | None = None) -> Iterator[None]:
    """While ``path`` is written: a failure names it (a full disk's own error does not) and the bytes it ``needs``.

    Raises:
        NotWrittenError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        text = f"{path} could not be written: {error.strerror or error}"
        if needs is not None:
            text += f"; it needs {needs:,} bytes"
        raise NotWrittenError(text) from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all.

    Raises:
        NotWrittenError: if it can not be written; what was there before stays as it was.
    """
    writing = path.with_name(f".writing-{path.name}")
    with naming(path):
        try:
            writing.write_text(text)
            _flush(writing)
            writing.replace(path)
        finally:
            writing.unlink(missing_ok=True)


def check_state(name: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise IncompatibleCheckpointError at the first entry of ``state`` that ``own`` lacks, or has in another shape.

    Args:
        name: where the state belongs, as in ``algorithm``.
        own: the state of what is to go on with it.
        state: the checkpoint's.
    """
    for key in dict.fromkeys([*own, *state]):
        if key not in state or key not in own:
            where = "this run's, not in the checkpoint's" if key in own else "the checkpoint's, not in this run's"
            raise IncompatibleCheckpointError(f"the entry {name}.{key} is in {where}")
        a, b = state[key], own[key]
        if isinstance(b, Tensor) and (not isinstance(a, Tensor) or a.shape != b.shape):
            shape = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise IncompatibleCheckpointError(
                f"the entry {name}.{key} has shape {shape} in the checkpoint and {list(b.shape)} in this run"
            )


_NAME = re.compile(r"frames_\d{12}")


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
