"""What is known of states: banks of autoencoders that learn the newest ones, and the scales of their novelty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.novelty import autoencoder_loss, fine_novelty, reconstruction_error
from marl_memory.memory.recent import RecentRows
from marl_memory.networks.autoencoder import Autoencoder
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.networks.optimiser import FlatAdam

BRIGHTEST = 255.0

TOGETHER = 1024
"""Rows that go through an autoencoder in one piece."""


class Novelty(NamedTuple):
    """Of R states of each bank: r_c and r_f ``[G, R]``, and the code z ``[G, R, n]``."""

    coarse: Tensor
    fine: Tensor
    code: Tensor


class StateNovelty(nn.Module):
    """The newest states of each of G banks, autoencoders that learn them, and running deviations of r_c and r_f.

    Vectors are normalised by their running mean and deviation; pictures, which are bytes, by their largest value.

    Args:
        valid: ``[G, F]``: False marks padding in the states of a bank, which enters nothing.
        picture: channels, height and width of states that are pictures; None: they are vectors.
        size: states of a bank that are kept to learn from.
        latent, hidden: see `Autoencoder`.
        sparsity: λ₁.
        lr: Adam's step size.
        fine_sign: see `fine_novelty`.
        seed: of the initial parameters and of the draws.
    """

    def __init__(
        self,
        valid: Tensor,
        *,
        picture: Sequence[int] | None = None,
        size: int,
        latent: int,
        hidden: Sequence[int],
        sparsity: float,
        lr: float,
        fine_sign: Literal[1, -1],
        seed: int,
    ) -> None:
        super().__init__()
        self.latent, self.hidden, self.picture, self.seed = latent, tuple(hidden), picture, seed
        self.sparsity, self.fine_sign = sparsity, fine_sign
        self.valid: Tensor
        self.register_buffer("valid", valid.unsqueeze(1), persistent=False)
        self.recent = RecentRows(*valid.shape, size=size, dtype=torch.uint8 if picture else torch.float32)
        self.moments = None if picture else RunningMoments(*valid.shape)
        self.scales = RunningMoments(len(valid), 2)
        self.learnt: Tensor
        self.register_buffer("learnt", torch.zeros(len(valid), dtype=torch.int64))
        self.level: Tensor
        self.register_buffer("level", torch.zeros(len(valid)))
        self.autoencoder = self._new()
        self.optimiser = FlatAdam(self.autoencoder, lr=lr)
        self.generator = Generator().manual_seed(seed)

    def _new(self) -> Autoencoder:
        banks, _, features = self.valid.shape
        return Autoencoder(
            features,
            self.latent,
            banks=banks,
            hidden=self.hidden,
            picture=self.picture,
            generator=Generator().manual_seed(self.seed),
        )

    @property
    def known(self) -> Tensor:
        """``[G]``: which banks have learnt anything."""
        return self.learnt > 0

    @property
    def deviations(self) -> Tensor:
        """σ_c and σ_f ``[G, 2]`` of the states learnt from, each at the time when it was."""
        return self.scales.std.float()

    def clear(self) -> None:
        """Forget the states, and what was learnt of them."""
        self.recent.clear()
        for x in (self.learnt, self.level):
            x.zero_()
        for moments in (self.moments, self.scales):
            for x in () if moments is None else moments.buffers():
                x.zero_()
        self.autoencoder.load_state_dict(self._new().state_dict())
        self.optimiser.load_named_state(dict(self.named_parameters()), {})

    @torch.no_grad()
    def write(self, states: Tensor, live: Tensor) -> None:
        """Take in states ``[G, R, F]`` where ``live`` ``[G, R]`` is True."""
        if self.moments is not None:
            self.moments.update(states.transpose(0, 1), live.T.unsqueeze(-1))
        self.recent.write(states, live)

    @torch.no_grad()
    def of(self, states: Tensor) -> Novelty:
        """The novelty of any number of states ``[G, R, F]``."""
        parts = [self._of(part) for part in states.split(TOGETHER, dim=1)]
        return Novelty(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))

    def _of(self, states: Tensor) -> Novelty:
        state = self.normalised(states)
        code, decoded = self.autoencoder(state)
        coarse = reconstruction_error(state, decoded, self.valid)
        return Novelty(coarse, fine_novelty(code.detach(), sign=self.fine_sign), code)

    def normalised(self, states: Tensor) -> Tensor:
        """States ``[G, R, F]`` as the autoencoders read and draw them."""
        if self.moments is None:
            return states.float() / BRIGHTEST
        state = self.moments.normalise(states.transpose(0, 1)).transpose(0, 1)
        return torch.where(self.valid, state, 0.0)

    @torch.enable_grad()
    def learn(self, batches: int, batch_size: int) -> Tensor:
        """``batches`` Adam steps on the mean $L_{AE}$ of ``batch_size`` states of each bank; the mean loss ``[]``.

        A bank without states learns nothing.  ``level`` ``[G]`` is the mean r_f of these states: σ follows all states
        ever learnt, the level the latest, for r_f drifts as the autoencoder learns.
        """
        there = self.recent.held > 0
        total, level = torch.zeros_like(self.level), torch.zeros_like(self.level)
        for _ in range(batches):
            coarse, fine, code = self._of(self.recent.draw(batch_size, self.generator))
            losses = autoencoder_loss(coarse, code, sparsity=self.sparsity).mean(1)
            self.optimiser.zero_grad()
            torch.where(there, losses, 0.0).sum().backward()  # each bank as if it had an optimiser of its own
            self.optimiser.gather()
            self.optimiser.step()
            seen = torch.stack([coarse.detach(), fine], -1).transpose(0, 1)
            self.scales.update(seen, there.view(1, -1, 1).expand(len(seen), -1, -1))
            total += losses.detach()
            level += fine.mean(1)
        self.level.copy_(torch.where(there, level / batches, self.level))
        self.learnt += batches * there
        return total[there].mean() / batches

    def get_extra_state(self) -> dict[str, Any]:
        """The generator, and Adam's slots by parameter name."""
        slots = self.optimiser.named_state(dict(self.named_parameters()))
        return {"generator": self.generator.get_state(), "optimiser": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state["generator"])
        self.optimiser.load_named_state(dict(self.named_parameters()), state["optimiser"])
