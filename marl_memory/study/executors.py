"""Where the runs of a study are executed: on this machine, on a Ray cluster, or on Slurm through submitit.

A run is a command in a process of its own wherever it is executed, so the results are the same bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ENDED_BADLY = 1
"""Status of a run whose executor lost it."""


class Running(Protocol):
    """A run that was handed to an executor."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs, or waits for its turn."""
        ...

    def stop(self) -> None:
        """Ask it to save and leave."""
        ...


Executor = Callable[[Sequence[str], Path], Running]
"""Starts a command whose output goes to a file."""


def call(words: Sequence[str], log: Path, cwd: str) -> int:
    """Run a command to its end; where this process is interrupted or killed, the command is asked to leave."""
    with _open(words, log, cwd) as process:
        return process.wait()


def _open(words: Sequence[str], log: Path, cwd: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        # A session of its own: Ctrl-C comes to the study, which asks its runs by closing their standard input.
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )


class LocalRun:
    """A child process of this one."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.process = _open(words, log, os.getcwd())

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.process.stdin is not None:
            self.process.stdin.close()


class RayRun:
    """A Ray task that calls the command on whatever node has room."""

    def __init__(self, task: Any, words: Sequence[str], log: Path) -> None:
        self.reference = task.remote(list(words), log.resolve(), os.getcwd())

    def poll(self) -> int | None:
        """Its exit status; None while it runs, or waits for its turn."""
        import ray
        from ray.exceptions import RayError

        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return ray.get(self.reference)
        except (RayError, KeyboardInterrupt):
            return ENDED_BADLY

    def stop(self) -> None:
        """Interrupt the task, which asks the command to leave."""
        import ray

        ray.cancel(self.reference)


class SubmititRun:
    """A job of submitit's: on Slurm, or a process of this machine's."""

    def __init__(self, executor: Any, words: Sequence[str], log: Path) -> None:
        self.job = executor.submit(call, list(words), log.resolve(), os.getcwd())

    def poll(self) -> int | None:
        """Its exit status; None while it runs, or waits for its turn."""
        if not self.job.done():
            return None
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return self.job.result()
        except (FailedJobError, UncompletedJobError):
            return ENDED_BADLY

    def stop(self) -> None:
        """Cancel the job; its command notices, and leaves."""
        self.job.cancel(check=False)


EXECUTORS = ("local", "ray", "submitit")


def make_executor(name: str, options: Mapping[str, Any], *, folder: Path, threads: int) -> Executor:
    """The executor that ``study.executor`` names.

    Args:
        name: ``local``, ``ray`` or ``submitit``.
        options: see `StudyFile`.
        folder: of the study, which all nodes see under this path.
        threads: that a run computes with.

    Raises:
        ValueError: for another name, or options that it does not take.
        ImportError: if its package is not installed.
    """
    if name == "local":
        if options:
            raise ValueError(f"study.executor_options={dict(options)} have no effect with study.executor=local")
        return LocalRun
    if name == "ray":
        task = _ray_task(options, threads)
        return lambda words, log: RayRun(task, words, log)
    if name == "submitit":
        executor = _submitit_executor(options, folder, threads)
        return lambda words, log: SubmititRun(executor, words, log)
    raise ValueError(f"study.executor={name!r} must be one of {', '.join(EXECUTORS)}")


def _ray_task(options: Mapping[str, Any], threads: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError('study.executor=ray needs Ray: pip install "marl-memory[ray]"') from error
    if not ray.is_initialized():
        try:
            ray.init(**{"include_dashboard": False, "log_to_driver": False, "logging_level": "error", **options})
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"study.executor_options={dict(options)}: ray.init says: {error}") from error
    return ray.remote(num_cpus=threads, max_retries=0)(call)


def _submitit_executor(options: Mapping[str, Any], folder: Path, threads: int) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError('study.executor=submitit needs submitit: pip install "marl-memory[submitit]"') from error
    keywords = {"timeout_min": 24 * 60, "cpus_per_task": threads, **options}
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=keywords.pop("cluster", None))
        executor.update_parameters(**keywords)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"study.executor_options={dict(options)}: submitit says: {error}") from error
    return executor


def job_words(study: Path, task: str, arm: str, seed: int, *more: str) -> list[str]:
    """The command of one run."""
    return [sys.executable, "-m", "marl_memory.study.job", str(study), task, arm, str(seed), *more]
