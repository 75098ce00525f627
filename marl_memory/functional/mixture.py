"""Behaviour that is a mixture of two policies: its exact density, and the weights by which the past is corrected."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture_log_prob(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""$\log\big(w\,p(a) + (1 - w)\,q(a)\big)$, exact at w = 0 and at w = 1.

    Args:
        weight: ``[*B]``, w in [0, 1].
        first: ``[*B]``, log p(a).
        second: ``[*B]``, log q(a).

    Returns:
        ``[*B]``.
    """
    blend = torch.logaddexp(weight.log() + first, (-weight).log1p() + second)
    return torch.where(weight <= 0, second, torch.where(weight >= 1, first, blend))


def truncated_ratio(taken: Tensor, target: Tensor, behaviour: Tensor) -> Tensor:
    r"""$\rho = \min(1, \pi(a)/P(a))$ where another policy P acted, and exactly 1 elsewhere.

    Args:
        taken: ``[*B]`` bool, where it did.
        target: ``[*B]``, log π(a).
        behaviour: ``[*B]``, log P(a).

    Returns:
        ``[*B]``.

    Reference: Espeholt et al. 2018, "IMPALA" (arXiv 1802.01561), equation 1, with a limit of 1.
    """
    return torch.where(taken, (target - behaviour).clamp(max=0.0).exp(), 1.0)
