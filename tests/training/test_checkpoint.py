"""Checkpoints: whole or not at all, in rotation, verified, and never unpickling code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_memory.training import checkpoint as module
from marl_memory.training.checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpointError, NoCheckpointError


def state(number: int) -> dict[str, Any]:
    tensors = {"weight": torch.full((4,), float(number)), "step": torch.tensor(number)}
    return {"frames": number, "best": [0.5, float(number)], "algorithm": tensors, "memory": {}}


def saved(folder: CheckpointFolder, *frames: int) -> None:
    for number in frames:
        folder.save(state(number), "scheduled", frames=number)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    written = folder.save(state(7), "best", frames=7, **{"evaluation/return": 1.25})
    read = Checkpoint(written.path)
    assert (read.meta["kind"], read.meta["frames"], read.meta["evaluation/return"]) == ("best", 7, 1.25)
    loaded = read.load()
    assert loaded["best"] == [0.5, 7.0]
    assert torch.equal(loaded["algorithm"]["weight"], state(7)["algorithm"]["weight"])


def test_the_newest_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    saved(folder, 100, 200, 300, 1_000_000)
    assert [c.meta["frames"] for c in folder.scheduled()] == [1_000_000, 300]
    assert folder.newest_frames() == 1_000_000
    assert folder.newest(pytest.fail)[0]["frames"] == 1_000_000


def test_best_and_signal_are_replaced_and_best_is_not_in_rotation(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    assert folder.named("best") is None
    for number in (1, 2):
        folder.save(state(number), "best", frames=number)
        folder.save(state(number + 10), "signal", frames=number + 10)
    best, signal = folder.named("best"), folder.named("signal")
    assert best is not None
    assert signal is not None
    assert (best.load()["frames"], signal.load()["frames"]) == (2, 12)
    saved(folder, 3, 4)  # the run went on: where a signal left it is the past
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "frames_000000000004"]
    assert best.load()["frames"] == 2


def test_saving_the_same_frame_again_replaces_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 5)
    folder.save(state(6), "scheduled", frames=5)
    assert [c.load()["frames"] for c in folder.scheduled()] == [6]


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_frames() is None
    with pytest.raises(NoCheckpointError, match="no checkpoint that can be read"):
        folder.newest(pytest.fail)


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training.keep_checkpoints=0"):
        CheckpointFolder(tmp_path, keep=0)


# ----------------------------------------------------------------------------------------------------------- damage


def cut_short(path: Path) -> None:
    content = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(content[: len(content) // 2])


def flip_one_bit(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def write_meta(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "meta.json").write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state cut short": cut_short,
    "one bit flipped": flip_one_bit,
    "state empty": lambda path: (path / "state.pt").write_bytes(b""),
    "state missing": lambda path: (path / "state.pt").unlink(),
    "meta missing": lambda path: (path / "meta.json").unlink(),
    "meta cut short": write_meta('{"kind": "sched'),
    "meta empty": write_meta(""),
    "meta without checksum": write_meta("{}"),
    "meta is a list": write_meta("[1, 2]"),
    "meta is not text": lambda path: (path / "meta.json").write_bytes(b"\xff\xfe\x00\x80"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    folder, warnings = CheckpointFolder(tmp_path), []
    saved(folder, 1, 2)
    DAMAGE[damage](tmp_path / "frames_000000000002")
    with pytest.raises(DamagedCheckpointError, match="frames_000000000002"):
        Checkpoint(tmp_path / "frames_000000000002").load()
    loaded, checkpoint = folder.newest(warnings.append)
    assert loaded["frames"] == 1
    assert checkpoint.path.name == "frames_000000000001"
    assert len(warnings) == 1
    assert "frames_000000000002" in warnings[0]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    folder, warnings = CheckpointFolder(tmp_path), []
    saved(folder, 1, 2)
    for checkpoint in folder.scheduled():
        cut_short(checkpoint.path)
    with pytest.raises(NoCheckpointError):
        folder.newest(warnings.append)
    assert len(warnings) == 2


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder, mark = CheckpointFolder(tmp_path / "checkpoints"), tmp_path / "executed"
    saved(folder, 1)
    path = tmp_path / "checkpoints" / "frames_000000000001"
    torch.save({"frames": 1, "algorithm": Malicious(mark)}, path / "state.pt")
    meta = json.loads((path / "meta.json").read_text())
    meta["sha256"] = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises((pickle.UnpicklingError, DamagedCheckpointError)):
        Checkpoint(path).load()
    assert not mark.exists()
    torch.load(path / "state.pt", weights_only=False)  # the trap does work
    assert mark.exists()


# -------------------------------------------------------------------------------------------------------- atomicity


class Killed(BaseException):
    """Stands for the power going out."""


def test_what_a_kill_left_half_written_is_cleaned(tmp_path: Path) -> None:
    saved(CheckpointFolder(tmp_path), 1)
    half = tmp_path / ".writing-frames_000000000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    folder = CheckpointFolder(tmp_path)
    assert half.exists()  # a reader changes nothing: it may be a live run's
    folder.recover()
    assert not half.exists()
    assert [c.load()["frames"] for c in folder.scheduled()] == [1]


@pytest.mark.parametrize("victim", ["torch.save", "_sha256", "_flush"])
def test_a_kill_while_writing_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 1)
    folder.save(state(1), "best", frames=1)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch if victim == "torch.save" else module, victim.removeprefix("torch."), killed)
        for kind in ("scheduled", "best"):
            with pytest.raises(Killed):
                folder.save(state(2), kind, frames=2)  # type: ignore[arg-type]
    folder = CheckpointFolder(tmp_path)
    folder.recover()
    best = folder.named("best")
    assert best is not None
    assert best.load()["frames"] == 1
    assert folder.newest(pytest.fail)[0]["frames"] == 1
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("kind", ["best", "scheduled"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, renames: int
) -> None:
    folder = CheckpointFolder(tmp_path)
    final = folder.save(state(1), kind, frames=5).path
    done, rename = 0, Path.rename

    def killed_after(self: Path, target: Path) -> Path:
        nonlocal done
        if done == renames:
            raise Killed
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_after)
        with pytest.raises(Killed):
            folder.save(state(2), kind, frames=5)
    CheckpointFolder(tmp_path).recover()
    assert final.exists()
    assert Checkpoint(final).load()["frames"] in (1, 2)


def test_what_lies_ahead_of_a_restored_state_is_dropped(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 1, 2, 3)
    folder.save(state(3), "best", frames=3)
    cut_short(tmp_path / "frames_000000000003")
    restored, _ = folder.newest(lambda text: None)
    folder.drop_after(restored["frames"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames_000000000001", "frames_000000000002"]
    folder.save(state(2), "best", frames=2)
    folder.drop_after(2)
    assert folder.named("best") is not None
