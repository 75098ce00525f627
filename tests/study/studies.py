"""A study small enough for tests, and what its runs left behind without what a clock measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from marl_memory.study.results import read_results
from tests import fresh

TINY = """
question: Does the machinery work?
operator: mnemo_region
common:
  - env=toy/rendezvous
  - algorithm=mappo
  - network.hidden=[8]
  - algorithm.minibatches=1
  - algorithm.epochs=1
  - memory=[${operator}]
  - memory.${operator}.capacity=64
  - memory.${operator}.neighbours=4
  - training.n_envs=4
  - training.steps=16
  - training.checkpoint_every_frames=64
  - training.evaluation_every_frames=128
  - training.evaluation_episodes=4
tasks:
  meet: []
arms:
  no_memory: ["memory=[]"]
  strength_0: ["memory.${operator}.strength=0.0"]
  shared: [scope=shared]
equal: [[no_memory, strength_0]]
seeds: [0, 1]
budget: 256
"""


def write(folder: Path, text: str = TINY, name: str = "tiny") -> Path:
    """A folder for ``--config-dir`` with one study."""
    (folder / "study").mkdir(parents=True, exist_ok=True)
    (folder / f"study/{name}.yaml").write_text(text)
    return folder


def command(configs: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "marl_memory", "study", "study=tiny", "--config-dir", str(configs), *words]


def run(configs: Path, *words: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = fresh.command(*command(configs, *words)[3:], cwd=cwd)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def kill_after(seconds: float, configs: Path, *words: str, cwd: Path, number: signal.Signals) -> None:
    """Start the study and send it, and it alone, a signal after some seconds, unless it ends before."""
    process = subprocess.Popen(
        command(configs, *words), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, number)
        process.wait(60)


def learnt(folder: Path) -> dict[Any, Any]:
    """What every finished run learnt."""
    records = read_results(folder).records
    return {
        run: (one.frames, one.digest, one.absolute, [curve for name, curve in one.curves.items()])
        for run, one in records.items()
    }
