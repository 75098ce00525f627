"""What every task of ours is to TorchRL: N environments stepped as one `EnvBase`, one TensorDict per vector step."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from marl_memory.spec import TaskSpec


def environment_seeds(run_seed: int, n_envs: int) -> list[int]:
    """Distinct 31-bit seeds, one per environment, all derived from one run seed (NumPy's `SeedSequence`)."""
    drawn = np.random.SeedSequence(run_seed).generate_state(4 * n_envs + 16) & 0x7FFFFFFF
    distinct = list(dict.fromkeys(int(seed) for seed in drawn))
    return distinct[:n_envs]


def assemble(entries: dict[str, Any], batch_size: torch.Size) -> TensorDict:
    """A TensorDict of entries that are known to fit: without the checks, which cost some 20 µs at every step."""
    return TensorDict._new_unsafe(source=entries, batch_size=batch_size)


class AgentsEnv(EnvBase):
    """N environments with A agents each, batch size ``[N]``; the entries are those of `marl_memory.keys.Keys`.

    A subclass gives `_reset` (honouring a partial ``_reset`` mask ``[N, 1]``), `_step` and `_set_seed`; where its
    simulator's state can be saved, also `snapshot` and `restore` and ``resumable = True``.
    """

    resumable: bool = False
    """Whether `snapshot` captures everything, so that a run continues exactly from where it stood."""

    replay_suffix: str = ""
    """How the files of `save_replay` end; empty where the task keeps no replays."""

    frames_per_second: float = 15.0
    """How many of the pictures that `frames` gives make a second of the task's own time; where it has none, 15."""

    def __init__(self, spec: TaskSpec, n_envs: int) -> None:
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([n_envs]))
        self.task_spec = spec
        self.n_envs = n_envs
        self._make_specs()

    def _make_specs(self) -> None:
        spec, n, a, Size = self.task_spec, self.n_envs, self.task_spec.n_agents, torch.Size
        seen = torch.uint8 if spec.picture else torch.float32
        agents: dict[str, Any] = {
            "observation": Unbounded(shape=Size((n, a, spec.observation_size)), dtype=seen),
            "alive": Categorical(2, shape=Size((n, a)), dtype=torch.bool),
            "discount": Bounded(0.0, 1.0, shape=Size((n, a, 1)), dtype=torch.float32),
        }
        if not spec.continuous:
            agents["action_mask"] = Categorical(2, shape=Size((n, a, spec.action_size)), dtype=torch.bool)
        observation: dict[str, Any] = {
            spec.group: Composite(agents, shape=Size((n, a))),
            "state": Unbounded(shape=Size((n, spec.state_size)), dtype=seen),
        }
        if spec.has_success:
            observation["success"] = Categorical(2, shape=Size((n, 1)), dtype=torch.bool)
        if spec.measures:
            observation["measures"] = Unbounded(shape=Size((n, len(spec.measures))), dtype=torch.float32)
        if spec.has_dropped:
            observation["dropped"] = Categorical(2, shape=Size((n, 1)), dtype=torch.bool)
        self.observation_spec = Composite(observation, shape=Size((n,)))
        reward = Composite({"reward": Unbounded(shape=Size((n, a, 1)), dtype=torch.float32)}, shape=Size((n, a)))
        self.reward_spec = Composite({spec.group: reward}, shape=Size((n,)))
        flag = Categorical(2, shape=Size((n, 1)), dtype=torch.bool)
        flags = {key: flag.clone() for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=Size((n,)))
        if spec.continuous:
            low = torch.tensor(spec.action_low).expand(n, a, spec.action_size).clone()
            high = torch.tensor(spec.action_high).expand(n, a, spec.action_size).clone()
            action = Bounded(low, high, shape=Size((n, a, spec.action_size)), dtype=torch.float32)
        else:
            action = Categorical(spec.action_size, shape=Size((n, a)), dtype=torch.int64)
        self.action_spec = Composite({spec.group: Composite({"action": action}, shape=Size((n, a)))}, shape=Size((n,)))

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Uniformly random actions, over the allowed ones where the task masks them."""
        keys = self.task_spec.keys
        if tensordict is None:
            tensordict = TensorDict(batch_size=self.batch_size)
        mask = None if self.task_spec.continuous else tensordict.get(keys.action_mask, None)
        if mask is None:
            tensordict.update(self.full_action_spec.rand())
        else:
            flat = torch.multinomial(mask.reshape(-1, mask.shape[-1]).float(), 1)
            tensordict.set(keys.action, flat.reshape(mask.shape[:-1]))
        return tensordict

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """One vector step; environments whose episode ended are reset.

        Returns ``(tensordict, following)``: the first with ``"next"`` holding the true last observations, the second
        the observations to act on.  It does what TorchRL's own does, without its per-step checks (about 100 µs), and
        carries only the environment's entries over to the second: no action, no entry of the policy's.
        """
        following = self._step(tensordict)
        tensordict.set("next", following)
        done: Tensor = following.get("done")
        if done.any():
            return tensordict, self._reset(TensorDict({"_reset": done}, batch_size=self.batch_size))
        entries = {name: following.get(name) for name in following.keys()}
        group = entries[self.task_spec.group]
        seen = {name: group.get(name) for name in group.keys() if name != "reward"}
        # As in TorchRL's: a reward belongs to ("next", …) only.
        entries[self.task_spec.group] = assemble(seen, group.batch_size)
        return tensordict, assemble(entries, following.batch_size)

    def snapshot(self) -> dict[str, Tensor]:
        """Everything the simulator knows, as tensors; only where `resumable`."""
        raise RuntimeError(f"{type(self).__name__} cannot save its simulator's state (resumable=False)")

    def restore(self, snapshot: dict[str, Tensor]) -> TensorDictBase:
        """Continue from a `snapshot`; returns the observations to act on."""
        raise RuntimeError(f"{type(self).__name__} cannot restore a simulator's state (resumable=False)")

    def frames(self) -> list[np.ndarray]:
        """Pictures of environment 0 since its last step or reset began, oldest first, each ``[H, W, 3]`` uint8.

        One, or several where the simulator shows what happens within a step.

        Raises:
            ValueError: if the task can not be drawn.
        """
        raise ValueError(f"{self.task_spec.name} can not be drawn: {type(self).__name__} has no pictures")

    def save_replay(self, file: Path) -> None:
        """Write what environment 0 has played since its last seeded reset, in the simulator's own form.

        Raises:
            ValueError: if the task keeps no replays.
        """
        raise ValueError(f"{self.task_spec.name} keeps no replays; a film shows what happened: --video")

    @abstractmethod
    def _set_seed(self, seed: int | None) -> None: ...
