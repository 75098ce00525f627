"""Greedy episodes as a film: an MP4 by ffmpeg, or a GIF."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensordict import TensorDictBase

from marl_memory.networks.policy import Policy
from marl_memory.training.checkpoint import NotWrittenError, naming
from marl_memory.training.collection import Episodes, TaskEnv
from marl_memory.training.evaluation import evaluate

Write = Callable[[np.ndarray], None]
"""Takes one picture, ``[H, W, 3]`` uint8."""

GIF_RATE = 50
"""The most pictures a second in a GIF: browsers slow faster ones down to 10."""


class Drawable(TaskEnv, Protocol):
    """An environment that can be filmed; `marl_memory_envs.base.AgentsEnv` is one."""

    frames_per_second: float

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step, without a reset where the episode ends."""
        ...

    def frames(self) -> list[np.ndarray]:
        """Pictures of environment 0 since its last step or reset began, each ``[H, W, 3]`` uint8."""
        ...


class Filmed:
    """``env`` with every picture handed to ``write``: that of an episode's start before its first step.

    Episodes end with their true last picture, before the environment is reset.

    Raises:
        ValueError: unless ``env`` has one environment.
    """

    def __init__(self, env: Drawable, write: Write) -> None:
        if env.n_envs != 1:
            raise ValueError(f"n_envs={env.n_envs}: one environment can be filmed at a time, make it with n_envs=1")
        self.env, self.write = env, write
        self.task_spec, self.n_envs, self.resumable = env.task_spec, env.n_envs, env.resumable
        self.set_seed, self.snapshot, self.restore, self.close = env.set_seed, env.snapshot, env.restore, env.close
        self._at_start = True

    def reset(self) -> TensorDictBase:
        """Reset it; observations ``[1]``."""
        self._at_start = True
        return self.env.reset()

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Step it, film it, and reset it where the episode ended."""
        if self._at_start:
            self._film()
        self._at_start = False
        tensordict = self.env.step(tensordict)
        self._film()
        following: TensorDictBase = tensordict.get("next")
        return tensordict, self.reset() if following.get("done").any() else following

    def _film(self) -> None:
        for picture in self.env.frames():
            self.write(picture)


def check_file(file: Path) -> None:
    """Raise before any work if no film can be written to ``file``.

    Raises:
        ValueError: if its suffix is neither .mp4 nor .gif, its folder does not exist, or there is no ffmpeg.
        ImportError: if it needs the extra ``video``.
    """
    if file.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--video={file} must end in .mp4 or .gif")
    if not file.parent.is_dir():
        raise ValueError(f"--video={file}: there is no folder {file.parent}; make it first, or choose another")
    if file.suffix == ".mp4":
        without = f"a GIF can be written without it: --video={file.with_suffix('.gif')}"
        if find_spec("imageio_ffmpeg") is None:
            raise ImportError(f'--video={file} needs imageio-ffmpeg: pip install "marl-memory[video]"; {without}')
        from imageio_ffmpeg import get_ffmpeg_exe

        try:
            get_ffmpeg_exe()
        except RuntimeError as error:
            raise ValueError(f"--video={file} needs ffmpeg: {' '.join(str(error).split())}; {without}") from error


def asking_for_pictures(node: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``env``, with ``render_mode="rgb_array"`` for the factory, if it names one.

    Pygame is told to draw without a screen, unless the variable ``SDL_VIDEODRIVER`` says something else.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if "factory" not in node:
        return dict(node)
    return {**node, "kwargs": {**(node.get("kwargs") or {}), "render_mode": "rgb_array"}}


def film(
    env: Drawable,
    actor: Policy,
    file: Path,
    *,
    episodes: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Episodes:
    """Play greedy episodes as `evaluate` does, and write them to ``file``, one after the other, whole or not at all.

    Args:
        env: one environment that can be drawn, used for nothing else.
        actor: the policy.
        file: an .mp4 or .gif; see `check_file`.
        episodes: how many.
        seed: of the environment.
        say: is told what was filmed.

    Raises:
        ValueError: if the task can not be drawn, or its pictures differ in size.
        NotWrittenError: if ``file`` can not be written.
    """
    rate, sizes = env.frames_per_second, []

    def write_checked(picture: np.ndarray) -> None:
        if sizes and picture.shape != sizes[0]:
            raise ValueError(
                f"{env.task_spec.name} can not be filmed: its pictures changed from {sizes[0][:2]} to "
                f"{picture.shape[:2]} (height, width)"
            )
        sizes.append(picture.shape)
        write(picture)

    writing = file.with_name(f".writing-{file.name}")
    try:
        with (_mp4 if file.suffix == ".mp4" else _gif)(file, writing, rate) as write:
            played = evaluate(Filmed(env, write_checked), actor, episodes=episodes, seed=seed)
        with naming(file):
            writing.replace(file)
    finally:
        writing.unlink(missing_ok=True)
    kept = f" (one in {stride} kept)" if file.suffix == ".gif" and (stride := _stride(rate)) > 1 else ""
    say(f"filmed {episodes} greedy episodes, {len(sizes)} pictures{kept}, {rate:g} a second: {file}")
    return played


@contextmanager
def _mp4(file: Path, writing: Path, rate: float) -> Iterator[Write]:
    """Pictures go to ffmpeg as they come (H.264, which every player and browser shows)."""
    ffmpeg: subprocess.Popen[bytes] | None = None

    def write(picture: np.ndarray) -> None:
        nonlocal ffmpeg
        height, width, _ = picture.shape
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # H.264 wants even sizes
        if ffmpeg is None:
            ffmpeg = _ffmpeg(writing, picture.shape[1], picture.shape[0], rate)
        assert ffmpeg.stdin is not None
        ffmpeg.stdin.write(picture.tobytes())

    try:
        yield write
    except BrokenPipeError:
        pass  # ffmpeg has left: why, is said below
    finally:
        said = ffmpeg.communicate()[1].decode(errors="replace") if ffmpeg is not None else ""
    if ffmpeg is None or ffmpeg.returncode != 0:
        raise NotWrittenError(f"{file} could not be written: ffmpeg says {' '.join(said.split())!r}")


def _ffmpeg(file: Path, width: int, height: int, rate: float) -> subprocess.Popen[bytes]:
    """ffmpeg, taking raw pictures on its standard input."""
    from imageio_ffmpeg import get_ffmpeg_exe

    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{rate:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4", str(file)]
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *target]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def _stride(rate: float) -> int:
    return math.ceil(rate / GIF_RATE)


@contextmanager
def _gif(file: Path, writing: Path, rate: float) -> Iterator[Write]:
    """Pictures are kept until the end, with 256 colours each; a GIF's times are whole hundredths of a second."""
    from PIL import Image

    pictures: list[Image.Image] = []
    stride, seen = _stride(rate), 0

    def write(picture: np.ndarray) -> None:
        nonlocal seen
        if seen % stride == 0:
            pictures.append(Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE))
        seen += 1

    yield write
    starts = [10 * round(100 * i * stride / rate) for i in range(len(pictures) + 1)]
    durations = [end - start for start, end in pairwise(starts)]  # in milliseconds: rounded, and yet never drifting
    with naming(file):
        pictures[0].save(writing, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
