"""Stable-Baselines3 on HalfCheetah-v5 and CartPole-v1: its speed, and what its TD3 learns, for docs/results.

Runs in an environment of its own and imports nothing of ours:

    python -m venv sb3 && sb3/bin/pip install stable-baselines3 "gymnasium[mujoco]"
    SB3_PYTHON=sb3/bin/python make bench
    sb3/bin/python benchmarks/sb3_peer.py learn 0 100000 td3_seed0.csv

``speed`` prints one JSON line: median seconds of a stretch of training.  ``learn`` trains TD3 with the hyper-parameters
of ``experiment=td3_half_cheetah`` and writes greedy evaluations: 8 episodes every 10 000 frames, 128 at the end.
"""

import csv
import json
import statistics
import sys
import time

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

TASK = "HalfCheetah-v5"


def speed(algorithm: str, frames: int, task: str, n_envs: int) -> None:
    """Two stretches after the first, which warms up; updates for each frame are as many as with one environment."""
    several = {"gradient_steps": n_envs} if n_envs > 1 else {}
    envs = make_vec_env(task, n_envs)
    model = getattr(stable_baselines3, algorithm.upper())("MlpPolicy", envs, device="cpu", seed=0, **several)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        model.learn(frames, reset_num_timesteps=False)
        taken.append(time.perf_counter() - started)
    versions = {"stable_baselines3": stable_baselines3.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": {"all": statistics.median(taken[1:])}, **versions}))


def learn(seed: int, frames: int, file: str) -> None:
    """TD3, 2×256, uniform actions for 10 000 frames, Gaussian noise of 0.1."""
    model = stable_baselines3.TD3(
        "MlpPolicy",
        TASK,
        device="cpu",
        seed=seed,
        learning_starts=10_000,
        action_noise=NormalActionNoise(np.zeros(6), 0.1 * np.ones(6)),
        policy_kwargs={"net_arch": [256, 256]},
    )
    with open(file, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["frames", "evaluation/return", "episodes"])
        table.writerow([0, greedy_return(model, 8), 8])
        for done in range(10_000, frames + 1, 10_000):
            model.learn(10_000, reset_num_timesteps=False)
            episodes = 128 if done == frames else 8
            table.writerow([done, greedy_return(model, episodes), episodes])
            stream.flush()


def greedy_return(model: object, episodes: int) -> float:
    """Mean undiscounted return of the mean policy."""
    envs = gymnasium.make_vec(TASK, num_envs=8, vectorization_mode="sync")
    total, (seen, _) = 0.0, envs.reset(seed=10_000)
    for _ in range(episodes // 8):
        for _ in range(1000):  # HalfCheetah always lasts 1 000 steps
            seen, reward, *_ = envs.step(model.predict(seen, deterministic=True)[0])
            total += float(reward.sum())
        seen, _ = envs.reset()
    return total / episodes


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "speed":
        speed(sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        learn(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
