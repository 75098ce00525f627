"""Discrete choices that gradients pass through."""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through_gumbel(logits: Tensor, u: Tensor, *, temperature: float) -> Tensor:
    r"""A one-hot sample of a categorical distribution, with the gradient of its relaxation.

    $$
    y = \mathrm{softmax}\big((\ell - \log(-\log u)) / \tau\big), \qquad
    \mathrm{out} = \mathrm{onehot}(\arg\max y) + y - \mathrm{stopgrad}(y)
    $$

    The index is an exact sample of softmax(ℓ) for every τ.

    Args:
        logits: ``[*B, P]``; the lowest number of the type where an action is forbidden: it is never drawn, and its
            gradient is 0.
        u: ``[*B, P]``, uniform on (0, 1).
        temperature: τ > 0; a small one makes y sharp and its gradient noisy.

    Returns:
        ``[*B, P]``, exactly one-hot in value.

    References: Jang et al. 2017 (arXiv 1611.01144), section 2.2; Maddison et al. 2017 (arXiv 1611.00712).
    """
    lowest = torch.finfo(logits.dtype).min
    noisy = torch.where(logits > lowest, logits - (-u.log()).log(), lowest)
    hard = torch.zeros_like(logits).scatter_(-1, noisy.argmax(-1, keepdim=True), 1.0)
    if not logits.requires_grad:
        return hard
    soft = torch.softmax(noisy / temperature, dim=-1)
    return hard + (soft - soft.detach())
