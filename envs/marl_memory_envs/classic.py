"""Gymnasium's classic control tasks, as one-agent teams."""

from __future__ import annotations

from typing import Any

from marl_memory_envs.one_agent import OneAgent, gym_env

REQUIRES: dict[str, str] = {}


def cartpole(**kwargs: Any) -> OneAgent:
    """CartPole-v1: reward 1 a step for at most 500 steps."""
    return gym_env("CartPole-v1", **kwargs)


def acrobot(**kwargs: Any) -> OneAgent:
    """Acrobot-v1: reward −1 a step until the tip is up, for at most 500 steps."""
    return gym_env("Acrobot-v1", **kwargs)


def mountain_car(**kwargs: Any) -> OneAgent:
    """MountainCar-v0: reward −1 a step until the car is up, for at most 200 steps."""
    return gym_env("MountainCar-v0", **kwargs)


def pendulum(**kwargs: Any) -> OneAgent:
    """Pendulum-v1: swing up and hold with one real torque, always 200 steps."""
    return gym_env("Pendulum-v1", **kwargs)
