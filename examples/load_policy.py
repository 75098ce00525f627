"""A trained policy plays elsewhere: `python load_policy.py RUN`."""

import sys
from pathlib import Path

from marl_memory import load_policy
from marl_memory.training.run import make_env, read_config

run = Path(sys.argv[1])
policy = load_policy(run)  # of the best checkpoint; it acts greedily
env = make_env(read_config(run), n_envs=8, seed=1)  # or any other vector of the run's task
td = env.rollout(50, policy, break_when_any_done=False)  # [8, 50]
episodes = td["next", "done"].sum().item()
print(f"{episodes} episodes, mean reward of a step {td['next', 'agents', 'reward'].mean():.3f}")
