"""ale-py's own vector environment, as an environment of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.spec import TaskSpec
from marl_memory_envs.base import AgentsEnv, assemble, environment_seeds
from marl_memory_envs.one_agent import AGENT
from marl_memory_envs.stepping import worker_count


class AleVectorEnv(AgentsEnv):
    """N games of one kind, emulated and preprocessed in C++ on several threads; entries as of `atari.game`.

    ale-py starts the next episode in the step that ends one; its first observation waits here until it is asked for.

    Args:
        name: the task's.
        n_envs: N.
        game, noop_max, frame_skip, screen_size, frame_stack, sticky_actions, full_action_space: see `atari.game`.
        episodic_life: here only False: ale-py goes on with the same game where `atari.game` begins a new one.
        clip_rewards: see `TaskSpec`.
        group: the name of the agents' group.
        workers: threads; None: one per core.

    Raises:
        ValueError: for ``episodic_life``.
    """

    def __init__(
        self,
        *,
        name: str,
        n_envs: int,
        game: str,
        noop_max: int = 30,
        frame_skip: int = 4,
        screen_size: int = 84,
        frame_stack: int = 4,
        episodic_life: bool = False,
        sticky_actions: float = 0.0,
        full_action_space: bool = False,
        clip_rewards: float | None = 1.0,
        group: str = "agents",
        workers: int | None = None,
    ) -> None:
        if episodic_life:
            raise ValueError(
                "env.kwargs.episodic_life=true differs between backends: after a lost life env.backend=ale_vector goes "
                "on with the same game, Gymnasium's preprocessing begins a new one; set env.backend=gymnasium"
            )
        from marl_memory_envs.atari import FRAMES

        self.vector = AtariVectorEnv(
            game,
            n_envs,
            num_threads=worker_count(n_envs, workers),
            max_num_frames_per_episode=FRAMES,
            repeat_action_probability=sticky_actions,
            full_action_space=full_action_space,
            autoreset_mode="SameStep",
            img_height=screen_size,
            img_width=screen_size,
            stack_num=frame_stack,
            frameskip=frame_skip,
            noop_max=noop_max,
            reward_clipping=False,
            use_fire_reset=False,
        )
        picture = (frame_stack, screen_size, screen_size)
        size = int(np.prod(picture))
        spec = TaskSpec(
            name=name,
            agents=(AGENT,),
            observation_sizes=(size,),
            action_sizes=(int(self.vector.single_action_space.n),),  # type: ignore[attr-defined]
            continuous=False,
            state_size=size,
            own_state=False,
            common_reward=False,
            max_episode_steps=FRAMES // frame_skip,
            picture=picture,
            frame_stack=frame_stack,
            clip_rewards=clip_rewards,
            group=group,
        )
        super().__init__(spec, n_envs)
        self.frames_per_second = 60 / frame_skip
        self.is_closed = False
        self._seeds: np.ndarray | None = None
        self._current: Tensor | None = None  # [N, F], what is to be acted on
        self._fresh = torch.zeros(n_envs, dtype=torch.bool)  # [N], whose episode ale-py has begun already
        everybody = torch.ones(n_envs, 1, dtype=torch.bool)
        self._going_on = {
            "alive": everybody,
            "discount": torch.ones(n_envs, 1, 1),
            "action_mask": torch.ones(n_envs, 1, spec.action_size, dtype=torch.bool),
        }
        self._nothing = ~everybody

    def frames(self) -> list[np.ndarray]:
        """The newest picture that the first game's agent sees, grey, twice as large: ale-py shows no other."""
        if self._current is None:
            raise ValueError(f"{self.task_spec.name} can not be drawn before its first reset")
        newest = self._current[0].view(self.task_spec.picture or ())[-1].numpy()
        return [np.repeat(newest.repeat(2, 0).repeat(2, 1)[..., None], 3, -1)]

    def _set_seed(self, seed: int | None) -> None:
        """The next reset of all games seeds each with its own."""
        self._seeds = None if seed is None else np.array(environment_seeds(seed, self.n_envs))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Reset all games, or those that the mask ``_reset`` ``[N, 1]`` names."""
        mask = None if tensordict is None else tensordict.get("_reset", None)
        asked = torch.ones(self.n_envs, dtype=torch.bool) if mask is None else mask.reshape(self.n_envs)
        if asked.all() and (mask is None or not self._fresh.all()):
            seen, _ = self.vector.reset(seed=self._seeds)
            self._seeds, self._current = None, torch.from_numpy(seen).flatten(1)
        elif self._current is None:
            raise RuntimeError("the first reset must reset all environments; its _reset mask names only some")
        elif (begun := asked & ~self._fresh).any():
            raise RuntimeError(
                f"env.backend=ale_vector can not reset single games in mid-episode: {begun.nonzero()[:, 0].tolist()}"
            )
        self._fresh = self._fresh & ~asked
        return self._entries(self._current, self._going_on, self._nothing, self._nothing)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Step all games."""
        if self._current is None:
            raise RuntimeError("step() before the first reset()")
        if (mask := tensordict.get("_step", None)) is not None and not mask.all():
            raise RuntimeError("env.backend=ale_vector steps all games or none: leave out the mask _step")
        action = tensordict.get(self.task_spec.keys.action).numpy(force=True).reshape(self.n_envs)
        if action.view(np.uint64).max() >= self.task_spec.action_size:
            raise ValueError(f"action {action.tolist()} of {self.task_spec.name}: {self.task_spec.action_size} exist")
        seen, reward, terminated, truncated, info = self.vector.step(action)
        following = self._current = torch.from_numpy(seen).flatten(1)
        ended, entries = torch.from_numpy(terminated).unsqueeze(-1), dict(self._going_on)
        cut = torch.from_numpy(truncated & ~terminated).unsqueeze(-1)
        done = ended | cut
        self._fresh = done.squeeze(-1)
        if self._fresh.any():
            last = torch.from_numpy(info["final_obs"]).flatten(1)
            following = torch.where(done, last, following)
            entries["alive"], entries["discount"] = ~ended, (~ended).float().unsqueeze(-1)
            only_first = torch.arange(self.task_spec.action_size) == 0
            entries["action_mask"] = torch.where(ended.unsqueeze(-1), only_first, entries["action_mask"])
        entries["reward"] = torch.from_numpy(reward).float().view(-1, 1, 1)
        return self._entries(following, entries, ended, cut)

    def _entries(
        self, seen: Tensor, agents: dict[str, Tensor], terminated: Tensor, truncated: Tensor
    ) -> TensorDictBase:
        group = assemble({"observation": seen.unsqueeze(1), **agents}, torch.Size((self.n_envs, 1)))
        root = {"state": seen, "done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return assemble({**root, self.task_spec.group: group}, self.batch_size)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the emulators."""
        if not self.is_closed:
            self.vector.close()
        super().close(raise_if_closed=raise_if_closed)
