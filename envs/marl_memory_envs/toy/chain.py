"""A long chain with a reward at its far end, for two actions or one continuous one."""

from __future__ import annotations

import numpy as np

from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.drawing import enlarge
from marl_memory_envs.toy.rules import Copies, Draw, Moved, Rules, check_options, thermometer
from marl_memory_envs.toy.shown import ToyEnv, ToyVector
from marl_memory_envs.toy.tabular import AGENT, COLOURS, FLOOR, GOAL, Tables, Tabular


class Chain(Tabular):
    """Cells 0 to L in a row; from the left end (cell 0) to the right one (cell L), L steps away.

    Actions are left (0) and right (1).  The reward is 1 at the right end, where the episode is won, and 0 elsewhere,
    but for ``left_reward`` at every step that ends in cell 0.  With probability ``slip`` a step leads left, whatever
    was chosen.  The agent sees its position as a thermometer, ``[L]``.  (A chain as in Osband et al., 2016; with slips
    and a small reward at the left akin to RiverSwim of Strehl and Littman, 2008.)

    Best expected return, for L = 20 and 100 steps: 1, with ``slip=0.1`` too.  The start's value without time limit,
    γ = 0.99: γ¹⁹ = 0.8262; with ``slip=0.1`` 0.7874.

    ``env=toy/long_chain`` has L = 60 and ``left_reward=0.001``.  Always right earns 1 (with ``slip=0.1`` 0.9995) and
    staying at the left end 0.1.  Who can tell the time may wait there first, and earns 1.04 (1.0017).  The start's
    value: γ⁵⁹ = 0.5527; with ``slip=0.1`` 0.4773.

    Args:
        length: L.
        slip: probability of a step to the left.
        left_reward: what a step that ends in cell 0 gives.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, length: int = 20, slip: float = 0.0, left_reward: float = 0.0, max_steps: int = 100) -> None:
        check_options({"length": (length, 1), "max_steps": (max_steps, 1)}, {"slip": slip})
        self.length = length
        cells = np.arange(length + 1)
        left, right = np.maximum(cells - 1, 0), np.minimum(cells + 1, length)
        successors = np.stack([left, right], axis=1)[..., None]
        odds = np.ones(1)
        if slip:
            successors = np.concatenate([successors, np.broadcast_to(left[:, None, None], successors.shape)], axis=2)
            odds = np.array([1 - slip, slip])
        rewards = (successors == length) + left_reward * (successors == 0)
        tables = Tables(successors, rewards, odds, cells == length, np.zeros(1, np.int64), length)
        super().__init__("toy/chain", tables, thermometer(cells, length), max_steps, ((-1.0,), (1.0,)))

    def picture(self, copies: Copies) -> np.ndarray:
        """The chain: its end green, agent blue."""
        return draw_chain(self.length, float(copies["cell"][0]))


class ContinuousChain(Rules):
    """The chain for one continuous action: from x = 0 to the right end x ≥ L, by steps of the action's size.

    The action lies in [−1, 1] and x moves by it, but not below 0.  The reward is 1 at the right end, where the episode
    is won, and 0 elsewhere, but for ``left_reward`` at every step that ends at x = 0.  With probability ``slip`` x
    moves by −1, whatever was chosen.  The agent sees x as a thermometer, ``[L]``: at whole positions what `Chain`
    shows.

    Best expected return: that of `Chain`, by always moving by 1: what counts of a position is how many whole steps
    are left, and a shorter step never saves one.  ``env=toy/chain_continuous`` has L = 10: random steps of random size
    spread half as far.  Its best return is 1, and the start's value γ⁹ = 0.9135; with ``slip=0.1`` 0.8925.

    Args:
        length: L.
        slip: probability of a step of −1.
        left_reward: what a step that ends at 0 gives.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(self, *, length: int = 20, slip: float = 0.0, left_reward: float = 0.0, max_steps: int = 100) -> None:
        check_options({"length": (length, 1), "max_steps": (max_steps, 1)}, {"slip": slip})
        self.length, self.slip, self.left_reward = length, slip, left_reward
        self.spec = TaskSpec(
            name="toy/chain_continuous",
            agents=("agent_0",),
            observation_sizes=(length,),
            action_sizes=(1,),
            continuous=True,
            state_size=length,
            own_state=False,
            common_reward=False,
            has_success=True,
            max_episode_steps=max_steps,
            action_low=((-1.0,),),
            action_high=((1.0,),),
        )

    def start(self, draw: Draw, n: int) -> Copies:
        """The left end."""
        return {"position": np.zeros(n)}

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """A step, or a slip."""
        by = actions[:, 0, 0].astype(np.float64)
        if self.slip:
            by = np.where(draw(1)[:, 0] >= 1 - self.slip, -1.0, by)
        position = np.clip(copies["position"] + by, 0.0, self.length)
        won = position == self.length
        reward = won + self.left_reward * (position == 0)
        return Moved({"position": position}, reward, won, won)

    def observe(self, copies: Copies) -> np.ndarray:
        """The position, ``[N, 1, L]``."""
        return thermometer(copies["position"][:, None], self.length)

    def picture(self, copies: Copies) -> np.ndarray:
        """The chain, the agent where it stands: its end green, agent blue."""
        return draw_chain(self.length, float(copies["position"][0]))


def draw_chain(length: int, position: float) -> np.ndarray:
    """Cells 0 to ``length``, the agent a square at its position, ``[size + 1, about 480, 3]`` uint8."""
    size = max(480 // (length + 1), 6)
    row = np.array([[COLOURS[FLOOR]] * length + [COLOURS[GOAL]]], np.uint8)
    picture = enlarge(row, size)
    left = round(position * size)
    picture[1:size, left + 1 : left + size] = AGENT
    return picture


def parallel_env(
    *,
    length: int = 20,
    slip: float = 0.0,
    left_reward: float = 0.0,
    max_steps: int = 100,
    continuous: bool = False,
    render_mode: str | None = None,
) -> ToyEnv:
    """One `Chain`, or `ContinuousChain`, as a PettingZoo environment."""
    kind = ContinuousChain if continuous else Chain
    return ToyEnv(kind(length=length, slip=slip, left_reward=left_reward, max_steps=max_steps), render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    length: int = 20,
    slip: float = 0.0,
    left_reward: float = 0.0,
    max_steps: int = 100,
    continuous: bool = False,
    group: str = "agents",
) -> ToyVector:
    """N copies of `Chain`, or of `ContinuousChain`, as one environment; see `ToyVector` for the other arguments."""
    kind = ContinuousChain if continuous else Chain
    rules = kind(length=length, slip=slip, left_reward=left_reward, max_steps=max_steps)
    return ToyVector(rules, n_envs, seed, group)
