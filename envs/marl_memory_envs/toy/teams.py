"""Two small teams for tests, examples and docs: discrete with masks and deaths, continuous with unequal actions."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

REQUIRES: dict[str, str] = {}

Steps = tuple[
    dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
]  # what ParallelEnv.step returns: observations, rewards, terminations, truncations, infos

WAIT, STRIKE, GUARD = range(3)


class MaskedDuel(ParallelEnv[str, dict[str, np.ndarray], int]):
    """Two fighters against a dragon: each waits (0, gains strength), strikes (1, spends it) or guards (2, is safe).

    Whoever does not guard dies with probability ``danger`` a step and leaves at once.  A strike needs strength, a guard
    cannot follow a guard: the mask says so, and a forbidden action counts as waiting and in ``illegal``.  Each strike
    is worth 1 and the blow that kills the dragon 3 more, to its fighter or, with ``common_reward``, to the team.  The
    episode ends with the dragon (``info["won"]``), with both fighters, or by truncation after ``max_steps``.

    Args:
        common_reward: whether both receive the team's reward.
        unequal: whether the second fighter sees the first one's strength, and so observes one number more.
        danger: probability of dying at an unguarded step.
        dragon: strikes that kill the dragon.
        max_steps: the time limit.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        *,
        common_reward: bool = True,
        unequal: bool = False,
        danger: float = 0.08,
        dragon: int = 8,
        max_steps: int = 20,
    ) -> None:
        if not 0 <= danger <= 1:
            raise ValueError(f"danger={danger} must lie in [0, 1]")
        if dragon < 1 or max_steps < 1:
            raise ValueError(f"dragon={dragon} and max_steps={max_steps} must be at least 1")
        self.common_reward, self.unequal = common_reward, unequal
        self.danger, self.dragon, self.max_steps = danger, dragon, max_steps
        self.metadata = {"name": "masked_duel", "render_modes": []}
        self.render_mode = None
        self.possible_agents = ["first", "second"]
        self.agents: list[str] = []
        self.illegal = 0
        self._random = np.random.default_rng()
        self._action_spaces = {agent: spaces.Discrete(3) for agent in self.possible_agents}
        self._observation_spaces = {
            agent: spaces.Dict(
                {
                    "observation": spaces.Box(0.0, 1.0, (5 + (unequal and agent == "second"),), np.float32),
                    "action_mask": spaces.Box(0, 1, (3,), np.int8),
                }
            )
            for agent in self.possible_agents
        }

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """A Dict of ``observation`` and ``action_mask``."""
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """Wait, strike or guard."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, Any]]]:
        """Both fighters alive, with a random strength of 0 to 3."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self._left, self._step = self.dragon, 0
        self._strength = {agent: int(self._random.integers(0, 4)) for agent in self.agents}
        self._guarded = dict.fromkeys(self.agents, False)
        self._lives = dict.fromkeys(self.agents, True)
        self._luck = self._random.random(2)  # shown to the fighters, so that no two starts look alike
        return {agent: self._observe(agent) for agent in self.agents}, {agent: {"won": False} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> Steps:
        """One round: strikes first, then the dragon's answer."""
        acting, self._step = self.agents, self._step + 1
        rewards = {agent: self._act(agent, int(actions[agent])) for agent in acting}
        won = self._left <= 0
        # Two draws at every step, whoever lives: what one fighter does never shifts the other's luck.
        fate = dict(zip(self.possible_agents, self._random.random(2), strict=True))
        dead = {agent: won or (not self._guarded[agent] and fate[agent] < self.danger) for agent in acting}
        cut = {agent: not dead[agent] and self._step >= self.max_steps for agent in acting}
        self._lives |= {agent: not dead[agent] for agent in acting}
        self.agents = [agent for agent in acting if not dead[agent] and not cut[agent]]
        if self.common_reward:
            rewards = dict.fromkeys(acting, sum(rewards.values()))
        return {a: self._observe(a) for a in acting}, rewards, dead, cut, {a: {"won": won} for a in acting}

    def state(self) -> np.ndarray:
        """``[6]``: the dragon's health, the time, and of each fighter whether it lives and its strength."""
        fighters = [x for a in self.possible_agents for x in (self._lives[a], self._strength[a] / 5)]
        return np.array([max(self._left, 0) / self.dragon, self._step / self.max_steps, *fighters], np.float32)

    def _act(self, agent: str, action: int) -> float:
        if not self._mask(agent)[action]:
            self.illegal += 1
            action = WAIT
        self._guarded[agent] = action == GUARD
        if action == WAIT:
            self._strength[agent] = min(self._strength[agent] + 1, 5)
        if action != STRIKE:
            return 0.0
        self._strength[agent] -= 1
        self._left -= 1
        return 4.0 if self._left == 0 else 1.0

    def _mask(self, agent: str) -> np.ndarray:
        return np.array([True, self._strength[agent] > 0, not self._guarded[agent]], np.int8)

    def _observe(self, agent: str) -> dict[str, np.ndarray]:
        index = self.possible_agents.index(agent)
        seen = [
            self._strength[agent] / 5,
            self._guarded[agent],
            max(self._left, 0) / self.dragon,
            self._step / self.max_steps,
            self._luck[index],
        ]
        if self.unequal and index == 1:
            seen.append(self._strength[self.possible_agents[0]] / 5)
        return {"observation": np.array(seen, np.float32), "action_mask": self._mask(agent)}


class Rendezvous(ParallelEnv[str, np.ndarray, np.ndarray]):
    """Agents in the square [−1, 1]² move towards each other, by at most 0.2 a step.

    The common reward is minus the mean distance to the centre of all.  The episode is terminated when that distance is
    below 0.1 (``info["met"]``), truncated after ``max_steps``.  There is no state beyond the observations.

    Args:
        n_agents: two or three.
        unequal: whether the last agent moves along the first axis only, with one action dimension instead of two.
        max_steps: the time limit.

    Raises:
        ValueError: for another number of agents, or a time limit below 1.
    """

    def __init__(self, *, n_agents: int = 2, unequal: bool = False, max_steps: int = 25) -> None:
        if n_agents not in (2, 3):
            raise ValueError(f"n_agents={n_agents} must be 2 or 3")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        self.max_steps = max_steps
        self.metadata = {"name": "rendezvous", "render_modes": []}
        self.render_mode = None
        self.possible_agents = [f"agent_{i}" for i in range(n_agents)]
        self.agents: list[str] = []
        self._random = np.random.default_rng()
        sizes = [1 if unequal and i == n_agents - 1 else 2 for i in range(n_agents)]
        self._observation_spaces = {a: spaces.Box(-2.0, 2.0, (4,), np.float32) for a in self.possible_agents}
        self._action_spaces = {
            agent: spaces.Box(-1.0, 1.0, (size,), np.float32)
            for agent, size in zip(self.possible_agents, sizes, strict=True)
        }

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """Own position and the way to the centre of all, ``[4]``."""
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The move, in units of 0.2."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Random positions."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.agents, self._step = list(self.possible_agents), 0
        self._position = self._random.uniform(-1, 1, (len(self.agents), 2))
        return self._observe(), {agent: {"met": False} for agent in self.agents}

    def step(self, actions: dict[str, np.ndarray]) -> Steps:
        """Everybody moves at once."""
        self._step += 1
        for i, agent in enumerate(self.agents):
            move = np.clip(actions[agent], -1, 1)
            self._position[i, : len(move)] += 0.2 * move
        self._position = self._position.clip(-1, 1)
        apart = float(np.linalg.norm(self._position - self._position.mean(0), axis=1).mean())
        met, acting = apart < 0.1, self.agents
        cut = not met and self._step >= self.max_steps
        if met or cut:
            self.agents = []
        return (
            self._observe(),
            dict.fromkeys(acting, -apart),
            dict.fromkeys(acting, met),
            dict.fromkeys(acting, cut),
            {agent: {"met": met} for agent in acting},
        )

    def _observe(self) -> dict[str, np.ndarray]:
        seen = np.concatenate([self._position, self._position.mean(0) - self._position], axis=1).astype(np.float32)
        return dict(zip(self.possible_agents, seen, strict=True))
