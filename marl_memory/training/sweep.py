"""Several runs by one command, ``marl-memory train -m seed=0,1,2``: each a job with a folder of its own.

Hydra's sweeper makes the jobs and its launcher runs them, one after the other in this process (``basic``) or side by
side in others (``joblib``).  Here is what it leaves open: all jobs are checked before the first one starts, one that
fails is named and the others go on, and Ctrl-C or SIGTERM ends the sweep and not only a job.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from marl_memory.training.config import config_dir
from marl_memory.training.hydra_errors import ConfigError, folders_of_the_user, in_one_sentence
from marl_memory.training.run import check_config

SWEEP = "MARL_MEMORY_SWEEP"
"""The environment variable that tells jobs, in other processes too, the folder that their sweep leaves notes in."""

STOPPED = "stopped"
"""The note that no further job shall start."""


class SweepError(ValueError):
    """A job of a sweep failed, or was not started."""


@contextmanager
def sweeping(words: Sequence[str]) -> Iterator[list[str]]:
    """Check the jobs of the command line ``words`` and let them run; gives the words for Hydra.

    Without ``-m`` or ``--multirun`` they are the same.

    Raises:
        ConfigError: before any job, if the configuration of one does not fit; nothing has been written then.
        SweepError: after the last job, if one failed or was not started.
    """
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(words):
        yield list(words)
        return
    names = check_jobs(words)
    with TemporaryDirectory(prefix="marl-memory-sweep-") as folder, _stopped_by_signals(Path(folder)):
        for number, name in enumerate(names):
            (Path(folder) / f"name_{number}").write_text(name)
        os.environ[SWEEP] = folder
        try:
            yield [f"hydra.sweep.dir='{folder}'", *words]  # Hydra's own notes: nobody needs them
        finally:
            del os.environ[SWEEP]
        ended = [
            f"{', '.join(those)} {what}"
            for kind, what in (("failed", "failed (see above)"), ("skipped", "not started: the sweep was stopped"))
            if (those := [name for i, name in enumerate(names) if (Path(folder) / f"{kind}_{i}").exists()])
        ]
        if ended:
            raise SweepError("; ".join(ended))


def check_jobs(words: Sequence[str]) -> list[str]:
    """Compose and check the configuration of every job that the command line ``words`` asks for.

    Returns:
        the jobs' names: a number, and in which overrides they differ.

    Raises:
        ConfigError: naming the job.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    folders = [f"file://{folder.resolve()}" for folder in folders_of_the_user(words)]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        jobs = _split(given, GlobalHydra.instance().config_loader())
        common = set(jobs[0]).intersection(*jobs)
        own = [" ".join(word for word in job if word not in common) for job in jobs]
        names = [f"job {i} ({words})" if words else f"job {i}" for i, words in enumerate(own)]
        for name, job in zip(names, jobs, strict=True):
            with in_one_sentence(words):
                config = compose("config", [f"hydra.searchpath={folders}", *job], return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            try:
                with in_one_sentence():
                    sections: Any = [key for key in config if key not in ("hydra", "run_folder")]
                    task = OmegaConf.masked_copy(config, sections)
                    resolved: Any = OmegaConf.to_container(task, resolve=True, throw_on_missing=True)
                check_config(resolved)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    return names


def _split(overrides: Sequence[str], loader: Any) -> list[list[str]]:
    """The overrides of every job, in the order of Hydra's sweeper: the last one changes fastest."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line} names no values to sweep over: list them, as in {key}=1,2,3")
        if override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [str(override.input_line)]
    return [list(job) for job in itertools.product(*choices.values())]


def in_a_sweep() -> bool:
    """Whether this run is one of a sweep's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def own_folder(folder: str) -> Path:
    """Where a run is written: ``folder``; in a sweep with ``_job_NUMBER`` after it, so that no two jobs share one."""
    from hydra.core.hydra_config import HydraConfig

    return Path(f"{folder}_job_{HydraConfig.get().job.num}" if in_a_sweep() else folder)


def stop() -> None:
    """Let no further job of this sweep start."""
    (Path(os.environ[SWEEP]) / STOPPED).touch()


def as_job(train: Callable[[], None]) -> None:
    """Call ``train``.  In a sweep: what is printed names the job, and its failure is noted and ends only this job."""
    if not in_a_sweep():
        train()
        return
    from hydra.core.hydra_config import HydraConfig

    hydra, notes = HydraConfig.get(), Path(os.environ[SWEEP])
    number, name = hydra.job.num, (notes / f"name_{hydra.job.num}").read_text()
    if (notes / STOPPED).exists():
        (notes / f"skipped_{number}").touch()
        return
    sys.argv = ["marl-memory train", *hydra.overrides.task]  # for run.json: in another process, that one's are there
    # Where others print at the same time, each line says whose it is.
    alone = hydra.runtime.choices["hydra/launcher"] == "basic"
    running = notes / f"running_{number}"
    running.write_text(str(os.getpid()))
    try:
        with nullcontext() if alone else redirect_stdout(Prefixed(sys.stdout, f"[job {number}] ")):
            print(name, flush=True)
            train()
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        said = error.code if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        print(f"{name} failed: {str(said).removeprefix('marl-memory: ')}", file=sys.stderr, flush=True)
        (notes / f"failed_{number}").touch()
    finally:
        running.unlink()


class Prefixed(io.TextIOBase):
    """A stream each line of which begins with ``prefix``, written to ``stream`` whole; it is no terminal."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix, self.begun = stream, prefix, ""

    def write(self, text: str) -> int:
        """Write the lines that are complete."""
        *lines, self.begun = (self.begun + text).split("\n")
        self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Flush what is complete."""
        self.stream.flush()


@contextmanager
def _stopped_by_signals(folder: Path) -> Iterator[None]:
    """Ctrl-C or SIGTERM lets no further job start; those that run save and leave.  A second one leaves at once.

    The terminal sends Ctrl-C to every process of the sweep; SIGTERM, which only this one gets, is passed on.
    """

    def handle(number: int, frame: Any) -> None:
        (folder / STOPPED).touch()
        signal.signal(number, previous[number])
        if number == signal.SIGTERM:
            for process in {int(note.read_text()) for note in folder.glob("running_*")} - {os.getpid()}:
                os.kill(process, number)

    previous = {int(number): signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
