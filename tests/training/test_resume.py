"""Stop and resume: 2k iterations equal k, a new process, and k more, bit for bit; also after kill -9."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from marl_memory.cli import config_dir
from marl_memory.memory.scope import SCOPES
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import RunFolderError, read_config, release, resume, start
from tests import fresh

TOY = [
    "env=toy/masked_duel",
    "training.n_envs=4",
    "training.steps=16",
    "training.total_frames=1280",
    "training.checkpoint_every_frames=256",
    "training.evaluation_every_frames=320",
    "training.evaluation_episodes=6",
    "network.hidden=[16,16]",
    "logger.quiet=true",
]
FEW = ["algorithm.epochs=2", "algorithm.minibatches=2"]
"""Updates an iteration: 4 instead of 64. Who is to be killed in the middle makes all of them."""
SMAX = [
    "env=smax/3m",
    "training.n_envs=8",
    "training.steps=32",
    "training.total_frames=1536",
    "training.checkpoint_every_frames=512",
    "training.evaluation_every_frames=512",
    "training.evaluation_episodes=8",
    "network.hidden=[16,16]",
    "logger.quiet=true",
    "logger.tensorboard=false",
]


def train(folder: Path, *overrides: str) -> None:
    fresh.command("train", *overrides, f"run_folder={folder}", check=True)


def final_state(folder: Path) -> dict[str, Any]:
    state, _ = CheckpointFolder(folder / "checkpoints").newest(pytest.fail)
    return state


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    return [{key: text for key, text in row.items() if not key.startswith("time/")} for row in found]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the last bit, tensors and all."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_runs(a: Path, b: Path) -> None:
    """The same final state, the same metrics but for timings, the same best policy, the same next batch."""
    assert_same(final_state(a), final_state(b))
    assert rows(a) == rows(b)
    best_a, best_b = (CheckpointFolder(folder / "checkpoints").named("best") for folder in (a, b))
    assert best_a is not None
    assert best_b is not None
    assert_same(best_a.load(), best_b.load(), "best")
    batches = [resume(folder, {}, say=lambda text: None).collector.collect()[0] for folder in (a, b)]
    for key in batches[0].keys(include_nested=True, leaves_only=True):
        if "learn" not in key:
            assert torch.equal(batches[0].get(key), batches[1].get(key)), key


def test_resume_equals_uninterrupted_on_a_team_with_masks_and_deaths(tmp_path: Path) -> None:
    for algorithm in ("ippo", "mappo"):
        straight, halved = (tmp_path / f"{algorithm}_{name}" for name in ("straight", "halved"))
        options = [*TOY, *FEW, f"algorithm={algorithm}"]
        options += ["algorithm.normalise_observations=true", "algorithm.scale_rewards=true"]
        train_here(straight, *options)
        train_here(halved, *options, "training.stop_at_frames=640")  # not a multiple of the checkpoint interval
        assert int(rows(halved)[-1]["frames"]) == 640
    fresh.python(RESUME_ALL, *(tmp_path / f"{name}_halved" for name in ("ippo", "mappo")), check=True)
    for algorithm in ("ippo", "mappo"):
        assert_same_runs(tmp_path / f"{algorithm}_straight", tmp_path / f"{algorithm}_halved")


OFF_POLICY = [
    *(key for key in TOY if "env=" not in key),
    "algorithm.batch_size=16",
    "algorithm.warmup_frames=128",
    "algorithm.capacity=600",  # the ring wraps
    "algorithm.updates_per_frame=0.0625",
]


TWO_DUELING = [
    "algorithm.critics=2",
    "algorithm.dueling=true",
    "algorithm.target_every=7",
    "algorithm.epsilon_fraction=1",
    "algorithm.train_every=4",
]


@pytest.mark.parametrize(
    ("algorithm", "env", "more"),
    [
        ("ddpg", "toy/rendezvous", ["algorithm.exploration=ou", "algorithm.noise_final=0.02"]),
        ("td3", "toy/rendezvous", ["algorithm.storage=memmap", "algorithm.train_every=4"]),
        ("maddpg", "toy/masked_duel", []),
        ("matd3", "toy/masked_duel", ["algorithm.share_actor=true"]),
        ("idqn", "toy/masked_duel", TWO_DUELING),
    ],
)
def test_resume_equals_uninterrupted_with_a_replay(algorithm: str, env: str, more: list[str], tmp_path: Path) -> None:
    options = [f"env={env}", f"algorithm={algorithm}", *OFF_POLICY, *more]
    train_here(tmp_path / "straight", *options)
    train_here(tmp_path / "halved", *options, "training.stop_at_frames=640")  # between checkpoints: leaves a signal's
    fresh.python(RESUME_ALL, tmp_path / "halved", check=True)
    parts = final_state(tmp_path / "straight")["iterate"]["parts"]
    assert len(parts) >= 2
    assert {file.name for file in (tmp_path / "straight/checkpoints/replay").iterdir()} >= set(parts)
    assert_same_runs(tmp_path / "straight", tmp_path / "halved")
    replays = [resume(tmp_path / name, {}, say=lambda text: None).iterate.replay for name in ("straight", "halved")]  # type: ignore[union-attr]
    for key in replays[0].entries:
        assert torch.equal(replays[0].in_order(key), replays[1].in_order(key)), key
    assert torch.equal(replays[0].ends_in_order(), replays[1].ends_in_order())


MEMORIES = {
    "mnemo_region": [("mappo", "toy/masked_duel"), ("ippo", "toy/rendezvous")],
    "mnemo_gradient": [("maddpg", "toy/masked_duel"), ("matd3", "toy/rendezvous")],
    "sil": [("ppo", "toy/rendezvous"), ("mappo", "toy/masked_duel")],
    "return_memory": [
        ("mappo", "toy/masked_duel"),
        ("td3", "toy/rendezvous"),
        ("maddpg", "toy/masked_duel"),
        ("dqn", "toy/masked_duel"),
    ],
    "reflection": [("mappo", "toy/masked_duel"), ("td3", "toy/rendezvous")],
    "coarse_fine": [("mappo", "toy/masked_duel"), ("td3", "toy/rendezvous"), ("dqn", "toy/masked_duel")],
}
MORE = {
    "sil": [],
    "reflection": [
        f"memory.reflection.{key}"
        for key in ("least=1", "kappa=0.3", "hidden=[16]", "batches=2", "batch_size=16", "upper=0.6", "lower=0.4")
    ],
    "coarse_fine": ["memory.coarse_fine.hidden=[16]", "memory.coarse_fine.batches=4"],
}
"""Options that make a memory small; None of them: those of a store of rows."""


ON_HOSTS = [
    pytest.param(memory, host, scopes, marks=[pytest.mark.slow] * slow, id=f"{memory}-{host[0]}-{'-'.join(scopes)}")
    for memory, hosts in MEMORIES.items()
    for place, host in enumerate(hosts)
    for scopes, slow in (((SCOPES[-1],), place > 0), (SCOPES[:-1], place > 0 or not memory.startswith("mnemo")))
]
"""Each memory on the first of its hosts, Mnemo's in every scope, the others in one; the rest as slow tests."""


@pytest.mark.parametrize(("memory", "host", "scopes"), ON_HOSTS)
def test_resume_equals_uninterrupted_with_a_memory_in_every_scope(
    memory: str, host: tuple[str, str], scopes: tuple[str, ...], tmp_path: Path
) -> None:
    (algorithm, env), pairs = host, []
    for scope in scopes:
        small = OFF_POLICY if algorithm in ("td3", "maddpg", "matd3", "dqn") else [*TOY[1:], *FEW]
        options = [f"env={env}", f"algorithm={algorithm}", *small, f"memory=[{memory}]", f"scope={scope}"]
        options += [f"memory.{memory}.capacity=192", f"memory.{memory}.strength_final=0.5"]
        options += MORE.get(memory, [f"memory.{memory}.min_rows=16", f"memory.{memory}.payloads=shuffled"])
        straight, halved = (tmp_path / f"{algorithm}_{scope}_{name}" for name in ("straight", "halved"))
        train_here(straight, *options)
        train_here(halved, *options, "training.stop_at_frames=640")
        pairs.append((straight, halved))
    fresh.python(RESUME_ALL, *(halved for _, halved in pairs), check=True)
    for straight, halved in pairs:
        assert float(rows(straight)[-1][f"memory/{memory}/rows"]) > 0
        assert memory != "reflection" or float(rows(straight)[-1]["memory/reflection/used"]) > 0
        assert_same_runs(straight, halved)


@pytest.mark.parametrize(
    ("algorithm", "env", "more"),
    [
        pytest.param(*("td3", "toy/rendezvous", []), marks=pytest.mark.slow),
        ("matd3", "toy/masked_duel", ["algorithm.train_every=4", "memory.gem.include_running=false"]),
        pytest.param(*("ddpg", "toy/rendezvous", ["algorithm.storage=memmap"]), marks=pytest.mark.slow),
        pytest.param(*("idqn", "toy/masked_duel", ["algorithm.critics=2"]), marks=pytest.mark.slow),
        ("mappo", "toy/masked_duel", []),
    ],
)
def test_resume_equals_uninterrupted_with_returns_over_the_replay(
    algorithm: str, env: str, more: list[str], tmp_path: Path
) -> None:
    """The returns, the clock of their refreshes and the generator of the smoothing noise included."""
    host = [*TOY[1:], *FEW] if algorithm == "mappo" else OFF_POLICY
    options = [f"env={env}", f"algorithm={algorithm}", *host, "memory=[gem]", *more, "memory.gem.refresh_every=72"]
    options += ["memory.gem.capacity=400", "memory.gem.strength_final=0.5"]  # a part of the replay
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    train_here(straight, *options)
    train_here(halved, *options, "training.stop_at_frames=640")
    fresh.python(RESUME_ALL, halved, check=True)
    assert float(rows(straight)[-1]["memory/gem/used"]) > 0
    assert {"table.returns", "refreshed", "_extra_state"} <= set(final_state(straight)["memory"]["gem"])
    assert_same_runs(straight, halved)


def train_here(folder: Path, *overrides: str) -> None:
    """As `train`, in this process, where JAX need not compile again."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [*overrides, f"run_folder={folder}"]), resolve=True)
    del config["run_folder"]
    start(config, folder).run()
    release(folder)


RESUME_ALL = """
import sys
from pathlib import Path
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import resume
for folder in sys.argv[1:]:
    resume(Path(folder), {}).run()
"""


def test_resume_equals_uninterrupted_on_smax(tmp_path: Path) -> None:
    halved = []
    for algorithm in ("ippo", "mappo"):
        train_here(tmp_path / f"{algorithm}_straight", *SMAX, *FEW, f"algorithm={algorithm}")
        halved.append(tmp_path / f"{algorithm}_halved")
        train_here(
            halved[-1], *SMAX, *FEW, f"algorithm={algorithm}", "training.stop_at_frames=768"
        )  # between checkpoints
        assert int(rows(halved[-1])[-1]["frames"]) == 768
    fresh.python(RESUME_ALL, *halved, check=True)  # a new process
    for algorithm in ("ippo", "mappo"):
        assert_same_runs(tmp_path / f"{algorithm}_straight", tmp_path / f"{algorithm}_halved")


def kill_and_resume(folder: Path, options: list[str], *, seconds: float, until: str = "checkpoints/frames_*") -> None:
    """Train, kill -9 a while after the file ``until`` is there, then resume to the end."""
    command = [sys.executable, "-m", "marl_memory.cli", "train", *options, f"run_folder={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(folder.glob(until)):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished before
    fresh.command("resume", folder, check=True)


@pytest.mark.parametrize("attempt", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_nine_then_resume_gives_the_same_bits(attempt: int, tmp_path: Path) -> None:
    train(tmp_path / "straight", *TOY, "algorithm=mappo")
    seconds = random.Random(os.urandom(8)).uniform(0.0, 0.8)
    print(f"killed {seconds:.3f} s after the first checkpoint")
    kill_and_resume(tmp_path / "killed", [*TOY, "algorithm=mappo"], seconds=seconds)
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")


DIE_WRITING = """
import os, signal, sys
from pathlib import Path
import marl_memory.training.checkpoint as checkpoint
from marl_memory.cli import main

FLUSHED, *words = sys.argv[1:]
flush, since = checkpoint._flush, 0

def dying(path):  # at the n-th flush to disk of what comes after the second checkpoint
    global since
    folder = path if path.name == "checkpoints" else path.parent if path.name == "replay" else path.parent.parent
    since += len(list(folder.glob("frames_*"))) >= 2
    if since == int(FLUSHED):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

checkpoint._flush = dying
main(["train", *words])
"""


@pytest.mark.parametrize("algorithm", ["td3", pytest.param("maddpg", marks=pytest.mark.slow)])
def test_kill_nine_in_the_middle_of_a_write_loses_nothing_before_it(algorithm: str, tmp_path: Path) -> None:
    """A part of the replay, its folder, the state, what is known of it, the folder of checkpoints: dead at each."""
    env = "toy/masked_duel" if algorithm == "maddpg" else "toy/rendezvous"
    options = [f"env={env}", f"algorithm={algorithm}", *OFF_POLICY]
    train_here(tmp_path / "straight", *options)
    folders = [tmp_path / f"dead_{flushed}" for flushed in range(1, 6)]
    for i, folder in enumerate(folders, 1):
        dead = fresh.python(DIE_WRITING, i, *options, f"run_folder={folder}")
        assert dead.returncode == -signal.SIGKILL, dead.stderr
    for folder in folders:
        there = CheckpointFolder(folder / "checkpoints").scheduled()
        assert len(there) >= 2 and all(checkpoint.load() for checkpoint in there[:2])
    fresh.python(RESUME_ALL, *folders, check=True)
    for folder in folders:
        assert_same_runs(tmp_path / "straight", folder)


@pytest.mark.slow
def test_kill_nine_before_the_first_checkpoint(tmp_path: Path) -> None:
    options = [*TOY, "algorithm=ippo", "training.evaluation_episodes=300"]  # the first evaluation takes a while
    train(tmp_path / "straight", *options)
    kill_and_resume(tmp_path / "killed", options, seconds=0.0, until="run.json")
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")


def test_resume_equals_uninterrupted_with_continuous_actions(tmp_path: Path) -> None:
    options = ["env=toy/rendezvous", *TOY[1:], *FEW, "algorithm=mappo", "env.kwargs={unequal: true}"]
    options += ["algorithm.normalise_observations=true"]
    train_here(tmp_path / "straight", *options)
    train_here(tmp_path / "halved", *options, "training.stop_at_frames=640")
    fresh.command("resume", tmp_path / "halved", check=True)
    assert_same_runs(tmp_path / "straight", tmp_path / "halved")


def test_readers_do_not_disturb_a_run_and_two_writers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "marl_memory.cli", "train", *TOY, "training.total_frames=1000000"]
    process = subprocess.Popen([*command, f"run_folder={folder}"], stdout=subprocess.DEVNULL)
    while not list((folder / "checkpoints").glob("frames_*")):
        time.sleep(0.01)
    for _ in range(100):
        CheckpointFolder(folder / "checkpoints").scheduled()
        MetricsFile(folder / "metrics.csv")
    with pytest.raises(RunFolderError, match="written by another process"):
        resume(folder, {})
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
def test_kill_nine_on_smax(algorithm: str, tmp_path: Path) -> None:
    options = [*SMAX, f"algorithm={algorithm}"]
    train(tmp_path / "straight", *options)
    kill_and_resume(tmp_path / "killed", options, seconds=random.Random(os.urandom(8)).uniform(0.0, 2.0))
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")


def test_same_seed_same_bits_another_seed_others(tmp_path: Path) -> None:
    short = [*TOY, *FEW, "algorithm=mappo", "training.total_frames=256"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, *short, f"seed={seed}")
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    one, other = final_state(tmp_path / "a")["algorithm"], final_state(tmp_path / "c")["algorithm"]
    weights = [key for key in one if ".body." in key and key.endswith("weight")]
    assert weights
    assert not any(torch.equal(one[key], other[key]) for key in weights)
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_a_signal_finishes_the_iteration_saves_and_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "marl_memory.cli", "train", *TOY, f"run_folder={folder}"]
    process = subprocess.Popen([*command, "training.total_frames=1000000", "training.checkpoint_every_frames=400000"])
    while not list((folder / "checkpoints").glob("frames_*")):
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    left = CheckpointFolder(folder / "checkpoints").named("signal")
    assert left is not None
    assert left.load()["frames"] == left.meta["frames"] == int(rows(folder)[-1]["frames"]) > 0
    assert resume(folder, {}, say=lambda text: None).frames == 0  # bit-equal: the last scheduled one
    trainer = resume(folder, {}, from_signal=True, say=lambda text: None)
    assert trainer.frames == left.meta["frames"]
    assert not trainer.collector.episodes.running_length.any()  # cut episodes enter no statistic
    trainer.scheduled_checkpoint()
    with pytest.raises(RunFolderError, match="no checkpoint left by a signal"):  # it is the past now
        resume(folder, {}, from_signal=True, say=lambda text: None)


def test_resume_says_what_it_does_and_refuses_what_it_can_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *TOY, "training.stop_at_frames=512")
    said: list[str] = []
    with pytest.raises(RunFolderError, match=r"algorithm\.lr=1 can not change"):
        resume(folder, {"algorithm.lr": 1}, say=said.append)
    with pytest.raises(RunFolderError, match="no checkpoint left by a signal"):
        resume(folder, {}, from_signal=True, say=said.append)
    with pytest.raises(RunFolderError, match="holds no run"):
        resume(tmp_path / "nothing", {}, say=said.append)
    for key in ("stop_at_frames", "total_frames"):
        with pytest.raises(RunFolderError, match="is at 512 already"):
            resume(folder, {f"training.{key}": 500}, say=said.append)
    trainer = resume(folder, {"training.total_frames": 2560}, say=said.append)
    assert any("stretches every schedule" in text for text in said)
    assert (trainer.frames, trainer.schedule.end) == (512, 2560)
    assert read_config(folder)["training"]["total_frames"] == 2560

    description = json.loads((folder / "run.json").read_text())
    description["versions"]["torch"] = "1.0"
    (folder / "run.json").write_text(json.dumps(description))
    newest = CheckpointFolder(folder / "checkpoints").scheduled()[0]
    (newest.path / "state.pt").write_bytes(b"not what was written")
    said.clear()
    assert resume(folder, {}, say=said.append).frames == 256
    assert any("damaged" in text and newest.path.name in text for text in said)
    assert any("the run began with 1.0" in text for text in said)


def test_a_run_folder_is_never_shared(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *TOY, "training.total_frames=64")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        train(folder, *TOY)
    assert "already holds a run" in failure.value.stderr
    assert "Traceback" not in failure.value.stderr
