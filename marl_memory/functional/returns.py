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
