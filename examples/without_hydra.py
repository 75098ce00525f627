"""A trainer built in Python, without Hydra and without YAML: `python without_hydra.py FOLDER`."""

import sys
from functools import partial
from pathlib import Path

import torch

from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.curve import draw, summarise
from marl_memory.training.logging import Logger
from marl_memory.training.trainer import Schedule, Trainer
from marl_memory_envs.toy import MaskedDuel
from marl_memory_envs.vector import vector_env


def make_trainer(folder: Path, total_frames: int) -> Trainer:
    """MAPPO on the toy task of two fighters and a dragon; ``folder`` is where numbers and checkpoints go."""
    torch.set_num_threads(1)  # small networks: a second thread gains little, and loses much on a busy machine
    seed = 0
    make_env = partial(vector_env, MaskedDuel, common_reward=True, success="won", max_episode_steps=20)
    env = make_env(n_envs=16, seed=seed)
    schedule = Schedule(
        total_frames=total_frames,
        steps=32,  # vector steps a batch: 32 × 16 frames an iteration
        checkpoint_every_frames=20_000,
        evaluation_every_frames=20_000,
        evaluation_episodes=32,
    )
    return Trainer(
        algorithm=PPO(
            spec=env.task_spec,
            network=partial(MLP, hidden=(64, 64)),
            seed=seed,
            centralised_critic=True,
            share_parameters=True,
        ),
        memory=Memory(),
        env=env,
        evaluation_env=make_env(n_envs=16, seed=seed + 1),
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints"),
        logger=Logger(folder, total_frames=total_frames),
        seed=seed,
    )


def main(folder: Path, total_frames: int = 100_000) -> None:
    """Train, and leave metrics, checkpoints and the learning curve in ``folder``."""
    folder.mkdir(parents=True)
    trainer = make_trainer(folder, total_frames)
    trainer.run()
    trainer.close()
    draw(folder)
    print(summarise(folder, finished=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
