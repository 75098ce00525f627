"""Four rooms (Sutton, Precup and Singh, 1999): a goal that only the far corner of another room rewards."""

from __future__ import annotations

import numpy as np

from marl_memory_envs.toy.rules import Copies, check_options, thermometer
from marl_memory_envs.toy.shown import ToyEnv, ToyVector
from marl_memory_envs.toy.tabular import COMPASS, GOAL, START, Grid, Tables, Tabular, slipping

MAP = [
    "#############",
    "#s....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#....*#",
    "#############",
]

STARTS = ("corner", "anywhere")


class FourRooms(Tabular):
    """104 cells in four rooms joined by four doors; from the upper left corner to the lower right one, 20 steps away.

    Actions are up, right, down, left; into a wall they lead nowhere.  The reward is 1 at the goal, where the episode is
    won, and 0 elsewhere.  The agent sees its row and column as thermometers, ``[20]``.

    Best expected return within 200 steps: 1, with ``slip=0.1`` too.  The start's value without time limit, γ = 0.99:
    γ¹⁹ = 0.8262; with ``slip=0.1`` 0.8066.

    Args:
        start: where episodes begin: ``corner``, or ``anywhere`` but at the goal.
        slip: probability that a move goes sideways.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, start: str = "corner", slip: float = 0.0, max_steps: int = 200) -> None:
        if start not in STARTS:
            raise ValueError(f"start={start!r} must be one of {', '.join(STARTS)}")
        check_options({"max_steps": (max_steps, 1)}, {"slip": slip})
        self.grid = Grid(MAP)
        goal, cells = self.grid.cell(GOAL), self.grid.cells
        successors, odds = slipping(self.grid.moves(), slip)
        begin = self.grid.kinds != GOAL if start == "anywhere" else self.grid.kinds == START
        tables = Tables(
            successors=successors,
            rewards=(successors == goal).astype(np.float64),
            odds=odds,
            terminal=self.grid.kinds == GOAL,
            starts=np.flatnonzero(begin),
            goal=goal,
        )
        views = np.concatenate([thermometer(cells[:, axis] - 1, 10) for axis in (0, 1)], axis=1)
        super().__init__("toy/four_rooms", tables, views, max_steps, COMPASS)

    def picture(self, copies: Copies) -> np.ndarray:
        """The rooms: goal green, agent blue."""
        return self.grid.picture(copies["cell"][0])


def parallel_env(
    *, start: str = "corner", slip: float = 0.0, max_steps: int = 200, render_mode: str | None = None
) -> ToyEnv:
    """One `FourRooms` as a PettingZoo environment."""
    return ToyEnv(FourRooms(start=start, slip=slip, max_steps=max_steps), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    start: str = "corner",
    slip: float = 0.0,
    max_steps: int = 200,
    group: str = "agents",
) -> ToyVector:
    """N copies of `FourRooms` as one environment; see `ToyVector` for ``n_envs``, ``seed`` and ``group``."""
    return ToyVector(FourRooms(start=start, slip=slip, max_steps=max_steps), n_envs, seed, group)
