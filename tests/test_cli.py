"""The command line as users type it, on tasks that start fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marl_memory import load_policy
from marl_memory.cli import main
from marl_memory.training.checkpoint import CheckpointFolder, NoCheckpointError
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import make_env, read_config
from tests import fresh

SMALL = [
    "training.n_envs=4",
    "training.steps=16",
    "training.total_frames=256",
    "training.checkpoint_every_frames=128",
    "training.evaluation_every_frames=128",
    "training.evaluation_episodes=4",
    "network.hidden=[16,16]",
    "algorithm.epochs=2",
    "algorithm.minibatches=2",
]


def cli(*arguments: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = fresh.command(*arguments, cwd=cwd)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = cli("train", "env=toy/masked_duel", "algorithm=mappo", *SMALL, f"run_folder={folder}", cwd=folder.parent)
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def test_train_leaves_everything_one_needs(finished: Path) -> None:
    assert {"config.yaml", "run.json", "metrics.csv", "curve.png", "checkpoints", "tensorboard"} <= {
        path.name for path in finished.iterdir()
    }
    run = json.loads((finished / "run.json").read_text())
    assert run["threads"] == 1
    assert run["versions"]["torch"] == torch.__version__
    assert any("masked_duel" in word for word in run["command"])
    assert run["task"]["agents"] == ["first", "second"]
    metrics = MetricsFile(finished / "metrics.csv")
    assert [int(row["frames"]) for row in metrics.rows] == [0, 64, 128, 192, 256]
    assert metrics.column("evaluation/success")[0] == [0.0, 128.0, 256.0]
    assert list((finished / "tensorboard").glob("events*"))


def test_train_shows_progress_and_the_next_commands(finished: Path) -> None:
    printed = (finished / "printed.txt").read_text()
    for words in ("frames/s", "return", "win", "ETA", "finished at 256 frames", f"marl-memory evaluate {finished}"):
        assert words in printed
    assert "torch threads  1" in printed
    assert "checkpoint_every_frames=128" in printed  # far below 20 episodes: said, since environments are reset there


def test_evaluate_plays_as_many_episodes_as_asked(finished: Path) -> None:
    printed = [cli("evaluate", str(finished), "--episodes", "7", cwd=finished.parent).stdout for _ in range(2)]
    assert "episodes  7" in printed[0]
    assert "success" in printed[0]
    assert printed[0] == printed[1]  # seeds of its own, the same each time
    assert (
        "--episodes=0 must be at least 1"
        in cli("evaluate", str(finished), "--episodes", "0", cwd=finished, ok=False).stderr
    )


def test_load_policy_acts_greedily_elsewhere(finished: Path) -> None:
    env = make_env(read_config(finished), n_envs=3, seed=5)
    policy = load_policy(finished)
    td = env.reset()
    mask = td["agents", "action_mask"]
    action = policy(td)["agents", "action"]
    assert action.shape == (3, 2)
    assert mask.gather(-1, action.unsqueeze(-1)).all()
    assert torch.equal(action, policy.distribution(td).mode)
    last, state = (
        load_policy(finished, checkpoint="last"),
        CheckpointFolder(finished / "checkpoints").scheduled()[0].load(),
    )
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, state["algorithm"][f"actor.{name}"]), name
    with pytest.raises(ValueError, match="must be 'best' or 'last'"):
        load_policy(finished, checkpoint="newest")
    with pytest.raises(ValueError, match="holds no run"):
        load_policy(finished / "nowhere")


def test_tasks_lists_every_env_config(tmp_path: Path) -> None:
    printed = cli("tasks", cwd=tmp_path).stdout
    for task in (
        "smax/3m",
        "mpe/simple_spread",
        "classic/cartpole",
        "box2d/lunar_lander",
        "pettingzoo",
        "toy/masked_duel",
    ):
        assert any(line.split()[0] == task for line in printed.splitlines()), task
    assert "env.factory=package.module:function" in printed
    assert any(line.split() == ["smax/3m", "[smax]", "ready"] for line in printed.splitlines())
    assert "mamujoco/task" in printed


def test_a_missing_suite_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from marl_memory.cli import config_dir
    from marl_memory.training import tasks

    monkeypatch.setattr(tasks, "find_spec", lambda package: None)
    found = {task.name: task for task in tasks.list_tasks(config_dir() / "env")}
    assert found["mpe/simple_tag"].hint == 'missing: pip install "marl-memory[mpe]"'
    assert found["smax/3m"].hint == 'missing: pip install "marl-memory[smax]"'
    assert (found["smax/3m"].ready, found["smax/3m"].extra) == (False, "smax")
    assert found["classic/cartpole"].ready
    monkeypatch.setattr(tasks, "find_spec", lambda package: package)
    found = {task.name: task for task in tasks.list_tasks(config_dir() / "env")}
    assert found["mamujoco/task"].hint == "ready, given env.kwargs.scenario=… and env.kwargs.agent_conf=…"
    assert found["mamujoco/ant_4x2"].hint == "ready"


USER_TASK = """
from marl_memory_envs.toy import MaskedDuel

def make(dragon=2):
    return MaskedDuel(dragon=dragon, common_reward=False)
"""


def test_a_users_own_parallel_env_trains_without_touching_the_library(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(USER_TASK)
    cli(
        "train", "env=pettingzoo", "env.factory=my_task:make", "env.kwargs={dragon: 3}", "algorithm=ippo", *SMALL,
        "run_folder=mine", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["task"]["common_reward"] is False
    with pytest.raises(NoCheckpointError, match="no best checkpoint"):
        load_policy_of_an_empty_run(tmp_path / "mine")


def load_policy_of_an_empty_run(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "checkpoints")
    load_policy(folder)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.clipp=0.1"], "clipp"),
        (["algorithm.clip=-0.1"], "algorithm.clip=-0.1 must be positive"),
        (["algorithm.gamma=1.5"], "algorithm.gamma=1.5 must lie in [0, 1]"),
        (["training.steps=0"], "training.steps=0 must be a whole number of at least 1"),
        (["network.activation=swish"], "network.activation='swish' must be one of"),
        (["algorithm.minibatches=1000"], "algorithm.minibatches=1000 must not exceed"),
        (["scope=shared"], "scope=shared"),
        (["seed=abc"], "seed='abc' must be a whole number"),
        (["training.steps=abc"], "training.steps='abc' must be a whole number"),
        (["training.threads=0"], "training.threads=0 must be a whole number of at least 1"),
        (["+algorithm.foo=1"], "algorithm.foo=1 is unknown, nothing reads it"),
        (["+env.kwargs.wings=2"], "wings"),
        (["env.max_episode_steps=3"], "max_episode_steps=3"),
        (["env=toy/nothing"], "nothing"),
    ],
)
def test_bad_input_gets_one_clear_error(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["marl-memory"])  # `train` writes it
    streams = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # else Hydra closes those that belong to pytest
    with pytest.raises(SystemExit) as left:
        main(["train", "env=toy/masked_duel", *SMALL, *overrides, "run_folder=run", *streams])
    assert isinstance(left.value.code, str) and words in left.value.code


def test_bad_input_as_a_user_sees_it(tmp_path: Path) -> None:
    done = cli("train", "env=toy/masked_duel", *SMALL, "algorithm.clip=-0.1", "run_folder=run", cwd=tmp_path, ok=False)
    assert done.stderr.strip() == "marl-memory: algorithm.clip=-0.1 must be positive"
    assert "Traceback" not in done.stdout
