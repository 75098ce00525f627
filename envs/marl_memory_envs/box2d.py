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


class _NewWorlds(OneAgent):
    """A task with a new Box2D world for each episode, as LunarLander has it.

    Gymnasium keeps the world, whose solver remembers earlier episodes: the same seed would not give the same episode.

    Args:
        env: BipedalWalker or CarRacing.
        gravity: of the world; none: Box2D's own.
    """

    def __init__(self, env: Any, *gravity: tuple[float, float]) -> None:
        super().__init__(env)
        self.gravity = gravity

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Start an episode in a new world; without a seed the environment's own generator goes on."""
        task: Any = self.env.unwrapped
        task._destroy()
        task.world = import_module("Box2D").b2World(*self.gravity)
        return super().reset(seed=seed, options=options)


def bipedal_walker(hardcore: bool = False, **kwargs: Any) -> OneAgent:
    """BipedalWalker-v3, for at most 1600 steps; ``hardcore=True``: its version with obstacles, at most 2000 steps."""
    import_module("Box2D")
    name = "BipedalWalkerHardcore-v3" if hardcore else "BipedalWalker-v3"
    return _NewWorlds(gym_env(name, **kwargs).env)


def car_racing(continuous: bool = True, **kwargs: Any) -> OneAgent:
    """CarRacing-v3: drive round a random track, seen from above in 96 × 96 pixels, for at most 1000 frames.

    Real actions are steering, gas and brake; ``continuous=False`` gives five choices instead.
    """
    import_module("Box2D")
    return _NewWorlds(gym_env("CarRacing-v3", continuous=continuous, **kwargs).env, (0.0, 0.0))
