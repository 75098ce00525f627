"""Films: decoded again, they show the episodes that were played; and what can not be filmed is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageSequence
from torch import Generator

from marl_memory.networks.actor import Actor
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training import video
from marl_memory.training.checkpoint import NotWrittenError
from marl_memory.training.evaluation import evaluate
from marl_memory.training.run import evaluate_run
from marl_memory.training.video import Filmed, asking_for_pictures, check_file, film
from marl_memory_envs.base import AgentsEnv
from marl_memory_envs.toy import MaskedDuel
from marl_memory_envs.vector import VectorEnv, vector_env
from tests import fresh

SPREAD: dict[str, Any] = {"factory": "marl_memory_envs.mpe:simple_spread", "kwargs": {"max_cycles": 6}}
CARTPOLE: dict[str, Any] = {"factory": "marl_memory_envs.classic:cartpole", "max_episode_steps": 500}

SMALL = (
    "training.n_envs=4", "training.steps=16", "training.total_frames=64", "training.checkpoint_every_frames=64",
    "training.evaluation_every_frames=64", "training.evaluation_episodes=4", "network.hidden=[16,16]",
)  # fmt: skip


def policy(spec: TaskSpec) -> Actor:
    generator = Generator().manual_seed(0)
    body = partial(MLP, hidden=(8,))
    return Actor(spec, body, share_parameters=True, normalise_observations=True, init_generator=generator, seed=1)


def mp4(file: Path) -> tuple[np.ndarray, str]:
    """All pictures ``[F, H, W, 3]`` and what ffmpeg says of the file."""
    command = [
        get_ffmpeg_exe(),
        "-i",
        str(file),
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    said = next(line for line in done.stderr.decode().splitlines() if "Video: h264" in line)
    width, height = map(int, re.search(r", (\d+)x(\d+)[, ]", said).groups())
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), said


def gif(file: Path) -> tuple[list[np.ndarray], list[int]]:
    """The pictures, and for how many milliseconds each is shown: equal ones in a row become one."""
    shown = [
        (np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(Image.open(file))
    ]
    return [picture for picture, _ in shown], [duration for _, duration in shown]


def test_an_mp4_of_simple_spread_shows_every_step(tmp_path: Path) -> None:
    env, said = vector_env(**asking_for_pictures(SPREAD), n_envs=1, seed=3), []
    played = film(env, policy(env.task_spec), tmp_path / "film.mp4", episodes=2, seed=3, say=said.append)
    pictures, said_by_ffmpeg = mp4(tmp_path / "film.mp4")
    assert played.lengths.tolist() == [6, 6]
    assert pictures.shape == (14, 700, 700, 3)  # 2 × (the start and 6 steps)
    assert " 10 fps" in said_by_ffmpeg  # mpe2's own rate
    assert np.ptp(pictures, axis=0).max() > 100, "nothing moves"
    assert (pictures[6] != pictures[7]).mean() > 0.005, "the second episode begins where the first ended"
    assert said == [f"filmed 2 greedy episodes, 14 pictures, 10 a second: {tmp_path / 'film.mp4'}"]
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_filming_changes_nothing_that_is_played(tmp_path: Path) -> None:
    env, plain = (vector_env(**{**node, "n_envs": 1, "seed": 0}) for node in (asking_for_pictures(CARTPOLE), CARTPOLE))
    actor = policy(env.task_spec)
    filmed = film(env, actor, tmp_path / "film.gif", episodes=3, seed=5)
    assert torch.equal(filmed.lengths, (expected := evaluate(plain, actor, episodes=3, seed=5)).lengths)
    assert torch.equal(filmed.returns, expected.returns)
    pictures, durations = gif(tmp_path / "film.gif")
    assert pictures[0].shape == (400, 600, 3)
    assert sum(durations) == 20 * (int(filmed.lengths.sum()) + 3)  # 50 a second: CartPole's own rate
    assert len(pictures) > 20


def test_smax_is_filmed_tick_by_tick(tmp_path: Path) -> None:
    from marl_memory_envs import smax
    from marl_memory_envs.smax_frames import picture

    env = smax.vector_env(map="3m", n_envs=1, seed=0, max_steps=3)
    played = film(env, policy(env.task_spec), tmp_path / "film.mp4", episodes=1, seed=0)
    pictures, said = mp4(tmp_path / "film.mp4")
    assert played.lengths.tolist() == [4]
    assert pictures.shape == (1 + 4 * 8, 480, 480, 3)
    assert " 16 fps" in said
    assert all((a != b).any() for a, b in zip(pictures[:-1:8], pictures[8::8], strict=True))

    td = env.reset()
    start = env.frames()
    env.step(env.rand_action(td))
    *_, last = env.frames()
    now = picture(env.simulator.game, env.simulator.one(env._carry)[1].state, tick=7)
    title = 60  # rows of pixels: the clock moves on at the end of a step only
    assert len(start) == 1
    assert np.array_equal(last[title:], now[title:]), "the last tick is not the state that the step led to"
    assert not np.array_equal(start[0][title:], now[title:])
    env.reset()
    assert len(env.frames()) == 1  # the last step was another episode's


def test_a_single_smax_battle_is_drawn_too() -> None:
    env = vector_env(
        "marl_memory_envs.smax:parallel_env",
        n_envs=1,
        seed=0,
        kwargs={"map": "3m", "max_steps": 3, "render_mode": "rgb_array"},
    )
    env.reset()
    (picture,) = env.frames()
    assert picture.shape == (480, 480, 3)
    assert env.frames_per_second == 2
    with pytest.raises(ValueError, match="render_mode='human' must be 'rgb_array' or None"):
        vector_env("marl_memory_envs.smax:parallel_env", n_envs=1, seed=0, kwargs={"map": "3m", "render_mode": "human"})


@pytest.mark.parametrize(
    "factory",
    [
        "classic:acrobot", "classic:mountain_car", "classic:pendulum", "box2d:lunar_lander", "box2d:bipedal_walker",
        "sisl:multiwalker", "mpe:simple_speaker_listener", "mpe:simple_reference", "mpe:simple_tag",
    ],
)  # fmt: skip
def test_every_other_drawable_family_gives_pictures_that_move(factory: str) -> None:
    env = vector_env(**asking_for_pictures({"factory": f"marl_memory_envs.{factory}"}), n_envs=2, seed=0)
    td = env.reset()
    (first,) = env.frames()
    for _ in range(10):
        td = env.step(env.rand_action(td))["next"]
    (later,) = env.frames()
    env.close()
    assert first.shape == later.shape
    assert (first != later).any()
    assert 10 <= env.frames_per_second <= 50


# ---- what the file holds ---------------------------------------------------------------------------------------------


class Coloured(VectorEnv):
    """simple_spread's episodes, with pictures of our own: of odd size, and at a rate of our own."""

    def __init__(self, rate: float, draw: Callable[[int], np.ndarray]) -> None:
        super().__init__(vector_env(**SPREAD, n_envs=1, seed=0).envs)
        self.frames_per_second, self.draw, self.count = rate, draw, 0

    def frames(self) -> list[np.ndarray]:
        self.count += 1
        return [self.draw(self.count)]


def grey(height: int, width: int, level: int) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_a_picture_of_odd_size_loses_nothing(tmp_path: Path) -> None:
    env = Coloured(12.5, lambda count: grey(31, 43, 20 * count))
    film(env, policy(env.task_spec), tmp_path / "film.mp4", episodes=1, seed=0)
    pictures, said = mp4(tmp_path / "film.mp4")
    assert pictures.shape == (7, 32, 44, 3)  # H.264 wants even sizes: the last row and column are there twice
    assert " 12.50 fps" in said
    assert np.abs(pictures.reshape(7, -1).mean(-1) - 20 * np.arange(1, 8)).max() < 4


def test_a_gif_keeps_its_speed_by_leaving_out_pictures(tmp_path: Path) -> None:
    env, said = Coloured(125.0, lambda count: grey(20, 20, 20 * count)), []
    film(env, policy(env.task_spec), tmp_path / "film.gif", episodes=1, seed=0, say=said.append)
    pictures, durations = gif(tmp_path / "film.gif")
    assert [int(picture[0, 0, 0]) for picture in pictures] == [20, 80, 140]  # one in three of seven
    assert durations == [20, 30, 20]  # 24 ms each, in hundredths of a second
    assert "7 pictures (one in 3 kept), 125 a second" in said[0]


def test_pictures_of_changing_size_are_refused_and_the_old_film_stays(tmp_path: Path) -> None:
    (tmp_path / "film.gif").write_text("the old film")
    env = Coloured(10, lambda count: grey(20 + (count > 3), 20, count))
    with pytest.raises(ValueError, match=r"changed from \(20, 20\) to \(21, 20\)"):
        film(env, policy(env.task_spec), tmp_path / "film.gif", episodes=1, seed=0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("film.gif", "the old film")]


@pytest.mark.parametrize(
    "script", ["echo the disk is full >&2; exit 3", "cat >/dev/null; echo the disk is full >&2; exit 1"]
)
def test_an_ffmpeg_that_fails_is_quoted(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    monkeypatch.setattr(video, "_ffmpeg", broken)
    env = vector_env(**asking_for_pictures(SPREAD), n_envs=1, seed=3)
    with pytest.raises(NotWrittenError, match=r"film.mp4 could not be written: ffmpeg says 'the disk is full'"):
        film(env, policy(env.task_spec), tmp_path / "film.mp4", episodes=1, seed=3)
    assert not list(tmp_path.iterdir())


# ---- what can not be filmed ------------------------------------------------------------------------------------------


def test_files_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"film.avi must end in .mp4 or .gif"):
        check_file(tmp_path / "film.avi")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        check_file(tmp_path / "nowhere" / "film.gif")
    monkeypatch.setattr(video, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r'pip install "marl-memory\[video\]"; .*--video=.*film.gif'):
        check_file(tmp_path / "film.mp4")
    check_file(tmp_path / "film.gif")


def test_one_environment_at_a_time() -> None:
    with pytest.raises(ValueError, match="n_envs=2"):
        Filmed(vector_env(**SPREAD, n_envs=2, seed=0), lambda picture: None)


def test_an_environment_without_pictures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    env = vector_env(**CARTPOLE, n_envs=1, seed=0)
    env.reset()
    with pytest.raises(ValueError, match="cartpole can not be drawn: render.. gave NoneType.*render_mode='rgb_array'"):
        env.frames()

    def no_screen() -> None:
        raise RuntimeError("no screen here")

    monkeypatch.setattr(env.envs[0], "render", no_screen)  # stands for a machine that can not draw
    with pytest.raises(ValueError, match="can not be drawn: RuntimeError: no screen here"):
        env.frames()
    with pytest.raises(ValueError, match="can not be drawn: NotImplementedError"):
        vector_env(MaskedDuel, n_envs=1, seed=0).frames()
    with pytest.raises(ValueError, match="VectorEnv has no pictures"):
        AgentsEnv.frames(env)


def test_mujoco_is_told_what_to_draw_with() -> None:
    """In a process of its own, without a screen."""
    code = (
        "from marl_memory_envs.vector import vector_env\n"
        "env = vector_env('marl_memory_envs.mujoco:hopper', n_envs=1, seed=0, kwargs={'render_mode': 'rgb_array'})\n"
        "env.reset()\nenv.frames()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["MUJOCO_GL"] = "glfw"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert "ValueError: marl_memory_envs.mujoco:hopper can not be drawn: " in done.stderr
    assert "set MUJOCO_GL=egl" in done.stderr.splitlines()[-1]


# ---- the command -----------------------------------------------------------------------------------------------------


def cli(*arguments: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = fresh.command(*arguments, cwd=cwd)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of CartPole."""
    folder = tmp_path_factory.mktemp("video") / "run"
    cli("train", "env=classic/cartpole", "algorithm=ppo", *SMALL, f"run_folder={folder}", cwd=folder.parent)
    return folder


def test_evaluate_films_three_episodes_into_the_run(cartpole: Path) -> None:
    printed = cli("evaluate", str(cartpole), "--video", cwd=cartpole.parent).stdout
    assert f"a second: {cartpole / 'video.mp4'}" in printed
    assert "episodes  3" in printed
    pictures, _ = mp4(cartpole / "video.mp4")
    length = float(next(line for line in printed.splitlines() if "length" in line).split()[1])
    assert len(pictures) == round(3 * length) + 3
    assert pictures.shape[1:] == (400, 600, 3)


def test_the_film_shows_what_evaluate_counts(cartpole: Path) -> None:
    filmed, counted = (evaluate_run(cartpole, episodes=1, video=file) for file in (cartpole / "one.gif", None))
    assert torch.equal(filmed.returns, counted.returns)
    _, durations = gif(cartpole / "one.gif")
    assert sum(durations) == 20 * (int(counted.lengths.sum()) + 1)


OWN_TASK = """
from marl_memory_envs.toy import MaskedDuel

def make():
    return MaskedDuel()
"""


def test_a_task_that_can_not_be_drawn_gets_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    cli(
        "train", "env=pettingzoo", "env.factory=own_task:make", "algorithm=ippo", *SMALL, "run_folder=run", cwd=tmp_path
    )
    done = cli("evaluate", "run", "--video", "film.gif", cwd=tmp_path, ok=False)
    assert "unexpected keyword argument 'render_mode'. For a film the factory is given render_mode" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*film*"))


def test_a_wrong_file_is_one_clear_error(cartpole: Path) -> None:
    done = cli("evaluate", str(cartpole), "--video", "film.avi", cwd=cartpole, ok=False)
    assert done.stderr == "marl-memory: --video=film.avi must end in .mp4 or .gif\n"
