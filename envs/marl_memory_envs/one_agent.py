"""A Gymnasium environment as a ParallelEnv with one agent: the special case A = 1, on the same path as any team."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from pettingzoo import ParallelEnv

AGENT = "agent_0"


class OneAgent(ParallelEnv[str, Any, Any]):
    """``env``, whose only agent is called ``agent_0``; observations, rewards, flags and infos are passed on.

    It has no state of its own, so that the state of the task is the agent's observation.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self.env = env
        self.possible_agents = [AGENT]
        self.agents: list[str] = []
        self.render_mode = env.render_mode
        self.metadata = {**env.metadata, "name": env.spec.id if env.spec else type(env.unwrapped).__name__}

    @property
    def np_random(self) -> Any:
        """The environment's own generator, which SuperSuit's frame_skip draws from."""
        return self.env.unwrapped.np_random

    def observation_space(self, agent: str) -> gym.Space[Any]:
        """The environment's observation space."""
        return self.env.observation_space

    def action_space(self, agent: str) -> gym.Space[Any]:
        """The environment's action space."""
        return self.env.action_space

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Start an episode; without a seed the environment's own generator goes on."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.agents = [AGENT]
        return {AGENT: observation}, {AGENT: info}

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One step; the agent leaves when the episode is terminated or truncated."""
        observation, reward, terminated, truncated, info = self.env.step(actions[AGENT])
        if terminated or truncated:
            self.agents = []
        return (
            {AGENT: observation},
            {AGENT: float(reward)},
            {AGENT: bool(terminated)},
            {AGENT: bool(truncated)},
            {AGENT: info},
        )

    def render(self) -> Any:
        """What the environment renders in its ``render_mode``."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def gym_env(id: str, **kwargs: Any) -> OneAgent:
    """``gymnasium.make(id, **kwargs)`` as a one-agent ParallelEnv.

    The checks that Gymnasium's wrapper adds to each step are left out: `VectorEnv` has its own.
    """
    return OneAgent(gym.make(id, disable_env_checker=True, **kwargs))
