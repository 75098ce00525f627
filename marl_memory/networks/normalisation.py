"""Running statistics: of value targets (ValueNorm), of observations, of returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueNorm(nn.Module):
    r"""The reference MAPPO's value normaliser: debiased exponential averages of the targets and of their squares.

    $$
    m \leftarrow \beta m + (1-\beta)\,\overline{y}, \quad q \leftarrow \beta q + (1-\beta)\,\overline{y^2}, \quad
    w \leftarrow \beta w + (1-\beta), \qquad \mu = m/w,\; \sigma^2 = \max(q/w - \mu^2,\, 10^{-2})
    $$

    The critic is trained on $(y-\mu)/\sigma$ and read as $\sigma v + \mu$.  Before the first update it is
    the identity.

    Args:
        decay: β, weight of the past.

    Reference: Yu et al., "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games" (2022), and its code.
    """

    def __init__(self, decay: float = 0.99999) -> None:
        super().__init__()
        self.decay = decay
        self.mean: Tensor
        self.square: Tensor
        self.weight: Tensor
        for name in ("mean", "square", "weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def update(self, target: Tensor, mask: Tensor) -> None:
        """Take in targets ``[*S]`` where ``mask`` ``[*S]`` is True; nothing happens if it is True nowhere."""
        kept = target[mask].double()
        if kept.numel() == 0:
            return
        self.mean.lerp_(kept.mean(), 1 - self.decay)
        self.square.lerp_(kept.square().mean(), 1 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)

    def moments(self) -> tuple[float, float]:
        """The current debiased mean and standard deviation."""
        if self.weight == 0:
            return 0.0, 1.0
        mean = self.mean / self.weight
        return mean.item(), (self.square / self.weight - mean.square()).clamp(min=1e-2).sqrt().item()

    def normalise(self, value: Tensor) -> Tensor:
        """From units of the reward to those of the critic network, any shape."""
        mean, std = self.moments()
        return (value - mean) / std

    def denormalise(self, output: Tensor) -> Tensor:
        """From units of the critic network to those of the reward, any shape."""
        mean, std = self.moments()
        return output * std + mean


class RunningMoments(nn.Module):
    """Exact running mean and variance per feature and bank, by Chan's parallel formula, over all rows ever seen.

    Args:
        banks: G, 1 where agents pool their statistics, else A.
        features: F.
    """

    def __init__(self, banks: int, features: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.m2: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(banks, features, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(banks, features, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(banks, features, dtype=torch.float64))

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in ``x`` ``[*B, A, F]`` where ``mask`` ``[*B, A, F]`` (or ``[*B, A, 1]``) is True."""
        banks, features = self.mean.shape
        rows = x.reshape(-1, banks, features).double()
        seen = mask.reshape(-1, banks, mask.shape[-1])
        count = seen.sum(0).double()
        total = self.count + count
        mean = torch.where(seen, rows, 0.0).sum(0) / count.clamp(min=1)
        m2 = torch.where(seen, (rows - mean).square(), 0.0).sum(0)
        delta = mean - self.mean
        share = count / total.clamp(min=1)
        self.mean.add_(delta * share)
        self.m2.add_(m2 + delta.square() * self.count * share)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """``[G, F]``; 1 until two rows were seen, and at least 1e-4."""
        return torch.where(self.count > 1, (self.m2 / self.count.clamp(min=1)).clamp(min=1e-8), 1.0).sqrt()

    def normalise(self, x: Tensor, *, limit: float = 10.0) -> Tensor:
        """``[*B, A, F] → [*B, A, F]``: zero mean, unit variance, limited to ±``limit`` standard deviations."""
        banks, features = self.mean.shape
        scaled = (x.reshape(-1, banks, features) - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        return scaled.clamp(-limit, limit).reshape(x.shape)
