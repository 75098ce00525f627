"""What the spaces of a PettingZoo team say, read once and checked: sizes, bounds, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


@dataclass(frozen=True, slots=True)
class AgentSpaces:
    """What one agent's spaces say.  ``low`` and ``high`` are ``[P_i]`` for continuous actions, else None.

    ``shape`` is that of an observation as the environment gives it; of a picture, ``picture`` says channels, height and
    width, and ``channels_last`` in which order they come.
    """

    name: str
    index: int
    observation_size: int
    shape: tuple[int, ...]
    action_size: int
    first_action: int
    dict_observation: bool
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    picture: tuple[int, int, int] | None = None
    channels_last: bool = False

    def planes(self, picture: np.ndarray) -> np.ndarray:
        """A picture as channels, rows, columns: ``[C, H, W]``."""
        if picture.ndim == 2:
            return picture[None]
        return picture.transpose(2, 0, 1) if self.channels_last else picture


def read_team(envs: Sequence[ParallelEnv[str, Any, Any]]) -> list[AgentSpaces]:
    """The agents of the first environment, after a check that all the others have the same."""
    if not envs:
        raise ValueError("envs is empty; a vector environment needs at least one")
    if len({id(env) for env in envs}) < len(envs):
        raise ValueError("one environment object is given twice; a factory must make a new one at every call")
    first = envs[0]
    names = list(first.possible_agents)
    for row, env in enumerate(envs[1:], start=1):
        alike = list(env.possible_agents) == names and all(
            env.observation_space(n) == first.observation_space(n) and env.action_space(n) == first.action_space(n)
            for n in names
        )
        if not alike:
            raise ValueError(f"environment {row} has other agents or spaces than environment 0; all must be alike")
    team = [_read_agent(i, n, first.observation_space(n), first.action_space(n)) for i, n in enumerate(names)]
    if len({agent.low is None for agent in team}) > 1:
        kinds = {agent.name: "discrete" if agent.low is None else "continuous" for agent in team}
        raise ValueError(f"the agents mix discrete and continuous actions: {kinds}; give all of them one kind")
    if len(shapes := {agent.picture for agent in team}) > 1:
        raise ValueError(
            f"the agents' observations mix shapes: {' and '.join(map(str, shapes))} (channels, height, width; None: a "
            "vector); give all of them pictures of one shape, or vectors"
        )
    return team


def _read_agent(index: int, name: str, observation: spaces.Space[Any], action: spaces.Space[Any]) -> AgentSpaces:
    masked = isinstance(observation, spaces.Dict) and set(observation.spaces) == {"observation", "action_mask"}
    box = observation["observation"] if isinstance(observation, spaces.Dict) and masked else observation
    picture = isinstance(box, spaces.Box) and box.dtype == np.uint8 and len(box.shape) in (2, 3)
    if not isinstance(box, spaces.Box) or not (picture or len(box.shape) == 1):
        raise ValueError(
            f"agent {name!r} observes {observation}; right is a Box of one dimension, a picture (a uint8 Box of two or "
            "three), or a Dict of exactly 'observation' (such a Box) and 'action_mask': flatten or encode the "
            "observation in the environment"
        )
    seen: dict[str, Any] = {"shape": box.shape, "observation_size": int(np.prod(box.shape)), "dict_observation": masked}
    if picture:
        seen |= _read_picture(name, box.shape)
    if isinstance(action, spaces.Discrete):
        return AgentSpaces(name, index, action_size=int(action.n), first_action=int(action.start), **seen)
    if not isinstance(action, spaces.Box) or len(action.shape) != 1 or not np.issubdtype(action.dtype, np.floating):
        raise ValueError(
            f"agent {name!r} acts in {action}; right is Discrete, or a Box of one dimension and real numbers: "
            "MultiDiscrete, MultiBinary and dictionary actions are not supported"
        )
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise ValueError(f"agent {name!r} acts in {action}; right are finite bounds: clip or squash in the environment")
    low, high = -_float32_below(-action.low), _float32_below(action.high)
    return AgentSpaces(name, index, action_size=action.shape[0], first_action=0, low=low, high=high, **seen)


def _read_picture(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Which of a picture's dimensions are what: its channels are the first or the last, whichever are fewer."""
    if len(shape) == 2:
        return {"picture": (1, *shape)}
    last = shape[2] < shape[0]
    channels, height, width = (shape[2], *shape[:2]) if last else shape
    if channels > min(height, width):
        raise ValueError(
            f"agent {name!r} observes a picture of {shape}; right is [channels, height, width] or "
            "[height, width, channels], with fewer channels than rows and columns"
        )
    return {"picture": (channels, height, width), "channels_last": last}


def _float32_below(limit: np.ndarray) -> np.ndarray:
    """The largest float32 not above ``limit``: an action at a rounded float64 bound must stay inside the space."""
    rounded = limit.astype(np.float32)
    return np.where(rounded > limit, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def pad_bounds(limits: Sequence[np.ndarray | None]) -> tuple[tuple[float, ...], ...] | None:
    """``[A, P]`` bounds, padded with zeros; None for discrete actions."""
    known = [limit for limit in limits if limit is not None]
    width = max((len(limit) for limit in known), default=0)
    return tuple((*map(float, limit), *[0.0] * (width - len(limit))) for limit in known) or None


def own_state_size(env: ParallelEnv[str, Any, Any]) -> int | None:
    """Features of ``env.state()``: as declared by a flat ``state_space``, else tried once (None: not implemented)."""
    declared = getattr(env, "state_space", None)
    if isinstance(declared, spaces.Box) and len(declared.shape) == 1:
        return declared.shape[0]
    env.reset()
    try:
        state = np.asarray(env.state())
    except NotImplementedError:
        return None
    if state.ndim != 1:
        raise ValueError(f"state() of {env} has shape {state.shape}; right is one dimension: flatten it there")
    return state.size


def spaces_of(env: ParallelEnv[str, Any, Any], agent: str) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """An agent's observation space and action space."""
    return env.observation_space(agent), env.action_space(agent)
