"""Greedy episodes as replays, which the game itself can show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tensordict import TensorDictBase

from marl_memory.algorithms.algorithm import derive_seed
from marl_memory.networks.policy import Policy
from marl_memory.training.collection import Episodes, TaskEnv
from marl_memory.training.evaluation import evaluate


class Recordable(TaskEnv, Protocol):
    """An environment that keeps replays; `marl_memory_envs.base.AgentsEnv` is one where its simulator does."""

    replay_suffix: str

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step, without a reset where the episode ends."""
        ...

    def save_replay(self, file: Path) -> None:
        """Write what was played since the last seeded reset."""
        ...


class Recorded:
    """``env`` with a replay of every episode, each of which begins with a seed of its own.

    Raises:
        ValueError: if ``env`` keeps no replays, or has more than one environment.
    """

    def __init__(self, env: Recordable, folder: Path, seed: int) -> None:
        if not env.replay_suffix:
            raise ValueError(f"{env.task_spec.name} keeps no replays; --video films what can be drawn")
        if env.n_envs != 1:
            raise ValueError(f"n_envs={env.n_envs}: replays are of one environment, make it with n_envs=1")
        self.env, self.folder, self.seed = env, folder, seed
        self.task_spec, self.n_envs, self.resumable = env.task_spec, env.n_envs, env.resumable
        self.set_seed, self.snapshot, self.restore, self.close = env.set_seed, env.snapshot, env.restore, env.close
        self.begun, self.files = 0, list[Path]()

    def reset(self) -> TensorDictBase:
        """Reset it; observations ``[1]``."""
        self.begun += 1
        return self.env.reset()

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Step it; where the episode ended write its replay, unless it broke off, and begin another."""
        tensordict = self.env.step(tensordict)
        following: TensorDictBase = tensordict.get("next")
        if not following.get("done").any():
            return tensordict, following
        if not (self.task_spec.has_dropped and following.get(self.task_spec.keys.dropped).any()):
            file = self.folder / f"episode_{len(self.files)}{self.env.replay_suffix}"
            self.env.save_replay(file)
            self.files.append(file)
        self.env.set_seed(derive_seed(self.seed, "replay", self.begun))
        return tensordict, self.reset()


def record(
    env: Recordable,
    actor: Policy,
    folder: Path,
    *,
    episodes: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Episodes:
    """Play greedy episodes as `evaluate` does, one after the other, and write a replay of each to ``folder``.

    Args:
        env: one environment that keeps replays, used for nothing else.
        actor: the policy.
        folder: is made if it is not there; replays of these names in it are replaced.
        episodes: how many.
        seed: of the first episode; those of the others follow from it.
        say: is told what was written.

    Raises:
        ValueError: if the task keeps no replays.
        OSError: if they can not be written.
    """
    recorded = Recorded(env, folder, seed)
    folder.mkdir(parents=True, exist_ok=True)
    played = evaluate(recorded, actor, episodes=episodes, seed=seed)
    say(f"{len(recorded.files)} replays: {folder}")
    return played
