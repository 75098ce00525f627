"""Stepping the environments and filling the batch, and the statistics of the episodes that end on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.keys import Entries
from marl_memory.spec import TaskSpec
from marl_memory.training.clock import Clock

TOGETHER = 16
"""Steps that are stored in one go: more cost memory and leave the cache, fewer cost calls."""


class TaskEnv(Protocol):
    """What training asks of a vector of N environments (a TorchRL `EnvBase` with our keys has it all)."""

    task_spec: TaskSpec
    n_envs: int
    resumable: bool

    def set_seed(self, seed: int) -> Any:
        """Seed every environment at the next full reset."""
        ...

    def reset(self) -> TensorDictBase:
        """Reset all; observations ``[N]``."""
        ...

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Step all, reset the ended; the step with ``"next"``, and the observations to act on.

        What a tensor holds does not change later: it is stored some steps after.
        """
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """The simulators' state, where ``resumable``."""
        ...

    def restore(self, snapshot: dict[str, Tensor]) -> TensorDictBase:
        """Continue from a snapshot; the observations to act on."""
        ...

    def close(self) -> Any:
        """Free what the simulators hold."""
        ...


@dataclass
class Episodes:
    """What is known of E ended episodes.

    Args:
        returns: ``[E]`` float64, undiscounted sum of rewards, averaged over agents.
        lengths: ``[E]`` int64, environment steps.
        success: ``[E]`` bool, or None where the task does not tell.
        measures: by name, ``[E]``: what the task tells beside (see `TaskSpec`).
        dropped: how many more episodes broke off and are not among these; None where the task does not tell.
        overestimation: ``[E]`` float64, what critics expected at the start minus the discounted return, averaged over
            agents; None where no critic was asked.
    """

    returns: Tensor
    lengths: Tensor
    success: Tensor | None
    measures: dict[str, Tensor] = field(default_factory=dict)
    dropped: int | None = None
    overestimation: Tensor | None = None

    def without(self, dropped: Tensor) -> Episodes:
        """Those that are not ``dropped`` ``[E]``, and how many were."""
        kept = ~dropped
        return Episodes(
            self.returns[kept],
            self.lengths[kept],
            None if self.success is None else self.success[kept],
            {name: x[kept] for name, x in self.measures.items()},
            int(dropped.sum()),
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means, under names that start with ``prefix``; nothing where no episode ended."""
        row: dict[str, float] = {f"{prefix}/episodes": len(self.returns)}
        if self.dropped is not None:
            row[f"{prefix}/dropped"] = self.dropped
        if len(self.returns) == 0:
            return row
        row |= {
            f"{prefix}/return": self.returns.mean().item(),
            f"{prefix}/length": self.lengths.double().mean().item(),
        }
        if self.success is not None:
            row[f"{prefix}/success"] = self.success.double().mean().item()
        if self.overestimation is not None:
            row[f"{prefix}/overestimation"] = self.overestimation.mean().item()
        return row | {f"{prefix}/{name}": x.double().mean().item() for name, x in self.measures.items()}


def named_measures(spec: TaskSpec, td: TensorDictBase) -> dict[str, Tensor]:
    """By name, ``[*B]``: what the episodes that end in a step ``[*B]`` tell beside."""
    if not spec.measures:
        return {}
    return dict(zip(spec.measures, td.get(("next", spec.keys.measures)).unbind(-1), strict=True))


def concatenate(parts: list[Episodes]) -> Episodes:
    """All episodes of ``parts`` (one at least), in their order."""
    success = [part.success for part in parts if part.success is not None]
    return Episodes(
        torch.cat([part.returns for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat(success) if success else None,
        {name: torch.cat([part.measures[name] for part in parts]) for name in parts[0].measures},
        sum(part.dropped or 0 for part in parts) if parts[0].dropped is not None else None,
    )


class EpisodeTracker:
    """Turns batches of rewards and ends, ``[T, N]``, into ended episodes; running episodes are carried over.

    Args:
        n_envs: N.
    """

    def __init__(self, n_envs: int) -> None:
        self.running_return = torch.zeros(n_envs, dtype=torch.float64)
        self.running_length = torch.zeros(n_envs, dtype=torch.int64)

    def take(
        self,
        reward: Tensor,
        done: Tensor,
        success: Tensor | None,
        measures: Mapping[str, Tensor] | None = None,
        dropped: Tensor | None = None,
    ) -> Episodes:
        """The episodes that end in this batch, but for those that are dropped.

        Args:
            reward: ``[T, N, A, 1]``.
            done: ``[T, N, 1]`` bool.
            success: ``[T, N, 1]`` bool or None.
            measures: by name, ``[T, N]``.
            dropped: ``[T, N, 1]`` bool or None.
        """
        total = reward.squeeze(-1).double().mean(-1).cumsum(0) + self.running_return
        steps = torch.arange(1, len(done) + 1).unsqueeze(-1) + self.running_length
        env, t = done.squeeze(-1).T.nonzero(as_tuple=True)  # sorted by environment, then by time
        first = torch.ones_like(env, dtype=torch.bool)
        first[1:] = env[1:] != env[:-1]
        returns, lengths = _differences(total[t, env], first), _differences(steps[t, env], first)
        last = torch.ones_like(first)
        last[:-1] = first[1:]
        self.running_return, self.running_length = total[-1].clone(), steps[-1].clone()
        self.running_return[env[last]] -= total[t, env][last]
        self.running_length[env[last]] -= steps[t, env][last]
        ended = {name: x[t, env] for name, x in (measures or {}).items()}
        episodes = Episodes(returns, lengths, None if success is None else success[t, env].squeeze(-1), ended)
        return episodes if dropped is None else episodes.without(dropped[t, env].squeeze(-1))

    def drop_running(self) -> None:
        """Forget the running episodes: they were cut and enter no statistic."""
        self.running_return.zero_()
        self.running_length.zero_()


def _differences(x: Tensor, first: Tensor) -> Tensor:
    before = torch.zeros_like(x)
    before[1:] = x[:-1]
    return torch.where(first, x, x - before)


class Collector:
    """Fills one preallocated batch ``[T, N]`` with vector steps, time first.

    The batch holds what the environment and the policy wrote (locked: learners only read it) and, under ``learn``, the
    entries a learner declared.  It is the same memory at every call.

    Args:
        env: N environments.
        policy: sets the action of a TensorDict ``[N]``.
        act: what memory does to the policy's choice before the environment sees it (the ACT stage).
        steps: T, vector steps per batch.
        learn_entries: the learner's entries and their shapes behind the batch dimensions.
        seed: of the environments.
        clock: books the time of the environments apart from the policy's and the storing; None for one of its own.
        ended: told after each step whose episode ended, ``[N, 1]`` bool.
    """

    def __init__(
        self,
        env: TaskEnv,
        policy: Callable[[TensorDictBase], TensorDictBase],
        act: Callable[[TensorDictBase], None],
        *,
        steps: int,
        learn_entries: Entries,
        seed: int,
        clock: Clock | None = None,
        ended: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.env, self.policy, self.act, self.steps = env, policy, act, steps
        self.clock, self.ended = clock or Clock(), ended
        self.learn_entries = learn_entries
        self.episodes = EpisodeTracker(env.n_envs)
        self.batch: TensorDictBase | None = None
        env.set_seed(seed)
        self.current = env.reset()

    def collect(self) -> tuple[TensorDictBase, Episodes]:
        """T vector steps of all N environments; the batch, and the episodes that ended."""
        with self.clock.section("policy"):
            return self._collect()

    def _collect(self) -> tuple[TensorDictBase, Episodes]:
        waiting = []
        for t in range(self.steps):
            td = self.policy(self.current)
            self.act(td)
            with self.clock.section("environment"):
                td, self.current = self.env.step_and_maybe_reset(td)
            if self.ended is not None:
                self.ended(td.get(("next", self.env.task_spec.keys.done)))
            if self.batch is None:
                self._allocate(td)
            waiting.append(self._leaves_of(td))
            if len(waiting) == TOGETHER or t == self.steps - 1:
                self._store(waiting, t + 1)
                waiting.clear()
        assert self.batch is not None
        k = self.env.task_spec.keys
        success = self.batch.get(("next", k.success), None)
        done, reward = self.batch.get(("next", k.done)), self.batch.get(("next", *k.reward))
        measures = named_measures(self.env.task_spec, self.batch)
        dropped = self.batch.get(("next", k.dropped), None)
        return self.batch, self.episodes.take(reward, done, success, measures, dropped)

    def _allocate(self, td: TensorDictBase) -> None:
        """Fix the batch's entries after the first step, when all of them are known."""
        shape, k = (self.steps, self.env.n_envs), self.env.task_spec.keys
        batch = TensorDict(batch_size=shape)
        of_the_step_before = {k.done, k.terminated, k.truncated, k.success, k.measures, k.dropped, k.discount, k.reward}
        for key in td.keys(include_nested=True, leaves_only=True):
            if key in of_the_step_before:
                continue
            leaf = td.get(key)
            batch.set(key, torch.zeros(*shape, *leaf.shape[1:], dtype=leaf.dtype))
        leaves = list(batch.keys(include_nested=True, leaves_only=True))
        for key, entry in self.learn_entries.items():
            batch.set(key, entry.zeros(shape, torch.float32))
        self.batch = batch.lock_()
        # By parent: looking up one name costs a fraction of looking up a path.
        by_parent: dict[tuple[str, ...], list[str]] = {}
        for key in leaves:
            *parent, name = (key,) if isinstance(key, str) else key
            by_parent.setdefault(tuple(parent), []).append(name)
        self.leaves = list(by_parent.items())
        self.columns = [batch.get((*parent, name)) for parent, names in self.leaves for name in names]

    def _leaves_of(self, td: TensorDictBase) -> list[Tensor]:
        """The tensors of one step, in the order of ``columns``."""
        found: list[Tensor] = []
        for parent, names in self.leaves:
            node = dict((td.get(parent) if parent else td).items())  # a tenth of looking up name by name
            found += map(node.__getitem__, names)
        return found

    def _store(self, steps: list[list[Tensor]], end: int) -> None:
        """Write the latest ``steps``, the last of which is step ``end`` − 1, into the batch."""
        for column, rows in zip(self.columns, zip(*steps, strict=True), strict=True):
            torch.stack(rows, out=column[end - len(rows) : end])

    def reset(self, seed: int) -> None:
        """Start every environment anew; running episodes are cut."""
        self.episodes.drop_running()
        self.env.set_seed(seed)
        self.current = self.env.reset()

    def state_dict(self) -> dict[str, Any]:
        """The simulators and the running episodes, where simulators can be saved; else nothing can go on."""
        if not self.env.resumable:
            return {}
        return {
            "env": self.env.snapshot(),
            "current": {key: leaf.clone() for key, leaf in self.current.flatten_keys(".").items()},
            "running_return": self.episodes.running_return.clone(),
            "running_length": self.episodes.running_length.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; environments that can not be saved keep the state `reset` gave them."""
        if self.env.resumable:
            # What to act on is restored as it was, not computed again: another program may round differently.
            self.env.restore(state["env"])
            self.current = TensorDict(state["current"], batch_size=(self.env.n_envs,)).unflatten_keys(".")
            self.episodes.running_return.copy_(state["running_return"])
            self.episodes.running_length.copy_(state["running_length"])
