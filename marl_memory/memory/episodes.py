"""Steps of running episodes, kept until their returns are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marl_memory.functional.returns import discounted_returns, leaves_alone, team_value
from marl_memory.keys import Entry
from marl_memory.memory.operator import Bootstrap, check_positive
from marl_memory.memory.scope import state_there
from marl_memory.spec import TaskSpec

HORIZON = 1000
"""Steps of an episode that are remembered where the task declares no limit."""


class Ended(NamedTuple):
    """M steps of episodes that are over.

    Args:
        rows: ``[M]``: observation, state, who lives, action (and action mask), and the number of the row.
        returns: ``[M, A]``.
    """

    rows: TensorDict
    returns: Tensor


class RunningEpisodes(nn.Module):
    r"""The latest steps of N environments, which `take` hands out with their discounted returns once episodes end.

    $$
    R_t = r_t + \gamma\, d_t \begin{cases} V(s_{t+1}) & \text{the episode was truncated at } t \\
    R_{t+1} & \text{it went on} \end{cases}
    $$

    with d = 0 where the agent's return ends.  Without a common reward an agent's own truncation, before its episode's,
    counts for it as one.  Batches come in the order of collection; where they are cut does not
    matter.  Of an episode longer than ``horizon`` the first steps are dropped, and counted; so are the steps of an
    episode that a reset of the environments cut (`drop_running`).  A ring of a shape fixed here.

    Args:
        spec: the task.
        n_envs: N.
        batch_steps: the most vector steps that a batch has.
        horizon: steps of an episode that are remembered; None: the task's time limit, else `HORIZON`.
        gamma: γ.
        learnt: whether rewards are ``learn_reward``; else those of the environment.
    """

    def __init__(
        self, spec: TaskSpec, *, n_envs: int, batch_steps: int, horizon: int | None, gamma: float, learnt: bool
    ) -> None:
        super().__init__()
        check_positive(n_envs=n_envs, batch_steps=batch_steps, horizon=horizon)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma!r} must lie in [0, 1]")
        self.spec, self.n_envs, self.batch_steps, self.gamma = spec, n_envs, batch_steps, gamma
        self.steps = (horizon or spec.max_episode_steps or HORIZON) + batch_steps
        k, a, p = spec.keys, spec.n_agents, spec.action_size
        inputs: dict[Any, Entry] = {
            k.observation: Entry((a, spec.observation_size), torch.uint8 if spec.picture else None),
            k.state: Entry((spec.state_size,), torch.uint8 if spec.picture else None),
            k.alive: Entry((a,), torch.bool),
        }
        if not spec.continuous:
            inputs[k.action_mask] = Entry((a, p), torch.bool)
        self.inputs = list(inputs)
        self.reward_key: Any = k.learn_reward if learnt else ("next", *k.reward)
        kept: dict[Any, Entry] = {
            **inputs,
            k.action: Entry((a, p)) if spec.continuous else Entry((a,), torch.int64),
            **{after(key): entry for key, entry in inputs.items()},
            self.reward_key: Entry((a, 1)),
            ("next", *k.discount): Entry((a, 1)),
            ("next", k.done): Entry((1,), torch.bool),
            ("next", k.truncated): Entry((1,), torch.bool),
        }
        self.write_keys: list[Any] = [*kept, k.row]
        self.names = {key: "_".join((key,) if isinstance(key, str) else key) for key in kept}
        for key, entry in kept.items():
            self.register_buffer(self.names[key], entry.zeros((self.steps, n_envs), torch.float32))
        self.register_buffer("row", torch.zeros(self.steps, n_envs, dtype=torch.int64))
        self.register_buffer("open", torch.zeros(self.steps, n_envs, dtype=torch.bool))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64))
        self.valid: Tensor
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)
        self.action_valid: Tensor
        self.register_buffer("action_valid", torch.tensor(spec.action_valid), persistent=False)

    row: Tensor
    """``[L, N]``: which row of the run a step is: what the batch says, else as the replay numbers them."""
    open: Tensor
    """``[L, N]``: the step waits for its return."""
    taken: Tensor
    """``[]``: vector steps since the run began."""
    dropped: Tensor
    """``[]``: steps whose returns will never be known."""

    def clear(self) -> None:
        """Forget all steps; the numbers of rows go on."""
        self._erase(torch.ones_like(self.open))
        self.dropped.zero_()

    def drop_running(self) -> None:
        """The environments were reset: what was not over will have no return."""
        self.dropped += self.open.sum()
        self._erase(self.open.clone())

    # --------------------------------------------------------------------------------------------------------- steps in

    @torch.no_grad()
    def write(self, td: TensorDictBase) -> None:
        """Take in a batch ``[T, N]``, or any that is one when its rows are laid out so.

        Raises:
            ValueError: for rows that are no multiple of N, or more than the ring has room for.
        """
        n, rows = self.n_envs, td.numel()
        if rows % n or rows > n * self.batch_steps:
            raise ValueError(
                f"a batch of {rows} rows must be steps of n_envs={n} environments, "
                f"at most batch_steps={self.batch_steps} of each"
            )
        steps = self.taken + torch.arange(rows // n, device=self.row.device)
        slots = steps % self.steps
        self.dropped += self.open[slots].sum()
        for key, name in self.names.items():
            x = clean(key, td, self.spec, self.valid, self.action_valid)
            getattr(self, name)[slots] = x.reshape(-1, n, *x.shape[td.ndim :])
        numbers: Tensor | None = td.get(self.spec.keys.row, None)
        if numbers is None:
            numbers = steps.unsqueeze(1) * n + torch.arange(n, device=self.row.device)
        self.row[slots] = numbers.reshape(-1, n)
        self.open[slots] = True
        self.taken += rows // n

    # -------------------------------------------------------------------------------------------------------- steps out

    @torch.no_grad()
    def take(self, bootstrap: Bootstrap) -> Ended | None:
        """The steps of the episodes that ended, oldest first, which are then forgotten; None if none did.

        Args:
            bootstrap: values of the states in which truncated episodes were left; of several critics the least counts.
        """
        k, done = self.spec.keys, self._of(("next", self.spec.keys.done)).squeeze(-1)
        ends = self.open & done
        if not bool(ends.any()):
            return None
        order = (self.taken + torch.arange(self.steps, device=done.device)) % self.steps  # the oldest step first
        waiting = self.open[order]
        over = waiting & ends[order].long().flip(0).cummax(0).values.flip(0).bool()
        begin, end = (int(x) for x in over.any(1).nonzero()[[0, -1]])
        order, over = order[begin : end + 1], over[begin : end + 1]
        alive, lives_on = (self._of(key)[order] for key in (k.alive, after(k.alive)))
        left = leaves_alone(alive, lives_on, self._of(("next", *k.discount))[order], self.spec.common_reward)
        cut = done[order].view(-1, self.n_envs, 1, 1) | left.unsqueeze(-1)
        reward, discount = self._of(self.reward_key)[order], self._of(("next", *k.discount))[order]
        tails = self._tails(order, over, left.any(-1), bootstrap)
        returns = discounted_returns(reward, discount, cut, tails, gamma=self.gamma)
        step, env = over.nonzero(as_tuple=True)
        at = (order[step], env)
        rows = self._rows(at, {key: key for key in (*self.inputs, k.action)})
        rows.set(k.row, self.row[at])
        self._erase(torch.zeros_like(self.open).index_put_(at, torch.ones_like(env, dtype=torch.bool)))
        return Ended(rows, returns[step, env].squeeze(-1))

    def _tails(self, order: Tensor, over: Tensor, left: Tensor, bootstrap: Bootstrap) -> Tensor:
        """V ``[L', N, A, 1]`` of the states in which episodes, or agents, were truncated, 0 elsewhere."""
        k = self.spec.keys
        tails = torch.zeros(*over.shape, self.spec.n_agents, 1, device=over.device)
        truncated = self._of(("next", k.truncated)).squeeze(-1)[order]
        step, env = (over & (truncated | left)).nonzero(as_tuple=True)
        if len(step) > 0:
            left = self._rows((order[step], env), {key: after(key) for key in self.inputs})
            value = bootstrap(left).amin(-1, keepdim=True)
            tails[step, env] = team_value(value, left.get(k.alive)) if self.spec.common_reward else value
        return tails

    def _rows(self, at: tuple[Tensor, Tensor], keys: dict[Any, Any]) -> TensorDict:
        """Steps ``[M]``, each entry under the first of two keys and from the second."""
        return TensorDict({key: self._of(source)[at] for key, source in keys.items()}, batch_size=(len(at[0]),))

    def _of(self, key: Any) -> Tensor:
        return getattr(self, self.names[key])

    def _erase(self, steps: Tensor) -> None:
        """Forget ``steps`` ``[L, N]``."""
        for name in (*self.names.values(), "row", "open"):
            getattr(self, name)[steps] = 0


def after(key: Any) -> Any:
    """The key at t + 1."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def clean(key: Any, td: TensorDictBase, spec: TaskSpec, valid: Tensor, action_valid: Tensor) -> Tensor:
    """An entry of ``td``, 0 in padding and where the dead leave whatever they leave.

    Args:
        key: of the entry.
        td: ``[*B]``.
        spec: the task.
        valid, action_valid: ``[A, F]`` and ``[A, P]`` bool, its `TaskSpec.observation_valid` and `action_valid`.
    """
    k, x = spec.keys, td.get(key)
    alive = td.get(k.alive)
    if key[0] == "next":
        alive = td.get(after(k.alive))
        if key == after(k.observation):  # what an agent saw last is needed, though it does not live on
            alive = alive | leaves_alone(td.get(k.alive), alive, td.get(("next", *k.discount)), spec.common_reward)
    if key in (k.observation, after(k.observation)):
        return torch.where(alive.unsqueeze(-1) & valid, x, 0)
    if key in (k.state, after(k.state)):
        return torch.where(state_there(alive, valid, own=spec.own_state), x, 0)
    if key == k.action:
        return torch.where(alive.unsqueeze(-1) & action_valid if spec.continuous else alive, x, 0)
    if key == ("next", *k.reward) and (limit := spec.clip_rewards) is not None:
        return x.clamp(-limit, limit)  # as learners read them
    return x
