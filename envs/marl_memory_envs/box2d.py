"""Gymnasium's Box2D tasks, as one-agent teams."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from marl_memory_envs.one_agent import OneAgent, gym_env

REQUIRES = {"Box2D": "box2d"}


def lunar_lander(**kwargs: Any) -> OneAgent:
    """LunarLander-v3, for at most 1000 steps; ``continuous=True`` gives two real actions instead of four choices."""
    import_module("Box2D")  # missing, it is named here: Gymnasium's own error hides which module it was
    return gym_env("LunarLander-v3", **kwargs)


def bipedal_walker(hardcore: bool = False, **kwargs: Any) -> OneAgent:
    """BipedalWalker-v3, for at most 1600 steps; ``hardcore=True``: its version with obstacles, at most 2000 steps."""
    import_module("Box2D")
    return gym_env("BipedalWalkerHardcore-v3" if hardcore else "BipedalWalker-v3", **kwargs)
