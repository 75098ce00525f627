"""N PettingZoo ParallelEnvs, stepped as ONE TorchRL environment: one TensorDict per vector step.

TorchRL's own route (a wrapper for each environment and a batched environment around them) costs several times what
these simulators do, gives every environment of a `ParallelEnv` the same seed unless told otherwise, and ends an episode
at the first death.  Here each step fills one fresh NumPy array per entry, row by row.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pettingzoo import ParallelEnv
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.spec import TaskSpec
from marl_memory_envs.base import AgentsEnv, assemble, environment_seeds
from marl_memory_envs.spaces import AgentSpaces, own_state_size, pad_bounds, read_team, spaces_of
from marl_memory_envs.stepping import (
    Played,
    ProcessEnv,
    Processes,
    Serial,
    Stepping,
    Threads,
    WholeTeams,
    check_stepping,
    make_env,
    missing,
    worker_count,
)

Frame = dict[str, np.ndarray]
"""The entries of one vector step, each ``[N, …]``."""

COMMON = 1e-5
"""How far apart the rewards of a team may be, relative to their size, and still count as one."""

_SPACES = ("observation_space", "action_space")

_ROOT = ("state", "done", "terminated", "truncated", "success", "measures", "dropped")


class VectorEnv(AgentsEnv):
    """N environments of one task, batch size ``[N]``; entries as in `marl_memory.keys.Keys`.

    Where agents see pictures, these are the state too, all of them, whatever other state the environment has.

    An agent is *alive* at t when it acts at t: it is in ``env.agents``, none of its flags is set, and
    ``infos[agent]["alive"]``, where the environment gives it, is true.  An agent that is listed but not alive is sent
    action 0 (continuous: the action nearest to zero).  A dead agent has a zero observation, only action 0 in its mask
    and reward 0, or the team's reward where rewards are common.  An episode is *done* when no agent is left; it is
    *truncated* when one of its agents ended by a truncation that was no termination, else *terminated*.

    ``("next", …)`` holds the true last observation of every agent that is cut by a truncation, and of all that acted in
    the last step of an episode.  Cut agents keep their action mask there too, so that a learner can bootstrap; they
    count as alive if the episode ends with them, and not if it goes on without them (they do not act again).

    Entries are to be read, not written to: those that say that everybody acts and goes on are the same tensors at every
    such step.

    Args:
        envs: the environments, all with the same agents and spaces.
        name: the task's name; by default what the first environment calls itself.
        common_reward: whether all agents receive one reward (checked at every step).
        success: the key in an agent's info which tells at the end of an episode whether it was won.
        measures: the keys of numbers in an agent's info at the end of an episode, which are told beside its return.
        dropped: the key in an agent's info which tells at the end of an episode that it broke off, through no doing of
            the agents: it must be truncated, and counts for nothing.
        action_embedding: see `TaskSpec`.
        max_episode_steps: the time limit that the environments themselves impose, in steps (checked, not imposed).
        clip_rewards: learners read rewards clipped to ± this; reported returns are never clipped.
        group: the name of the agents' group in the TensorDict.
        stepping: ``serial`` steps one environment after another, ``threads`` and ``processes`` some on each of the
            workers; the numbers are the same. One environment alone is always stepped serially. In processes only
            `vector_env` can make environments.
        workers: how many threads or processes, at most; None: one per core. Never more than environments.

    Raises:
        ValueError: for spaces that do not fit, environments that differ, data that are not finite, or values of
            ``stepping`` and ``workers`` that do not exist or do not fit.
        EnvironmentFailure: if an environment raises an error.
        ChildProcessError: if a worker process ends before it should.
    """

    def __init__(
        self,
        envs: Sequence[ParallelEnv[str, Any, Any]],
        *,
        name: str | None = None,
        common_reward: bool = False,
        success: str | None = None,
        measures: Sequence[str] = (),
        dropped: str | None = None,
        action_embedding: tuple[tuple[float, ...], ...] | None = None,
        max_episode_steps: int | None = None,
        clip_rewards: float | None = None,
        group: str = "agents",
        stepping: str = "serial",
        workers: int | None = None,
    ) -> None:
        check_stepping(stepping, workers)
        agents = read_team(envs)
        state_size = None if agents[0].picture else own_state_size(envs[0])
        width = max(agent.observation_size for agent in agents)
        spec = TaskSpec(
            name=name or str(envs[0]),
            agents=tuple(agent.name for agent in agents),
            observation_sizes=tuple(agent.observation_size for agent in agents),
            action_sizes=tuple(agent.action_size for agent in agents),
            continuous=agents[0].low is not None,
            state_size=len(agents) * width if state_size is None else state_size,
            own_state=state_size is not None,
            common_reward=common_reward,
            has_success=success is not None,
            measures=tuple(measures),
            has_dropped=dropped is not None,
            action_embedding=action_embedding,
            max_episode_steps=max_episode_steps,
            action_low=pad_bounds([agent.low for agent in agents]),
            action_high=pad_bounds([agent.high for agent in agents]),
            picture=agents[0].picture,
            frame_stack=envs[0].metadata.get("frame_stack", 1) if agents[0].picture else 1,
            clip_rewards=clip_rewards,
            group=group,
        )
        super().__init__(spec, len(envs))
        self.envs = list(envs)
        self.replay_suffix = str(envs[0].metadata.get("replay_suffix", self.replay_suffix))
        self.frames_per_second = float(envs[0].metadata.get("render_fps", self.frames_per_second))
        self.is_closed = False
        self._agents = {agent.name: agent for agent in agents}
        self._shapes = [agent.shape for agent in agents]
        self._spaces = [{name: spaces_of(env, name) for name in self._agents} for env in envs]
        self._noop = _noop(agents, spec)  # [A] or [A, P]: what an agent is sent that is listed but not alive
        self._team = list(spec.agents)
        self._stepping = _stepping(self.envs, self._team, stepping, workers)
        self._agents_size = torch.Size((self.n_envs, spec.n_agents))
        self._dict_observations = any(agent.dict_observation for agent in agents)
        self._one_width = len(set(spec.observation_sizes)) == 1
        self._one_size = len(set(spec.action_sizes)) == 1
        self._plain_actions = self._one_size and not self._noop.any()
        self._success_key, self._dropped_key = success, dropped
        self._template = _template(spec, self.n_envs)
        self._usual = {**self._template, "alive": np.ones((self.n_envs, spec.n_agents), dtype=bool)}
        self._usual_tensors = {key: torch.from_numpy(array) for key, array in self._usual.items()}
        self._written = [
            "reward",
            *(["state"] if spec.own_state else []),
            *([] if self._one_width else ["observation"]),
        ]
        self._sizes = np.array(spec.action_sizes)
        self._seeds: list[int | None] = [None] * self.n_envs
        self._frame: Frame | None = None
        self._alive = np.zeros((self.n_envs, spec.n_agents), dtype=bool)
        self._all_alive = False
        self._listed: list[list[str]] = [[] for _ in envs]  # the agents whose actions each env.step expects
        self._acting: list[list[str]] = [[] for _ in envs]  # those of them that are alive
        self._cut = np.zeros(self.n_envs, dtype=bool)  # whether an agent was truncated in this episode
        self._steps = np.zeros(self.n_envs, dtype=np.int64)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close every environment."""
        if not self.is_closed:
            self._stepping.close()
        super().close(raise_if_closed=raise_if_closed)

    def frames(self) -> list[np.ndarray]:
        """What the first environment's ``render()`` gives, ``[H, W, 3]`` uint8: one picture, of the state as it is.

        Raises:
            ValueError: if it fails, or gives no such picture (without ``render_mode="rgb_array"``, say).
        """
        env, name = self.envs[0], self.task_spec.name
        try:
            picture = env.render()
        except Exception as error:  # whatever keeps a simulator from drawing
            raise ValueError(f"{name} can not be drawn: {type(error).__name__}: {error}{_hint()}") from error
        if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
            kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise ValueError(
                f"{name} can not be drawn: render() gave {kind}, not a uint8 array [height, width, 3]; "
                "the environment must be made with render_mode='rgb_array' and know that mode"
            )
        return [picture]

    def save_replay(self, file: Path) -> None:
        """See `AgentsEnv.save_replay`: the first environment's own ``save_replay(path)``, where it has one."""
        save = getattr(self.envs[0], "save_replay", None)
        if save is None:
            super().save_replay(file)
        else:
            save(str(file))

    # ---- TorchRL's three methods -------------------------------------------------------------------------------------

    def _set_seed(self, seed: int | None) -> None:
        """The next reset of all environments seeds each with its own; later ones let their generators go on."""
        self._seeds = [None] * self.n_envs if seed is None else list(environment_seeds(seed, self.n_envs))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Reset all environments, or those that the mask ``_reset`` ``[N, 1]`` names; the others stay as they are."""
        rows = self._rows(tensordict, "_reset")
        everything = len(rows) == self.n_envs
        if self._frame is None or everything:
            if not everything:
                raise RuntimeError("the first reset must reset all environments; its _reset mask names only some")
            frame = {key: array.copy() for key, array in self._template.items()}
        else:
            frame = {key: array.copy() for key, array in self._frame.items()}
            for key, array in frame.items():
                for row in rows:  # one or few: an index array costs several times as much
                    array[row] = self._template[key][row]
        self._steps[rows] = 0
        self._cut[rows] = False
        readable = np.zeros_like(self._alive)
        starts = self._stepping.reset(rows, self._seeds if everything else [None] * len(rows))
        for row, (observations, infos) in zip(rows, starts, strict=True):
            self._check_spaces(row)
            self._listed[row] = list(self.envs[row].agents)
            self._read_row(frame, readable, row, observations, infos, self._listed[row])
        if everything:
            self._seeds = [None] * self.n_envs
        self._complete(frame, readable, rows)
        return self._tensordict(frame, reward=False)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Step all environments, or those that TorchRL's mask ``_step`` ``[N, 1]`` names."""
        return self._tensordict(self._advance(tensordict, self._rows(tensordict, "_step"))[0], reward=True)

    def _advance(self, tensordict: TensorDictBase, rows: Sequence[int]) -> tuple[Frame, bool]:
        """The entries after a step of environments ``rows``, and whether any row is done."""
        if self._frame is None:
            raise RuntimeError("step() before the first reset()")
        actions = self._actions(tensordict)
        whole, others = self._play(rows, actions if self.task_spec.continuous else actions.tolist())
        if len(whole.rows) == self.n_envs:
            # Everybody acts and goes on: flags, masks and lives are the same tensors at all such steps.
            frame = {**self._usual, **{key: self._template[key].copy() for key in self._written}}
        else:
            frame = {key: array.copy() for key, array in self._template.items()}
        if whole.rows:
            self._write_whole(frame, whole)
        if len(whole.rows) == self.n_envs:
            self._complete(frame, None, rows)
        else:
            readable = np.zeros_like(self._alive)
            readable[whole.rows] = True
            for row, answer in others:
                self._write_row(frame, readable, row, *answer)
            if len(rows) < self.n_envs:
                idle = np.setdiff1d(np.arange(self.n_envs), rows)
                for key, array in frame.items():
                    if key not in ("reward", "discount"):
                        array[idle] = self._frame[key][idle]
            self._complete(frame, readable, rows)
        limit = self.task_spec.max_episode_steps
        if limit is None or self._steps.max() < limit:
            return frame, len(whole.rows) < self.n_envs and bool(frame["done"].any())
        if (late := (self._steps >= limit) & ~frame["done"][:, 0]).any():
            raise ValueError(
                f"environment {int(late.argmax())} of {self.task_spec.name} goes on after max_episode_steps={limit}: "
                "the environment must truncate there itself, or the limit is another"
            )
        return frame, True

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """As in `AgentsEnv`, with the second TensorDict made of the tensors of the first."""
        frame, ended = self._advance(tensordict, self._rows(tensordict, "_step"))
        tensors = self._tensors(frame)
        tensordict.set("next", self._entries(tensors, reward=True))
        if ended:
            return tensordict, self._reset(assemble({"_reset": tensors["done"]}, self.batch_size))
        return tensordict, self._entries(tensors, reward=False)

    # ---- one row -----------------------------------------------------------------------------------------------------

    def _play(self, rows: Sequence[int], actions: Any) -> Played:
        """Step environments ``rows`` with ``actions``, lists ``[N][A]`` or an array ``[N, A, P]``; sorted answers."""
        agents, team, one_size, plain = self._agents, self._team, self._one_size, not self._dict_observations
        all_listed, acting = self._listed, self._acting
        sent: list[dict[str, Any]] = []
        usual: list[bool] = []
        self._steps[slice(None) if len(rows) == self.n_envs else rows] += 1
        for row in rows:
            listed, chosen = all_listed[row], actions[row]
            if not listed:
                raise RuntimeError(f"environment {row} is done: reset it before stepping it again")
            if one_size and listed == team:
                sent.append(dict(zip(listed, chosen, strict=True)))
            elif self.task_spec.continuous:
                sent.append({name: chosen[(agent := agents[name]).index, : agent.action_size] for name in listed})
            else:
                sent.append({name: chosen[agents[name].index] for name in listed})
            usual.append(plain and acting[row] == team)
        return self._stepping.step(rows, sent, usual)

    def _write_row(
        self,
        frame: Frame,
        readable: np.ndarray,
        row: int,
        observations: Mapping[str, Any],
        rewards: Mapping[str, Any],
        terminations: Mapping[str, Any],
        truncations: Mapping[str, Any],
        infos: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write row ``row`` of every entry from an environment's answer to a step."""
        env, listed = self.envs[row], self._listed[row]
        self._read_rewards(frame["reward"][row], row, rewards)
        present, cut = env.agents, ()
        if present != listed or any(terminations.values()) or any(truncations.values()):
            present, cut = self._departures(frame, row, terminations, truncations)
        self._listed[row] = list(present)
        acted, seen = self._acting[row], (*present, *cut) if present else listed
        self._read_row(frame, readable, row, observations, infos, seen, cut)
        if not self.task_spec.common_reward:
            for name in acted:  # dead, though the environment keeps it in its list: its return ends here too
                if name in present and name not in self._acting[row]:
                    frame["discount"][row, self._agents[name].index] = 0.0
        if not present:
            frame["done"][row] = True
            frame["truncated" if self._cut[row] else "terminated"][row] = True
            if not self._cut[row]:
                frame["discount"][row] = 0.0
            self._read_end(frame, row, infos, listed)

    def _write_whole(self, frame: Frame, whole: WholeTeams) -> None:
        """Write the rows in which every agent acted and goes on acting."""
        rows: Any = slice(None) if len(whole.rows) == self.n_envs else whole.rows
        count, spec = len(whole.rows), self.task_spec
        sizes = list(spec.observation_sizes)
        if list(map(np.shape, whole.observations)) != self._shapes * count:
            for row, start in zip(whole.rows, range(0, len(whole.observations), len(sizes)), strict=True):
                for name, value in zip(self._team, whole.observations[start:], strict=False):
                    self._check_size(row, self._agents[name], value)
        if spec.picture:
            self._write_pictures(frame, rows, whole.observations)
        elif self._one_width:
            together = np.concatenate(whole.observations, dtype=np.float32, casting="same_kind")
            together = together.reshape(count, spec.n_agents, spec.observation_size)
            if count == self.n_envs:
                frame["observation"] = together
            else:
                frame["observation"][rows] = together
        else:
            for index, size in enumerate(sizes):
                frame["observation"][rows, index, :size] = np.stack(whole.observations[index :: len(sizes)])
        rewards = np.array(whole.rewards, dtype=np.float64).reshape(count, -1)
        if spec.common_reward:
            spread = rewards.max(-1) - rewards.min(-1)
            for i in np.flatnonzero(spread > COMMON * np.maximum(1.0, np.abs(rewards[:, 0]))):
                self._report_not_common(whole.rows[i], rewards[i].tolist())
            rewards = rewards[:, :1]
        frame["reward"][rows] = rewards[..., None]
        if count < self.n_envs:
            frame["alive"][rows] = True

    def _write_pictures(self, frame: Frame, rows: Any, observations: Sequence[np.ndarray]) -> None:
        """Write the pictures of whole teams."""
        planes = self._agents[self._team[0]].planes
        together = np.empty((len(observations), *(self.task_spec.picture or ())), dtype=np.uint8)
        for place, picture in zip(together, observations, strict=True):
            place[...] = planes(picture)
        together = together.reshape(-1, self.task_spec.n_agents, self.task_spec.observation_size)
        if len(together) == self.n_envs:
            frame["observation"] = together
        else:
            frame["observation"][rows] = together

    def _read_rewards(self, reward: np.ndarray, row: int, given: Mapping[str, Any]) -> None:
        """Write ``reward`` ``[A, 1]``: of those who acted; or everybody's, for what they did before, if common."""
        acted, agents = self._acting[row], self._agents
        if not self.task_spec.common_reward:
            for name in acted:
                reward[agents[name].index, 0] = given[name]
            return
        values = [float(given[name]) for name in acted or self._listed[row]]
        if max(values) - min(values) > COMMON * max(1.0, abs(values[0])):
            self._report_not_common(row, values)
        reward[:] = values[0]

    def _departures(
        self, frame: Frame, row: int, terminations: Mapping[str, Any], truncations: Mapping[str, Any]
    ) -> tuple[list[str], list[str]]:
        """Who is left, and who was cut, after a step in which an agent came or went.

        Writes the discount 0 of agents with rewards of their own that terminated.
        """
        env, listed = self.envs[row], self._listed[row]
        present = [n for n in env.agents if not (terminations.get(n, False) or truncations.get(n, False))]
        cut: list[str] = []
        for name in listed:
            if terminations.get(name, False):
                if not self.task_spec.common_reward:
                    frame["discount"][row, self._agents[name].index] = 0.0
            elif truncations.get(name, False):
                cut.append(name)
            elif name not in present:
                raise ValueError(
                    f"{self._where(row)}: agent {name!r} left env.agents neither terminated nor truncated; "
                    "one of its flags must be set in the step in which it leaves"
                )
        self._cut[row] |= bool(cut)
        return present, cut

    def _read_row(
        self,
        frame: Frame,
        readable: np.ndarray,
        row: int,
        observations: Mapping[str, Any],
        infos: Mapping[str, Mapping[str, Any]],
        seen: Sequence[str],
        cut: Sequence[str] = (),
    ) -> None:
        """Write observation, mask and life of the agents ``seen``: those that act next and those at their end.

        ``cut`` are the ones at their end whom a truncation ended; ``readable`` ``[N, A]`` is set where a mask holds.
        """
        observed, alive = frame["observation"][row], frame["alive"][row]
        masks = None if self.task_spec.continuous else frame["action_mask"][row]
        present, agents, acting = self._listed[row], self._agents, []
        for name in seen:
            agent = agents.get(name)
            if agent is None:
                raise ValueError(
                    f"{self._where(row)}: agent {name!r} is in env.agents, but not in possible_agents {self._team}"
                )
            info = infos.get(name)
            acts = name in present
            if info and not info.get("alive", True):
                continue
            if name not in observations:
                if acts:
                    raise ValueError(f"{self._where(row)}: the observation of living agent {name!r} is missing")
                continue
            value = observations[name]
            mask = info.get("action_mask") if info else None
            if agent.dict_observation:
                value, mask = value["observation"], value["action_mask"]
            self._check_size(row, agent, value)
            if agent.picture:
                value = agent.planes(value).reshape(-1)
            index = agent.index
            observed[index, : agent.observation_size] = value
            if acts:
                acting.append(name)
            if acts or name in cut:
                alive[index] = acts or not present
                readable[row, index] = True
                if mask is not None and masks is not None:
                    self._read_mask(masks, readable[row], row, agent, mask, acts)
        self._acting[row] = acting

    def _read_mask(
        self, masks: np.ndarray, readable: np.ndarray, row: int, agent: AgentSpaces, given: Any, acts: bool
    ) -> None:
        """Write the mask that the environment gave for one agent into ``masks`` ``[A, P]``."""
        if len(given) != agent.action_size:
            raise ValueError(
                f"{self._where(row)}: agent {agent.name!r} has an action_mask of {len(given)}, not {agent.action_size}"
            )
        masks[agent.index, : agent.action_size] = given
        if not masks[agent.index].any():
            if acts:
                raise ValueError(
                    f"{self._where(row)}: the action_mask of living agent {agent.name!r} allows no action; "
                    "allow at least one, such as a no-op"
                )
            readable[agent.index] = False  # nothing to choose in a last state: the no-op of the dead

    def _check_size(self, row: int, agent: AgentSpaces, observation: Any) -> None:
        shape = np.shape(observation)
        if shape != agent.shape:
            seen = f"{shape[0]} numbers" if len(shape) == 1 else f"an array of shape {shape}"
            right = agent.observation_size if len(agent.shape) == 1 else agent.shape
            raise ValueError(f"{self._where(row)}: agent {agent.name!r} observes {seen}, not {right}")

    def _check_spaces(self, row: int) -> None:
        """An environment's spaces are those it was built with: what it gives would be misread by others."""
        for name, known in self._spaces[row].items():
            for kind, before, now in zip(_SPACES, known, spaces_of(self.envs[row], name), strict=True):
                if now is not before and now != before:
                    raise ValueError(
                        f"{self._where(row)}: {kind} of agent {name!r} changed from {before} to {now}; "
                        "an environment must keep the spaces it began with"
                    )

    def _report_not_common(self, row: int, rewards: list[float]) -> None:
        raise ValueError(
            f"{self._where(row)}: common_reward=True, but the agents' rewards differ: {rewards}; "
            "set common_reward=False, or make the environment give all agents one reward"
        )

    def _read_end(self, frame: Frame, row: int, infos: Mapping[str, Mapping[str, Any]], acted: Sequence[str]) -> None:
        """Write what the infos tell at the end of an episode; of one that is dropped, only that."""
        if self._dropped_key is not None and any((infos.get(name) or {}).get(self._dropped_key) for name in acted):
            if not self._cut[row]:
                raise ValueError(f"{self._where(row)}: an episode that is dropped must be truncated")
            frame["dropped"][row] = True
            return
        if self._success_key is not None:
            frame["success"][row] = bool(self._told(row, infos, acted, "success", self._success_key))
        for i, key in enumerate(self.task_spec.measures):
            frame["measures"][row, i] = self._told(row, infos, acted, "measures", key)

    def _told(self, row: int, infos: Mapping[str, Mapping[str, Any]], acted: Sequence[str], kind: str, key: str) -> Any:
        for name in acted:
            if key in (info := infos.get(name) or {}):
                return info[key]
        raise ValueError(
            f"{self._where(row)}: {kind}={key!r} is in no agent's info at the end of the episode; "
            f"infos are {dict(infos)}"
        )

    # ---- all rows ----------------------------------------------------------------------------------------------------

    def _rows(self, tensordict: TensorDictBase | None, key: str) -> Sequence[int]:
        """The rows that a mask ``[N, 1]`` names; all of them where there is none."""
        mask = None if tensordict is None else tensordict.get(key, None)
        if mask is None:
            return range(self.n_envs)
        return mask.reshape(self.n_envs).nonzero()[:, 0].tolist()

    def _actions(self, tensordict: TensorDictBase) -> np.ndarray:
        """The actions to send, ``[N, A]`` or ``[N, A, P]``: a copy, which an environment may keep or change."""
        spec = self.task_spec
        given = tensordict.get(spec.keys.action).numpy(force=True)
        expected = (*self._alive.shape, spec.action_size) if spec.continuous else self._alive.shape
        if given.shape != expected:
            raise ValueError(f"{spec.keys.action} has shape {given.shape}; {spec.name} takes {expected}")
        if spec.continuous:
            return given.copy() if self._all_alive else np.where(self._alive[..., None], given, self._noop)
        if self._all_alive and self._plain_actions and given.view(np.uint64).max() < spec.action_size:
            return given.copy()  # none is negative, which would read as a huge one
        if (wrong := ((given < 0) | (given >= self._sizes)) & self._alive).any():
            row, index = np.argwhere(wrong)[0]
            raise ValueError(
                f"{self._where(row)}: action {given[row, index]} of agent {spec.agents[index]!r} is not one of its "
                f"{spec.action_sizes[index]}; a policy must respect action_mask, which is False for padded actions"
            )
        return np.where(self._alive, given + self._noop, self._noop)

    def _complete(self, frame: Frame, readable: np.ndarray | None, rows: Sequence[int]) -> None:
        """Fill what all rows have in common, check that everything is finite, and keep the frame.

        ``readable`` ``[N, A]`` says which masks hold; None: everybody is alive, and masks stay as they were.
        """
        spec = self.task_spec
        if readable is not None and not spec.continuous and not readable.all():
            stepped = np.zeros(self.n_envs, dtype=bool)
            stepped[list(rows)] = True
            mute = ~readable & stepped[:, None]
            frame["action_mask"][mute] = np.arange(spec.action_size) == 0
        if spec.own_state:
            for row in rows:
                frame["state"][row] = self.envs[row].state()
        elif spec.picture:
            frame["state"] = frame["observation"].reshape(self.n_envs, -1)  # the same bytes: pictures are large
        else:
            frame["state"] = frame["observation"].reshape(self.n_envs, -1).copy()
        checked = ("observation", "reward", "state") if spec.own_state else ("observation", "reward")
        checked = ("reward",) if spec.picture else checked
        # The fastest sum that no infinite number leaves finite; that of finite ones can overflow.
        if not math.isfinite(sum(np.vdot(frame[key], frame[key]) for key in checked)):
            for key in checked:
                if not np.isfinite(frame[key]).all():
                    self._report_not_finite(key, frame[key])
        object.__setattr__(self, "_frame", frame)  # a module's own way of setting attributes is slow
        if readable is not None or not self._all_alive:
            self._alive = frame["alive"].copy()
            self._all_alive = bool(self._alive.all())

    def _report_not_finite(self, key: str, array: np.ndarray) -> None:
        position = np.argwhere(~np.isfinite(array))[0]
        who = "" if key == "state" else f" of agent {self.task_spec.agents[position[1]]!r}"
        raise ValueError(f"{self._where(position[0])}: {key}{who} is {array[tuple(position)]}, not a finite number")

    def _tensordict(self, frame: Frame, *, reward: bool) -> TensorDict:
        return self._entries(self._tensors(frame), reward=reward)

    def _tensors(self, frame: Frame) -> dict[str, Tensor]:
        usual, tensors = self._usual, self._usual_tensors
        return {key: tensors[key] if x is usual[key] else torch.from_numpy(x) for key, x in frame.items()}

    def _entries(self, tensors: dict[str, Tensor], *, reward: bool) -> TensorDict:
        agents = {key: tensor for key, tensor in tensors.items() if key not in _ROOT and (reward or key != "reward")}
        root: dict[str, Any] = {key: tensors[key] for key in _ROOT if key in tensors}
        root[self.task_spec.group] = assemble(agents, self._agents_size)
        return assemble(root, self.batch_size)

    def _where(self, row: int) -> str:
        return f"environment {row} of {self.task_spec.name}, step {int(self._steps[row])}"


def _stepping(envs: list[ParallelEnv[str, Any, Any]], team: list[str], kind: str, workers: int | None) -> Stepping:
    first = envs[0]
    if isinstance(first, ProcessEnv):
        return first.processes
    if kind == "processes" and len(envs) > 1:
        raise ValueError(
            "env.stepping='processes' needs environments that were made in worker processes: use vector_env, or "
            "set env.stepping to serial or threads"
        )
    if kind == "threads" and (count := worker_count(len(envs), workers)) > 1:
        return Threads(envs, team, count)
    return Serial(envs, team)


def _template(spec: TaskSpec, n: int) -> Frame:
    """The entries before anything is written: everybody dead, nothing ended."""
    agents = spec.n_agents
    seen = np.uint8 if spec.picture else np.float32
    frame: Frame = {
        "observation": np.zeros((n, agents, spec.observation_size), dtype=seen),
        "alive": np.zeros((n, agents), dtype=bool),
        "reward": np.zeros((n, agents, 1), dtype=np.float32),
        "discount": np.ones((n, agents, 1), dtype=np.float32),
        "state": np.zeros((n, spec.state_size), dtype=seen),
        **{key: np.zeros((n, 1), dtype=bool) for key in ("done", "terminated", "truncated")},
    }
    if not spec.continuous:
        frame["action_mask"] = np.tile(np.array(spec.action_valid), (n, 1, 1))
    if spec.has_success:
        frame["success"] = np.zeros((n, 1), dtype=bool)
    if spec.measures:
        frame["measures"] = np.zeros((n, len(spec.measures)), dtype=np.float32)
    if spec.has_dropped:
        frame["dropped"] = np.zeros((n, 1), dtype=bool)
    return frame


def _noop(agents: Sequence[AgentSpaces], spec: TaskSpec) -> np.ndarray:
    if not spec.continuous:
        return np.array([agent.first_action for agent in agents])
    low, high = np.array(spec.action_low, dtype=np.float32), np.array(spec.action_high, dtype=np.float32)
    return np.clip(np.zeros_like(low), low, high)


def _hint() -> str:
    """MuJoCo's own errors do not say what it needs to draw."""
    if "mujoco" not in sys.modules:
        return ""
    return (
        "; MuJoCo draws through OpenGL: without a screen set MUJOCO_GL=egl (graphics card with its driver) or "
        "MUJOCO_GL=osmesa (software; on Debian: sudo apt install libosmesa6)"
    )


# ---- making one from a name ------------------------------------------------------------------------------------------


def vector_env(
    factory: str | Callable[..., Any],
    *,
    n_envs: int,
    seed: int,
    name: str | None = None,
    common_reward: bool = False,
    success: str | None = None,
    max_episode_steps: int | None = None,
    clip_rewards: float | None = None,
    group: str = "agents",
    kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Any] = (),
    stepping: str = "serial",
    workers: int | None = None,
) -> VectorEnv:
    """``n_envs`` environments made by ``factory(**kwargs)`` and seeded from ``seed``, as one `VectorEnv`.

    Args:
        factory: a function that returns a new ParallelEnv, or where to import it from: ``"package.module:function"``.
        n_envs: N, how many environments are stepped together.
        seed: the run's seed; every environment gets one of its own, derived from it.
        name, common_reward, success, max_episode_steps, clip_rewards, group, stepping, workers: see `VectorEnv`.
        kwargs: what the factory is called with.
        wrappers: SuperSuit's wrappers to put around each, the first inmost; see `marl_memory_envs.wrapping.Wrapped`.

    Raises:
        ValueError: for a factory that is not ``module:function``, names nothing, makes no ParallelEnv, or can not be
            sent to the worker processes; and as `VectorEnv`.
        ImportError: if a module is missing; the message names the extra to install, where one has it.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs={n_envs} must be at least 1")
    check_stepping(stepping, workers)
    make = _import_factory(factory) if isinstance(factory, str) else factory
    label = factory if isinstance(factory, str) else str(getattr(factory, "__qualname__", repr(factory)))
    try:
        inspect.signature(make).bind(**(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"kwargs={dict(kwargs or {})} do not fit factory={label}: {error}") from error
    if wrappers:
        from marl_memory_envs.wrapping import Wrapped  # SuperSuit takes its time to import

        make = Wrapped(make, wrappers)
    processes: Processes | None = None
    if stepping == "processes" and n_envs > 1:
        processes = Processes(make, kwargs or {}, n_envs, workers=worker_count(n_envs, workers), label=label)
    envs = processes.environments() if processes else [make_env(make, kwargs or {}, label) for _ in range(n_envs)]
    try:
        vector = VectorEnv(
            envs,
            name=name or label,
            common_reward=common_reward,
            success=success,
            max_episode_steps=max_episode_steps,
            clip_rewards=clip_rewards,
            group=group,
            stepping=stepping,
            workers=workers,
        )
    except BaseException:
        if processes:
            processes.close()
        raise
    vector.set_seed(seed)
    return vector


def _import_factory(path: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f"factory={path!r} must be 'package.module:function', with a colon")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise missing(error, path, module_name) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"factory={path!r}: module {module_name} has no {attribute!r}") from error
