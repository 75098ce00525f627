"""Action distributions of stochastic policies.

They exist beside ``torch.distributions`` because a run draws from generators of its own (``torch.distributions`` knows
only the global one) and because masks and padding are part of every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from marl_memory.functional.transport import categorical_kl, gaussian_kl, gaussian_w2

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""The logit of a forbidden action."""


class MaskedCategorical:
    """A categorical distribution over the allowed actions of each agent.

    Args:
        logits: ``[*B, A, P]``.
        mask: ``[*B, A, P]`` bool, at least one True per row; forbidden actions get probability 0.
    """

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        self.mask = mask
        self.logits = torch.where(mask, logits, LOWEST[logits.dtype])

    @cached_property
    def log_probs(self) -> Tensor:
        """``[*B, A, P]``."""
        return F.log_softmax(self._actions_first(), dim=0).movedim(0, -1)

    def _actions_first(self) -> Tensor:
        """``[P, *B, A]``: over a short last dimension a softmax goes row by row, which takes ten times as long."""
        return self.logits.movedim(-1, 0)

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions ``[*B, A]`` int64 and their log-probabilities ``[*B, A]``.

        By inversion: the first action whose cumulated weight exceeds u times their sum.
        """
        probs = torch.softmax(self._actions_first(), 0)
        cumulated = probs.cumsum(0)
        total = cumulated[-1]
        # u is a multiple of 2^-24 (float64: 2^-53) below 1, so that u times the sum rounds to less than the sum.
        u = torch.rand(total.shape, generator=generator, dtype=total.dtype)
        action = (cumulated <= u * total).sum(0)
        return action, probs.gather(0, action.unsqueeze(0)).log().squeeze(0)

    @property
    def mode(self) -> Tensor:
        """``[*B, A]`` int64: the most probable action."""
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """``[*B, A]`` of integer actions ``[*B, A]``."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self, generator: Generator) -> Tensor:
        """``[*B, A]`` in nats, exact (the generator is not used)."""
        return -torch.where(self.mask, self.log_probs.exp() * self.log_probs, 0.0).sum(-1)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``log_probs`` ``[*B, A, P]``."""
        return {"log_probs": self.log_probs}

    def kl_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """KL(p*‖π) ``[*B, A]`` of ``log_probs`` ``[*B, A, P]``."""
        return categorical_kl(reference["log_probs"], self.log_probs)

    def w2_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """Between categoricals there is none: it needs a cost."""
        raise ValueError("W₂² is one between Gaussians")


class TanhNormal:
    r"""A diagonal Gaussian squashed into a box: a = low + (high − low)(tanh(u) + 1)/2, u ~ N(loc, scale²).

    Args:
        loc, scale: ``[*B, A, P]``, before squashing.
        low, high: ``[A, P]``, finite bounds.
        valid: ``[A, P]`` bool; padded dimensions count in no probability.
    """

    LIMIT = 1 - 1e-6
    """tanh(u) is kept within ±LIMIT, so that an action on the bound has a finite pre-image."""

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, valid: Tensor) -> None:
        self.loc, self.scale, self.valid = loc, scale, valid
        self.half_range, self.centre = (high - low) / 2, (high + low) / 2

    def _squash(self, u: Tensor) -> Tensor:
        return self.centre + self.half_range * torch.tanh(u).clamp(-self.LIMIT, self.LIMIT)

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions ``[*B, A, P]`` and their log-densities ``[*B, A]``."""
        noise = torch.randn(self.loc.shape, generator=generator, dtype=self.loc.dtype)
        action = self._squash(self.loc + self.scale * noise)
        return action, self.log_prob(action)

    @property
    def mode(self) -> Tensor:
        """``[*B, A, P]``: the squashed mean."""
        return self._squash(self.loc)

    def log_prob(self, action: Tensor) -> Tensor:
        """``[*B, A]``, the density of actions ``[*B, A, P]`` in action units."""
        u = torch.atanh(((action - self.centre) / self.half_range).clamp(-self.LIMIT, self.LIMIT))
        return self._log_prob_of(torch.where(self.valid, u, 0.0))  # a padded range is empty: 0/0 must reach no gradient

    def _log_prob_of(self, u: Tensor) -> Tensor:
        normal = -0.5 * ((u - self.loc) / self.scale).square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_range.log()
        return torch.where(self.valid, normal - log_slope, 0.0).sum(-1)

    def entropy(self, generator: Generator) -> Tensor:
        """``[*B, A]`` in nats: a one-sample, reparameterised estimate (there is no closed form)."""
        noise = torch.randn(self.loc.shape, generator=generator, dtype=self.loc.dtype)
        return -self._log_prob_of(self.loc + self.scale * noise)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``loc`` and ``scale`` ``[*B, A, P]``, before squashing."""
        return {"loc": self.loc, "scale": self.scale}

    def kl_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """KL(p*‖π) ``[*B, A]`` of ``loc`` and ``scale`` ``[*B, A, P]``; before squashing, which changes nothing."""
        return gaussian_kl(*self._beside(reference))

    def w2_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """W₂² ``[*B, A]`` before squashing."""
        return gaussian_w2(*self._beside(reference))

    def _beside(self, reference: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and deviations of both; equal in padded dimensions."""
        pairs = ((reference["loc"], self.loc, 0.0), (reference["scale"], self.scale, 1.0))
        (m, loc), (s, scale) = (
            (torch.where(self.valid, theirs, one), torch.where(self.valid, ours, one)) for theirs, ours, one in pairs
        )
        return m, s, loc, scale


Distribution = MaskedCategorical | TanhNormal
