"""Convolutional networks over pictures: for one agent, for agents that share parameters, and for those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.networks.mlp import ACTIVATIONS, MLP

BRIGHTEST = 255.0
"""Pictures are divided by it, here and nowhere before."""


class BankedConv(nn.Module):
    """G convolutions side by side, one per bank of parameters, without padding.

    Args:
        in_channels, out_channels, kernel, stride: of each.
        banks: G.
        gain: scale of the orthogonal initial weights; biases are 0.
        generator: where the initial weights are drawn from.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        banks: int,
        gain: float,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.stride, self.banks = stride, banks
        self.weight = nn.Parameter(torch.empty(banks * out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(banks * out_channels))
        for bank in self.weight.data.view(banks, out_channels, -1):
            nn.init.orthogonal_(bank, gain, generator=generator)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Of ``scale`` times the pictures: ``[R, G·in, H, W] → [R, G·out, H', W']``."""
        weight = self.weight if scale == 1.0 else self.weight * scale  # there are fewer weights than pixels
        return F.conv2d(x, weight, self.bias, self.stride, groups=self.banks)


class CNN(nn.Module):
    """Convolutions over a picture, then an `MLP` over what they see and over what came beside the picture.

    The input holds one picture ``[C, H, W]`` of `TaskSpec.picture`, or the pictures of several agents, which are then
    the channels of one; as uint8, or as numbers from 0 to 255.  What is left of it behind the pictures (the number of
    the agent that looks, or actions) goes to the `MLP` as it is.

    The defaults are the network of Mnih et al., "Human-level control through deep reinforcement learning" (2015).

    Args:
        in_features, out_features, banks, output_gain, generator: see `MLP`.
        picture: C, H, W.
        channels, kernels, strides: of each convolution.
        hidden, activation, layer_norm: see `MLP`.

    Raises:
        ValueError: for lists of unequal lengths, values below 1, an unknown activation, or pictures too small.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        generator: Generator,
        picture: Sequence[int],
        banks: int = 1,
        output_gain: float = 1.0,
        channels: Sequence[int] = (32, 64, 64),
        kernels: Sequence[int] = (8, 4, 3),
        strides: Sequence[int] = (4, 2, 1),
        hidden: Sequence[int] = (512,),
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_lists(channels=channels, kernels=kernels, strides=strides)
        count, height, width = picture
        pictures = in_features // math.prod(picture)
        self.picture, self.banks = (pictures * count, height, width), banks
        self.pixels = math.prod(self.picture)
        gain = nn.init.calculate_gain("relu")
        planes, layers = self.picture[0], []
        for out, kernel, stride in zip(channels, kernels, strides, strict=True):
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            if min(height, width) < 1:
                raise ValueError(
                    f"network.kernels={list(kernels)} with network.strides={list(strides)} leave nothing of a picture "
                    f"of {picture[1]} × {picture[2]}: choose smaller ones, or larger pictures"
                )
            layers.append(
                BankedConv(planes, out, kernel=kernel, stride=stride, banks=banks, gain=gain, generator=generator)
            )
            planes = out
        self.layers = nn.ModuleList(layers)
        self.seen = planes * height * width
        self.head = MLP(
            self.seen + in_features - self.pixels,
            out_features,
            generator=generator,
            banks=banks,
            output_gain=output_gain,
            hidden=hidden,
            activation=activation,
            layer_norm=layer_norm,
        )
        self.activation, self.hidden_size = ACTIVATIONS[activation], self.head.hidden_size

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``[*B, in] → [*B, out]`` with one bank, ``[*B, A, in] → [*B, A, out]`` with A banks.

        For ``hidden`` see `MLP`.
        """
        batch = x.shape[:-2] if self.banks > 1 else x.shape[:-1]
        rows = x.reshape(-1, self.banks, x.shape[-1])
        planes, height, width = self.picture
        pixels = rows[..., : self.pixels].reshape(-1, self.banks * planes, height * width)
        # Channels last, which convolutions on a CPU take half of the time for, while pixels are bytes still.
        pixels = torch.stack(pixels.unbind(1), -1).to(self._dtype)
        y = pixels.view(-1, height, width, self.banks * planes).permute(0, 3, 1, 2)
        for i, layer in enumerate(self.layers):
            y = self.activation(layer(y, scale=1.0 if i else 1 / BRIGHTEST))
        y = y.reshape(-1, self.banks, self.seen)
        if self.pixels < x.shape[-1]:
            y = torch.cat([y, rows[..., self.pixels :].to(y.dtype)], dim=-1)
        return self.head(y, hidden).reshape(*batch, *([self.banks] if self.banks > 1 else []), -1)

    @property
    def _dtype(self) -> torch.dtype:
        return cast(BankedConv, self.layers[0]).weight.dtype


def _check_lists(**lists: Sequence[int]) -> None:
    for name, values in lists.items():
        if min(values, default=0) < 1:
            raise ValueError(f"network.{name}={list(values)} must hold positive numbers, one for each convolution")
    if len(set(map(len, lists.values()))) > 1:
        told = ", ".join(f"network.{name}={list(values)}" for name, values in lists.items())
        raise ValueError(f"{told} must be equally long: one number for each convolution")
