"""Memory of pictures: small projected keys, bytes where pictures are kept, and runs in which it acts."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from marl_memory.memory.barycenter_region import BarycenterRegion
from marl_memory.memory.episodes import RunningEpisodes
from marl_memory.memory.trace import PICTURE_SIZE
from marl_memory.spec import TaskSpec

PICTURE = (4, 20, 20)
SIZE = 1600


def spec(agents: int = 2, clip_rewards: float | None = None) -> TaskSpec:
    return TaskSpec(
        name="pictures",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(SIZE,) * agents,
        action_sizes=(3,) * agents,
        continuous=False,
        state_size=SIZE * agents,
        own_state=False,
        common_reward=False,
        picture=PICTURE,
        frame_stack=4,
        clip_rewards=clip_rewards,
    )


def batch(rows: int, task: TaskSpec, seed: int = 0) -> TensorDict:
    g, k, a = torch.Generator().manual_seed(seed), task.keys, task.n_agents
    observation = torch.randint(0, 256, (rows, a, SIZE), generator=g, dtype=torch.uint8)
    alive = torch.ones(rows, a, dtype=torch.bool)
    return TensorDict({k.observation: observation, k.state: observation.flatten(1), k.alive: alive}, batch_size=rows)


@pytest.mark.parametrize(("scope", "rows"), [("per_agent", (2, 5)), ("shared", (1, 10)), ("centralized", (1, 5))])
def test_keys_are_a_fixed_projection_of_the_brightness(scope: str, rows: tuple[int, int]) -> None:
    operator, td = BarycenterRegion(spec=spec(), scope=scope, capacity=64), batch(5, spec())
    td[spec().keys.alive][3] = False
    keys = operator.scope.keys_of(td)
    assert keys.shape == (*rows, PICTURE_SIZE)
    planes = operator.scope.planes
    assert planes is not None
    source = td["state"] if scope == "centralized" else td["agents", "observation"]
    expected = source.float() / 255 @ planes
    expected[3] = 0
    expected = expected.transpose(0, 1) if scope == "per_agent" else expected.reshape(1, -1, PICTURE_SIZE)
    torch.testing.assert_close(keys.reshape(expected.shape), expected)
    again = BarycenterRegion(spec=spec(), scope=scope, capacity=64).scope.planes
    assert torch.equal(planes, again)  # type: ignore[arg-type]


def test_a_projection_keeps_which_pictures_are_near() -> None:
    """One changed by a few pixels is nearer than any other."""
    operator, td = BarycenterRegion(spec=spec(1), capacity=64), batch(30, spec(1))
    near = td.clone()
    near["agents", "observation"][..., :30] ^= 255
    a, b = operator.scope.keys_of(td)[0], operator.scope.keys_of(near)[0]
    assert torch.equal(torch.cdist(b, a).argmin(1), torch.arange(30))


def test_a_row_is_small() -> None:
    """4096 pictures of 84 × 84 × 4 as float32 would be 462 MB."""
    operator = BarycenterRegion(spec=spec(1), capacity=4096)
    keys = operator.trace.store.keys  # type: ignore[union-attr]
    assert keys.shape == (1, 4096, PICTURE_SIZE)
    assert BarycenterRegion(spec=spec(1), capacity=64, projection=16).scope.features == 16


def test_steps_of_running_episodes_are_kept_as_bytes_and_their_rewards_clipped() -> None:
    task = spec(1, clip_rewards=1.0)
    episodes = RunningEpisodes(task, n_envs=1, batch_steps=3, horizon=10, gamma=1.0, learnt=False)
    td, k = batch(3, task), task.keys
    td.set(k.action, torch.zeros(3, 1, dtype=torch.int64))
    td.set(k.action_mask, torch.ones(3, 1, 3, dtype=torch.bool))
    after = {key: td[key].clone() for key in (k.observation, k.state, k.alive, k.action_mask)}
    for key, x in after.items():
        td.set(("next", key) if isinstance(key, str) else ("next", *key), x)
    done = torch.tensor([[False], [False], [True]])
    for name, x in ((k.done, done), (k.truncated, torch.zeros_like(done))):
        td.set(("next", name), x)
    td.set(("next", *k.reward), torch.tensor([5.0, -9.0, 0.5]).view(3, 1, 1))
    td.set(("next", *k.discount), torch.ones(3, 1, 1))
    episodes.write(td)
    ended = episodes.take(lambda rows: torch.zeros(len(rows), 1, 1))
    assert ended is not None
    assert ended.rows[k.observation].dtype == ended.rows[k.state].dtype == torch.uint8
    assert torch.equal(ended.rows[k.observation], td[k.observation])
    assert ended.returns.flatten().tolist() == [0.5, -0.5, 0.5]


SMALL = [
    "algorithm=ppo",
    "network.channels=[8,8]",
    "network.hidden=[32]",
    "algorithm.epochs=1",
    "algorithm.minibatches=4",
    "training.n_envs=4",
    "training.steps=64",
    "training.total_frames=1024",
    "training.checkpoint_every_frames=1024",
    "training.evaluation_every_frames=1024",
    "training.evaluation_episodes=1",
    "logger.tensorboard=false",
    "logger.quiet=true",
]


def train(folder: Path, *words: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows of the metrics, and the learner's state at the end."""
    from marl_memory.training.checkpoint import CheckpointFolder

    command = [sys.executable, "-m", "marl_memory.cli", "train", *SMALL, *words, f"run_folder={folder}"]
    subprocess.run(command, check=True)
    state, _ = CheckpointFolder(folder / "checkpoints").newest(print)
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file)), state["algorithm"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "task",
    [
        ["env=atari/pong", "network.kernels=[8,4]", "network.strides=[4,2]"],
        ["env=box2d/car_racing", "network.kernels=[8,4]", "network.strides=[4,2]", "env.kwargs.continuous=true"],
    ],
    ids=["pong", "car_racing"],
)
def test_mnemo_region_acts_where_pictures_are_seen(task: list[str], tmp_path: Path) -> None:
    rows, learnt = train(tmp_path / "with", *task, "memory=[mnemo_region]", "memory.mnemo_region.capacity=512")
    host, alone = train(tmp_path / "without", *task)
    last = rows[-1]
    assert float(last["memory/mnemo_region/rows"]) > 0
    assert float(last["memory/mnemo_region/neighbours"]) > 0
    assert float(last["memory/mnemo_region/strength"]) > 0
    assert float(last["memory/mnemo_region/omega"]) > 0
    assert host[-1]["frames"] == last["frames"]
    differ = [name for name, x in learnt.items() if name.startswith("actor.body") and not torch.equal(x, alone[name])]
    assert differ
