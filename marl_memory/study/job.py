"""One run of a study, in a process of its own: begun or gone on with, judged, and its record written.

``python -m marl_memory.study.job STUDY TASK ARM SEED``; the status is 0 for a finished run, `STOPPED` for one that was
asked to leave and saved itself, and 1 for one that failed, whose reason then lies beside its folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from marl_memory.algorithms.algorithm import Algorithm
from marl_memory.study.results import PLAN, Record, failure_file, run_folder, sha256
from marl_memory.training.clock import SECTIONS, collecting_and_learning
from marl_memory.training.config import differences
from marl_memory.training.logging import MetricsFile
from marl_memory.training.plot import NOT_COMPARED
from marl_memory.training.run import RunFolderBusyError, evaluate_run, read_config, resume, start
from marl_memory.training.trainer import Trainer

STOPPED = 3
"""Status of a run that was asked to leave."""

PATIENCE = 120.0
"""Seconds to wait for a process of an earlier, killed study to finish its iteration and let go of the run."""

ABSOLUTE = 10
"""Times the episodes of an evaluation over which the best policy is played anew."""

PROBED = 3.0
"""Seconds of training by which a probe estimates a run."""


def run_job(study: Path, task: str, arm: str, seed: int) -> bool:
    """Train to the end, and leave a `Record`; False if a signal asked to leave before."""
    folder, config = run_folder(study, task, arm, seed), planned(study, task, arm, seed)
    trainer = _begin(config, folder)
    try:
        trainer.run()
    finally:
        trainer.close()
    if trainer.frames < trainer.schedule.total_frames:
        return False
    episodes = evaluate_run(folder, episodes=ABSOLUTE * trainer.schedule.evaluation_episodes)
    absolute = {"return": episodes.returns.tolist()}
    if episodes.success is not None:
        absolute["success"] = episodes.success.double().tolist()
    metrics = MetricsFile(folder / "metrics.csv")
    Record(
        task=task,
        arm=arm,
        seed=seed,
        frames=trainer.frames,
        curves={name: metrics.column(name) for name in metrics.columns if name.startswith("evaluation/")},
        absolute=absolute,
        digest=digest(trainer.algorithm),
        costs=_costs(trainer, metrics),
        files={name: sha256(folder / name) for name in ("metrics.csv", "run.json")},
    ).write(folder)
    return True


def planned(study: Path, task: str, arm: str, seed: int) -> dict[str, Any]:
    """The configuration that the study's plan has for a run."""
    return json.loads((study / PLAN).read_text())["configs"][task][arm][str(seed)]


def _begin(config: dict[str, Any], folder: Path) -> Trainer:
    """A new run, or one that goes on at its newest checkpoint.

    Raises:
        RunFolderError: if the folder holds another run than the planned one, or one that another process writes to.
    """
    began = time.monotonic()
    while True:
        try:
            if not (folder / "run.json").exists():
                return start(config, folder)
            for key, there, wanted in differences(read_config(folder), config):
                if not key.startswith(NOT_COMPARED):
                    raise ValueError(f"{folder} has {key}={there}, but the study plans {wanted}: it is another study's")
            return resume(folder, {})
        except RunFolderBusyError:
            if time.monotonic() - began > PATIENCE:
                raise
            time.sleep(0.5)


def digest(algorithm: Algorithm) -> str:
    """SHA-256 of the learner's parameters, by name."""
    sha = hashlib.sha256()
    for name, parameter in sorted(algorithm.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _costs(trainer: Trainer, metrics: MetricsFile) -> dict[str, float]:
    seconds = {f"time/{name}": sum(metrics.column(f"time/{name}")[1]) for name in SECTIONS}
    operators = trainer.memory.operators.values()
    payloads = [operator.payloads for operator in operators]
    return {
        "wall_seconds": sum(seconds.values()),
        "frames_per_second": trainer.frames / collecting_and_learning(seconds),
        "peak_bytes": float(peak_bytes()),
        "memory_seconds": seconds["time/memory"],
        "memory_bytes": float(sum(operator.bytes for operator in operators)),
        "memory_parameters": float(sum(x.numel() for operator in operators for x in operator.parameters())),
        "rows": float(sum(len(operator) for operator in operators)),
        "payloads": float(sum(held.held for held in payloads if held is not None)),
    }


def peak_bytes() -> int:
    """The most memory that this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def probe(config: Mapping[str, Any]) -> dict[str, float]:
    """Train for some seconds in a folder that is let go; what a whole run may take.

    Returns:
        ``seconds`` of a run to its end, start and evaluations counted, and ``bytes``, the most it had resident so far.
    """
    began = time.monotonic() - time.process_time()  # what starting Python and its imports took counts too
    algorithm = dict(config["algorithm"])
    if "warmup_frames" in algorithm:  # frames without an update would tell nothing
        algorithm["warmup_frames"] = algorithm["batch_size"]
    with TemporaryDirectory(prefix="marl-memory-probe-") as folder:
        trainer = start({**config, "algorithm": algorithm}, Path(folder) / "run")
        try:
            trainer.clock.restart()
            at = time.monotonic()
            trainer.evaluate()
            evaluation = time.monotonic() - at
            trainer.step()  # compiles
            ready, frames = time.monotonic(), trainer.frames
            while time.monotonic() - ready < PROBED and trainer.frames < trainer.schedule.total_frames:
                trainer.step()
            pace = (time.monotonic() - ready) / max(trainer.frames - frames, 1)
        finally:
            trainer.close()
    schedule = trainer.schedule
    evaluations = 1 + ABSOLUTE + schedule.total_frames // schedule.evaluation_every_frames
    seconds = ready - began + evaluations * evaluation + schedule.total_frames * pace
    return {"seconds": seconds, "bytes": float(peak_bytes())}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m marl_memory.study.job")
    parser.add_argument("study", type=Path)
    parser.add_argument("task")
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    parser.add_argument("--probe", action="store_true", help="train for some seconds and print what a run may take")
    parser.add_argument("--tied", action="store_true", help="leave when the other end of standard input is gone")
    run = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:  # as in the command line: a user's own task lies where the command was given
        sys.path.append(os.getcwd())
    if run.tied:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    where = (run.study, run.task, run.arm, run.seed)
    if run.probe:
        print(json.dumps(probe(planned(*where))), flush=True)
        return 0
    try:
        return 0 if run_job(*where) else STOPPED
    except Exception as error:
        said = [f"{type(error).__name__}: {' '.join(str(error).split())}", *getattr(error, "__notes__", [])]
        failure_file(run_folder(*where)).write_text(f"{traceback.format_exc()}\n{'; '.join(said)}\n")
        traceback.print_exc()
        return 1


def _leave_with_parent() -> None:
    while os.read(0, 1024):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
