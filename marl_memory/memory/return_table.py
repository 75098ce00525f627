"""The returns of a replay's newest rows, kept by the rows' numbers and computed anew from the critics of now."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.returns import (
    columns_of,
    lambda_returns,
    leaves_alone,
    max_backpropagation,
    n_step_returns,
    team_value,
    twin_backpropagation,
)
from marl_memory.memory.operator import Bootstrap, Steps, check_positive
from marl_memory.spec import TaskSpec

ESTIMATORS = ("twin", "max", "lambda")

BLOCK = 4096
"""Rows that are valued at once."""


class Facts(NamedTuple):
    """What returns are made of, of T' steps of N environments.

    Args:
        reward, discount: ``[T', N, A]``.
        bootstrap: ``[T', N, A, C]``, values of the states that followed.
        ends: ``[T', N]`` bool, ends of episodes.
        leaves: ``[T', N, A]`` bool, see `leaves_alone`.
    """

    reward: Tensor
    discount: Tensor
    bootstrap: Tensor
    ends: Tensor
    leaves: Tensor


class ReturnTable(nn.Module):
    r"""R ``[T, N, A, C]`` of the newest T steps of N environments; row = step × N + environment, as the replay counts.

    `sweep` computes the returns of all rows, or of the newest only, from values that a host lends.  Estimators, with
    $V^{(c)}_{t,h}$ the value of h rewards and then the c-th critic's bootstrap:

    | estimator | R of critic c                                                                              |
    |-----------|--------------------------------------------------------------------------------------------|
    | `twin`    | `twin_backpropagation`; of four critics two are a twin, of which the least value counts    |
    | `max`     | $\max_h V^{(c)}_{t,h}$: it overestimates                                                   |
    | `lambda`  | the λ-return of critic c                                                                   |

    A critic without a twin is estimated by ``max``.  Episodes bootstrap where they were cut, and at the newest step; an
    agent with rewards of its own where it was cut itself.

    Args:
        spec: the task.
        capacity: rows; T = capacity // N.
        n_envs: N.
        critics: C.
        gamma: γ.
        estimator: see above.
        lam: λ of ``lambda``; None for 0.9.
        max_rollout: the most rewards before a bootstrap; None: as many as there are.
        one_step_floor: whether R is at least the critic's own one-step target, as in the authors' code.
        include_running: whether episodes that still run have returns.

    Raises:
        ValueError: for a value out of range, or one that has no effect.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        capacity: int,
        n_envs: int,
        critics: int,
        gamma: float,
        estimator: str,
        lam: float | None,
        max_rollout: int | None,
        one_step_floor: bool,
        include_running: bool,
    ) -> None:
        super().__init__()
        check_positive(n_envs=n_envs)
        _check(capacity, n_envs, critics, gamma, estimator, lam, max_rollout, one_step_floor)
        self.spec, self.n_envs, self.steps = spec, n_envs, capacity // n_envs
        self.include_running = include_running
        self.twins = estimator == "twin" and critics > 1
        self.one_step_floor, self.gamma = one_step_floor and self.twins, gamma
        if estimator == "lambda":
            self.estimate = partial(lambda_returns, gamma=gamma, lam=0.9 if lam is None else lam)
        else:
            best = twin_backpropagation if self.twins else max_backpropagation
            self.estimate = partial(best, gamma=gamma, max_rollout=max_rollout)
        self.register_buffer("returns", torch.zeros(self.steps, n_envs, spec.n_agents, critics))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    returns: Tensor
    """``[T, N, A, C]``; not finite where there is none."""
    written: Tensor
    """``[]``: the number after that of the newest step with a return; 0 for none."""
    oldest: Tensor
    """``[]``: the number of the oldest step with a return."""

    def __len__(self) -> int:
        """Team rows."""
        return int(self.written - self.oldest) * self.n_envs

    def clear(self) -> None:
        """Forget everything."""
        self.written.zero_()
        self.oldest.zero_()
        self.returns.zero_()

    def find(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """R ``[*B, A, C]`` of the rows with these numbers ``[*B]``, and ``[*B, A]`` bool, where there is one."""
        step = row // self.n_envs
        found = self.returns[step % self.steps, row % self.n_envs]
        held = (step < self.written) & (step >= self.oldest)
        return found, held.unsqueeze(-1) & found.isfinite().all(-1)

    @torch.no_grad()
    def sweep(self, bootstrap: Bootstrap, steps: Steps, first: int, generator: Generator | None = None) -> Facts | None:
        """Compute the returns of the steps from ``first`` on; nothing of what came before is changed.

        Args:
            bootstrap: values of the states that followed, asked for `BLOCK` rows at once.
            steps: the rows.
            first: number of a step; what is not held any more is passed over.
            generator: lent to ``bootstrap``.

        Returns:
            what they were computed from; None if there are no steps.
        """
        oldest = max(steps.oldest, steps.written - self.steps)
        first = max(first, oldest)
        if first >= steps.written:
            return None
        self.oldest.fill_(oldest)
        facts = self.facts(bootstrap, steps, first, generator)
        self.settle(facts, first)
        return facts

    def facts(self, bootstrap: Bootstrap, steps: Steps, first: int, generator: Generator | None) -> Facts:
        """What the returns of the steps from ``first`` on are made of, in blocks of bounded memory."""
        k, (_, n, a, c), count = self.spec.keys, self.returns.shape, steps.written - first
        reward, discount, values = (self.returns.new_empty(count, n, a, *tail) for tail in ((), (), (c,)))
        leaves = reward.new_empty(reward.shape, dtype=torch.bool)
        stride = max(BLOCK // n, 1)
        for begin in range(0, count, stride):
            here = slice(begin, min(begin + stride, count))
            block = steps.block(first + here.start, first + here.stop)
            after = block.get("next")
            value = bootstrap(after, generator) if generator is not None else bootstrap(after)
            values[here] = team_value(value, after.get(k.alive)) if self.spec.common_reward else value
            reward[here] = block.get(k.learn_reward).squeeze(-1)
            goes_on = block.get(("next", *k.discount))
            discount[here] = goes_on.squeeze(-1)
            leaves[here] = leaves_alone(block.get(k.alive), after.get(k.alive), goes_on, self.spec.common_reward)
        return Facts(reward, discount, values, steps.ends_between(first, steps.written), leaves)

    def settle(self, facts: Facts, first: int) -> None:
        """Write the returns of the steps from ``first`` on."""
        count, half = len(facts.reward), facts.bootstrap.shape[-1] // 2
        pairs = self.twins and half > 1
        bootstrap = facts.bootstrap.unflatten(-1, (2, half)).amin(-1) if pairs else facts.bootstrap
        index, valid = columns_of(facts.ends)
        closed = facts.ends.clone()
        closed[-1] = True
        of = (facts.reward, facts.discount, bootstrap, facts.leaves)
        reward, discount, bootstrap, leaves = (x.flatten(0, 1)[index] for x in of)
        cut = closed.flatten()[index].unsqueeze(-1) | leaves
        found = self.estimate(reward, bootstrap, discount, cut)
        if self.one_step_floor:
            found = torch.maximum(found, n_step_returns(reward, bootstrap, discount, cut, gamma=self.gamma, n=1))
        found = found.repeat_interleave(half, -1) if pairs else found
        ordered = torch.empty_like(facts.bootstrap)
        ordered.flatten(0, 1)[index[valid]] = found[valid]
        if not self.include_running:
            runs = facts.ends.flip(0).cumsum(0).flip(0) == 0
            ordered.masked_fill_(runs.view(*runs.shape, 1, 1), -torch.inf)
        slots = (first + torch.arange(count, device=ordered.device)) % self.steps
        self.returns[slots] = ordered
        self.written.fill_(first + count)


def _check(
    capacity: int,
    n_envs: int,
    critics: int,
    gamma: float,
    estimator: str,
    lam: float | None,
    max_rollout: int | None,
    one_step_floor: bool,
) -> None:
    """Raise ValueError for what does not fit."""
    if capacity < n_envs:
        raise ValueError(f"capacity={capacity!r} must hold a step of training.n_envs={n_envs} environments")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must lie in [0, 1]")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}")
    if max_rollout is not None and max_rollout < 1:
        raise ValueError(f"max_rollout={max_rollout!r} must be at least 1, or null")
    if estimator == "twin" and critics > 1 and critics % 2:
        raise ValueError(f"estimator='twin' needs an even number of critics, the host has {critics}")
    if lam is not None and estimator != "lambda":
        raise ValueError(f"lam={lam!r} has no effect with estimator={estimator!r}: leave it null")
    if lam is not None and not 0 <= lam <= 1:
        raise ValueError(f"lam={lam!r} must lie in [0, 1]")
    if max_rollout is not None and estimator == "lambda":
        raise ValueError(f"max_rollout={max_rollout!r} has no effect with estimator='lambda': set it to null")
    if one_step_floor and not (estimator == "twin" and critics > 1):
        raise ValueError(
            "one_step_floor=True has an effect on estimator='twin' and two critics or more: leave it false"
        )
