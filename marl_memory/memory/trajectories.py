"""Whole episodes, as they end: the latest steps of N environments, and what is known of an episode at its end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marl_memory.keys import Entry
from marl_memory.memory.operator import check_positive
from marl_memory.memory.scope import state_there
from marl_memory.spec import TaskSpec


class Finished(NamedTuple):
    """E episodes that ended, in the order in which they did.

    Args:
        env: ``[E]`` int64, in which environment.
        last: ``[E]`` int64, the number of its last vector step.
        length: ``[E]`` int64, steps.
        kept: ``[E]`` int64, how many of these are still known: the last ones.
        returns: ``[E]`` float64, undiscounted sum of the environment's rewards, the team's; equal where rewards were.
        terminated: ``[E]`` bool; else the episode was truncated.
        success: ``[E]`` bool, or None where the task does not tell.
        left: ``[E, S]``, the state in which it was left.
    """

    env: Tensor
    last: Tensor
    length: Tensor
    kept: Tensor
    returns: Tensor
    terminated: Tensor
    success: Tensor | None
    left: Tensor

    def __getitem__(self, which: Any) -> Finished:  # type: ignore[override]
        """Those of them that ``which`` names."""
        return Finished(*(None if x is None else x[which] for x in self))  # pyright: ignore[reportArgumentType]


class Trajectories(nn.Module):
    """The latest steps of N environments, so that an episode is known as a whole when it ends.

    Where batches are cut does not matter.  Of an episode longer than ``horizon`` the last steps are known.  Of what a
    reset of the environments cuts, and of what broke off (``dropped``), nobody hears.

    Args:
        spec: the task.
        n_envs: N.
        batch_steps: the most vector steps that a batch has.
        horizon: steps of an episode that are known when it ends.
        state: whether the team's state is kept too.
    """

    def __init__(self, spec: TaskSpec, *, n_envs: int, batch_steps: int, horizon: int, state: bool) -> None:
        super().__init__()
        check_positive(n_envs=n_envs, batch_steps=batch_steps, horizon=horizon)
        self.spec, self.n_envs, self.batch_steps, self.horizon = spec, n_envs, batch_steps, horizon
        self.size = horizon + batch_steps
        k, a, p = spec.keys, spec.n_agents, spec.action_size
        seen = None if spec.picture is None else torch.uint8
        self.entries: dict[str, Entry] = {
            "observation": Entry((a, spec.observation_size), seen),
            "action": Entry((a, p)) if spec.continuous else Entry((a,), torch.int64),
            "alive": Entry((a,), torch.bool),
        }
        if not spec.continuous:
            self.entries["action_mask"] = Entry((a, p), torch.bool)
        if state:
            self.entries["state"] = Entry((spec.state_size,), seen)
        """What is known of a step, by name: also what `steps` gives."""
        for name, entry in self.entries.items():
            self.register_buffer(name, entry.zeros((self.size, n_envs), torch.float32))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("begin", torch.zeros(n_envs, dtype=torch.int64))
        self.register_buffer("running", torch.zeros(n_envs, dtype=torch.float64))
        self.shares = 1 if spec.common_reward else spec.n_agents
        """What sums of `running` are divided by, once: divided at every step equal episodes would not be equal."""
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)
        self.register_buffer("action_valid", torch.tensor(spec.action_valid), persistent=False)
        after: list[Any] = [k.done, k.terminated, k.state, *((k.success,) if spec.has_success else ())]
        after += [k.dropped] if spec.has_dropped else []
        self.write_keys: list[Any] = [k.observation, k.action, k.alive, *(("next", key) for key in after)]
        self.write_keys += [("next", *k.reward), *([] if spec.continuous else [k.action_mask])]
        self.write_keys += [k.state] if state else []

    taken: Tensor
    """``[]``: vector steps since the run began."""
    begin: Tensor
    """``[N]``: the number of the first vector step of the episode that runs."""
    running: Tensor
    """``[N]``: its return so far, times `shares`."""
    valid: Tensor
    action_valid: Tensor

    def clear(self) -> None:
        """Forget all steps; vector steps are counted on."""
        self.drop_running()

    def drop_running(self) -> None:
        """The environments were reset."""
        self.begin.copy_(self.taken.expand_as(self.begin))
        self.running.zero_()

    @torch.no_grad()
    def write(self, td: TensorDictBase) -> Finished | None:
        """Take in a batch ``[T, N]``, or any that is one when its rows are laid out so; the episodes that ended in it.

        Raises:
            ValueError: for rows that are no multiple of N, or more than there is room for.
        """
        n, rows = self.n_envs, td.numel()
        if rows % n or rows > n * self.batch_steps:
            raise ValueError(
                f"a batch of {rows} rows must be steps of n_envs={n} environments, "
                f"at most batch_steps={self.batch_steps} of each"
            )
        steps = self.taken + torch.arange(rows // n, device=self.taken.device)
        for name, entry in self.entries.items():
            getattr(self, name)[steps % self.size] = self._cleaned(name, td).reshape(-1, n, *entry.shape)
        ended = self._ended(td.reshape(-1, n), int(self.taken))
        self.taken += len(steps)
        return ended

    def latest(self, count: int) -> tuple[Tensor, Tensor]:
        """Observations ``[T', N, A, F]`` and who lived ``[T', N, A]`` in the last ``count`` vector steps, or all known.

        Args:
            count: at least 1.
        """
        slots = self._latest(count)
        return self.observation[slots], self.alive[slots]

    def latest_states(self, count: int) -> Tensor:
        """The team's states ``[T', N, S]`` in the same steps."""
        return self.get_buffer("state")[self._latest(count)]

    def _latest(self, count: int) -> Tensor:
        end = int(self.taken)
        return torch.arange(end - min(count, self.size, end), end, device=self.taken.device) % self.size

    def steps(self, episodes: Finished, count: Tensor) -> tuple[TensorDict, Tensor, Tensor]:
        """The last ``count`` ``[E]`` steps of each of ``episodes``, which `write` just gave.

        Returns:
            the steps ``[M]``, in order; of which episode each is, in 0 … E − 1; and how many steps of it follow.
        """
        which = torch.arange(len(count), device=count.device).repeat_interleave(count)
        first = count.cumsum(0) - count
        place = torch.arange(len(which), device=count.device) - first[which]
        follow = count[which] - 1 - place
        at = ((episodes.last[which] - follow) % self.size, episodes.env[which])
        return (
            TensorDict({name: getattr(self, name)[at] for name in self.entries}, batch_size=(len(which),)),
            which,
            follow,
        )

    observation: Tensor
    alive: Tensor

    def _cleaned(self, name: str, td: TensorDictBase) -> Tensor:
        """An entry of ``td``, 0 in padding and where the dead leave whatever they leave."""
        k = self.spec.keys
        x, alive = td.get(k.state if name == "state" else (k.group, name)), td.get(k.alive)
        if name == "observation":
            return torch.where(alive.unsqueeze(-1) & self.valid, x, 0)
        if name == "state":
            return self._state(x, alive)
        if name == "action":
            return torch.where(alive.unsqueeze(-1) & self.action_valid if self.spec.continuous else alive, x, 0)
        return x

    def _state(self, state: Tensor, alive: Tensor) -> Tensor:
        """``state`` ``[*B, S]`` without the dead and padding, which one that is all observations has in it."""
        return torch.where(state_there(alive, self.valid, own=self.spec.own_state), state, 0)

    def _ended(self, td: TensorDictBase, taken: int) -> Finished | None:
        """The episodes that end in ``td`` ``[T, N]``, whose first vector step is number ``taken``."""
        k, n = self.spec.keys, self.n_envs
        done: Tensor = td.get(("next", k.done)).squeeze(-1)
        number = done.cumsum(0) - done.long()  # [T, N]: the how-manieth episode of its environment a step is of
        after = number[-1] + done[-1]
        # Each episode has a sum of its own: one that is not finite ends with it, and equal ones are equal to the bit.
        total = self.running.new_zeros(int(after.max()) + 1, n)
        total[0] = self.running
        total.scatter_add_(0, number, self._team_reward(td))
        self.running.copy_(total.gather(0, after.unsqueeze(0)).squeeze(0))
        if not bool(done.any()):
            return None
        env, t = done.T.nonzero(as_tuple=True)  # sorted by environment, then by time
        first = torch.ones_like(env, dtype=torch.bool)
        first[1:] = env[1:] != env[:-1]
        last = taken + t
        begin = torch.where(first, self.begin[env], last.roll(1) + 1)
        # Of each environment the last that ended: what runs now began behind it.
        ending = first.roll(-1)
        ending[-1] = True
        self.begin[env[ending]] = last[ending] + 1
        order = (t * n + env).argsort()
        if self.spec.has_dropped:
            order = order[~td.get(("next", k.dropped))[t, env].squeeze(-1)[order]]
            if len(order) == 0:
                return None
        env, t, length = env[order], t[order], (last + 1 - begin)[order]
        won: Tensor | None = td.get(("next", k.success))[t, env].squeeze(-1) if self.spec.has_success else None
        return Finished(
            env=env,
            last=taken + t,
            length=length,
            kept=length.clamp(max=self.horizon),
            returns=total[number[t, env], env] / self.shares,
            terminated=td.get(("next", k.terminated))[t, env].squeeze(-1),
            success=won,
            left=self._state(td.get(("next", k.state))[t, env], td.get(k.alive)[t, env]),
        )

    def _team_reward(self, td: TensorDictBase) -> Tensor:
        """``[T, N]`` float64: the sum over agents that live; of a common reward, which each of them has, their mean."""
        k = self.spec.keys
        reward, alive = td.get(("next", *k.reward)).squeeze(-1).double(), td.get(k.alive)
        total = torch.where(alive, reward, 0.0).sum(-1)
        return total / alive.sum(-1).clamp(min=1) if self.spec.common_reward else total
