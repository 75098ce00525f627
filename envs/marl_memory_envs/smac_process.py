"""StarCraft II's process: started so that it never outlives its parent, watched, and killed.

Only this module and `smac_game` import pysc2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from marl_memory_envs.smac_protos import ensure

ensure()

from pysc2.lib import protocol, sc_process  # noqa: E402  # pyright: ignore[reportMissingImports]

TAIL = 10
"""Lines of the game's output that are kept when it is killed."""

GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which an exec keeps
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""A program that becomes the game, which the kernel then kills when the thread that started it is gone."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class GameProcess:
    """At most one process of the game; started when a game is to be launched, kept for the next one."""

    def __init__(self) -> None:
        self.pysc2: Any = None
        self.child: subprocess.Popen[bytes] | None = None
        self.late = ""
        """Why the watchdog killed the process, if it did."""
        self.tail: list[str] = []
        """The last lines that the process killed last had written."""
        self._log: Path | None = None
        self._watchdog: Watchdog | None = None

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self.child is not None and self.child.poll() is None

    def start(self, config: Any, **how: Any) -> Any:
        """Take the place of ``config.start``, of a pysc2 run configuration: a process that can create a game.

        One that plays already leaves its game: that takes a fraction of a new start.
        """
        if self.running and self.pysc2 is not None:
            controller = self.pysc2.controller
            if controller.status in (protocol.Status.in_game, protocol.Status.ended):
                controller.leave()
            if controller.status == protocol.Status.launched:
                return self.pysc2
        self.kill()
        with replaced(sc_process, "StarcraftProcess", partial(Guarded, owner=self)):
            self.pysc2 = type(config).start(config, **how)
        return self.pysc2

    def spawn(self, config: Any, words: list[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start the program, in a session of its own: what is typed at the trainer's terminal is not for the game."""
        self._log = folder / "output.log"
        guard = [sys.executable, "-E", "-S", "-c", GUARD, str(os.getpid())] if sys.platform == "linux" else []
        with self._log.open("wb") as log:
            self.child = subprocess.Popen(
                [*guard, *words],
                cwd=config.cwd,
                env=config.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.child

    @contextmanager
    def watched(self, seconds: float, what: str) -> Iterator[None]:
        """Kill the process if what is done meanwhile takes longer: whoever waits for its answer then gets an error."""
        if self._watchdog is None:
            self._watchdog = Watchdog()
            weakref.finalize(self, self._watchdog.end)
        self.late = ""
        with self._watchdog.guarding(seconds, partial(self._too_late, what, seconds)):
            yield

    def _too_late(self, what: str, seconds: float) -> None:
        self.late = f"{what} took longer than {seconds:g} s"
        if self.child is not None:
            _kill(self.child)

    def kill(self) -> None:
        """End the process at once, and what belongs to it; nothing if there is none."""
        if self.child is None:
            return
        self.end()
        if self.pysc2 is not None:
            self.pysc2.close()
        self.pysc2 = self.child = None

    def end(self) -> None:
        """Kill the process, and keep the last lines of its output while they are there."""
        if self.child is None:
            return
        _kill(self.child)
        code = self.child.wait()
        if self._log is not None and self._log.exists():
            self.tail = self._log.read_text(errors="replace").splitlines()[-TAIL:]
            if code not in (0, -signal.SIGKILL):
                self.tail.append(f"(it ended with {'signal' if code < 0 else 'exit code'} {abs(code)})")

    def close(self) -> None:
        """End the process and what watches it."""
        self.kill()
        if self._watchdog is not None:
            self._watchdog.end()
            self._watchdog = None


class Guarded(sc_process.StarcraftProcess):
    """pysc2's own process, started by a `GameProcess`."""

    def __init__(self, *arguments: Any, owner: GameProcess, **keywords: Any) -> None:
        self._owner = owner
        super().__init__(*arguments, **keywords)

    def _launch(self, run_config: Any, args: list[str], **_: Any) -> subprocess.Popen[bytes]:
        return self._owner.spawn(run_config, args, Path(self._tmp_dir))

    def close(self) -> None:
        """End the process before its folder, which holds its output, is removed; once is enough."""
        if self._proc is not None:
            self._owner.end()
        super().close()


class Watchdog:
    """A thread that acts when a deadline has passed."""

    PERIOD = 0.25

    def __init__(self) -> None:
        self._deadline: tuple[float, Callable[[], None]] | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def guarding(self, seconds: float, act: Callable[[], None]) -> Iterator[None]:
        """Call ``act`` from the thread, once, if this is not left within ``seconds``."""
        self._deadline = time.monotonic() + seconds, act
        try:
            yield
        finally:
            with self._lock:  # an act in progress is waited for: it is meant for what was done here
                self._deadline = None

    def _watch(self) -> None:
        while not self._over.wait(self.PERIOD):
            with self._lock:
                if self._deadline is not None and time.monotonic() > self._deadline[0]:
                    self._deadline[1]()
                    self._deadline = None

    def end(self) -> None:
        """Stop watching."""
        self._over.set()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its session."""
    if child.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
