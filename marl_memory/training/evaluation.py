"""Greedy evaluation on environments of its own: an exact number of episodes, nothing of the run is touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.algorithms.algorithm import Algorithm
from marl_memory.networks.policy import Policy
from marl_memory.training.collection import Episodes, TaskEnv, named_measures

LONGEST = 100_000
"""Steps after which an episode of a task that declares no limit counts as endless."""


@torch.no_grad()
def evaluate(
    env: TaskEnv,
    actor: Policy,
    *,
    episodes: int,
    seed: int,
    act: Callable[[TensorDictBase], None] | None = None,
    critic: Algorithm | None = None,
) -> Episodes:
    """Play exactly ``episodes`` episodes with the policy's modes.

    Environment j plays its first ⌈·⌉ or ⌊·⌋ share of them, fixed beforehand: taking whichever episodes end first would
    favour short ones.  The same seed gives the same initial states at every call.  An episode that is dropped is played
    anew.

    Args:
        env: N environments used for nothing else.
        actor: the policy; its generator is not drawn from.
        episodes: how many, at least 1.
        seed: of the environments.
        act: what memory does to the policy's choice; None: the policy plays alone.
        critic: whose estimates of the initial states are compared with the discounted returns that follow.  Behind a
            truncation a return goes on with the estimate of the state it was left in.

    Raises:
        ValueError: if an episode outlasts the task's limit, or `LONGEST` where it declares none.
    """
    k, n = env.task_spec.keys, env.n_envs
    quota = torch.full((n,), episodes // n) + (torch.arange(n) < episodes % n)
    most = int(quota.max())
    returns, lengths = torch.zeros(n, most, dtype=torch.float64), torch.zeros(n, most, dtype=torch.int64)
    success = torch.zeros(n, most, dtype=torch.bool) if env.task_spec.has_success else None
    measures = {name: torch.zeros(n, most) for name in env.task_spec.measures}
    lost = 0
    played, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    limit = env.task_spec.max_episode_steps or LONGEST
    judge = None if critic is None else Judge(critic, n, most)
    env.set_seed(seed)
    td = env.reset()
    greedy, actor.greedy = actor.greedy, True
    try:
        while (played < quota).any():
            if judge is not None:
                judge.begin(td)
            td = actor(td)
            if act is not None:
                act(td)
            step, td = env.step_and_maybe_reset(td)
            slot, playing = played.clamp(max=most - 1), played < quota
            reward = step.get(("next", *k.reward)).squeeze(-1).double().mean(-1)
            returns[rows, slot] += torch.where(playing, reward, 0.0)
            lengths[rows, slot] += playing
            done = step.get(("next", k.done)).squeeze(-1) & playing
            if success is not None:
                success[rows, slot] |= done & step.get(("next", k.success)).squeeze(-1)
            for name, measure in named_measures(env.task_spec, step).items():
                measures[name][rows, slot] += torch.where(done, measure, 0.0)
            if env.task_spec.has_dropped:
                dropped = done & step.get(("next", k.dropped)).squeeze(-1)
                lost, done = lost + int(dropped.sum()), done & ~dropped
                for column in (returns, lengths):
                    column[rows[dropped], slot[dropped]] = 0
            if judge is not None:
                judge.take(step.get("next"), slot, done)
            played += done
            if (lengths[rows, slot] > limit).any():
                raise ValueError(
                    f"an episode of {env.task_spec.name} is longer than {limit} steps: give the task a time limit "
                    "(truncation), and env.max_episode_steps if it is a longer one"
                )
    finally:
        actor.greedy = greedy
    kept = torch.arange(most) < quota.unsqueeze(-1)
    return Episodes(
        returns[kept],
        lengths[kept],
        None if success is None else success[kept],
        {name: measure[kept] for name, measure in measures.items()},
        lost if env.task_spec.has_dropped else None,
        None if judge is None else judge.errors[kept],
    )


class Judge:
    r"""What a critic expects at the start of an episode, minus the discounted return that follows.

    Args:
        critic: whose estimates.
        n_envs: N.
        most: episodes of each environment.
    """

    def __init__(self, critic: Algorithm, n_envs: int, most: int) -> None:
        self.critic, self.keys = critic, critic.spec.keys
        shape = (n_envs, critic.spec.n_agents)
        self.error, self.factor = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        self.begins = torch.ones(n_envs, dtype=torch.bool)
        self.errors = torch.zeros(n_envs, most, dtype=torch.float64)
        """``[N, most]``, of the episodes that ended; means over agents."""

    def begin(self, td: TensorDictBase) -> None:
        """Estimate the states ``[N]`` in which episodes begin."""
        if self.begins.any():
            begins = self.begins.unsqueeze(-1)
            self.error = torch.where(begins, self.critic.estimate(td).double(), self.error)
            self.factor = torch.where(begins, 1.0, self.factor)

    def take(self, after: TensorDictBase, slot: Tensor, done: Tensor) -> None:
        """Take in what followed a step, ``[N]``; episodes that count end where ``done``, as number ``slot``."""
        k = self.keys
        self.error -= self.factor * after.get(k.reward).squeeze(-1)
        self.factor *= self.critic.gamma * after.get(k.discount).squeeze(-1)
        self.begins = after.get(k.done).squeeze(-1)
        if (left := done & after.get(k.truncated).squeeze(-1)).any():
            tail = self.factor * self.critic.estimate(after).double()
            self.error = torch.where(left.unsqueeze(-1), self.error - tail, self.error)
        self.errors[done, slot[done]] = self.error[done].mean(-1)
