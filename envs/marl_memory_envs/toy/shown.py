"""A toy task as others see it: one PettingZoo `ParallelEnv`, or N copies as one TorchRL environment.

Both run the same `Simulator`, the first with N = 1, so they agree to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory_envs.base import AgentsEnv, assemble, environment_seeds
from marl_memory_envs.toy.rules import Rules, Streams

Rows = slice | np.ndarray

EVERY: Rows = slice(None)


class Seen(NamedTuple):
    """What N copies show: ``observation [N, A, F]``, ``state [N, S]``, and after a step ``[N]`` each of the others."""

    observation: np.ndarray
    state: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray


class Simulator:
    """N copies of a task, their time and their random streams.

    Args:
        rules: the task.
        seeds: of each copy's random stream.
    """

    def __init__(self, rules: Rules, seeds: list[int]) -> None:
        limit = rules.spec.max_episode_steps
        assert limit is not None
        self.rules, self.n, self.limit = rules, len(seeds), limit
        self.streams = Streams(seeds)
        self.copies = rules.start(lambda k: np.zeros((self.n, k)), self.n)  # until the first reset: only their shapes
        self.steps = np.zeros(self.n, np.int64)
        self.over = np.ones(self.n, bool)
        self.nothing = np.zeros(self.n, np.float32), *(np.zeros(self.n, bool) for _ in range(3))

    def reset(self, rows: Rows = EVERY) -> Seen:
        """Begin an episode in the copies ``rows``; what all of them show."""
        count = self.n if isinstance(rows, slice) else len(rows)
        new = self.rules.start(lambda k: self.streams.draw(rows, k), count)
        if count == self.n:
            self.copies = new
        else:
            self.copies = {name: array.copy() for name, array in self.copies.items()}
            for name, array in self.copies.items():
                array[rows] = new[name]
        self.steps[rows], self.over[rows] = 0, False
        return self.look()

    def step(self, actions: np.ndarray) -> Seen:
        """One step of all copies with ``actions``, ``[N, A]`` or ``[N, A, P]``.

        Raises:
            RuntimeError: if one of them is done.
        """
        if self.over.any():
            raise RuntimeError(f"environment {self.over.argmax()} is done: reset it before stepping it again")
        moved = self.rules.move(self.copies, actions, lambda k: self.streams.draw(EVERY, k))
        self.copies = moved.copies
        self.steps += 1
        truncated = (self.steps >= self.limit) & ~moved.terminated
        self.over = moved.terminated | truncated
        reward = moved.reward.astype(np.float32)
        return Seen(*self.look()[:2], reward, moved.terminated, truncated, moved.success & self.over)

    def look(self) -> Seen:
        """What the copies show as they stand, without reward."""
        observation = self.rules.observe(self.copies)
        if self.rules.spec.own_state:
            state = self.rules.state(self.copies)
        else:
            state = observation.reshape(self.n, -1).copy()
        return Seen(observation, state, *self.nothing)

    def snapshot(self) -> dict[str, np.ndarray]:
        """Everything that changes, by name."""
        kept = {"origins": self.streams.origins, "counts": self.streams.counts, "steps": self.steps, "over": self.over}
        return {**kept, **{f"copies_{name}": array for name, array in self.copies.items()}}

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Continue from a `snapshot`.

        Raises:
            ValueError: for a snapshot of another task or another N.
        """
        for name, array in (mine := self.snapshot()).items():
            saved = snapshot.get(name)
            if saved is None or saved.shape != array.shape or saved.dtype != array.dtype or len(snapshot) != len(mine):
                wanted = f"{self.rules.spec.name} with n_envs={self.n}"
                raise ValueError(f"{name} of the snapshot is not {array.dtype} {array.shape}: it is not of {wanted}")
        new = {name: array.copy() for name, array in snapshot.items()}
        self.streams.origins, self.streams.counts = new.pop("origins"), new.pop("counts")
        self.steps, self.over = new.pop("steps"), new.pop("over")
        self.copies = {name.removeprefix("copies_"): array for name, array in new.items()}


class ToyVector(AgentsEnv):
    """N copies of a toy task stepped as one; the entries are those of `marl_memory.keys.Keys`.

    They are to be read, not written to: those that say that everybody acts and goes on are the same tensors at every
    such step.  ``frames`` are pictures of copy 0.

    Args:
        rules: the task.
        n_envs: N.
        seed: the run seed, from which every copy's own seed is derived (`environment_seeds`).
        group: the agents' group in the TensorDict.

    Raises:
        ValueError: for ``n_envs`` below 1.
    """

    resumable = True
    frames_per_second = 5.0

    def __init__(self, rules: Rules, n_envs: int, seed: int, group: str = "agents") -> None:
        if n_envs < 1:
            raise ValueError(f"n_envs={n_envs} must be at least 1")
        spec = replace(rules.spec, group=group)
        super().__init__(spec, n_envs)
        self.simulator = Simulator(rules, environment_seeds(seed, n_envs))
        self._started = False
        self._agents_size = torch.Size((n_envs, spec.n_agents))
        self._action_key = spec.keys.action
        shape = (n_envs, spec.n_agents)
        self._action_shape = (*shape, spec.action_size) if spec.continuous else shape
        self._going_on = {"alive": torch.ones(shape, dtype=torch.bool), "discount": torch.ones(*shape, 1)}
        if not spec.continuous:
            self._going_on["action_mask"] = torch.ones(*shape, spec.action_size, dtype=torch.bool)
        self._no = torch.zeros(n_envs, 1, dtype=torch.bool)

    def frames(self) -> list[np.ndarray]:
        """Copy 0 as it is, ``[[height, width, 3]]`` uint8."""
        return [self.simulator.rules.picture(self.simulator.copies)]

    def snapshot(self) -> dict[str, Tensor]:
        """Copies, times and random streams."""
        # uint64 (the streams) as int64 of the same bits: PyTorch knows few operations on unsigned integers.
        arrays = {
            name: x.view(np.int64) if x.dtype == np.uint64 else x for name, x in self.simulator.snapshot().items()
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def restore(self, snapshot: dict[str, Tensor]) -> TensorDictBase:
        """Continue from a `snapshot`; returns the observations to act on.

        Raises:
            ValueError: for a snapshot of another task or another N.
        """
        arrays = {name: tensor.numpy(force=True) for name, tensor in snapshot.items()}
        streams = {name: arrays[name].view(np.uint64) for name in ("origins", "counts") if name in arrays}
        self.simulator.restore(arrays | streams)
        self._started = True
        return self._entries(self.simulator.look(), reward=False)

    def _set_seed(self, seed: int | None) -> None:
        """Begin every random stream anew; episodes under way go on from where they stand, until they are reset."""
        if seed is None:
            raise ValueError("seed=None: give an integer, from which the seeds of all copies are derived")
        self.simulator.streams.seed(EVERY, environment_seeds(seed, self.n_envs))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Begin anew where ``_reset [N, 1]`` holds (everywhere without it); the others stay as they are."""
        which = None if tensordict is None else tensordict.get("_reset", None)
        rows = EVERY if which is None or which.all() else which.reshape(self.n_envs).numpy().nonzero()[0]
        if not self._started and rows is not EVERY:
            raise RuntimeError("the first reset must reset all environments; its _reset mask names only some")
        object.__setattr__(self, "_started", True)  # a module's own way of setting attributes is slow
        return self._entries(self.simulator.reset(rows), reward=False)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step of every copy: the entries of time t + 1."""
        if not self._started:
            raise RuntimeError("step() before the first reset()")
        return self._entries(self.simulator.step(self._actions(tensordict)), reward=True)

    def _actions(self, tensordict: TensorDictBase) -> np.ndarray:
        """``[N, A]`` int64, or ``[N, A, P]`` float32; all of them in their bounds."""
        spec, action = self.task_spec, tensordict.get(self._action_key).numpy(force=True)
        if action.shape != self._action_shape:
            raise ValueError(f"{spec.keys.action} has shape {action.shape}; {spec.name} takes {self._action_shape}")
        if spec.continuous:
            if not (np.abs(action) <= 1).all():  # toy tasks' bounds are ±1
                raise ValueError(f"actions from {action.min()} to {action.max()}: {spec.name} takes −1 to 1")
        elif action.view(np.uint64).max() >= spec.action_size:  # a negative one reads as a huge one
            low, high = action.min(), action.max()
            raise ValueError(f"actions from {low} to {high}: {spec.name} has {spec.action_size}, from 0")
        return action

    def _entries(self, seen: Seen, *, reward: bool) -> TensorDict:
        group = {"observation": torch.from_numpy(seen.observation), **self._going_on}
        root = {"state": torch.from_numpy(seen.state), **dict.fromkeys(("done", "terminated", "truncated"), self._no)}
        if (terminated := seen.terminated).any():
            root["terminated"] = torch.from_numpy(terminated[:, None])
            goes_on = torch.from_numpy(~terminated)[:, None].expand(self._agents_size)
            group["alive"], group["discount"] = goes_on.clone(), goes_on[..., None].float()
            if not self.task_spec.continuous:
                group["action_mask"] = group["action_mask"].clone()
                group["action_mask"][torch.from_numpy(terminated), :, 1:] = False  # nothing to choose: the no-op
        if seen.truncated.any():
            root["truncated"] = torch.from_numpy(seen.truncated[:, None])
        if root["terminated"] is not self._no or root["truncated"] is not self._no:
            root["done"] = root["terminated"] | root["truncated"]
        if self.task_spec.has_success:
            root["success"] = torch.from_numpy(seen.success[:, None]) if seen.success.any() else self._no
        if reward:
            group["reward"] = torch.from_numpy(seen.reward)[:, None, None].expand(*self._agents_size, 1).contiguous()
        root[self.task_spec.group] = assemble(group, self._agents_size)
        return assemble(root, self.batch_size)


class ToyEnv(ParallelEnv[str, np.ndarray, Any]):
    """One copy of a toy task: the vector of one, with PettingZoo's names.

    All agents act until the episode ends for all of them; ``info["success"]`` tells whether it was won.

    Args:
        rules: the task.
        render_mode: ``rgb_array`` for pictures, or None.

    Raises:
        ValueError: for another ``render_mode``.
    """

    def __init__(self, rules: Rules, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} must be 'rgb_array' or None")
        spec = self.task_spec = rules.spec
        self.metadata = {"name": spec.name, "render_modes": ["rgb_array"], "render_fps": 5, "is_parallelizable": True}
        self.render_mode = render_mode
        self.possible_agents = list(spec.agents)
        self.agents: list[str] = []
        self.observation_spaces = {a: spaces.Box(0.0, 1.0, (spec.observation_size,), np.float32) for a in spec.agents}
        self.action_spaces: dict[str, spaces.Space[Any]] = {
            agent: spaces.Box(-1.0, 1.0, (spec.action_size,), np.float32)
            if spec.continuous
            else spaces.Discrete(spec.action_size)
            for agent in spec.agents
        }
        if spec.own_state:
            self.state_space = spaces.Box(0.0, 1.0, (spec.state_size,), np.float32)
        self.simulator = Simulator(rules, [int(np.random.SeedSequence().generate_state(1)[0])])

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The agent's one space object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The agent's one space object."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Begin an episode; without a seed the random stream goes on."""
        if seed is not None:
            self.simulator.streams.seed(EVERY, [seed])
        self.agents = list(self.possible_agents)
        return self._observations(self.simulator.reset()), {agent: {"success": False} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        """One step with an action of every agent.

        Raises:
            ValueError: for an action out of its space.
        """
        acting = self.agents
        if not acting:
            return {}, {}, {}, {}, {}
        for agent in acting:
            if not self.action_spaces[agent].contains(actions.get(agent)):
                raise ValueError(f"action {actions.get(agent)!r} of {agent} is not in {self.action_spaces[agent]}")
        seen = self.simulator.step(np.array([[actions[agent] for agent in acting]]))
        if self.simulator.over[0]:
            self.agents = []
        return (
            self._observations(seen),
            dict.fromkeys(acting, float(seen.reward[0])),
            dict.fromkeys(acting, bool(seen.terminated[0])),
            dict.fromkeys(acting, bool(seen.truncated[0])),
            {agent: {"success": bool(seen.success[0])} for agent in acting},
        )

    def state(self) -> np.ndarray:
        """``[S]``: the task's global state.

        Raises:
            NotImplementedError: if it has none beyond the observations.
        """
        return self.simulator.rules.state(self.simulator.copies)[0]

    def render(self) -> np.ndarray | None:
        """The task as it stands, ``[height, width, 3]`` uint8; nothing without ``render_mode``."""
        return self.simulator.rules.picture(self.simulator.copies) if self.render_mode else None

    def close(self) -> None:
        """Nothing to release."""

    def _observations(self, seen: Seen) -> dict[str, np.ndarray]:
        return dict(zip(self.possible_agents, seen.observation[0], strict=True))
