"""A task of one's own: a guide who sees the treasure and a porter who does not must stand on it together.

    marl-memory train env=pettingzoo env.factory=treasure_hunt:TreasureHunt env.common_reward=true env.success=won \
        env.max_episode_steps=25 algorithm=mappo training.total_frames=200_000 training.steps=32
"""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv


class TreasureHunt(ParallelEnv):
    """Two agents on a line of ``length`` cells go left (0), stay (1) or go right (2); at a wall that way is masked."""

    metadata = {"name": "treasure_hunt"}

    def __init__(self, length=9, max_steps=25):
        self.length, self.max_steps = length, max_steps
        self.possible_agents, self.agents = ["guide", "porter"], []
        self.random, mask = np.random.default_rng(), Box(0, 1, (3,), np.int8)
        sizes = {"guide": 3, "porter": 2}  # the library pads the porter's observation with a zero
        boxes = {agent: Box(0, 1, (size,), np.float32) for agent, size in sizes.items()}
        self.seen = {agent: Dict({"observation": box, "action_mask": mask}) for agent, box in boxes.items()}
        self.moves = {agent: Discrete(3) for agent in sizes}

    def observation_space(self, agent):
        return self.seen[agent]

    def action_space(self, agent):
        return self.moves[agent]

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.steps = list(self.possible_agents), 0
        guide, porter, self.treasure = self.random.integers(self.length, size=3)
        self.cells = {"guide": guide, "porter": porter}
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        for agent, action in actions.items():
            self.cells[agent] += action - 1
        won = all(cell == self.treasure for cell in self.cells.values())
        cut = self.steps >= self.max_steps and not won
        told = (float(won) - 0.01, won, cut, {"won": won})  # reward, terminated, truncated, info: alike for both
        self.agents = [] if won or cut else self.agents
        return self.observe(), *(dict.fromkeys(actions, value) for value in told)

    def observe(self):
        guide, porter = self.cells.values()
        seen = {"guide": [guide, porter, self.treasure], "porter": [porter, guide]}
        return {agent: {"observation": self.scale(seen[agent]), "action_mask": self.mask(agent)} for agent in seen}

    def scale(self, cells):
        return np.array(cells, np.float32) / (self.length - 1)

    def mask(self, agent):
        return np.array([self.cells[agent] > 0, True, self.cells[agent] < self.length - 1], np.int8)
