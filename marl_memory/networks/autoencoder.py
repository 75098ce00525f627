"""Autoencoders of vectors and of pictures: for one bank of rows, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.networks.mlp import MLP

LARGE, SMALL = 32, 8
"""Pictures from the first size on are quartered first; they are halved until they are smaller than the second."""

CHANNELS = (32, 64)
"""Of the first convolution, and of the others."""


class Autoencoder(nn.Module):
    """An encoder z = E(s) and a decoder ŝ = D(z) with the hidden layers of an `MLP`; one pair for each bank.

    Pictures pass a stack of convolutions first, and its mirror image last.

    Args:
        features: F, of s.
        latent: n, of z.
        banks: G.
        hidden: widths of the encoder's hidden layers; the decoder's are these in reverse.
        picture: channels, height and width, if s is a picture: channel by channel and row by row.
        generator: where the initial weights are drawn from.

    Raises:
        ValueError: if a picture has other than F numbers.
    """

    def __init__(
        self,
        features: int,
        latent: int,
        *,
        banks: int,
        generator: Generator,
        hidden: Sequence[int] = (256, 256),
        picture: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if picture is not None and math.prod(picture) != features:
            raise ValueError(f"picture={list(picture)} holds {math.prod(picture)} numbers, not features={features}")
        self.eye = None if picture is None else Convolutions(picture, banks=banks, generator=generator)
        seen = features if self.eye is None else self.eye.features
        self.encoder = MLP(seen, latent, hidden=hidden, banks=banks, generator=generator)
        self.decoder = MLP(latent, seen, hidden=hidden[::-1], banks=banks, generator=generator)
        self.hand = None if self.eye is None else self.eye.reversed(generator)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[G, R, n]`` and reconstructions ``[G, R, F]`` of ``[G, R, F]``."""
        code = _banked(self.encoder, state if self.eye is None else self.eye(state))
        decoded = _banked(self.decoder, code)
        return code, decoded if self.hand is None else self.hand(torch.relu(decoded))


def _banked(network: MLP, x: Tensor) -> Tensor:
    """``[G, R, in] → [G, R, out]``, each bank with parameters of its own."""
    return network(x) if network.banks == 1 else network(x.transpose(0, 1)).transpose(0, 1)


class Convolutions(nn.Module):
    """Convolutions without padding, with ReLU between them and behind: ``[G, R, C·H·W] → [G, R, features]``.

    Kernels of 8 by steps of 4 for a large picture, then kernels of 4 by steps of 2 until it is smaller than `SMALL`.

    Args:
        picture: C, H, W.
        banks: G.
        generator: where the initial weights are drawn from.
    """

    def __init__(self, picture: Sequence[int], *, banks: int, generator: Generator) -> None:
        super().__init__()
        self.banks = banks
        sizes = [(picture[0], picture[1], picture[2])]
        self.steps: list[tuple[int, int]] = []
        while min(sizes[-1][1:]) >= SMALL:
            kernel, stride = (8, 4) if min(sizes[-1][1:]) >= LARGE else (4, 2)
            height, width = ((size - kernel) // stride + 1 for size in sizes[-1][1:])
            sizes.append((CHANNELS[len(self.steps) > 0], height, width))
            self.steps.append((kernel, stride))
        self.sizes = sizes
        self.features = math.prod(sizes[-1])
        maps = [(into[0], out[0], kernel) for into, out, (kernel, _) in zip(sizes, sizes[1:], self.steps, strict=False)]
        self.weights = nn.ParameterList(_filters(banks, out, into, kernel, generator) for into, out, kernel in maps)
        self.biases = nn.ParameterList(torch.zeros(banks * out) for _, out, _ in maps)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = _side_by_side(x, self.sizes[0])
        for weight, bias, (_, stride) in zip(self.weights, self.biases, self.steps, strict=True):
            y = torch.relu(F.conv2d(y, weight, bias, stride, groups=self.banks))
        return _apart(y, self.banks)

    def reversed(self, generator: Generator) -> Deconvolutions:
        """The way back to the picture, with weights of its own."""
        return Deconvolutions(self, generator=generator)


class Deconvolutions(nn.Module):
    """Transposed convolutions that undo the sizes of `Convolutions`: ``[G, R, features] → [G, R, C·H·W]``.

    ReLU between them; none behind.
    """

    def __init__(self, forth: Convolutions, *, generator: Generator) -> None:
        super().__init__()
        self.banks, self.first = forth.banks, forth.sizes[-1]
        ways = list(zip(forth.sizes, forth.sizes[1:], forth.steps, strict=False))[::-1]
        self.steps = [(stride, tuple((size - kernel) % stride for size in to[1:])) for to, _, (kernel, stride) in ways]
        self.weights = nn.ParameterList(
            _filters(self.banks, into[0], to[0], kernel, generator) for to, into, (kernel, _) in ways
        )
        self.biases = nn.ParameterList(torch.zeros(self.banks * to[0]) for to, _, _ in ways)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = _side_by_side(x, self.first)
        for i, (weight, bias, (stride, rest)) in enumerate(zip(self.weights, self.biases, self.steps, strict=True)):
            y = F.conv_transpose2d(y if i == 0 else torch.relu(y), weight, bias, stride, 0, rest, self.banks)
        return _apart(y, self.banks)


def _filters(banks: int, first: int, second: int, kernel: int, generator: Generator) -> nn.Parameter:
    """``[G·first, second, k, k]``, orthogonal within each bank."""
    weight = torch.empty(banks, first, second * kernel * kernel)
    for bank in weight:
        nn.init.orthogonal_(bank, math.sqrt(2), generator=generator)
    return nn.Parameter(weight.view(banks * first, second, kernel, kernel))


def _side_by_side(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """``[G, R, C·H·W] → [R, G·C, H, W]``."""
    channels, height, width = size
    return x.transpose(0, 1).reshape(x.shape[1], len(x) * channels, height, width)


def _apart(y: Tensor, banks: int) -> Tensor:
    """``[R, G·C, H, W] → [G, R, C·H·W]``."""
    return y.reshape(len(y), banks, -1).transpose(0, 1)
