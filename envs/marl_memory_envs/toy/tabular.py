"""Toy tasks of one agent in finitely many states, given by tables: whoever wants to know their optimum reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.drawing import enlarge
from marl_memory_envs.toy.rules import Copies, Draw, Moved, Rules, pick


class Tables(NamedTuple):
    """A Markov decision process with S states, P actions and K outcomes of an action.

    Args:
        successors: ``[S, P, K]`` int64, the state that outcome k leads to.
        rewards: ``[S, P, K]``, what it gives.
        odds: ``[K]``, the probability of outcome k, in every state.
        terminal: ``[S]``, whether the episode ends there.
        starts: ``[*]`` int64, the states in which episodes begin, equally likely.
        goal: the state in which an episode is won.
    """

    successors: np.ndarray
    rewards: np.ndarray
    odds: np.ndarray
    terminal: np.ndarray
    starts: np.ndarray
    goal: int


class Tabular(Rules):
    """A task of one agent that is its `Tables`.

    Args:
        name: the task's.
        tables: its dynamics.
        views: ``[S, F]`` float32 in [0, 1], what the agent sees in each state.
        max_steps: the time limit.
        embedding: one vector per action.
    """

    def __init__(
        self,
        name: str,
        tables: Tables,
        views: np.ndarray,
        max_steps: int,
        embedding: tuple[tuple[float, ...], ...],
    ) -> None:
        self.tables, self.views = tables, np.ascontiguousarray(views[:, None], dtype=np.float32)
        self._limits = np.cumsum(tables.odds)[:-1]
        self.spec = TaskSpec(
            name=name,
            agents=("agent_0",),
            observation_sizes=(views.shape[1],),
            action_sizes=(tables.successors.shape[1],),
            continuous=False,
            state_size=views.shape[1],
            own_state=False,
            common_reward=False,
            has_success=True,
            max_episode_steps=max_steps,
            action_embedding=embedding,
        )

    def start(self, draw: Draw, n: int) -> Copies:
        """One of the starts; a number is drawn only where there are several."""
        starts = self.tables.starts
        cell = np.repeat(starts, n) if len(starts) == 1 else starts[pick(draw(1)[:, 0], len(starts))]
        return {"cell": cell}

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """Look it up; a number is drawn only where an action has several outcomes."""
        tables, cell, chosen = self.tables, copies["cell"], actions[:, 0]
        outcome = (draw(1) >= self._limits).sum(1) if len(self._limits) else 0
        cell, reward = tables.successors[cell, chosen, outcome], tables.rewards[cell, chosen, outcome]
        return Moved({"cell": cell}, reward, tables.terminal[cell], cell == tables.goal)

    def observe(self, copies: Copies) -> np.ndarray:
        """The view of the agent's state, ``[N, 1, F]``."""
        return self.views[copies["cell"]]


WALL, FLOOR, CLIFF, GOAL, START = "#.x*s"
"""The characters of a map."""

COLOURS = {
    WALL: (70, 74, 82),
    FLOOR: (236, 236, 230),
    CLIFF: (146, 60, 48),
    GOAL: (98, 166, 92),
    START: (206, 214, 226),
}
AGENT = (44, 98, 178)

MOVES = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])
"""Row and column of up (0), right (1), down (2), left (3): Gymnasium's order."""

COMPASS = ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0))


class Grid:
    """A map, with a state for each cell that is no wall, in reading order.

    Args:
        rows: the map, one string a row: ``#`` wall, ``.`` floor, ``x`` cliff, ``*`` goal, ``s`` start.
    """

    def __init__(self, rows: list[str]) -> None:
        self.map = np.array([list(row) for row in rows])
        self.cells = np.argwhere(self.map != WALL)
        self.index = np.full(self.map.shape, -1)
        self.index[tuple(self.cells.T)] = np.arange(len(self.cells))
        self.kinds = self.map[tuple(self.cells.T)]

    def cell(self, kind: str) -> int:
        """The first state of a kind."""
        return int(np.flatnonzero(self.kinds == kind)[0])

    def moves(self) -> np.ndarray:
        """``[S, 4]``: where a move leads; into a wall or off the map, nowhere."""
        height, width = self.map.shape
        ahead = np.clip(self.cells[:, None] + MOVES, 0, [height - 1, width - 1])
        found = self.index[ahead[..., 0], ahead[..., 1]]
        return np.where(found < 0, np.arange(len(self.cells))[:, None], found)

    def picture(self, cell: int, size: int = 24) -> np.ndarray:
        """The map with the agent in a cell, ``[height, width, 3]`` uint8, ``size`` pixels a cell."""
        colours = np.array([[COLOURS[kind] for kind in row] for row in self.map], np.uint8)
        colours[tuple(self.cells[cell])] = AGENT
        return enlarge(colours, size)


def slipping(moves: np.ndarray, slip: float) -> tuple[np.ndarray, np.ndarray]:
    """``[S, 4, K]`` and ``[K]``: where each move leads and with which odds; with probability ``slip`` it is one of the
    two sideways, each as often (Gymnasium's slippery grids: 2/3).
    """
    if slip == 0:
        return moves[..., None], np.ones(1)
    sideways = np.stack([moves, np.roll(moves, 1, axis=1), np.roll(moves, -1, axis=1)], axis=-1)
    return sideways, np.array([1 - slip, slip / 2, slip / 2])
