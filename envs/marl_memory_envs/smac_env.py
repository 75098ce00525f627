"""SMAC and SMACv2 on StarCraft II as a PettingZoo `ParallelEnv`, which goes on when a game breaks off.

The game is smacv2's (`smac_game`, with its repairs), the process StarCraft II's (`smac_process`).  This module imports
neither PyTorch nor smacv2: worker processes are small, and tests bring games of their own.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

from marl_memory_envs import smac_install
from marl_memory_envs.smac_rules import Battle, GameFailure, Games

MEASURES = ("dead_allies", "dead_enemies")

TIMEOUTS = ("truncate", "terminate")

LOOPS_A_SECOND = 22.4
"""Game loops in a second of the game at its usual speed, which is called faster."""

UNITS = {
    "terran": ("marine", "marauder", "medivac"),
    "protoss": ("stalker", "zealot", "colossus"),
    "zerg": ("zergling", "hydralisk", "baneling"),
}
"""The units of SMACv2's races; the first two are drawn with probability 0.45 each, the third with 0.1."""

NEVER_ALONE = {"terran": ["medivac"], "protoss": [], "zerg": ["baneling"]}
"""Units that do not make up a whole team."""


def smacv2_capabilities(race: str, allies: int, enemies: int) -> dict[str, Any]:
    """What SMACv2 draws for every episode of a scenario: teams, and where they start (on a map of 32 × 32)."""
    return {
        "n_units": allies,
        "n_enemies": enemies,
        "team_gen": {
            "dist_type": "weighted_teams",
            "unit_types": list(UNITS[race]),
            "weights": [0.45, 0.45, 0.1],
            "exception_unit_types": NEVER_ALONE[race],
            "observe": True,
        },
        "start_positions": {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32},
    }


class Smac(ParallelEnv[str, np.ndarray, int]):
    """One battle of SMAC or SMACv2; the agents are the allies, the enemies the game's own.

    An ally that dies is terminated and leaves ``agents``.  The reward is common.  ``infos[agent]["action_mask"]``
    (int8) are the allowed actions: 0 does nothing and is for the dead, 1 stops, 2 to 5 move north, south, east and
    west, the rest attack an enemy each (of a medivac: heal an ally).  At the end of an episode ``infos[agent]`` has
    ``battle_won``, ``dead_allies`` and ``dead_enemies``.

    When a game dies, hangs or is refused, it is started anew.  The episode that it breaks off is truncated where it
    stood, with reward 0 and ``dropped`` in the infos: what was last seen is given once more.  `restarts` counts.

    A reset with a seed begins a new game that follows from the seed alone, in the process that is there; a reset
    without one goes on with the game.

    Args:
        games: where games come from.
        name: what errors call the task.
        timeouts: ``truncate``, or ``terminate`` for a time limit that ends episodes as a defeat does (as in smacv2).
        attempts: how often in a row, without an episode that ends in between, a game may fail.
        frames_per_second: how many steps are a second of the game.

    Raises:
        ValueError: for another value of ``timeouts`` or ``attempts``.
    """

    def __init__(
        self,
        games: Games,
        *,
        name: str = "smac",
        timeouts: str = "truncate",
        attempts: int = 5,
        frames_per_second: float = LOOPS_A_SECOND / 8,
    ) -> None:
        if timeouts not in TIMEOUTS:
            raise ValueError(f"timeouts={timeouts!r} must be one of {', '.join(TIMEOUTS)}")
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ValueError(f"attempts={attempts!r} must be a whole number of at least 1")
        self.games, self.name, self.timeouts, self.attempts = games, name, timeouts, attempts
        self._game: Battle | None = games.make(0)
        info = self._game.get_env_info()
        count, self.n_actions = info["n_agents"], info["n_actions"]
        self.episode_limit: int = info["episode_limit"]
        self.metadata = {
            "name": name,
            "render_modes": ["rgb_array"],
            "render_fps": frames_per_second,
            "is_parallelizable": True,
            "replay_suffix": ".SC2Replay",
            "episode_limit": self.episode_limit,
        }
        self.render_mode = "rgb_array"
        self.possible_agents = [f"ally_{i}" for i in range(count)]
        self.agents: list[str] = []
        box = (-np.inf, np.inf)
        self.observation_spaces = {a: spaces.Box(*box, (info["obs_shape"],), np.float32) for a in self.possible_agents}
        self.action_spaces = {a: spaces.Discrete(self.n_actions) for a in self.possible_agents}
        self.state_space = spaces.Box(*box, (info["state_shape"],), np.float32)
        self._index = {agent: i for i, agent in enumerate(self.possible_agents)}
        self._seed: int | None = None
        self.restarts = 0
        """How often a game was started anew because the one before had failed."""
        self._since_seed = 0
        self._failures = 0

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The agent's one space object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The agent's one space object."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Begin an episode; a first one without a seed draws one from the system.

        Raises:
            ChildProcessError: if the game failed ``attempts`` times in a row; with the last lines it wrote.
        """
        if seed is not None or self._seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
            self._seed, self._since_seed, self._game = seed & 0x7FFFFFFF, 0, None
        while not self._begins():
            pass
        self._look()
        self.agents = list(self.possible_agents)
        return self._observations(self.agents), self._infos(self.agents)

    def step(
        self, actions: dict[str, int]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One step with the actions of the allies alive.

        Raises:
            ValueError: for an action that is not allowed.
        """
        acting = self.agents
        if not acting:
            return {}, {}, {}, {}, {}
        assert self._game is not None
        row = self._row(actions)
        try:
            reward, over, info = self._game.step(row)
        except GameFailure as error:
            return self._break_off(str(error))
        if not info:
            return self._break_off("its step told nothing")
        self._look()
        cut = over and bool(info.get("episode_limit")) and self.timeouts == "truncate"
        alive = dict(zip(self.possible_agents, self._alive.tolist(), strict=True))
        terminated = {agent: not alive[agent] or (over and not cut) for agent in acting}
        truncated = {agent: cut and alive[agent] for agent in acting}
        infos = self._infos(acting)
        if over:
            self._failures = 0
            told = {"battle_won": bool(info["battle_won"]), **{key: int(info[key]) for key in MEASURES}}
            for agent in acting:
                infos[agent] |= told
        self.agents = [agent for agent in acting if not (terminated[agent] or truncated[agent])]
        return self._observations(acting), dict.fromkeys(acting, float(reward)), terminated, truncated, infos

    def state(self) -> np.ndarray:
        """``[S]``: smacv2's state."""
        return self._state.copy()

    def render(self) -> np.ndarray:
        """The battle as it stands, ``[H, W, 3]`` uint8."""
        if self._game is None:
            raise RuntimeError("render() before the first reset()")
        return np.ascontiguousarray(self._game.render("rgb_array"), dtype=np.uint8)

    def save_replay(self, file: str | Path) -> None:
        """Write what was played since the last reset with a seed, in the game's own form."""
        if self._game is None:
            raise ValueError(f"{self.name}: nothing was played, or the game has broken off; there is no replay")
        Path(file).write_bytes(self._game.replay())

    def close(self) -> None:
        """End the game and its process."""
        if self._game is not None:
            self._game.close()
            self._game = None
        self.games.close()

    def __str__(self) -> str:
        return self.name

    # -------------------------------------------------------------------------------------------------- games that fail

    def _begins(self) -> bool:
        """Whether the game at hand, or a new one, begins an episode."""
        if self._failures >= self.attempts:
            self._failures = 0
            raise ChildProcessError(self._given_up())
        try:
            self._game = self._game or self.games.make(self._game_seed())
            if self._game.reset() is not None:
                return True
            self._fail("its reset gave nothing")
        except GameFailure as error:
            self._fail(str(error))
        return False

    def _game_seed(self) -> int:
        """The seed's own at first; after a failure another one, that follows from it too."""
        assert self._seed is not None
        if self._since_seed == 0:
            return self._seed
        return int(np.random.SeedSequence([self._seed, self._since_seed]).generate_state(1)[0] & 0x7FFFFFFF)

    def _fail(self, reason: str) -> None:
        """Kill the game and count."""
        self._last_words = reason, self.games.kill()
        self._game = None
        self.restarts += 1
        self._since_seed += 1
        self._failures += 1
        print(f"warning: {self.name}: {reason}; the game is started anew", file=sys.stderr, flush=True)

    def _break_off(
        self, reason: str
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """The end of an episode whose game is gone."""
        acting, self.agents = self.agents, []
        self._fail(f"an episode is dropped: {reason}")
        infos = self._infos(acting)
        for agent in acting:
            infos[agent]["dropped"] = True
        nobody = dict.fromkeys(acting, False)
        return self._observations(acting), dict.fromkeys(acting, 0.0), nobody, dict.fromkeys(acting, True), infos

    def _given_up(self) -> str:
        reason, lines = self._last_words
        said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        return (
            f"{self.name}: the game failed {self.attempts} times in a row without an episode that ended, at last: "
            f"{reason}.  It was started with SC2PATH={smac_install.root()}; the last it wrote:\n{said}"
        )

    # ----------------------------------------------------------------------------------------------------- what is seen

    def _look(self) -> None:
        """Keep what the game shows."""
        assert self._game is not None
        self._observed = np.asarray(self._game.get_obs(), dtype=np.float32)
        self._masks = np.asarray(self._game.get_avail_actions(), dtype=np.int8)
        self._state = np.asarray(self._game.get_state(), dtype=np.float32)
        self._alive = self._masks[:, 0] == 0  # smacv2 has no other sign of death than that only the no-op is left

    def _row(self, actions: Mapping[str, int]) -> list[int]:
        """Every ally's action, 0 of the dead."""
        row = [0] * len(self.possible_agents)
        for agent in self.agents:
            action, i = actions.get(agent), self._index[agent]
            if action is None or not 0 <= action < self.n_actions or not self._masks[i, action]:
                allowed = np.flatnonzero(self._masks[i]).tolist()
                raise ValueError(f"action {action!r} of {agent} is not allowed now; its action_mask allows {allowed}")
            row[i] = int(action)
        return row

    def _observations(self, agents: list[str]) -> dict[str, np.ndarray]:
        return {agent: self._observed[self._index[agent]] for agent in agents}

    def _infos(self, agents: list[str]) -> dict[str, dict[str, Any]]:
        return {agent: {"action_mask": self._masks[self._index[agent]]} for agent in agents}


class StarCraft:
    """Games of StarCraft II on one map, through smacv2; see `Games`.

    Args:
        map: a map of SMAC or a scenario of SMACv2.
        capabilities: further entries of smacv2's ``capability_config``.
        options: further keywords of smacv2's `StarCraft2Env`.
        how: ``step_timeout``, ``reset_timeout``, ``game_version`` and ``difficulty``.

    Raises:
        ValueError: for an option or a capability that smacv2 does not have.
    """

    def __init__(self, map: str, capabilities: Mapping[str, Any], options: Mapping[str, Any], **how: Any) -> None:
        from marl_memory_envs.smac_game import Game, GameProcess

        drawn, chosen, map_name = dict(capabilities), dict(options), map
        if made := smac_install.scenario(map):
            map_name = f"10gen_{made[0]}"
            drawn = smacv2_capabilities(*made) | drawn
            chosen = {"obs_own_pos": True, "use_unit_ranges": True, "min_attack_range": 2} | chosen
        _check_options(chosen)
        self.process = GameProcess()
        self._arguments = {"map_name": map_name, "capabilities": drawn, **how, **chosen}
        self._make = Game

    def make(self, seed: int) -> Battle:
        """A new game in the same process."""
        return self._make(seed=seed, process=self.process, **self._arguments)

    def kill(self) -> list[str]:
        """End the process at once."""
        self.process.kill()
        return self.process.tail

    def close(self) -> None:
        """End the process."""
        self.process.close()


OURS = ("map_name", "seed", "game_version", "difficulty", "capability_config", "continuing_episode", "debug")
"""Keywords of `StarCraft2Env` that have keys of their own, or are set here; replays are asked for otherwise."""


def _check_options(options: Mapping[str, Any]) -> None:
    from smacv2.env.starcraft2.starcraft2 import StarCraft2Env  # pyright: ignore[reportMissingImports]

    known = [
        key
        for key in inspect.signature(StarCraft2Env.__init__).parameters
        if key not in ("self", *OURS) and not key.startswith(("replay_", "window_", "heuristic_"))
    ]
    for key in options:
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known)) or "nothing"
            raise ValueError(f"env.options.{key} is unknown; near it: {near}; smacv2 has {', '.join(known)}")


def parallel_env(
    map: str,
    *,
    game_version: str = smac_install.VERSION,
    difficulty: str = "7",
    timeouts: str = "truncate",
    step_timeout: float = 30.0,
    reset_timeout: float = 180.0,
    attempts: int = 5,
    capabilities: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Smac:
    """One battle on ``map``, in this process; see `vector_env` for the keywords."""
    smac_install.check(map, game_version)
    for name, seconds in (("step_timeout", step_timeout), ("reset_timeout", reset_timeout)):
        if not seconds > 0:
            raise ValueError(f"env.{name}={seconds!r} must be a positive number of seconds")
    games = StarCraft(
        map,
        capabilities or {},
        options or {},
        game_version=game_version,
        difficulty=str(difficulty),
        step_timeout=float(step_timeout),
        reset_timeout=float(reset_timeout),
    )
    rate = LOOPS_A_SECOND / (options or {}).get("step_mul", 8)
    return Smac(games, name=task_name(map), timeouts=timeouts, attempts=attempts, frames_per_second=rate)


def task_name(map: str) -> str:
    """As in ``env=…``."""
    return f"{'smacv2' if smac_install.scenario(map) else 'smac'}/{map}"
