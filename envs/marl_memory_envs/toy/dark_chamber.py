"""A dark chamber: pictures of a room in which the agent's cell is hardly brighter than the others."""

from __future__ import annotations

import numpy as np

from marl_memory_envs.toy.rules import Copies, Draw, Moved, check_options
from marl_memory_envs.toy.shown import ToyEnv, ToyVector
from marl_memory_envs.toy.tabular import COMPASS, FLOOR, GOAL, START, Grid, Tables, Tabular, slipping

PIXELS = 2
"""Height and width of a cell in the picture that the agent sees."""

DARK = 0.1, 0.14
"""Brightness of the floor's two kinds of tiles."""


class DarkChamber(Tabular):
    """size × size cells; from the upper left corner to the hidden exit in the lower right one.

    Actions are up, right, down, left.  The reward is 1 at the exit, where the episode is won, and 0 elsewhere.  The
    agent sees the whole room, a chequered floor of brightness 0.10 and 0.14, in which its own cell is brighter by
    ``glow``: a picture ``[2·size, 2·size]`` row by row, ``[4·size²]``.  Of the exit it sees nothing.  Two pictures
    differ in eight pixels, by ``glow``; ``noise`` adds to every pixel at every step a number from [−noise, noise].

    Best expected return within 100 steps: 1, with ``slip=0.1`` too.  The start's value without time limit, γ = 0.99:
    γ¹⁵ = 0.8601; with ``slip=0.1`` 0.8472.  Noise does not change them: while ``noise < glow / 2`` every picture
    still tells the cell.

    Args:
        size: cells along a side.
        glow: how much brighter the agent's cell is.
        noise: of the pixels.
        slip: probability that a move goes sideways.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(
        self, *, size: int = 9, glow: float = 0.04, noise: float = 0.0, slip: float = 0.0, max_steps: int = 100
    ) -> None:
        check_options({"size": (size, 2), "max_steps": (max_steps, 1)}, {"slip": slip})
        if not 0 < glow <= 0.5:
            raise ValueError(f"glow={glow} must lie in (0, 0.5]")
        if not 0 <= noise <= DARK[0]:
            raise ValueError(f"noise={noise} must lie in [0, {DARK[0]}]: a pixel can not be darker than black")
        floor = [size * FLOOR] * (size - 2)
        self.grid = Grid([START + (size - 1) * FLOOR, *floor, (size - 1) * FLOOR + GOAL])
        self.noise, self.image_shape = noise, (PIXELS * size, PIXELS * size)
        successors, odds = slipping(self.grid.moves(), slip)
        goal = self.grid.cell(GOAL)
        tables = Tables(
            successors=successors,
            rewards=(successors == goal).astype(np.float64),
            odds=odds,
            terminal=self.grid.kinds == GOAL,
            starts=np.array([self.grid.cell(START)]),
            goal=goal,
        )
        rooms = np.tile(np.where(np.indices((size, size)).sum(0) % 2, DARK[1], DARK[0]), (size * size, 1, 1))
        rooms[np.arange(size * size), self.grid.cells[:, 0], self.grid.cells[:, 1]] += glow
        views = rooms.repeat(PIXELS, 1).repeat(PIXELS, 2).reshape(size * size, -1)
        super().__init__("toy/dark_chamber", tables, views, max_steps, COMPASS)

    def start(self, draw: Draw, n: int) -> Copies:
        """The start, and the noise of its picture."""
        return self._with_grain(super().start(draw, n), draw)

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """A move, and the noise of the next picture."""
        moved = super().move(copies, actions, draw)
        return moved._replace(copies=self._with_grain(moved.copies, draw))

    def observe(self, copies: Copies) -> np.ndarray:
        """The picture, ``[N, 1, 4·size²]``."""
        views = super().observe(copies)
        return views + copies["grain"][:, None] if self.noise else views

    def picture(self, copies: Copies) -> np.ndarray:
        """What the agent sees, five times as bright, in large."""
        pixels = np.clip(self.observe(copies)[0, 0].reshape(self.image_shape) * 5 * 255, 0, 255).astype(np.uint8)
        return np.repeat(pixels.repeat(12, 0).repeat(12, 1)[..., None], 3, axis=2)

    def _with_grain(self, copies: Copies, draw: Draw) -> Copies:
        """With the noise of each pixel, ``[N, F]`` float32, kept so that looking again shows the same."""
        if not self.noise:
            return copies
        grain = (2 * draw(self.views.shape[-1]) - 1) * self.noise
        return {**copies, "grain": grain.astype(np.float32)}


def parallel_env(
    *,
    size: int = 9,
    glow: float = 0.04,
    noise: float = 0.0,
    slip: float = 0.0,
    max_steps: int = 100,
    render_mode: str | None = None,
) -> ToyEnv:
    """One `DarkChamber` as a PettingZoo environment."""
    return ToyEnv(DarkChamber(size=size, glow=glow, noise=noise, slip=slip, max_steps=max_steps), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    size: int = 9,
    glow: float = 0.04,
    noise: float = 0.0,
    slip: float = 0.0,
    max_steps: int = 100,
    group: str = "agents",
) -> ToyVector:
    """N copies of `DarkChamber` as one environment; see `ToyVector` for ``n_envs``, ``seed`` and ``group``."""
    rules = DarkChamber(size=size, glow=glow, noise=noise, slip=slip, max_steps=max_steps)
    return ToyVector(rules, n_envs, seed, group)
