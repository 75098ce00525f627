"""Returns and advantages: pure functions of tensors whose first dimension is time."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    discount: Tensor,
    cut: Tensor,
    *,
    gamma: float,
    lam: float,
    ratio: Tensor | None = None,
) -> Tensor:
    r"""Generalised advantage estimation over time-major tensors.

    $$
    \delta_t = r_t + \gamma\, d_t\, V(s_{t+1}) - V(s_t), \qquad
    \hat A_t = \delta_t + \gamma \lambda\, (1 - c_t)\, \hat A_{t+1}
    $$

    $d_t$ is 0 only where the return truly ends, so a truncated episode bootstraps from $V(s_{t+1})$ of its true last
    state; $c_t$ stops the sum wherever row t + 1 belongs to another episode.  The sum also stops at the last row, whose
    ``next_value`` carries the rest.

    Where another policy than the learner's acted, with its truncated ratios:
    $\hat A_t = \rho_t\,(\delta_t + \gamma \lambda\, (1 - c_t)\, \hat A_{t+1})$, V-trace with $c = \lambda \rho$.

    Args:
        reward: ``[T, *B]``.
        value: ``[T, *B]``, V(s_t).
        next_value: ``[T, *B]``, V(s_{t+1}) of the state that really followed (before any reset).
        discount: ``[T, *B]``, 0 at a termination, else 1.
        cut: ``[T, *B]`` bool, whether the episode ended at row t (terminated or truncated).
        gamma: discount factor γ in [0, 1].
        lam: λ in [0, 1]; 1 gives Monte-Carlo, 0 the one-step advantage.
        ratio: ``[T, *B]``, ρ; None: 1 everywhere.

    Returns:
        ``[T, *B]`` advantages; add ``value`` for the λ-return targets.

    References: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16;
    Espeholt et al. 2018, "IMPALA" (arXiv 1802.01561), remark 1.
    """
    advantage = torch.addcmul(reward, discount, next_value, value=gamma).sub_(value)
    decay = torch.full_like(advantage, gamma * lam).masked_fill_(cut, 0.0)
    if ratio is not None:  # ρ (δ + γλ Â) = ρ δ + (ρ γλ) Â
        advantage.mul_(ratio)
        decay.mul_(ratio)
    rows, decays = advantage.unbind(0), decay.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(decays[t], rows[t + 1])
    return advantage


def discounted_sum(reward: Tensor, cut: Tensor, carry: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    r"""Forward discounted sums $S_t = \gamma\, (1 - c_{t-1})\, S_{t-1} + r_t$, the scale of a return.

    Args:
        reward: ``[T, *B]``.
        cut: ``[T, *B]`` bool, whether the episode ended at row t.
        carry: ``[*B]``, γ times the last sum of the batch before, 0 where its episode ended: what this returned then.
        gamma: discount factor.

    Returns:
        the sums ``[T, *B]``, and the carry ``[*B]`` for the next batch.

    Reference: the return scaling of Engstrom et al., "Implementation Matters in Deep RL" (2020), section 2.
    """
    sums = reward.clone()
    keep = torch.full_like(reward, gamma).masked_fill_(cut, 0.0)
    sums[0].add_(carry)
    for t in range(1, len(sums)):
        sums[t].addcmul_(keep[t - 1], sums[t - 1])
    return sums, keep[-1] * sums[-1]


def discounted_returns(reward: Tensor, discount: Tensor, cut: Tensor, tail: Tensor, *, gamma: float) -> Tensor:
    r"""Monte-Carlo returns $R_t = r_t + \gamma\, d_t\, (c_t\, V_t + (1 - c_t)\, R_{t+1})$; after the last row is 0.

    What is not finite reaches the earlier rows of its own episode, and no other.

    Args:
        reward: ``[T, *B]``.
        discount: ``[T, *B]``, d: 0 at a termination, else 1.
        cut: ``[T, *B]`` bool, c: whether the episode ended at row t (terminated or truncated).
        tail: ``[T, *B]``, V: the value of the state in which a truncated episode was left; read where it was cut.
        gamma: discount factor γ in [0, 1].

    Returns:
        ``[T, *B]``.
    """
    returns = torch.addcmul(reward, discount, torch.where(cut, tail, 0.0), value=gamma)
    decay = (discount * gamma).masked_fill(cut, 0.0)
    rows, decays, stops = returns.unbind(0), decay.unbind(0), (decay == 0).unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(decays[t], rows[t + 1].masked_fill(stops[t], 0.0))
    return returns


def leaves_alone(alive: Tensor, lives_on: Tensor, discount: Tensor, common_reward: bool) -> Tensor:
    """Who is truncated before its episode is: its return goes on with the value of what it saw last, and ends there.

    Args:
        alive, lives_on: ``[*B, A]`` bool, at the step and after it.
        discount: ``[*B, A, 1]``, d: 0 at a termination.
        common_reward: nobody's return ends before the team's then.

    Returns:
        ``[*B, A]`` bool.
    """
    return torch.zeros_like(alive) if common_reward else alive & ~lives_on & (discount.squeeze(-1) != 0)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``x`` ``[*S]`` over the True entries of ``mask`` ``[*S]``, 0 if there are none; None: over all.

    Entries outside the mask are never multiplied, so a NaN there does not reach the mean.
    """
    if mask is None:
        return x.mean()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def mean_over_living(x: Tensor, alive: Tensor, *, apart: bool) -> Tensor:
    """Mean of ``x`` over the rows and agents that live, summed over C.

    Args:
        x: ``[B, A, C]``, 0 where an agent is dead.
        alive: ``[B, A]`` bool.
        apart: take the mean of each agent's rows and sum over agents, as if each had a loss of its own.

    Returns:
        ``[]``.
    """
    if apart:
        return (x.sum((0, 2)) / alive.sum(0).clamp(min=1)).sum()
    return x.sum() / alive.sum().clamp(min=1)


def team_value(value: Tensor, alive: Tensor) -> Tensor:
    """Values of a team with a common reward: an agent that is dead and sees nothing takes the mean of the living ones'.

    Every value estimates one team return.  Where nobody lives, each keeps its own.

    Args:
        value: ``[*B, A, C]``.
        alive: ``[*B, A]`` bool.

    Returns:
        ``[*B, A, C]``.
    """
    living = alive.unsqueeze(-1)
    count = living.sum(-2, keepdim=True)
    mean = torch.where(living, value, 0.0).sum(-2, keepdim=True) / count.clamp(min=1)
    return torch.where(living | (count == 0), value, mean)


# ------------------------------------------------------------------- the best of several rollouts, and their references


def twin_backpropagation(
    reward: Tensor, bootstrap: Tensor, discount: Tensor, cut: Tensor, *, gamma: float, max_rollout: int | None = None
) -> Tensor:
    r"""Returns of the best rollout, which one twin chooses and the other one values (twin back-propagation).

    With h rewards before the value of a state is taken, $V^{(i)}_{t,1} = r_t + \gamma d_t Q^{(i)}_t$ and
    $V^{(i)}_{t,h} = r_t + \gamma V^{(i)}_{t+1,h-1}$ as far as the episode goes:

    $$
    h^*_{(i)} = \arg\max_h V^{(i)}_{t,h}, \qquad R^{(1)}_t = V^{(2)}_{t, h^*_{(1)}}, \qquad
    R^{(2)}_t = V^{(1)}_{t, h^*_{(2)}}
    $$

    of equal values the shorter rollout counts.  The best h at t is 1, or one more than the best at t + 1; so this is
    one backward scan over $o_t = \max_h V^{(i)}_{t,h}$ and what the other twin says of that h, linear in T.  A reward
    that is not finite reaches the earlier rows of its own episode, and no other.

    Args:
        reward: ``[T, *B]``.
        bootstrap: ``[T, *B, 2]``, Q of the twins in the state that really followed; not read where ``discount`` is 0.
        discount: ``[T, *B]``, d: 0 at a termination, else 1.
        cut: ``[T, *B]`` bool, whether the episode ended at row t (terminated or truncated); it also does at the last.
        gamma: discount factor γ in [0, 1].
        max_rollout: the largest h; None: there is none.  With one, this takes a pass over all rows for each h.

    Returns:
        ``[T, *B, 2]``: $R^{(1)}$ and $R^{(2)}$.

    Raises:
        ValueError: for a ``max_rollout`` below 1.

    Reference: Hu et al. 2021, "Generalizable Episodic Memory for Deep Reinforcement Learning" (arXiv 2103.06469),
    equations 4 and 5; the linear scan is ours.
    """
    return _best_rollout(reward, bootstrap, bootstrap.flip(-1), discount, cut, gamma, max_rollout)


def max_backpropagation(
    reward: Tensor, bootstrap: Tensor, discount: Tensor, cut: Tensor, *, gamma: float, max_rollout: int | None = None
) -> Tensor:
    r"""Returns of the best rollout by a single estimator, $R_t = r_t + \gamma d_t \max(R_{t+1}, Q_t)$.

    It overestimates where estimates are noisy.

    Args:
        reward, discount, cut, gamma, max_rollout: see `twin_backpropagation`.
        bootstrap: ``[T, *B, C]``, C estimators, each for itself.

    Returns:
        ``[T, *B, C]``.

    Raises:
        ValueError: for a ``max_rollout`` below 1.

    Reference: Hu et al. 2021 (arXiv 2103.06469), equation 2.
    """
    return _best_rollout(reward, bootstrap, bootstrap, discount, cut, gamma, max_rollout)


def lambda_returns(
    reward: Tensor, bootstrap: Tensor, discount: Tensor, cut: Tensor, *, gamma: float, lam: float
) -> Tensor:
    r"""λ-returns $R_t = r_t + \gamma d_t \big((1 - \lambda) Q_t + \lambda R_{t+1}\big)$, with $R_{t+1} = Q_t$ at a cut.

    Args:
        reward, bootstrap, discount, cut, gamma: see `max_backpropagation`.
        lam: λ in [0, 1]; 0 takes one reward, 1 all of them.

    Returns:
        ``[T, *B, C]``.
    """
    one_step = _one_step(reward, bootstrap, discount, gamma)
    decay = torch.full_like(reward, gamma * lam).masked_fill_(_stops(discount, cut), 0.0).unsqueeze(-1)
    decay[-1:] = 0.0
    returns = torch.addcmul(one_step, decay, bootstrap, value=-1.0)
    returns = torch.where(decay == 0, one_step, returns)
    rows, decays, stops = returns.unbind(0), decay.unbind(0), (decay == 0).unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(decays[t], rows[t + 1].masked_fill(stops[t], 0.0))
    return returns


def n_step_returns(reward: Tensor, bootstrap: Tensor, discount: Tensor, cut: Tensor, *, gamma: float, n: int) -> Tensor:
    r"""$V_{t,h}$ of `twin_backpropagation` with h = n, or fewer where the episode ends before.

    Args:
        reward, bootstrap, discount, cut, gamma: see `max_backpropagation`.
        n: rewards, at least 1.

    Returns:
        ``[T, *B, C]``.
    """
    value = _one_step(reward, bootstrap, discount, gamma)
    stop, one_step = _stops(discount, cut).unsqueeze(-1), value
    for _ in range(1, n):
        longer = torch.add(reward[:-1].unsqueeze(-1), value[1:], alpha=gamma)
        value = torch.cat([torch.where(stop[:-1], one_step[:-1], longer), one_step[-1:]])
    return value


def _best_rollout(
    reward: Tensor,
    own: Tensor,
    other: Tensor,
    discount: Tensor,
    cut: Tensor,
    gamma: float,
    max_rollout: int | None,
) -> Tensor:
    """What ``other`` ``[T, *B, C]`` says of the rollout that is best by ``own`` ``[T, *B, C]``."""
    if max_rollout is not None and max_rollout < 1:
        raise ValueError(f"max_rollout={max_rollout!r} must be at least 1, or null")
    ended, stop = (discount == 0).unsqueeze(-1), _stops(discount, cut).unsqueeze(-1)
    # [T, 2, *B, C]: own values, and the other's of the same rollouts
    both = torch.stack([own, other], 1).masked_fill(ended.unsqueeze(1), 0.0)
    if max_rollout is not None:
        return _within(reward, both, stop, gamma, max_rollout)
    reward = reward.unsqueeze(1).unsqueeze(-1)
    found = torch.empty_like(both)
    rewards, ahead, stops, out = reward.unbind(0), both.unbind(0), stop.unbind(0), found.unbind(0)
    last = len(out) - 1
    torch.add(rewards[last], ahead[last], alpha=gamma, out=out[last])
    for t in range(last - 1, -1, -1):
        bootstraps = (ahead[t][0] >= out[t + 1][0]).logical_or_(stops[t])
        best = torch.where(bootstraps, ahead[t], out[t + 1])
        torch.add(rewards[t], best, alpha=gamma, out=out[t])
    return found[:, 1]


def _within(reward: Tensor, both: Tensor, stop: Tensor, gamma: float, most: int) -> Tensor:
    """The best of rollouts of at most so many rewards: one pass over all t for each length."""
    reward, stop = reward.unsqueeze(1).unsqueeze(-1), stop.unsqueeze(1)
    value = torch.add(reward, both, alpha=gamma)  # V of h rewards
    best, reaches = value, torch.ones_like(stop)
    for _ in range(1, min(most, len(reward))):
        # V_{t,h} = r_t + γ V_{t+1,h−1}, where row t + 1 is of the same episode and has a rollout so long
        value = torch.add(reward[: len(value) - 1], value[1:], alpha=gamma)
        reaches = reaches[1:] & ~stop[: len(value)]
        longer = (value[:, :1] <= best[: len(value), :1]).logical_not_() & reaches  # NaN too, as without a limit
        best = torch.cat([torch.where(longer, value, best[: len(value)]), best[len(value) :]])
    return best[:, 1]


def _one_step(reward: Tensor, bootstrap: Tensor, discount: Tensor, gamma: float) -> Tensor:
    """``[T, *B, C]``."""
    ended = (discount == 0).unsqueeze(-1)
    return torch.add(reward.unsqueeze(-1), bootstrap.masked_fill(ended, 0.0), alpha=gamma)


def _stops(discount: Tensor, cut: Tensor) -> Tensor:
    """``[T, *B]``: nothing of row t + 1 belongs to row t."""
    return cut | (discount == 0)


def columns_of(ends: Tensor) -> tuple[Tensor, Tensor]:
    """How to lay the trajectories of N environments side by side, so that a backward scan is short and wide.

    An environment's rows are cut behind ends of episodes only, into columns of at most twice the longest episode.

    Args:
        ends: ``[T, N]`` bool, where an episode ends; the last row ends one in any case.

    Returns:
        ``index`` ``[H, M]``, places in the rows flattened as ``[T × N]``, in order of time; below its end a column
        repeats its last row; and ``valid`` ``[H, M]`` bool, False for these repetitions.
    """
    steps, n_envs = ends.shape
    closed = ends.T.clone(memory_format=torch.contiguous_format)  # [N, T]; a copy: ends may be a replay's
    closed[:, -1] = True
    last = closed.flatten().nonzero().squeeze(-1)
    longest = int(torch.diff(last, prepend=last.new_tensor([-1])).max())
    marks = torch.arange(longest - 1, closed.numel() + longest - 1, longest, device=ends.device)
    chosen = torch.zeros_like(last, dtype=torch.bool)
    chosen[torch.searchsorted(last, marks.clamp(max=closed.numel() - 1))] = True
    stop = last[chosen] + 1
    start = torch.cat([stop.new_zeros(1), stop[:-1]])
    place = torch.arange(int((stop - start).max()), device=ends.device).unsqueeze(1) + start
    valid = place < stop
    place = torch.minimum(place, stop - 1)
    return (place % steps) * n_envs + place // steps, valid
