"""Whole runs on SMAC's stand-in: training with memory, kill and resume, failures on the way, replays, a film."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.envs.trained import assert_trained

for package in ("smacv2", "pysc2", "s2clientprotocol", "portpicker", "websocket"):
    pytest.importorskip(package, reason=f"{package} is not installed: docs/smac.md says how")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAND_IN = Path(__file__).parents[1] / "sc2_stub"
SMALL = (
    "algorithm=mappo memory=[mnemo_region] algorithm.minibatches=4 training.n_envs=4 training.steps=80 "
    "training.checkpoint_every_frames=4_800 training.evaluation_every_frames=6_400 training.evaluation_episodes=8 "
    "logger.tensorboard=false"
).split()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("make_sc2path", STAND_IN / "make_sc2path.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SC2_STUB_")}
    return {**clean, "SC2PATH": str(module.make(tmp_path / "sc2"))}


def command(*words: Any, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "marl_memory", *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def test_smac_trains_with_memory_and_resumes_to_the_same_bits(environment: dict[str, str], tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    words = ("train", "env=smac/3m", *SMALL, "training.total_frames=12_800")
    command(*words, f"run_folder={straight}", environment=environment)
    assert_trained(straight, 12_800)
    found = rows(straight)
    last = found[-1]
    assert float(last["memory/mnemo_region/rows"]) > 0 and float(last["memory/mnemo_region/strength"]) > 0
    assert {"train/success", "train/dead_allies", "train/dead_enemies", "evaluation/dead_enemies"} <= set(last)
    assert sum(int(float(row["train/dropped"] or 0)) for row in found) == 0
    command(*words, f"run_folder={cut}", "training.stop_at_frames=5_760", environment=environment)
    command("resume", cut, environment=environment)
    assert rows(cut) == found
    said = command("evaluate", straight, "--replay", environment=environment)
    assert "3 replays: " in said
    assert len(list((straight / "replays").glob("episode_?.SC2Replay"))) == 3
    film = tmp_path / "film.gif"
    command("evaluate", straight, "--video", film, "--episodes", 1, environment=environment)
    assert film.stat().st_size > 1000


def test_smacv2_trains_while_games_crash_and_hang(environment: dict[str, str], tmp_path: Path) -> None:
    faults = {"SC2_STUB_CRASH_AFTER": "900", "SC2_STUB_HANG_AFTER": "1300"}  # of every process of the game
    run = tmp_path / "run"
    words = ("train", "env=smacv2/terran_5_vs_5", "env.step_timeout=5", *SMALL, "training.total_frames=10_240")
    said = command(*words, f"run_folder={run}", environment={**environment, **faults})
    dropped = sum(int(float(row["train/dropped"] or 0)) for row in rows(run))
    assert dropped >= 4 and said.count("an episode is dropped") >= dropped
    assert_trained(run, 10_240)


def test_nothing_is_left_of_a_run_that_is_killed(environment: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "env=smac/3m", *SMALL, "training.total_frames=1_000_000", f"run_folder={run}"]
    with subprocess.Popen([sys.executable, "-m", "marl_memory", *words], env=environment) as trainer:
        while len(rows(run) if (run / "metrics.csv").exists() else []) < 4:
            time.sleep(0.5)
            assert trainer.poll() is None
        mine = str(environment["SC2PATH"])
        games = [
            int(pid.name) for pid in Path("/proc").glob("[0-9]*") if mine in _words(pid) and "-listen" in _words(pid)
        ]
        assert len(games) == 8, "four for training, four for evaluation"
        trainer.send_signal(signal.SIGKILL)
    limit = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in games) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not any("-listen" in _words(Path(f"/proc/{pid}")) for pid in games)


def _words(process: Path) -> str:
    try:
        return (process / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
