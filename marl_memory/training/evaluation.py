"""Greedy evaluation on environments of its own: an exact number of episodes, nothing of the run is touched."""

from __future__ import annotations

import torch

from marl_memory.networks.policy import Policy
from marl_memory.training.collection import Episodes, TaskEnv

LONGEST = 100_000
"""Steps after which an episode of a task that declares no limit counts as endless."""


@torch.no_grad()
def evaluate(env: TaskEnv, actor: Policy, *, episodes: int, seed: int) -> Episodes:
    """Play exactly ``episodes`` episodes with the policy's modes.

    Environment j plays its first ⌈·⌉ or ⌊·⌋ share of them, fixed beforehand: taking whichever episodes end first would
    favour short ones.  The same seed gives the same initial states at every call.

    Args:
        env: N environments used for nothing else.
        actor: the policy; its generator is not drawn from.
        episodes: how many, at least 1.
        seed: of the environments.

    Raises:
        ValueError: if an episode outlasts the task's limit, or `LONGEST` where it declares none.
    """
    k, n = env.task_spec.keys, env.n_envs
    quota = torch.full((n,), episodes // n) + (torch.arange(n) < episodes % n)
    most = int(quota.max())
    returns, lengths = torch.zeros(n, most, dtype=torch.float64), torch.zeros(n, most, dtype=torch.int64)
    success = torch.zeros(n, most, dtype=torch.bool) if env.task_spec.has_success else None
    played, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    limit = env.task_spec.max_episode_steps or LONGEST
    env.set_seed(seed)
    td = env.reset()
    greedy, actor.greedy = actor.greedy, True
    try:
        while (played < quota).any():
            step, td = env.step_and_maybe_reset(actor(td))
            slot, playing = played.clamp(max=most - 1), played < quota
            reward = step.get(("next", *k.reward)).squeeze(-1).double().mean(-1)
            returns[rows, slot] += torch.where(playing, reward, 0.0)
            lengths[rows, slot] += playing
            done = step.get(("next", k.done)).squeeze(-1) & playing
            if success is not None:
                success[rows, slot] |= done & step.get(("next", k.success)).squeeze(-1)
            played += done
            if (lengths[rows, slot] > limit).any():
                raise ValueError(
                    f"an episode of {env.task_spec.name} is longer than {limit} steps: give the task a time limit "
                    "(truncation), and env.max_episode_steps if it is a longer one"
                )
    finally:
        actor.greedy = greedy
    kept = torch.arange(most) < quota.unsqueeze(-1)
    return Episodes(returns[kept], lengths[kept], None if success is None else success[kept])
