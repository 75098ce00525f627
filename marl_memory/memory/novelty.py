"""What is known of states: banks of autoencoders that learn the newest ones, and the scales of their novelty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.novelty import autoencoder_loss, fine_novelty, reconstruction_error
from marl_memory.memory.recent import RecentRows
from marl_memory.networks.autoencoder import Autoencoder
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.networks.optimiser import FlatAdam

BRIGHTEST = 255.0

LIMIT = 10.0
"""Deviations from the mean beyond which vectors are cut off."""

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
        gaps: whether numbers of vectors may be missing: they come as NaN, and enter nothing either.
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
        gaps: bool = False,
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
        self.gaps, self.all_valid = gaps and picture is None, bool(valid.all())
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
            there = live.unsqueeze(-1) & ~states.isnan() if self.gaps else live.unsqueeze(-1)
            self.moments.update(states.transpose(0, 1), there.transpose(0, 1))
        self.recent.write(states, live)

    @torch.no_grad()
    def of(self, states: Tensor) -> Novelty:
        """The novelty of any number of states ``[G, R, F]``."""
        normalised = self._normaliser()
        parts = [self._coarse(part, normalised) for part in states.split(TOGETHER, dim=1)]
        coarse, code = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return Novelty(coarse, fine_novelty(code, sign=self.fine_sign), code)

    def _coarse(self, states: Tensor, normalised: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """r_c ``[G, R]`` and z ``[G, R, n]`` of states ``[G, R, F]``."""
        state = normalised(states)
        code, decoded = self.autoencoder(state)
        valid = None if self.all_valid else self.valid
        if self.gaps:
            valid = ~states.isnan() & self.valid
        return reconstruction_error(state, decoded, valid), code

    def normalised(self, states: Tensor) -> Tensor:
        """States ``[G, R, F]`` as the autoencoders read and draw them."""
        return self._normaliser()(states)

    def _normaliser(self) -> Callable[[Tensor], Tensor]:
        """`normalised`, with what does not change between calls computed once."""
        if self.moments is None:
            return lambda states: states.float() / BRIGHTEST
        mean, slope = self.moments.mean.float().unsqueeze(1), (1 / self.moments.std).float().unsqueeze(1)

        def normalised(states: Tensor) -> Tensor:
            state = ((states - mean) * slope).clamp_(-LIMIT, LIMIT)
            if self.gaps:
                state = state.nan_to_num_(0.0)
            return state if self.all_valid else torch.where(self.valid, state, 0.0)

        return normalised

    @torch.enable_grad()
    def learn(self, batches: int, batch_size: int) -> Tensor:
        """``batches`` Adam steps on the mean $L_{AE}$ of ``batch_size`` states of each bank; the mean loss ``[]``.

        A bank without states learns nothing.  ``level`` ``[G]`` is the mean r_f of these states: σ follows all states
        ever learnt, the level the latest, for r_f drifts as the autoencoder learns.
        """
        there = self.recent.held > 0
        losses, coarse, codes = torch.zeros_like(self.level), [], []
        normalised = self._normaliser()
        for _ in range(batches):
            error, code = self._coarse(self.recent.draw(batch_size, self.generator), normalised)
            loss = autoencoder_loss(error, code, sparsity=self.sparsity).mean(1)
            self.optimiser.zero_grad()
            torch.where(there, loss, 0.0).sum().backward()  # each bank as if it had an optimiser of its own
            self.optimiser.gather()
            self.optimiser.step()
            losses += loss.detach()
            coarse.append(error.detach())
            codes.append(code.detach())
        fine = fine_novelty(torch.cat(codes, 1), sign=self.fine_sign)
        seen = torch.stack([torch.cat(coarse, 1), fine], -1).transpose(0, 1)
        self.scales.update(seen, there.view(1, -1, 1).expand(len(seen), -1, -1))
        self.level.copy_(torch.where(there, fine.mean(1), self.level))
        self.learnt += batches * there
        return losses[there].mean() / batches

    def get_extra_state(self) -> dict[str, Any]:
        """The generator, and Adam's slots by parameter name."""
        slots = self.optimiser.named_state(dict(self.named_parameters()))
        return {"generator": self.generator.get_state(), "optimiser": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state["generator"])
        self.optimiser.load_named_state(dict(self.named_parameters()), state["optimiser"])
