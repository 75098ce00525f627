"""Weights & Biases: only where asked for, one run over all sessions, closed whatever happens."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marl_memory.training.logging import Logger

TOY = (
    "env=toy/masked_duel algorithm=mappo training.n_envs=4 training.steps=16 training.total_frames=256 "
    "training.checkpoint_every_frames=128 training.evaluation_every_frames=128 training.evaluation_episodes=4 "
    "network.hidden=[8] algorithm.epochs=1 algorithm.minibatches=1 logger.quiet=true logger.tensorboard=false"
).split()


class Run:
    """What the stub notes of one session."""

    def __init__(self, step: int, **arguments: Any) -> None:
        self.arguments, self.step = arguments, step
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.left: int | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        assert step >= self.step, "W&B drops such rows, with a warning each"
        self.rows.append((step, row))
        self.step = step

    def finish(self, exit_code: int) -> None:
        self.left = exit_code


class Stub(types.ModuleType):
    """Stands in for the package."""

    class Error(Exception):
        """As W&B's."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Run] = []
        self.refuses, self.step = "", 0

    def Settings(self, **arguments: Any) -> dict[str, Any]:
        return arguments

    def init(self, **arguments: Any) -> Run:
        if self.refuses:
            raise self.Error(self.refuses)
        self.runs.append(Run(self.step, **arguments))
        return self.runs[-1]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    module = Stub()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def make(folder: Path, wandb: str | None = "offline") -> Logger:
    config = {"seed": 3, "algorithm": {"lr": 0.1}}
    return Logger(folder, total_frames=100, config=config, tensorboard=False, quiet=True, wandb=wandb)


def test_what_is_not_asked_for_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises, as where it is not installed
    logger = make(tmp_path, wandb=None)
    with logger.writing(-1):
        logger.log({"frames": 1, "a": 1.0})
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["not installed", "a folder of that name"])
def test_a_missing_package_is_one_error_that_names_the_extra(
    found: types.ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", found)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImportError, match=r'logger.wandb=offline needs .*pip install "marl-memory\[wandb\]"'):
        make(tmp_path)


def test_another_mode_is_an_error_before_anything_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="logger.wandb='on' must be null, offline or online"):
        make(tmp_path, wandb="on")


def test_rows_and_the_configuration_go_along(tmp_path: Path, stub: Stub) -> None:
    logger = make(tmp_path / "task" / "mappo" / "seed_3", wandb="online")
    (tmp_path / "task" / "mappo" / "seed_3").mkdir(parents=True)
    with logger.writing(-1):
        logger.log({"frames": 0, "evaluation/return": 1.0})
        logger.log({"frames": 64, "train/return": 2.0})
    (run,) = stub.runs
    assert run.rows == [(0, {"frames": 0, "evaluation/return": 1.0}), (64, {"frames": 64, "train/return": 2.0})]
    assert run.left == 0
    expected = {
        "config": {"seed": 3, "algorithm": {"lr": 0.1}},
        "project": "marl_memory",
        "name": "task/mappo/seed_3",
        "mode": "online",
        "resume": "allow",
        "dir": str(tmp_path / "task" / "mappo" / "seed_3"),
    }
    assert {key: run.arguments[key] for key in expected} == expected
    assert run.arguments["settings"] == {"silent": True, "console": "off"}


def test_a_resumed_run_keeps_its_id_and_sends_no_row_twice(tmp_path: Path, stub: Stub) -> None:
    for start, step in ((-1, 0), (64, 129)):  # W&B has rows up to 128; the newest checkpoint is of 64
        stub.step = step
        logger = make(tmp_path)
        with logger.writing(start):
            for frames in range(start + 64, 193, 64):
                logger.log({"frames": frames, "a": 1.0})
    first, second = stub.runs
    assert first.arguments["id"] == second.arguments["id"] == (tmp_path / "wandb" / "run_id").read_text()
    assert [step for step, _ in second.rows] == [192]
    (tmp_path / "other").mkdir()
    with make(tmp_path / "other").writing(-1):
        pass
    assert stub.runs[-1].arguments["id"] != first.arguments["id"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_closes_it_as_failed(error: type[BaseException], tmp_path: Path, stub: Stub) -> None:
    with pytest.raises(error), make(tmp_path).writing(-1):
        raise error("in the middle")
    assert stub.runs[0].left == 1


def test_an_error_of_another_part_closes_it_too(tmp_path: Path, stub: Stub) -> None:
    logger = Logger(tmp_path, total_frames=100, quiet=True, wandb="offline")
    logger.start(-1)
    assert logger.writer is not None
    logger.writer.close = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="tensorboard could not be written: No space left"):
        logger.close()
    assert stub.runs[0].left == 0


def test_what_wandb_refuses_is_one_error(tmp_path: Path, stub: Stub) -> None:
    stub.refuses = "no API key:\n  call wandb login"
    with (
        pytest.raises(ValueError, match="logger.wandb=online: W&B did not begin: no API key: call wandb login"),
        make(tmp_path, wandb="online").writing(-1),
    ):
        pytest.fail("it began")


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[Any]]]:
    """The address of a proxy that lets nothing through, and what it was asked: W&B has processes of its own."""
    asked: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    connection, _ = server.accept()
                    connection.settimeout(1.0)
                    with connection, contextlib.suppress(OSError):
                        asked.append(connection.recv(1000))

        thread = threading.Thread(target=refuse)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.slow
def test_the_real_package_writes_offline_and_asks_no_other_host(tmp_path: Path, proxy: tuple[str, list[Any]]) -> None:
    pytest.importorskip("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    address, asked = proxy
    environment |= {
        "http_proxy": address,
        "https_proxy": address,
        "HTTPS_PROXY": address,
        "no_proxy": "",
        "NO_PROXY": "",
    }
    for words in (
        ["train", *TOY, "logger.wandb=offline", "training.stop_at_frames=128", "run_folder=run"],
        ["resume", "run"],
    ):
        command = [sys.executable, "-m", "marl_memory.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not asked
        assert "wandb:" not in done.stdout + done.stderr  # the terminal is not W&B's
    run_id = (tmp_path / "run" / "wandb" / "run_id").read_text()
    sessions = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(sessions) == 2
    for session in sessions:
        written = session.read_bytes()
        assert b"evaluation/return" in written and b"time/environment" in written
        assert b"masked_duel" in written and b"checkpoint_every_frames" in written  # the configuration
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
