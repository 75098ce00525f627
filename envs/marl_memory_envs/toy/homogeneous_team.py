"""Any number of agents that are alike, each with an errand of its own."""

from __future__ import annotations

import numpy as np

from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.drawing import BLANK, PALETTE, enlarge
from marl_memory_envs.toy.rules import Copies, Draw, Moved, Rules, check_options, pick, thermometer
from marl_memory_envs.toy.shown import ToyEnv, ToyVector

MOVES = np.array([[0, 0], [-1, 0], [0, 1], [1, 0], [0, -1]])


class HomogeneousTeam(Rules):
    """A agents on one field of size × size cells, each with a start and a target of its own, drawn anew each episode.

    Actions are stay, up, right, down, left; agents do not stand in each other's way.  The team's reward at each step is
    the share of agents that stand on their target after it.  With probability ``slip`` a move fails.  An agent sees its
    own row and column and those of its target as thermometers, ``[4·(size − 1)]``, nothing of the others; there is no
    state beyond all observations.  One policy serves all: what one agent experiences is as good for any other.

    Best expected return: T + 1 − E[max(d, 1)] for the distance d of two cells drawn at random, where T ≥ 2·(size − 1):
    17.76 for size 5 and T = 20, whatever A; with ``slip=0.1`` 17.404.  An episode is won if all stand on their
    targets at its end.

    Args:
        n_agents: A.
        size: of the field.
        slip: probability that a move fails.
        max_steps: T, the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, n_agents: int = 4, size: int = 5, slip: float = 0.0, max_steps: int = 20) -> None:
        check_options({"n_agents": (n_agents, 1), "size": (size, 2), "max_steps": (max_steps, 1)}, {"slip": slip})
        self.size, self.slip = size, slip
        self.codes = thermometer(np.arange(size), size - 1)
        features = 4 * (size - 1)
        self.spec = TaskSpec(
            name="toy/homogeneous_team",
            agents=tuple(f"agent_{i}" for i in range(n_agents)),
            observation_sizes=(features,) * n_agents,
            action_sizes=(len(MOVES),) * n_agents,
            continuous=False,
            state_size=n_agents * features,
            own_state=False,
            common_reward=True,
            has_success=True,
            max_episode_steps=max_steps,
            action_embedding=((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)),
        )

    def start(self, draw: Draw, n: int) -> Copies:
        """Cells and targets, ``[N, A, 2]`` row and column."""
        drawn = pick(draw(4 * self.spec.n_agents), self.size).reshape(n, self.spec.n_agents, 4)
        return {"cell": drawn[..., :2], "target": drawn[..., 2:]}

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """Everybody moves, but for those that slip."""
        by = MOVES[actions]
        if self.slip:
            by = np.where((draw(self.spec.n_agents) < self.slip)[..., None], 0, by)
        cell = np.minimum(np.maximum(copies["cell"] + by, 0), self.size - 1)
        there = (cell == copies["target"]).all(2)
        return Moved({**copies, "cell": cell}, there.mean(1), np.zeros(len(cell), bool), there.all(1))

    def observe(self, copies: Copies) -> np.ndarray:
        """Own cell and target, ``[N, A, 4·(size − 1)]``."""
        places = np.concatenate([copies["cell"], copies["target"]], axis=2)
        return self.codes[places].reshape(*places.shape[:2], -1)

    def picture(self, copies: Copies) -> np.ndarray:
        """Agents as squares within their targets' frames, in one colour each; who is hidden stands under another."""
        large = 48
        picture = enlarge(np.tile(BLANK, (self.size, self.size, 1)), large)
        for agent, (row, column) in enumerate(copies["target"][0] * large):
            picture[row + 3 : row + large - 2, column + 3 : column + large - 2] = PALETTE[agent % len(PALETTE)]
            picture[row + 8 : row + large - 7, column + 8 : column + large - 7] = BLANK
        for agent, (row, column) in enumerate(copies["cell"][0] * large):
            picture[row + 12 : row + large - 11, column + 12 : column + large - 11] = PALETTE[agent % len(PALETTE)]
        return picture


def parallel_env(
    *, n_agents: int = 4, size: int = 5, slip: float = 0.0, max_steps: int = 20, render_mode: str | None = None
) -> ToyEnv:
    """One `HomogeneousTeam` as a PettingZoo environment."""
    return ToyEnv(HomogeneousTeam(n_agents=n_agents, size=size, slip=slip, max_steps=max_steps), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    n_agents: int = 4,
    size: int = 5,
    slip: float = 0.0,
    max_steps: int = 20,
    group: str = "agents",
) -> ToyVector:
    """N copies of `HomogeneousTeam` as one environment; see `ToyVector` for ``n_envs``, ``seed`` and ``group``."""
    rules = HomogeneousTeam(n_agents=n_agents, size=size, slip=slip, max_steps=max_steps)
    return ToyVector(rules, n_envs, seed, group)
