"""Atari: the adapter beside the loops it replaces, ale-py's vector environment beside it, and what a replay takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.collection import random_actions
from benchmarks.measure import Row, ratio, turns
from marl_memory.keys import Entry
from marl_memory.training.replay import ReplayRing
from marl_memory_envs.atari import vector_env
from marl_memory_envs.vector import vector_env as any_env

GAME = "pong"
N = 8
STEPS = 60

SUPERSUIT: list[dict[str, Any]] = [
    {"max_observation": {"memory": 2}},
    {"frame_skip": {"num_frames": 4}},
    {"resize": {"x_size": 84, "y_size": 84}},
    {"frame_stack_v1": {"stack_size": 4}},
]
"""As in configs/env/atari/pong_v3.yaml."""


def rows(repeats: int) -> Iterator[Row]:
    """One player's game: Gymnasium's loop / ours, and ours / ale-py's vector environment."""
    ours, beside, vector = playing(_default()), _gymnasium(), playing(_ale_vector())
    timed = turns(beside, ours, repeats)
    yield ratio("Atari, share of Gymnasium's AtariPreprocessing", timed, calls=STEPS, environments=N)
    yield ratio("Atari, ale_vector beside the default", turns(ours, vector, repeats), calls=STEPS, environments=N)


def players(repeats: int) -> Iterator[Row]:
    """Two players' game: TorchRL's `PettingZooWrapper` / ours, same pictures of the same game."""
    timed = turns(_torchrl(), playing(any_env(**_two_players(), n_envs=N, seed=0)), repeats)
    yield ratio("two-player Atari beside PettingZooWrapper", timed, calls=STEPS, environments=N)


def replay(repeats: int) -> Iterator[Row]:
    """GB of a replay of 1 M steps of one player, with all that an off-policy learner keeps."""
    ring, batch = million()
    ring.extend(batch)
    yield Row("Atari replay of 1 M steps", [ring.bytes / 1e9], "GB", {"pictures": "84 × 84, stacks of 4"})


def _default() -> Any:
    return vector_env(n_envs=N, seed=0, kwargs={"game": GAME})


def _ale_vector() -> Any:
    return vector_env(n_envs=N, seed=0, kwargs={"game": GAME}, backend="ale_vector")


def _two_players() -> dict[str, Any]:
    return {"factory": "marl_memory_envs.atari:players", "kwargs": {"game": f"{GAME}_v3"}, "wrappers": SUPERSUIT}


def playing(env: Any) -> Callable[[], None]:
    """`STEPS` vector steps of an environment of ours with random actions, from where the last ones ended."""
    actions, key, now = random_actions(env, STEPS), env.task_spec.keys.action, {"td": env.reset()}

    def play() -> None:
        for t in range(STEPS):
            now["td"].set(key, actions[t])
            _, now["td"] = env.step_and_maybe_reset(now["td"])

    return play


def _gymnasium() -> Callable[[], None]:
    """The loop one writes with Gymnasium alone: no stack, nothing kept."""
    import ale_py
    import gymnasium as gym
    from gymnasium.wrappers import AtariPreprocessing

    gym.register_envs(ale_py)
    make = partial(gym.make, "ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    envs = [AtariPreprocessing(make()) for _ in range(N)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    actions = torch.randint(6, (STEPS, N), generator=torch.Generator().manual_seed(0)).tolist()

    def play() -> None:
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                *_, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

    return play


def _torchrl() -> Callable[[], None]:
    """TorchRL's way to the same pictures, as its users write it: SuperSuit's wrappers, then `PettingZooWrapper`."""
    import supersuit
    from pettingzoo.atari import pong_v3
    from torchrl.envs import SerialEnv
    from torchrl.envs.libs.pettingzoo import PettingZooWrapper

    from marl_memory_envs.atari import rom_folder

    def make() -> Any:
        env = pong_v3.parallel_env(auto_rom_install_path=str(rom_folder()))
        env = supersuit.frame_skip_v0(supersuit.max_observation_v0(env, 2), 4)
        env = supersuit.resize_v1(supersuit.color_reduction_v0(env, mode="full"), 84, 84)
        env = supersuit.frame_stack_v1(env, 4)
        return PettingZooWrapper(env, group_map={"agents": list(env.possible_agents)}, device="cpu")

    env = SerialEnv(N, make)
    now = {"td": env.reset()}
    actions = torch.randint(6, (STEPS, N, 2), generator=torch.Generator().manual_seed(0))

    def play() -> None:
        for chosen in actions:
            one_hot = torch.nn.functional.one_hot(chosen, 6)
            spec = env.full_action_spec["agents", "action"]
            now["td"].set(("agents", "action"), one_hot if spec.shape == one_hot.shape else chosen)
            _, now["td"] = env.step_and_maybe_reset(now["td"])

    return play


def million() -> tuple[ReplayRing, Any]:
    """An empty replay of 1 M steps, and a batch for it."""
    env: Any = _default()
    spec, k = env.task_spec, env.task_spec.keys
    batch = torch.stack([env.step_and_maybe_reset(env.rand_action(env.reset()))[0]])
    inputs: list[Any] = [k.observation, k.action_mask, k.alive]
    after = [("next", *key) for key in (*inputs, k.reward, k.discount)]
    ring = ReplayRing(
        capacity=1_000_000,
        n_envs=N,
        batch_size=32,
        entries=[*inputs, k.action, *after],
        learn_entries={k.learn_reward: Entry((1, 1))},
        keys=k,
        seed=0,
        frame_stack=spec.frame_stack,
    )
    env.close()
    return ring, batch
