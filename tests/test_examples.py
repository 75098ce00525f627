"""The examples, run as a user would: their commands are read from their own first lines."""

from __future__ import annotations

import ast
import json
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from pettingzoo.test import parallel_api_test

from marl_memory import cli
from marl_memory.study.plan import check_builds, make_plan
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import release

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = (
    "training.n_envs=4 training.steps=16 training.total_frames=256 training.checkpoint_every_frames=128 "
    "training.evaluation_every_frames=128 training.evaluation_episodes=4 network.hidden=[16,16] "
    "logger.tensorboard=false"
).split()


def command(file: Path) -> list[str]:
    """The arguments after ``marl-memory`` in the file's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert docstring is not None
    program, *arguments = shlex.split(docstring[docstring.index("marl-memory train") :])
    assert program == "marl-memory"
    return arguments


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples outside the repository, and a process that has yet to see it."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Path(shutil.copytree(EXAMPLES, tmp_path / "user"))


def train(folder: Path, name: str, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train in ``folder`` by the command line; the state of the last checkpoint."""
    monkeypatch.chdir(folder)
    cli.main([*overrides, *TINY, "logger.quiet=true", f"run_folder={name}"])
    return CheckpointFolder(folder / name / "checkpoints").scheduled()[0].load()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_example_is_tested_here() -> None:
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*") if "__pycache__" not in path.parts}
    assert found == {
        "algorithm/a2c.py",
        "algorithm/algorithm/a2c.yaml",
        "load_policy.py",
        "operator/memory/visit_bonus.yaml",
        "operator/visit_bonus.py",
        "own_environment/env/treasure_hunt.yaml",
        "own_environment/treasure_hunt.py",
        "study/study/critics.yaml",
        "torchrl/ddpg.py",  # these four in test_torchrl_examples.py
        "torchrl/mappo.py",
        "torchrl/ppo.py",
        "torchrl/td3.py",
        "without_hydra.py",
    }


def test_own_environment_trains_by_the_installed_command(user_folder: Path) -> None:
    folder = user_folder / "own_environment"
    program = Path(sysconfig.get_path("scripts")) / "marl-memory"  # unlike `python -m`, it has no "" in sys.path
    done = subprocess.run(
        [program, *command(folder / "treasure_hunt.py"), *TINY, "run_folder=run"],
        cwd=folder, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    task = json.loads((folder / "run" / "run.json").read_text())["task"]
    assert (task["agents"], task["observation_sizes"]) == (["guide", "porter"], [3, 2])
    assert MetricsFile(folder / "run" / "metrics.csv").column("evaluation/success")[0] == [0, 128, 256]


def test_own_environment_keeps_the_rules_of_pettingzoo() -> None:
    hunt = runpy.run_path(str(EXAMPLES / "own_environment" / "treasure_hunt.py"))["TreasureHunt"]()
    parallel_api_test(hunt, num_cycles=100)
    hunt.reset(seed=0)
    hunt.cells, hunt.treasure = {"guide": 0, "porter": 8}, 4
    for _ in range(4):
        assert hunt.agents == ["guide", "porter"]
        observations, rewards, terminations, truncations, infos = hunt.step({"guide": 2, "porter": 0})
    assert hunt.agents == []
    assert terminations == {"guide": True, "porter": True}
    assert rewards == {"guide": 0.99, "porter": 0.99}
    assert infos["guide"]["won"]
    assert not truncations["guide"]


def test_own_environment_has_a_config_of_its_own(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = user_folder / "own_environment"
    state = train(
        folder, "run", "train", "--config-dir", ".", "env=treasure_hunt", "env.kwargs.length=5", monkeypatch=monkeypatch
    )
    assert state["frames"] == 256
    assert json.loads((folder / "run" / "run.json").read_text())["task"]["name"] == "treasure_hunt"


def test_operator_acts_is_saved_and_at_strength_0_changes_nothing(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = user_folder / "operator"
    arguments = command(folder / "visit_bonus.py")
    states = {
        name: train(folder, name, *arguments, *overrides, monkeypatch=monkeypatch)
        for name, overrides in {
            "on": ["memory.visit_bonus.eta=0.5"],
            "zero": ["memory.visit_bonus.strength=0"],
            "absent": ["memory=[]"],
        }.items()
    }
    counts = states["on"]["memory"]["visit_bonus"]["counts"]
    assert counts.sum() == 256 * 2  # two agents live through every frame of Rendezvous
    assert (counts > 0).sum() > 1
    assert states["absent"]["memory"] == {}
    assert same(states["zero"]["algorithm"], states["absent"]["algorithm"])
    assert not same(states["on"]["algorithm"], states["absent"]["algorithm"])


def test_algorithm_resumes_exactly(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = user_folder / "algorithm"
    arguments = command(folder / "a2c.py")
    straight = train(folder, "straight", *arguments, monkeypatch=monkeypatch)
    stopped = train(folder, "stopped", *arguments, "training.stop_at_frames=128", monkeypatch=monkeypatch)
    assert (stopped["frames"], straight["frames"]) == (128, 256)
    assert not same(stopped["algorithm"], straight["algorithm"])
    release(folder / "stopped")
    cli.main(["resume", "stopped"])
    assert same(CheckpointFolder(folder / "stopped" / "checkpoints").scheduled()[0].load(), straight)


def test_a_policy_is_loaded_and_used(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(user_folder, "run", "train", "env=toy/masked_duel", monkeypatch=monkeypatch)
    monkeypatch.setattr(sys, "argv", ["load_policy.py", "run"])
    capsys.readouterr()
    used = runpy.run_path("load_policy.py")
    assert used["policy"].greedy
    assert used["td"].batch_size == (8, 50)
    assert used["episodes"] >= 8 * 2  # an episode of the task lasts 20 steps at most
    assert capsys.readouterr().out.startswith(f"{used['episodes']} episodes, mean reward of a step ")


def test_the_trainer_works_without_hydra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "without_hydra.py"))["main"](tmp_path / "run", total_frames=1024)
    assert "finished at 1,024 frames" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.csv", "curve.png", "checkpoints"}


def test_a_study_of_ones_own(user_folder: Path) -> None:
    plan = make_plan(["study=critics", "--config-dir", str(user_folder / "study")])
    assert len(plan.configs) == 3 * 2 * 2 * 5
    check_builds(plan)
    assert plan.study.baseline_of("shuffled+central") == "no_memory+central"
