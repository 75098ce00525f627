"""Atari 2600 games: ALE's as one-agent tasks, with Gymnasium's preprocessing, and PettingZoo's for several players."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pettingzoo.utils import BaseParallelWrapper

from marl_memory_envs import vector
from marl_memory_envs.base import AgentsEnv
from marl_memory_envs.one_agent import OneAgent
from marl_memory_envs.stepping import missing

REQUIRES = {"ale_py": "atari", "cv2": "atari", "multi_agent_ale_py": "atari", "pygame": "atari"}

BACKENDS = ("gymnasium", "ale_vector")

FRAMES = 108_000
"""The emulator's frames after which an episode is truncated: half an hour of play, as in ALE's version 5."""


class _Game(OneAgent):
    """One player's game; it is drawn in its own colours and size, whatever the agent sees."""

    def render(self) -> np.ndarray:
        """The screen, ``[210, 160, 3]``."""
        return self.env.unwrapped.ale.getScreenRGB()  # type: ignore[attr-defined]


def game(
    *,
    game: str,
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    frame_stack: int = 4,
    episodic_life: bool = False,
    sticky_actions: float = 0.0,
    full_action_space: bool = False,
) -> OneAgent:
    """A game of ALE (version 5) behind Gymnasium's `AtariPreprocessing`; observations ``[frame_stack, H, W]`` uint8.

    Every step repeats the action for ``frame_skip`` frames; what is seen is the brighter of the last two, grey and
    shrunk; the latest ``frame_stack`` of these make an observation, before them, zeros.  Rewards are the game's own.

    Args:
        game: its name, as in ``ms_pacman``.
        noop_max: an episode begins with 1 to so many frames without an action; 0: with none.
        frame_skip: frames of a step.
        screen_size: H and W.
        frame_stack: pictures in an observation.
        episodic_life: whether losing a life terminates the episode (the next begins with a new game).
        sticky_actions: the chance of each frame to repeat the action of the frame before (ALE's own default is 0.25).
        full_action_space: all 18 actions, instead of those that the game reads.

    Raises:
        ValueError: for a game that ALE does not have, a missing ROM, or a number out of range; for ``noop_max`` with
            one of the two games whose own actions have none that does nothing (backgammon, video_checkers).

    References: Mnih et al. 2015 (preprocessing); Machado et al. 2018, arXiv 1709.06009 (sticky actions).
    """
    from ale_py.env import AtariEnv
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    check_game(game)
    _check_numbers(
        noop_max=noop_max,
        frame_skip=frame_skip,
        screen_size=screen_size,
        frame_stack=frame_stack,
        sticky_actions=sticky_actions,
    )
    emulator = AtariEnv(
        game=game,
        obs_type="grayscale",
        frameskip=1,
        repeat_action_probability=sticky_actions,
        full_action_space=full_action_space,
        max_num_frames_per_episode=FRAMES,
    )
    if noop_max and (first := emulator.get_action_meanings()[0]) != "NOOP":
        raise ValueError(
            f"env.kwargs.noop_max={noop_max}: the first action of {game} is {first}, and none does nothing; set it to "
            "0, or env.kwargs.full_action_space=true"
        )
    seen = AtariPreprocessing(
        emulator,
        noop_max=noop_max,
        frame_skip=frame_skip,
        screen_size=screen_size,
        terminal_on_life_loss=episodic_life,
    )
    one = _Game(FrameStackObservation(seen, frame_stack, padding_type="zero"))
    rate = {"name": f"atari/{game}", "render_fps": 60 / frame_skip, "frame_stack": frame_stack}
    one.metadata = {**one.metadata, **rate}
    return one


def vector_env(
    *,
    n_envs: int,
    seed: int,
    backend: str = "gymnasium",
    name: str | None = None,
    clip_rewards: float | None = 1.0,
    group: str = "agents",
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Any] = (),
    stepping: str | None = None,
    workers: int | None = None,
) -> AgentsEnv:
    """``n_envs`` games of one kind, as one environment.

    Args:
        n_envs: N.
        seed: the run's seed; every game gets one of its own, derived from it.
        backend: ``gymnasium``: see `game`; ``ale_vector``: `AleVectorEnv`, the same on threads of ale-py's.
        name: the task's name; None: ``atari/`` and the game's.
        clip_rewards, group: see `VectorEnv`.
        kwargs: of `game`.
        wrappers: see `marl_memory_envs.wrapping.Wrapped`; not for ``ale_vector``.
        stepping: see `VectorEnv`; None: ``serial``, and of ``ale_vector``, which knows nothing else, ``threads``.
        workers: see `VectorEnv`.

    Raises:
        ValueError: for a backend that does not exist, or options that it does not have; and as `game`.
    """
    settings = dict(kwargs or {})
    if backend not in BACKENDS:
        raise ValueError(f"env.backend={backend!r} must be one of {', '.join(BACKENDS)}")
    for package in ("ale_py", "cv2"):
        if find_spec(package) is None:
            raise missing(ModuleNotFoundError(name=package), f"{__name__}:game", __name__)
    if "game" in settings:
        check_game(settings["game"])
    _check_numbers(**{key: value for key, value in settings.items() if key in _NUMBERS})
    name = name or f"atari/{settings.get('game')}"
    if backend == "gymnasium":
        return vector.vector_env(
            f"{__name__}:game",
            n_envs=n_envs,
            seed=seed,
            name=name,
            max_episode_steps=FRAMES // settings.get("frame_skip", 4),
            clip_rewards=clip_rewards,
            group=group,
            kwargs=settings,
            wrappers=wrappers,
            stepping=stepping or "serial",
            workers=workers,
        )
    if wrappers:
        raise ValueError(f"env.wrappers={list(wrappers)} do not reach env.backend=ale_vector: set it to gymnasium")
    if stepping not in (None, "threads"):
        raise ValueError(f"env.stepping={stepping!r}: env.backend=ale_vector steps on threads, leave it null")
    from marl_memory_envs.atari_vector import AleVectorEnv

    env = AleVectorEnv(name=name, n_envs=n_envs, clip_rewards=clip_rewards, group=group, workers=workers, **settings)
    env.set_seed(seed)
    return env


# ---- several players -------------------------------------------------------------------------------------------------


class _Players(BaseParallelWrapper[str, Any, Any]):
    """PettingZoo's emulator with its grey screen as rows and columns, without the channel of one.

    PettingZoo's own ``parallel_env`` gives the same, but makes of each frame a turn of every player, and of the turns a
    frame again, which takes longer than the emulator does.

    Args:
        env: PettingZoo's environment, without its wrappers.
    """

    def __init__(self, env: Any) -> None:
        from gymnasium.spaces import Box

        super().__init__(env)
        self._space = Box(0, 255, env.observation_space(env.possible_agents[0]).shape[:2], np.uint8)
        self._n_actions = int(env.action_space(env.possible_agents[0]).n)
        self.metadata = {**env.metadata, "render_fps": 15}  # 60 frames a second, four to a step
        self.render_mode = env.render_mode

    def observation_space(self, agent: str) -> Any:
        """``[210, 160]``, the same screen for everybody."""
        return self._space

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start a game."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return {name: seen[..., 0] for name, seen in observations.items()}, infos

    def step(self, actions: dict[str, Any]) -> Any:
        """One frame; who is cut off at the time limit leaves, as whoever is out does.

        Raises:
            ValueError: for an action that does not exist (a negative one would count from the last).
        """
        for name, action in actions.items():
            if not 0 <= action < self._n_actions:
                raise ValueError(f"action {action} of {name} in {self}: {self._n_actions} exist, from 0 on")
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        self.env.agents = [name for name in self.env.agents if not truncations[name]]
        seen = {name: screen[..., 0] for name, screen in observations.items()}
        return seen, rewards, terminations, truncations, infos


def players(*, game: str, **kwargs: Any) -> _Players:
    """One of PettingZoo's games for several players, on the ROMs that come with ale-py: one frame a step, grey.

    The rest of the preprocessing is SuperSuit's, in the config's ``wrappers``.  All players see the same screen; a
    game without sticky actions always begins, and with the same actions goes on, in the same way.

    Args:
        game: the name with its version, as in ``pong_v3``.
        kwargs: of PettingZoo's environment, as in ``max_cycles``.

    Raises:
        ValueError: for a game that PettingZoo does not have, or a missing ROM.
        ImportError: if a package is missing.
    """
    for package in ("multi_agent_ale_py", "ale_py", "pygame"):
        import_module(package)
    known = players_games()
    if game not in known:
        raise ValueError(f"env.kwargs.game={game!r} is none of PettingZoo's Atari games: {_near(game, known)}")
    make = import_module(f"pettingzoo.atari.{game}").parallel_env
    try:
        made = make(obs_type="grayscale_image", auto_rom_install_path=str(rom_folder()), **kwargs)
    except OSError as error:
        raise ValueError(f"{error}; looked for in {rom_folder()}: {_GET_ROMS}") from error
    return _Players(made.unwrapped)


# ---- what there is ---------------------------------------------------------------------------------------------------

_GET_ROMS = (
    "ale-py brings the ROMs: pip install --force-reinstall ale-py; or set ALE_ROMS_DIR to a folder that has them"
)


def rom_folder() -> Path:
    """Where ROMs are looked for: ``ALE_ROMS_DIR``, else among ale-py's own files."""
    import os

    import ale_py

    return Path(os.environ.get("ALE_ROMS_DIR") or Path(str(ale_py.__file__)).parent / "roms")


TWO_PLAYERS = ("combat", "joust", "maze_craze", "warlords")
"""ROMs that ale-py brings though one player can not play them: it ends the process where one tries."""


@cache
def games() -> tuple[str, ...]:
    """The names of all games that ALE has for one player."""
    from ale_py import roms

    return tuple(sorted(set(roms.get_all_rom_ids()) - set(TWO_PLAYERS)))


@cache
def players_games() -> tuple[str, ...]:
    """The names of all of PettingZoo's Atari games, with their versions."""
    spec = find_spec("pettingzoo.atari")
    folder = Path(str(spec.origin)).parent if spec else Path()
    return tuple(sorted(file.stem for file in folder.glob("*_v*.py")))


def check_game(name: str) -> None:
    """Raise ValueError unless ALE has the game and its ROM is there; names the nearest ones, or where it should be."""
    if name in TWO_PLAYERS:
        known = [other for other in players_games() if other.startswith(name)]
        raise ValueError(
            f"env.kwargs.game={name!r} is a game for several players: env=atari/players with {' or '.join(known)}"
        )
    if name not in games():
        raise ValueError(f"env.kwargs.game={name!r} is none of ALE's games: {_near(name, games())}")
    if not (file := rom_folder() / f"{name}.bin").exists():
        raise ValueError(f"env.kwargs.game={name}: there is no ROM {file}; {_GET_ROMS}")


def _near(name: str, known: Sequence[str]) -> str:
    """The nearest names, also of Gymnasium's (``ALE/MsPacman-v5``); ends a sentence."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("ALE/")).lower()
    plain = re.sub(r"(_no_frameskip)?-v\d+$", "", plain)
    bare = {re.sub(r"_v\d+$", "", other): other for other in known}
    near = [bare[other] for other in difflib.get_close_matches(re.sub(r"_v\d+$", "", plain), bare, n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


_NUMBERS = ("noop_max", "frame_skip", "screen_size", "frame_stack", "sticky_actions")


def _check_numbers(*, sticky_actions: float = 0.0, noop_max: int = 0, **counts: int) -> None:
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"env.kwargs.{key}={value} must be at least 1")
    if noop_max < 0:
        raise ValueError(f"env.kwargs.noop_max={noop_max} must not be negative")
    if not 0 <= sticky_actions < 1:
        raise ValueError(f"env.kwargs.sticky_actions={sticky_actions} must lie in [0, 1)")
