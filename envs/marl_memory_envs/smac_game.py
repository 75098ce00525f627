"""smacv2's `StarCraft2Env`, repaired from outside: the package itself stays as it is.

Each method that is overridden says what went wrong without it.  Importing this module imports smacv2 and pysc2; they
are imported nowhere else but here and in `smac_process`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np

from marl_memory_envs.smac_process import GameProcess, replaced  # first: it makes the protocol importable
from marl_memory_envs.smac_rules import GameFailure

# isort: split
import websocket  # pyright: ignore[reportMissingImports]
from google.protobuf.message import DecodeError
from pysc2 import run_configs  # pyright: ignore[reportMissingImports]
from pysc2.lib import protocol, remote_controller, sc_process  # pyright: ignore[reportMissingImports]
from smacv2.env.starcraft2 import distributions, starcraft2  # pyright: ignore[reportMissingImports]

logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails is told once, by whoever deals with it

GAME_LOOPS = 400
"""Single game loops that units may take to appear, or to be gone, before a reset counts as failed."""

SPAWNS = 5
"""How often teams are drawn and placed before a reset counts as failed."""

BROKEN = (
    protocol.ConnectionError,
    protocol.ProtocolError,
    remote_controller.ConnectError,
    remote_controller.RequestError,
    sc_process.SC2LaunchError,
    websocket.WebSocketException,
    DecodeError,
    OSError,
)
"""What pysc2 raises where the game is gone, does not answer, or refuses."""


class Game(starcraft2.StarCraft2Env):
    """One battle after another on one map, in one process of the game.

    Args:
        map_name: the map, in smacv2's names.
        seed: 31 bits, from which everything random follows: the game, teams and positions, smacv2's own draws.
        process: where the game runs; its owner closes it.
        capabilities: smacv2's ``capability_config`` (what is drawn for every episode), or nothing.
        step_timeout, reset_timeout: seconds that a step and a reset may take before the game counts as hanging.
        options: further keywords of `StarCraft2Env`.
    """

    def __init__(
        self,
        *,
        map_name: str,
        seed: int,
        process: GameProcess,
        capabilities: Mapping[str, Any],
        step_timeout: float,
        reset_timeout: float,
        **options: Any,
    ) -> None:
        capabilities = _expanded(capabilities)
        # It registers a function at exit that would keep every object alive.
        with replaced(starcraft2, "atexit", SimpleNamespace(register=lambda function: None)):
            # A time limit is in the info only with `continuing_episode`, which changes nothing else.
            super().__init__(
                map_name=map_name,
                seed=seed,
                continuing_episode=True,
                capability_config=capabilities,
                **options,
            )
        self._process, self._step_timeout, self._reset_timeout = process, step_timeout, reset_timeout
        self._worth = self.max_reward
        self._draws = Draws(seed)
        self._attacks = np.random.default_rng([seed, 1])
        self._generators = _generators(capabilities, seed)

    # ------------------------------------------------------------------------------------------------------ the episode

    def reset(self, episode_config: Any = None) -> Any:
        """Begin an episode; observations and state.

        Teams and positions are drawn from generators of this game alone.  Where units do not appear smacv2's wrapper
        tries again, and then returns nothing; this returns the second trial's.

        Raises:
            GameFailure: if the game is gone, hangs or does not place the units.
        """
        with self._draws(), self._guarded("a reset", self._reset_timeout):
            for _ in range(SPAWNS):
                try:
                    begun = super().reset(self._scenario())
                except starcraft2.CannotResetException:
                    continue
                # Without this, a reset before the first episode has ended would start the game anew.
                self._episode_count = max(self._episode_count, 1)
                return begun
            raise GameFailure(f"the units did not appear in {SPAWNS} trials")

    def step(self, actions: Any) -> Any:
        """One step; reward, whether the episode is over, info.

        Raises:
            GameFailure: if the game is gone, hangs or answers with an error.
        """
        with self._draws(), self._guarded("a step", self._step_timeout):
            return super().step(actions)

    def get_obs(self) -> Any:
        """Every agent's observation; smacv2 shuffles the order in which it computes them."""
        with self._draws():
            return super().get_obs()

    @contextmanager
    def _guarded(self, what: str, seconds: float) -> Iterator[None]:
        try:
            with self._process.watched(seconds, what):
                yield
        except BROKEN as error:
            raise GameFailure(self._process.late or f"{type(error).__name__}: {error}") from error
        except GameFailure as error:
            raise GameFailure(self._process.late or str(error)) from error

    def full_restart(self) -> None:
        """Raise GameFailure: smacv2 would start another game here and go on with what it knew of the old one.

        `step` then returns ``(0, True, {})`` beside old observations, and `reset` can loop for ever.
        """
        error = sys.exc_info()[1]
        raise GameFailure(f"{type(error).__name__}: {error}" if error else "smacv2 asked for a new game")

    def close(self) -> None:
        """Close the renderer; the process is its owner's."""
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    # -------------------------------------------------------------------------------------------------------- launching

    def _launch(self) -> None:
        """Launch in the process of this game, which may be running already."""
        with replaced(starcraft2, "run_configs", SimpleNamespace(get=self._run_config_of)):
            super()._launch()

    def _run_config_of(self, version: str | None) -> Any:
        config = run_configs.get(version=version)
        config.start = partial(self._process.start, config)
        return config

    def replay(self) -> bytes:
        """All that was played since the launch, in the game's own form."""
        with self._guarded("saving a replay", self._reset_timeout):
            return self._controller.save_replay()

    # ------------------------------------------------------------------------------------------------ units and rewards

    def _kill_all_units(self) -> None:
        """Wait for the *old* units to go: SMAC's maps replace dead teams at once, so that some are always there."""
        old = {unit.tag for unit in self._obs.observation.raw_data.units}
        self._kill_units(list(old))
        for _ in range(GAME_LOOPS):
            self._controller.step(2)
            self._obs = self._controller.observe()
            if not any(unit.tag in old for unit in self._obs.observation.raw_data.units):
                return
        raise GameFailure("the units of the last episode did not go")

    def init_units(self, ally_team: Any, enemy_team: Any, episode_config: Any = None) -> None:
        """Find the units, and the most that an episode against these enemies is worth.

        smacv2 sums their health in the first episode only: once for every time it looks, and again when launched again
        before that episode has ended, so that rewards shrink.  And it fails if it looks before there are any.
        """
        for _ in range(GAME_LOOPS):
            if ally_team or any(unit.owner == 1 for unit in self._obs.observation.raw_data.units):
                break
            self._controller.step(1)
            self._obs = self._controller.observe()
        else:
            raise GameFailure("no units appeared on the map")
        super().init_units(ally_team, enemy_team, episode_config={} if episode_config is None else episode_config)
        self.max_reward = self._worth + sum(unit.health_max + unit.shield_max for unit in self.enemies.values())

    def _init_ally_unit_types(self, min_unit_type: int) -> None:
        """On SMAC's maps of marines these have the lowest id, not the one four above it (of SMACv2's maps)."""
        super()._init_ally_unit_types(min_unit_type)
        if self.map_type == "marines":
            self.marine_id = min_unit_type
            self.ally_unit_map = {"marine": min_unit_type}

    def get_unit_type_id(self, unit: Any, ally: bool) -> int:
        """SMAC's maps have types of their own for allies, from the lowest up; smacv2 reads them as built-in ones."""
        if ally and not self.map_type.endswith("_gen"):
            return unit.unit_type - self._min_unit_type
        return super().get_unit_type_id(unit, ally)

    # ----------------------------------------------------------------------------------------------------------- chance

    def _scenario(self) -> dict[str, Any]:
        """What is drawn for an episode.

        smacv2 draws attack and health as ``[n, 1]``, which newer NumPy refuses to take for numbers.
        """
        drawn: dict[str, Any] = {}
        for generator in self._generators:
            drawn |= generator.generate()
        for key in ("attack", "health"):
            if key in drawn:
                drawn[key]["item"] = np.asarray(drawn[key]["item"]).reshape(self.n_agents)
        return drawn

    def get_agent_action(self, a_id: int, action: int) -> Any:
        """Whether an attack fails is drawn from this game's own generator; smacv2 makes a new one, of no seed."""
        stochastic = self.stochastic_attack
        if stochastic and action >= self.n_actions_no_attack:
            if self._attacks.uniform() > self.agent_attack_probabilities[a_id]:
                return None
            self.stochastic_attack = False
        try:
            return super().get_agent_action(a_id, action)
        finally:
            self.stochastic_attack = stochastic

    # ---------------------------------------------------------------------------------------------------- what is shown

    def build_state_feature_names(self) -> list[str]:
        """With ``obs_instead_of_state`` those of all observations; smacv2 raises NotImplementedError."""
        if not self.obs_instead_of_state:
            return super().build_state_feature_names()
        names = self.build_obs_feature_names()
        return [f"agent_{i}_{name}" for i in range(self.n_agents) for name in names]

    def get_stats(self) -> dict[str, Any]:
        """Also before the first episode has ended, where smacv2 divides by zero."""
        if self.battles_game:
            return super().get_stats()
        with replaced(self, "battles_game", 1):
            return super().get_stats()

    def render(self, mode: str = "rgb_array") -> Any:
        """A picture ``[H, W, 3]``.

        pysc2 shuffles its colours in a way that Python 3.11 refuses, and imports sk-video, which it does not use here.
        """
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        with replaced(random, "shuffle", _shuffle), _in_place_of("skvideo", io=SimpleNamespace(FFmpegWriter=object)):
            import smacv2.env.starcraft2.render  # noqa: F401  # pyright: ignore[reportMissingImports]
        return super().render(mode)


class Draws:
    """What smacv2 draws from Python's and NumPy's global generators, apart from what the program draws from them."""

    def __init__(self, seed: int) -> None:
        self._python: Any = random.Random(seed).getstate()
        self._numpy: Any = np.random.RandomState(seed).get_state()  # noqa: NPY002
        self._inside = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The global generators are this game's meanwhile."""
        if self._inside:
            yield
            return
        outside = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(outside[0])
            np.random.set_state(outside[1])  # noqa: NPY002


def _expanded(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    """As smacv2's wrapper hands them on: each with its own name and the sizes of the teams, and nobody else's."""
    sizes = {key: value for key, value in capabilities.items() if not isinstance(value, Mapping)}
    return {
        key: {**deepcopy(dict(value)), "env_key": key, **sizes} if isinstance(value, Mapping) else value
        for key, value in capabilities.items()
    }


def _generators(capabilities: Mapping[str, Any], seed: int) -> list[Any]:
    """smacv2's distributions of what is drawn for an episode, with generators that follow from ``seed``."""
    found = [
        distributions.get_distribution(config["dist_type"])(deepcopy(config))
        for config in capabilities.values()
        if isinstance(config, dict)
    ]
    waiting, count = list(found), 0
    while waiting:
        source = waiting.pop(0)
        for name, value in sorted(vars(source).items()):
            if isinstance(value, np.random.Generator):
                setattr(source, name, np.random.default_rng([seed, 2, count]))
                count += 1
            elif isinstance(value, distributions.Distribution):
                waiting.append(value)
    return found


@contextmanager
def _in_place_of(module: str, **entries: Any) -> Iterator[None]:
    """``import module`` finds these entries meanwhile, where it is not installed."""
    if find_spec(module) is not None:
        yield
        return
    sys.modules[module] = cast(ModuleType, SimpleNamespace(**entries))
    try:
        yield
    finally:
        del sys.modules[module]


def _shuffle(x: list[Any], draw: Any = random.random) -> None:
    """Python's `random.shuffle` as it was up to 3.10, with a function that draws."""
    for i in reversed(range(1, len(x))):
        j = int(draw() * (i + 1))
        x[i], x[j] = x[j], x[i]
