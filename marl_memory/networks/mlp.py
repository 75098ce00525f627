"""Multilayer perceptrons for one agent, for agents that share parameters, and for agents that do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import skip_init

from marl_memory.functional.linear import linear as affine

LARGE = 8192
"""Elements from which on NumPy's tanh is used: PyTorch's takes ten times as long, but costs less to call."""


class _Tanh(torch.autograd.Function):
    """tanh of a tensor on the CPU, by NumPy; equal to PyTorch's but for the last digit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, y)


def tanh(x: Tensor) -> Tensor:
    """tanh ``[*S] → [*S]``."""
    if x.numel() < LARGE or x.device.type != "cpu":
        return torch.tanh(x)
    return cast(Tensor, _Tanh.apply(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": tanh,
    "elu": F.elu,
    "gelu": F.gelu,
}


class BankedLinear(nn.Module):
    """G linear maps side by side, one per bank of parameters.

    Args:
        in_features, out_features: sizes.
        banks: G.
    """

    def __init__(self, in_features: int, out_features: int, *, banks: int) -> None:
        super().__init__()
        # [G, in, out]: transposed, each gradient would be copied once more.
        self.weight = nn.Parameter(torch.empty(banks, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(banks, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[G, R, in] → [G, R, out]``."""
        return torch.baddbmm(self.bias, x, self.weight)


def linear(in_features: int, out_features: int, *, banks: int, gain: float, generator: Generator) -> nn.Module:
    """One linear map or ``banks`` of them, with orthogonal weights scaled by ``gain`` and biases of 0.

    Args:
        in_features, out_features: sizes.
        banks: how many maps; 1 is the ordinary ``nn.Linear``.
        gain: scale of the orthogonal initialisation.
        generator: where the initial weights are drawn from.
    """
    if banks > 1:
        layer = BankedLinear(in_features, out_features, banks=banks)
        maps = layer.weight.data.transpose(1, 2)
    else:  # without its own initialisation, which draws from the global generator
        layer = cast(nn.Linear, skip_init(nn.Linear, in_features, out_features))
        maps = layer.weight.data.unsqueeze(0)
    for bank in maps:
        nn.init.orthogonal_(bank, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """An MLP whose parameters are shared by all inputs (``banks=1``) or kept per agent (``banks=A``).

    Args:
        in_features, out_features: sizes.
        banks: 1, or the number of agents A for independent parameters.
        hidden: width of each hidden layer.
        activation: one of ``relu``, ``tanh``, ``elu``, ``gelu``.
        layer_norm: whether the input and every hidden layer are normalised per row (the affine part that usually
            follows is left to the next linear map, which can express it).
        output_gain: orthogonal gain of the last layer.
        generator: where the initial weights are drawn from.
        again: how many of the last inputs the second layer reads too.

    Raises:
        ValueError: for an unknown activation, an empty layer, or no layer that could read inputs again.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        generator: Generator,
        banks: int = 1,
        output_gain: float = 1.0,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        layer_norm: bool = False,
        again: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"network.activation={activation!r} must be one of {sorted(ACTIVATIONS)}")
        if min(hidden, default=1) < 1:
            raise ValueError(f"network.hidden={list(hidden)} must hold positive widths")
        if again and not hidden:
            raise ValueError("network.hidden=[] has no layer after the first that could read actions once more")
        inputs = [in_features, *hidden]
        inputs[1:2] = [width + again for width in inputs[1:2]]
        gains = [nn.init.calculate_gain(activation) if activation in ("relu", "tanh") else math.sqrt(2)] * len(hidden)
        self.layers = nn.ModuleList(
            linear(i, o, banks=banks, gain=gain, generator=generator)
            for i, o, gain in zip(inputs, [*hidden, out_features], [*gains, output_gain], strict=True)
        )
        self.layer_norm, self.again = layer_norm, again
        self.hidden_size = inputs[-1]
        """H, what the last layer reads."""
        self.banks = banks
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``[*B, in] → [*B, out]`` with one bank, ``[*B, A, in] → [*B, A, out]`` with A banks.

        Args:
            x: the input.
            hidden: ``[*B, H]`` or ``[*B, A, H]``, where what the last layer reads is left, detached; None: nowhere.
        """
        batch = x.shape[:-1]
        if self.banks > 1:
            rows = x.reshape(-1, self.banks, x.shape[-1]).transpose(0, 1)
        else:
            rows = x.reshape(-1, x.shape[-1])  # once: a linear map of more dimensions does it anew in each layer
        read = rows[..., -self.again :] if self.again else None
        for i, layer in enumerate(self.layers):
            if i > 0:
                rows = self.activation(rows)
            if i == 1 and read is not None:
                rows = torch.cat([rows, read], -1)
            if self.layer_norm:
                rows = F.layer_norm(rows, rows.shape[-1:])
            if hidden is not None and i == len(self.layers) - 1:
                last = rows.detach().transpose(0, 1) if self.banks > 1 else rows.detach()
                hidden.copy_(last.reshape(hidden.shape))
            # One bank, without the call of a module: at a few rows that costs as much as the product.
            rows = affine(rows, layer.weight, layer.bias) if self.banks == 1 else layer(rows)  # type: ignore[arg-type]
        if self.banks > 1:
            rows = rows.transpose(0, 1)
        return rows.reshape(*batch, rows.shape[-1])
