"""Action distributions of stochastic policies.

They exist beside ``torch.distributions`` because a run draws from generators of its own (``torch.distributions`` knows
only the global one) and because masks and padding are part of every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.functional.transport import gaussian_kl, gaussian_w2

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""The logit of a forbidden action."""

TINY = torch.finfo(torch.float32).tiny

FEW = 256
"""Logits up to which the calls of sampling cost more than its arithmetic."""


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

    def draw(self, generator: Generator) -> Tensor:
        """Actions ``[*B, A]`` int64."""
        if self.logits.numel() > FEW:
            return self._invert(generator)[0]
        clocks = torch.empty_like(self.log_probs).exponential_(generator=generator).clamp_(min=TINY)
        return (self.log_probs.exp() / clocks).argmax(-1)

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions ``[*B, A]`` int64 and their log-probabilities ``[*B, A]``."""
        return (self._race if self.logits.numel() <= FEW else self._invert)(generator)

    def _race(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """An exponential clock for each action, as fast as it is probable: the first to ring. Fewest calls."""
        log_probs = F.log_softmax(self.logits, -1)
        clocks = torch.empty_like(log_probs).exponential_(generator=generator).clamp_(min=TINY)  # it may draw 0
        action = (log_probs.exp() / clocks).argmax(-1, keepdim=True)
        return action.squeeze(-1), log_probs.gather(-1, action).squeeze(-1)

    def _invert(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """The first action whose cumulated weight exceeds u times their sum. Fewest random numbers."""
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

    log_density = log_prob
    """In the units in which `Actor.unsquash` gives actions: they are what they are."""

    def entropy(self, generator: Generator) -> Tensor:
        """``[*B, A]`` in nats, exact (the generator is not used)."""
        return -torch.where(self.mask, self.log_probs.exp() * self.log_probs, 0.0).sum(-1)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``log_probs`` ``[*B, A, P]``."""
        return {"log_probs": self.log_probs}

    @staticmethod
    def settled(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `kl_from` reads of a reference ``log_probs`` ``[*B, A, P]``: its probabilities and Σ p* log p*."""
        probs = reference["log_probs"].exp()
        return {"probs": probs, "negentropy": torch.xlogy(probs, probs).sum(-1)}

    def kl_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """KL(p*‖π) ``[*B, A]`` of a `settled` reference."""
        return reference["negentropy"] - (reference["probs"] * self.log_probs).sum(-1)

    def w2_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """Between categoricals there is none: it needs a cost."""
        raise ValueError("W₂² is one between Gaussians")


class Box(nn.Module):
    r"""A box of actions and the way into it: a = low + (high − low)(tanh(u) + 1)/2.

    Args:
        low, high: ``[A, P]``, finite bounds.
        valid: ``[A, P]`` bool; padded dimensions count in no probability.
    """

    LIMIT = 1 - 1e-6
    """tanh(u) is kept within ±LIMIT, so that an action on the bound has a finite pre-image."""

    def __init__(self, low: Tensor, high: Tensor, valid: Tensor) -> None:
        super().__init__()
        half_range = (high - low) / 2
        divisor = torch.where(valid, half_range, 1.0)  # a padded range is empty: 0/0 must reach no gradient
        self.all_valid = bool(valid.all())
        self.valid: Tensor
        self.centre: Tensor
        self.half_range: Tensor
        self.divisor: Tensor
        self.log_volume: Tensor
        self.log_unit: Tensor
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("centre", (high + low) / 2, persistent=False)
        self.register_buffer("half_range", half_range, persistent=False)
        self.register_buffer("divisor", divisor, persistent=False)
        self.register_buffer("log_volume", divisor.log().sum(-1), persistent=False)
        # log of (2π)^{P/2}, of an agent's own dimensions
        log_unit = 0.5 * math.log(2 * math.pi) * valid.sum(-1)
        self.register_buffer("log_unit", log_unit.to(low.dtype), persistent=False)

    def squash(self, u: Tensor) -> Tensor:
        """``[*B, A, P]``: the action of u."""
        return torch.addcmul(self.centre, self.half_range, torch.tanh(u).clamp(-self.LIMIT, self.LIMIT))

    def unsquash(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """u ``[*B, A, P]``, 0 where padded, and log |∂a/∂u| ``[*B, A]``."""
        x = self.keep((action - self.centre) / self.divisor).clamp(-self.LIMIT, self.LIMIT)
        above, below = torch.log1p(x), torch.log1p(-x)  # atanh is half their difference, log(1 − x²) their sum
        return (above - below) / 2, (above + below).sum(-1) + self.log_volume

    def log_slope(self, u: Tensor) -> Tensor:
        """log |∂a/∂u| ``[*B, A]`` at any u."""
        return self.keep(2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1) + self.log_volume

    def keep(self, x: Tensor) -> Tensor:
        """``[*B, A, P]`` with 0 in padded dimensions."""
        return x if self.all_valid else torch.where(self.valid, x, 0.0)


class TanhNormal:
    r"""A diagonal Gaussian squashed into a box: the action of u ~ N(loc, scale²).

    Args:
        loc: ``[*B, A, P]``, before squashing.
        log_scale: as ``loc``, or what is broadcast to it.
        box: the actions.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, box: Box) -> None:
        self.loc, self.log_scale, self.box = loc, log_scale, box

    @property
    def scale(self) -> Tensor:
        """``[*B, A, P]``, before squashing."""
        return self.log_scale.exp().expand_as(self.loc)

    def draw(self, generator: Generator) -> Tensor:
        """Actions ``[*B, A, P]``."""
        return self.box.squash(torch.addcmul(self.loc, self.log_scale.exp(), self._noise(generator)))

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Actions ``[*B, A, P]`` and their log-densities ``[*B, A]``."""
        action = self.draw(generator)
        return action, self.log_prob(action)

    @property
    def mode(self) -> Tensor:
        """``[*B, A, P]``: the squashed mean."""
        return self.box.squash(self.loc)

    def log_prob(self, action: Tensor) -> Tensor:
        """``[*B, A]``, the density of actions ``[*B, A, P]`` in action units."""
        u, log_slope = self.box.unsquash(action)
        return self.log_density(u) - log_slope

    def log_density(self, u: Tensor) -> Tensor:
        """``[*B, A]``, before squashing, of u ``[*B, A, P]``."""
        z = self.box.keep((u - self.loc) * (-self.log_scale).exp())
        return -torch.add(self._log_volume(), (z * z).sum(-1), alpha=0.5)

    def entropy(self, generator: Generator) -> Tensor:
        """``[*B, A]`` in nats: a one-sample, reparameterised estimate (there is no closed form)."""
        noise = self._noise(generator)
        slope = self.box.log_slope(torch.addcmul(self.loc, self.log_scale.exp(), noise))
        return torch.add(self._log_volume() + slope, self.box.keep(noise * noise).sum(-1), alpha=0.5)

    def _noise(self, generator: Generator) -> Tensor:
        return torch.randn(self.loc.shape, generator=generator, dtype=self.loc.dtype)

    def _log_volume(self) -> Tensor:
        """log of (2π)^{P/2} Π scale, ``[A]`` or as ``log_scale``."""
        return self.box.keep(self.log_scale).sum(-1) + self.box.log_unit

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``loc`` and ``scale`` ``[*B, A, P]``, before squashing."""
        return {"loc": self.loc, "scale": self.scale}

    @staticmethod
    def settled(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `kl_from` and `w2_from` read of a reference: ``loc`` and ``scale`` ``[*B, A, P]``."""
        return {"loc": reference["loc"], "scale": reference["scale"]}

    def kl_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """KL(p*‖π) ``[*B, A]``; before squashing, which changes nothing."""
        return gaussian_kl(*self._beside(reference))

    def w2_from(self, reference: Mapping[str, Tensor]) -> Tensor:
        """W₂² ``[*B, A]`` before squashing."""
        return gaussian_w2(*self._beside(reference))

    def _beside(self, reference: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and deviations of both; equal in padded dimensions."""
        m, s, loc, scale = reference["loc"], reference["scale"], self.loc, self.scale
        if self.box.all_valid:
            return m, s, loc, scale
        keep, valid = self.box.keep, self.box.valid
        return keep(m), torch.where(valid, s, 1.0), keep(loc), torch.where(valid, scale, 1.0)


Distribution = MaskedCategorical | TanhNormal
