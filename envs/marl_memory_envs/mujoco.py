"""Gymnasium's MuJoCo tasks (version 5), as one-agent teams; ``kwargs`` are those of Gymnasium's environment."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from marl_memory_envs.one_agent import OneAgent, gym_env

REQUIRES = {"mujoco": "mujoco", "imageio": "mujoco"}


def _make(id: str, kwargs: dict[str, Any]) -> OneAgent:
    for package in REQUIRES:
        import_module(package)  # missing, it is named here: Gymnasium's own error hides which module it was
    return gym_env(id, **kwargs)


def half_cheetah(**kwargs: Any) -> OneAgent:
    """HalfCheetah-v5: run in a plane; 17 observations, 6 torques, always 1000 steps."""
    return _make("HalfCheetah-v5", kwargs)


def hopper(**kwargs: Any) -> OneAgent:
    """Hopper-v5: hop on one leg in a plane; 11 observations, 3 torques, until it falls, at most 1000 steps."""
    return _make("Hopper-v5", kwargs)


def walker2d(**kwargs: Any) -> OneAgent:
    """Walker2d-v5: walk in a plane; 17 observations, 6 torques, until it falls, at most 1000 steps."""
    return _make("Walker2d-v5", kwargs)


def ant(**kwargs: Any) -> OneAgent:
    """Ant-v5: run on four legs; 105 observations, 8 torques, until it falls, at most 1000 steps."""
    return _make("Ant-v5", kwargs)


def humanoid(**kwargs: Any) -> OneAgent:
    """Humanoid-v5: walk upright; 348 observations, 17 torques, until it falls, at most 1000 steps."""
    return _make("Humanoid-v5", kwargs)


def swimmer(**kwargs: Any) -> OneAgent:
    """Swimmer-v5: swim with two joints; 8 observations, 2 torques, always 1000 steps."""
    return _make("Swimmer-v5", kwargs)


def inverted_double_pendulum(**kwargs: Any) -> OneAgent:
    """InvertedDoublePendulum-v5: balance two poles; 9 observations, 1 force, until they fall, at most 1000 steps."""
    return _make("InvertedDoublePendulum-v5", kwargs)


def reacher(**kwargs: Any) -> OneAgent:
    """Reacher-v5: bring a fingertip to a target; 10 observations, 2 torques, always 50 steps."""
    return _make("Reacher-v5", kwargs)
