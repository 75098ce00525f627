"""``train -m``: a folder for every job, one after the other or side by side, and every failure has a name."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from marl_memory.training.hydra_errors import ConfigError, in_one_sentence
from marl_memory.training.logging import MetricsFile
from marl_memory.training.sweep import Prefixed, check_jobs
from tests import fresh

SMALL = (
    "training.n_envs=4", "training.steps=16", "training.total_frames=128", "training.checkpoint_every_frames=128",
    "training.evaluation_every_frames=128", "training.evaluation_episodes=4", "network.hidden=[16,16]",
    "algorithm.epochs=2", "algorithm.minibatches=2",
)  # fmt: skip

OWN_TASK = """
from marl_memory_envs.toy import MaskedDuel

def make():
    return MaskedDuel()
"""

OWN = ("env=pettingzoo", "env.factory=own_task:make", "env.common_reward=true", *SMALL)

SIDE_BY_SIDE = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def train(*words: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    if SIDE_BY_SIDE[0] in words:  # its processes begin as this one does
        command = [sys.executable, "-m", "marl_memory", "train", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250)
    else:
        done = fresh.command("train", *words, cwd=cwd)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def learned(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics, without what a clock measures."""
    rows = MetricsFile(folder / "metrics.csv").rows
    assert len(rows) == 3
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user's task lies; ``alone`` is a run of seed 1."""
    folder = tmp_path_factory.mktemp("multirun")
    (folder / "own_task.py").write_text(OWN_TASK)
    train(*OWN, "seed=1", "run_folder=alone", cwd=folder)
    return folder


def test_every_job_has_a_folder_of_its_own(folder: Path) -> None:
    """Four jobs that differ in what the folder's usual name does not say: seed 0 twice, and seed 1 twice."""
    before = set(folder.iterdir())
    done = train("-m", *OWN, "seed=0,1", "algorithm.lr=0.001,0.01", cwd=folder)
    jobs = sorted(folder.glob("runs/pettingzoo/mappo/seed_*_job_*"), key=lambda path: path.name[-1])
    assert [path.name[:6] + path.name[-6:] for path in jobs] == [
        "seed_0_job_0",
        "seed_0_job_1",
        "seed_1_job_2",
        "seed_1_job_3",
    ]
    assert set(folder.iterdir()) - before == {folder / "runs"}, "only runs are written"
    for i, job in enumerate(jobs):
        assert f"run folder  {job.relative_to(folder)}\n" in done.stdout
        run = json.loads((job / "run.json").read_text())
        assert (run["config"]["seed"], run["config"]["algorithm"]["lr"]) == (i // 2, (0.001, 0.01)[i % 2])
    assert "job 1 (seed=0 algorithm.lr=0.01)\n" in done.stdout
    assert learned(jobs[2]) == learned(folder / "alone")  # an earlier job in the same process changes nothing
    assert learned(jobs[2]) != learned(jobs[3])


@pytest.mark.slow
def test_side_by_side_is_the_same_as_alone(folder: Path) -> None:
    done = train("-m", *OWN, "seed=0,1", *SIDE_BY_SIDE, "run_folder=side", cwd=folder)
    assert learned(folder / "side_job_1") == learned(folder / "alone")
    for number in (0, 1):
        run = json.loads((folder / f"side_job_{number}" / "run.json").read_text())
        assert run["threads"] == 1
        assert run["command"][0] == "marl-memory train"
        assert f"seed={number}" in run["command"], "the command of this job alone"
        assert f"[job {number}] run folder  side_job_{number}\n" in done.stdout
    assert all(line.startswith(("[job 0] ", "[job 1] ")) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), id="basic"), pytest.param(SIDE_BY_SIDE, id="joblib", marks=pytest.mark.slow)],
)
def test_a_job_that_fails_is_named_and_the_others_go_on(launcher: tuple[str, ...], folder: Path) -> None:
    name = f"failing{len(launcher)}"
    sweep = ("algorithm.clip=-0.1,0.2", *launcher, f"run_folder={name}")  # a value that only the learner can judge
    done = train("-m", *OWN, *sweep, cwd=folder, ok=False)
    assert done.stderr.splitlines()[-2:] == [
        "job 0 (algorithm.clip=-0.1) failed: algorithm.clip=-0.1 must be positive",
        "marl-memory: job 0 (algorithm.clip=-0.1) failed (see above)",
    ]
    assert "Traceback" not in done.stderr
    assert not (folder / f"{name}_job_0").exists()
    assert len(learned(folder / f"{name}_job_1")) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,abc"], "job 1 (seed=abc): seed='abc' must be a whole number, 0 or more"),
        (["algorithm.lr=1e-3,abc", "seed=1,2"], "job 2 (algorithm.lr=abc seed=1): algorithm.lr='abc' must be a finite"),
        (["seed=0,1", "algorithm.clipp=1"], "algorithm.clipp is unknown, nothing reads it: did you mean clip?"),
        (["env=toy/masked_duel,toy/masked_dual"], "env=toy/masked_dual does not exist: did you mean toy/masked_duel"),
        (["seed=0,1", "training.steps=0"], "job 0 (seed=0): training.steps=0 must be a whole number of at least 1"),
        (["seed=interval(0,3)"], "seed=interval(0,3) names no values to sweep over: list them, as in seed=1,2,3"),
        (
            ["network.hidden=[8],[x]"],
            "job 1 (network.hidden=[x]): network.hidden=['x'] must be a list of whole numbers",
        ),
    ],
)
def test_every_job_is_checked_before_the_first_one_starts(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised, in_one_sentence():
        check_jobs(["env=toy/masked_duel", *words, "-m"])
    assert str(raised.value).startswith(message)


def test_the_jobs_are_those_of_hydra(tmp_path: Path) -> None:
    names = check_jobs(["env=toy/masked_duel", "seed=range(0,3)", "env.kwargs.dragon=2,4", "training.threads=1", "-m"])
    pairs = [(seed, dragon) for seed in range(3) for dragon in (2, 4)]
    assert names == [f"job {i} (seed={seed} env.kwargs.dragon={dragon})" for i, (seed, dragon) in enumerate(pairs)]
    assert check_jobs(["env=toy/masked_duel", "-m"]) == ["job 0"]
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.yaml").write_text("defaults: [toy/masked_duel@_here_]\nkwargs: {dragon: 3}\n")
    assert check_jobs(["env=mine", "seed=1,2", "--config-dir", str(tmp_path), "-m"]) == [
        "job 0 (seed=1)",
        "job 1 (seed=2)",
    ]


def test_a_bad_sweep_leaves_nothing_behind(tmp_path: Path) -> None:
    done = train("-m", "env=toy/masked_duel", "seed=0,abc", cwd=tmp_path, ok=False)
    assert done.stderr == "marl-memory: job 1 (seed=abc): seed='abc' must be a whole number, 0 or more\n"
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_is_missing_is_named() -> None:
    def missing(file: str) -> str:
        with pytest.raises(ConfigError) as raised, in_one_sentence():
            raise MissingConfigException("not found", file)
        return str(raised.value)

    assert missing("hydra/launcher/joblib") == (
        'hydra/launcher=joblib is not installed: pip install "marl-memory[joblib]"'
    )
    assert missing("hydra/launcher/jobs") == "hydra/launcher=jobs does not exist; known are basic and joblib"


@pytest.mark.parametrize(
    ("launcher", "to_all"),
    [
        pytest.param((), True, id="basic"),
        pytest.param(SIDE_BY_SIDE, True, id="joblib", marks=pytest.mark.slow),
        pytest.param(SIDE_BY_SIDE, False, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_sweep_and_loses_nothing(launcher: tuple[str, ...], to_all: bool, folder: Path) -> None:
    """Ctrl-C goes to all processes of the terminal's group; ``kill`` only to the one that was started."""
    name = f"stopped{len(launcher)}{to_all}"
    words = (
        *OWN,
        "training.total_frames=100_000_000",
        "training.checkpoint_every_frames=100_000_000",
        "seed=0,1,2",
        *launcher,
        f"run_folder={name}",
    )
    command = [sys.executable, "-m", "marl_memory", "train", "-m", *words]
    running = [folder / f"{name}_job_{i}" for i in range(2 if launcher else 1)]
    sweep = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 100
        while not all(
            (job / "metrics.csv").exists() and len(MetricsFile(job / "metrics.csv").rows) > 2 for job in running
        ):
            assert sweep.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        if to_all:
            os.killpg(sweep.pid, signal.SIGINT)
        else:
            os.kill(sweep.pid, signal.SIGTERM)
        said = sweep.communicate(timeout=100)[1]
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
    assert sweep.returncode == 1
    left = ", ".join(f"job {i} (seed={i})" for i in range(len(running), 3))
    assert said.splitlines()[-1] == f"marl-memory: {left} not started: the sweep was stopped"
    assert not (folder / f"{name}_job_2").exists()
    for job in running:
        assert (job / "curve.png").exists(), "a job that is asked to stop saves, draws and leaves"
        assert list((job / "checkpoints").glob("*signal*"))


def test_lines_of_jobs_that_print_together_stay_apart() -> None:
    stream = io.StringIO()
    prefixed = Prefixed(stream, "[job 7] ")
    print("one\ntwo", end="", file=prefixed)
    assert stream.getvalue() == "[job 7] one\n"
    print(" and a half", file=prefixed, flush=True)
    assert stream.getvalue() == "[job 7] one\n[job 7] two and a half\n"
    assert not prefixed.isatty()
