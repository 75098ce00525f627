"""PettingZoo's cooperative tasks from the Stanford Intelligent Systems Laboratory (SISL)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from pettingzoo.utils.conversions import aec_to_parallel_wrapper

REQUIRES = {"Box2D": "box2d", "pygame": "box2d"}

OWN = 24
"""How many of a walker's 31 observations are its own body and lidar; the others are noisy views of its neighbours."""


class _Walkers(aec_to_parallel_wrapper[str, Any, Any]):
    """PettingZoo's own conversion, but the time limit truncates, and the state outlives a fallen walker.

    PettingZoo reports the time limit as a termination, so that a return would end there; and its ``state()`` fails
    once a walker has fallen and was removed.
    """

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One step of all walkers that are left."""
        observations, rewards, terminations, truncations, infos = super().step(actions)
        world = self.unwrapped.env
        if world.frames >= world.max_cycles:
            for name in terminations:
                ended = bool(world.last_dones[self.possible_agents.index(name)])
                terminations[name], truncations[name] = ended, not ended
        return observations, dict(rewards), terminations, truncations, infos

    def state(self) -> np.ndarray:
        """``[24 W + 3]``: each walker's own 24 observations (zeros once it is gone), then the package's x, y, angle."""
        world = self.unwrapped.env
        package = world.package
        own = [np.asarray(seen, dtype=np.float32)[:OWN] for seen in world.last_obs]
        return np.concatenate([*own, [package.position.x, package.position.y, package.angle]], dtype=np.float32)


def multiwalker(**kwargs: Any) -> _Walkers:
    """Multiwalker v9: bipedal walkers carry a package over uneven ground, for at most 500 steps.

    With ``shared_reward`` (PettingZoo's default) all get the mean of their rewards.
    """
    return _Walkers(import_module("pettingzoo.sisl.multiwalker.multiwalker").env(**kwargs))
