"""Cliff walking (Sutton and Barto, example 6.6): the shortest way leads along a cliff."""

from __future__ import annotations

import numpy as np

from marl_memory_envs.toy.rules import Copies, check_options, thermometer
from marl_memory_envs.toy.shown import ToyEnv, ToyVector
from marl_memory_envs.toy.tabular import CLIFF, COMPASS, FLOOR, GOAL, START, Grid, Tables, Tabular, slipping

CLIFFS = ("restart", "terminate")


class CliffWalking(Tabular):
    """4 × 12 cells; from the lower left corner to the lower right one, between which the cliff lies.

    Actions are up, right, down, left.  Each step costs 1, one over the cliff 100 instead, and then the agent is back at
    the start (``restart``, as in Gymnasium's CliffWalking-v1) or the episode is lost (``terminate``).  At the goal it
    is won.
    The agent sees its row and column as thermometers, ``[14]``.

    Best expected return within 100 steps: −13, in 13 steps; with ``slip=0.1`` −23.29 (``restart``) and −22.06
    (``terminate``), on a way further from the cliff.  The start's value without time limit, γ = 0.99: −12.248; with
    ``slip=0.1`` −21.838 and −20.701.

    Args:
        cliff: what a fall does: ``restart`` or ``terminate``.
        slip: probability that a move goes sideways.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, cliff: str = "restart", slip: float = 0.0, max_steps: int = 100) -> None:
        if cliff not in CLIFFS:
            raise ValueError(f"cliff={cliff!r} must be one of {', '.join(CLIFFS)}")
        check_options({"max_steps": (max_steps, 1)}, {"slip": slip})
        self.grid = Grid([12 * FLOOR] * 3 + [START + 10 * CLIFF + GOAL])
        cells, falls = self.grid.cells, self.grid.kinds == CLIFF
        successors, odds = slipping(self.grid.moves(), slip)
        rewards = np.where(falls[successors], -100.0, -1.0)
        if cliff == "restart":
            successors = np.where(falls[successors], self.grid.cell(START), successors)
        tables = Tables(
            successors=successors,
            rewards=rewards,
            odds=odds,
            terminal=(self.grid.kinds == GOAL) | falls,
            starts=np.array([self.grid.cell(START)]),
            goal=self.grid.cell(GOAL),
        )
        views = np.concatenate([thermometer(cells[:, 0], 3), thermometer(cells[:, 1], 11)], axis=1)
        super().__init__("toy/cliff_walking", tables, views, max_steps, COMPASS)

    def picture(self, copies: Copies) -> np.ndarray:
        """The grid: cliff red, goal green, agent blue."""
        return self.grid.picture(copies["cell"][0])


def parallel_env(
    *, cliff: str = "restart", slip: float = 0.0, max_steps: int = 100, render_mode: str | None = None
) -> ToyEnv:
    """One `CliffWalking` as a PettingZoo environment."""
    return ToyEnv(CliffWalking(cliff=cliff, slip=slip, max_steps=max_steps), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    cliff: str = "restart",
    slip: float = 0.0,
    max_steps: int = 100,
    group: str = "agents",
) -> ToyVector:
    """N copies of `CliffWalking` as one environment; see `ToyVector` for ``n_envs``, ``seed`` and ``group``."""
    return ToyVector(CliffWalking(cliff=cliff, slip=slip, max_steps=max_steps), n_envs, seed, group)
