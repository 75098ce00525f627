"""Autoencoders of vectors: for one bank of rows or several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from marl_memory.networks.mlp import MLP


class Autoencoder(nn.Module):
    """An encoder z = E(s) and a decoder ŝ = D(z) of the same hidden layers in reverse; one pair for each bank.

    Args:
        features: F, of s.
        latent: n, of z.
        banks: G.
        hidden: widths of the encoder's hidden layers.
        generator: where the initial weights are drawn from.
    """

    def __init__(
        self, features: int, latent: int, *, banks: int, generator: Generator, hidden: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        self.banks = banks
        self.encoder = MLP(features, latent, hidden=hidden, banks=banks, generator=generator)
        self.decoder = MLP(latent, features, hidden=hidden[::-1], banks=banks, generator=generator)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[G, R, n]`` and reconstructions ``[G, R, F]`` of ``[G, R, F]``."""
        code = _banked(self.encoder, state)
        return code, _banked(self.decoder, code)


def _banked(network: MLP, x: Tensor) -> Tensor:
    """``[G, R, in] → [G, R, out]``, each bank with parameters of its own."""
    return network(x) if network.banks == 1 else network(x.transpose(0, 1)).transpose(0, 1)
