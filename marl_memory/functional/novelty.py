"""How new a state is to an autoencoder: its reconstruction error, and how sparse its code is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COMBINATIONS = ("add", "mul")


def hoyer(code: Tensor) -> Tensor:
    r"""How sparse codes are: 1 with one entry that is not 0, 0 with all of one size, whatever their scale.

    $$
    \mathrm{Hoyer}(z) = \frac{\sqrt{n} - \lVert z \rVert_1 / \lVert z \rVert_2}{\sqrt{n} - 1} \in [0, 1]
    $$

    A code of zeros, which has no direction, counts as sparse: 1.

    Args:
        code: z, ``[*B, n]`` with n of at least 2.

    Returns:
        ``[*B]``.

    Reference: Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints" (2004), section 3.1.
    """
    root = math.sqrt(code.shape[-1])
    # In units of the largest entry: squares of very small or large ones would be 0 or infinite.
    size = code.abs()
    largest = size.amax(-1, keepdim=True)
    size = size / torch.where(largest > 0, largest, 1.0)
    norm = size.square().sum(-1).sqrt()
    sparse = (root - size.sum(-1) / norm.clamp(min=1.0)) / (root - 1)  # the largest is 1: the norm is at least 1
    return torch.where(largest.squeeze(-1) > 0, sparse, 1.0).clamp(0.0, 1.0)


def reconstruction_error(state: Tensor, decoded: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Coarse novelty $r_c = \lVert s - \hat s \rVert^2 / \dim(s)$.

    Args:
        state, decoded: s and ŝ, ``[*B, F]``.
        valid: ``[F]``, or what broadcasts to ``[*B, F]``: False marks padding, which counts neither as error nor as
            dimension.  None: all of it is valid.

    Returns:
        ``[*B]``.
    """
    error = state - decoded
    if valid is None:
        return error.square().mean(-1)
    return torch.where(valid, error, 0.0).square().sum(-1) / valid.sum(-1).clamp(min=1)


def fine_novelty(code: Tensor, *, sign: int) -> Tensor:
    """Fine novelty ``[*B]`` in [0, 1] of codes ``[*B, n]``.

    Args:
        code: z.
        sign: 1: what has a dense code is new, $r_f = 1 - \\mathrm{Hoyer}(z)$; −1: what has a sparse one,
            $r_f = \\mathrm{Hoyer}(z)$.
    """
    sparse = hoyer(code)
    return 1 - sparse if sign > 0 else sparse


def intrinsic_reward(
    coarse: Tensor, fine: Tensor, scales: Tensor, level: Tensor | float, *, zeta: float, combine: str
) -> Tensor:
    r"""Both kinds of novelty as one reward.

    $$
    \texttt{add}: \; \frac{r_c}{\sigma_c} + \zeta \frac{r_f - \mu_f}{\sigma_f}, \qquad
    \texttt{mul}: \; \frac{r_c}{\sigma_c} \max\Big(0,\, 1 + \zeta \frac{r_f - \mu_f}{\sigma_f}\Big)
    $$

    Args:
        coarse, fine: r_c and r_f, ``[*B]``.
        scales: σ_c and σ_f, what broadcasts to ``[*B, 2]``.
        level: μ_f, what broadcasts to ``[*B]``; 0: the sum of the published summary.
        zeta: ζ.
        combine: one of `COMBINATIONS`.

    Returns:
        ``[*B]``.
    """
    coarse, fine = coarse / scales[..., 0], zeta * (fine - level) / scales[..., 1]
    return coarse + fine if combine == "add" else coarse * (1 + fine).clamp(min=0)


def autoencoder_loss(coarse: Tensor, code: Tensor, *, sparsity: float) -> Tensor:
    r"""$L_{AE} = r_c + \lambda_1 \lVert z \rVert_1 / n$ of each row.

    Args:
        coarse: r_c, ``[*B]``.
        code: z, ``[*B, n]``.
        sparsity: λ₁.

    Returns:
        ``[*B]``.
    """
    return coarse + sparsity * code.abs().mean(-1)
