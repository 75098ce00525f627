"""A team whose right actions depend on what the others alone can see."""

from __future__ import annotations

import numpy as np

from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.drawing import BLANK, PALETTE, enlarge
from marl_memory_envs.toy.rules import Copies, Draw, Moved, Rules, check_options, one_hot, pick
from marl_memory_envs.toy.shown import ToyEnv, ToyVector


class HiddenCoupling(Rules):
    """Agents in a ring, each with a private hint; each must play the hint of the next one.

    A round has two steps.  In the first every agent tells: its action is shown to the agent before it.  In the second
    every agent plays, and the team's reward is 1 if *all* of them play the next one's hint.  Then hints are drawn anew.
    What a told number means is nowhere said: the team must agree on it.  With probability ``noise`` a random number is
    shown instead.  An agent sees its own hint, whether it is time to play, and the number it was told, ``[2·K + 1]``;
    so to each of them alone the reward of what it does looks random until the others' code is known.  The state holds
    all hints and all numbers that were told, ``[2·A·K + 1]``.

    Best expected return: ``rounds``, 10; with noise ``rounds · (1 − noise · (1 − 1/K))^A``, with ``noise=0.1`` 8.711:
    tell the hint by any one-to-one code, and play what was told.  An episode is won if no round was lost.

    Args:
        n_agents: A, at least 2.
        hints: K, how many hints and actions there are.
        rounds: of an episode, which is truncated after two steps for each.
        noise: probability that a random number is shown.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, n_agents: int = 2, hints: int = 3, rounds: int = 10, noise: float = 0.0) -> None:
        check_options({"n_agents": (n_agents, 2), "hints": (hints, 2), "rounds": (rounds, 1)}, {"noise": noise})
        self.hints, self.noise = hints, noise
        self.spec = TaskSpec(
            name="toy/hidden_coupling",
            agents=tuple(f"agent_{i}" for i in range(n_agents)),
            observation_sizes=(2 * hints + 1,) * n_agents,
            action_sizes=(hints,) * n_agents,
            continuous=False,
            state_size=2 * n_agents * hints + 1,
            own_state=True,
            common_reward=True,
            has_success=True,
            max_episode_steps=2 * rounds,
        )

    def start(self, draw: Draw, n: int) -> Copies:
        """New hints; nothing told yet (−1)."""
        shape = (n, self.spec.n_agents)
        told, playing, flawless = np.full(shape, -1), np.zeros(n, bool), np.ones(n, bool)
        return {"hint": pick(draw(shape[1]), self.hints), "told": told, "playing": playing, "flawless": flawless}

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """Tell, or play; copies may be at different times."""
        hint, playing, agents = copies["hint"], copies["playing"], self.spec.n_agents
        fresh = pick(draw(agents), self.hints)
        right = playing & (actions == np.roll(hint, -1, axis=1)).all(1)
        told = actions
        if self.noise:
            told = np.where(draw(agents) < self.noise, pick(draw(agents), self.hints), actions)
        flawless = copies["flawless"] & (right | ~playing)
        after = {
            "hint": np.where(playing[:, None], fresh, hint),
            "told": np.where(playing[:, None], -1, told),
            "playing": ~playing,
            "flawless": flawless,
        }
        return Moved(after, right.astype(np.float32), np.zeros(len(hint), bool), flawless)

    def observe(self, copies: Copies) -> np.ndarray:
        """Own hint, time to play, and what the next agent told, ``[N, A, 2·K + 1]``."""
        playing = np.broadcast_to(copies["playing"][:, None, None], (*copies["hint"].shape, 1))
        heard = np.roll(copies["told"], -1, axis=1)
        return np.concatenate([one_hot(copies["hint"], self.hints), playing, one_hot(heard, self.hints)], axis=2)

    def state(self, copies: Copies) -> np.ndarray:
        """All hints, all that was told, and the time, ``[N, 2·A·K + 1]``."""
        n = len(copies["hint"])
        known = [one_hot(copies[name], self.hints).reshape(n, -1) for name in ("hint", "told")]
        return np.concatenate([*known, copies["playing"][:, None]], axis=1, dtype=np.float32)

    def picture(self, copies: Copies) -> np.ndarray:
        """A column for each agent: its hint, and what it told."""
        rows = [copies["hint"][0], copies["told"][0]]
        colours = np.array([[PALETTE[i % len(PALETTE)] if i >= 0 else BLANK for i in row] for row in rows])
        return enlarge(colours, 48)


def parallel_env(
    *, n_agents: int = 2, hints: int = 3, rounds: int = 10, noise: float = 0.0, render_mode: str | None = None
) -> ToyEnv:
    """One `HiddenCoupling` as a PettingZoo environment."""
    return ToyEnv(HiddenCoupling(n_agents=n_agents, hints=hints, rounds=rounds, noise=noise), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    n_agents: int = 2,
    hints: int = 3,
    rounds: int = 10,
    noise: float = 0.0,
    group: str = "agents",
) -> ToyVector:
    """N copies of `HiddenCoupling` as one environment; see `ToyVector` for ``n_envs``, ``seed`` and ``group``."""
    rules = HiddenCoupling(n_agents=n_agents, hints=hints, rounds=rounds, noise=noise)
    return ToyVector(rules, n_envs, seed, group)
