"""The gate that closes a memory where the critic satisfies its Bellman equation."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marl_memory.memory.scope import Scope

FORGET = 0.99
"""Decay of running means, per write."""

TINY = 1e-12

LEAST = torch.finfo(torch.float32).tiny
"""Of sums of weights, of which only ratios matter, however small they are."""


class RunningMean(nn.Module):
    """A debiased exponential mean of tensors ``[*shape]``.

    Args:
        shape: of what is averaged.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.sum: Tensor
        self.seen: Tensor
        self.register_buffer("sum", torch.zeros(shape))
        self.register_buffer("seen", torch.zeros(shape))

    def update(self, x: Tensor, counts: Tensor) -> None:
        """Take in ``x`` ``[*shape]`` where it ``counts`` ``[*shape]`` and is finite."""
        taken = counts & (x.abs() < torch.inf)
        self.sum.lerp_(torch.where(taken, x, self.sum), 1 - FORGET)
        self.seen.lerp_(torch.where(taken, 1.0, self.seen), 1 - FORGET)

    @property
    def value(self) -> Tensor:
        """``[*shape]``; 0 before the first update."""
        return self.sum / self.seen.clamp(min=TINY)

    def clear(self) -> None:
        """Forget everything."""
        self.sum.zero_()
        self.seen.zero_()


class FixedPointGate(nn.Module):
    r"""$\min(1, c\,|\bar\delta| / S)$: how much of a memory's strength is left at a state.

    $\bar\delta$ is the state's TD error (on-policy: its advantage before normalisation) averaged with those its
    neighbours stored, S the running root mean square of the value targets, at least that of the rewards divided by
    1 − γ.  S tends to the scale of Q* and not to 0, so the gate closes as δ does: Q* stays a fixed point.  (The root
    mean square of δ itself in the place of S would close nothing.)  Every bank has its own S, and so has every
    payload of its rows.

    Args:
        scope: of the memory.
        slope: c.
        gamma: γ, the host's.
    """

    def __init__(self, scope: Scope, *, slope: float, gamma: float) -> None:
        super().__init__()
        if not 0 < slope <= 1:
            raise ValueError(f"gate_slope={slope!r} must lie in (0, 1]")
        self.scope, self.slope = scope, slope
        self.squares = RunningMean(scope.banks, scope.payloads, 2)  # of targets and rewards
        self.horizons: Tensor
        self.register_buffer("horizons", torch.tensor([1.0, 1 / max(1 - gamma, 1e-6)]), persistent=False)

    def update(self, td: TensorDictBase) -> None:
        """Take in value targets and rewards of the living."""
        means, count = self.scope.means(self.squared(td), self.scope.living(td.get(self.scope.key_names.alive)))
        self.squares.update(means, count > 0)

    def squared(self, td: TensorDictBase) -> Tensor:
        """What ``squares`` are means of, ``[*B, A, 2]``."""
        keys = self.scope.key_names
        return torch.cat([td.get(keys.value_target)[..., :1], td.get(keys.learn_reward)[..., :1]], -1).square_()

    @property
    def scale(self) -> Tensor:
        """S of every agent, ``[A]``."""
        largest = (self.squares.value.sqrt() * self.horizons).amax(-1)
        return self.scope.per_agent(largest.clamp(min=TINY))

    def forward(self, error: Tensor, around: Tensor, weight: Tensor) -> Tensor:
        """The gate ``[*B, A]``.

        Args:
            error: ``[*B, A]``, δ here.
            around: ``[*B, A]``, Σ w_i δ_i of the neighbours.
            weight: ``[*B, A]``, Σ w_i.
        """
        mean = (error + around) / (1 + weight)
        return (self.slope * mean.abs() / self.scale).clamp(max=1.0)

    def clear(self) -> None:
        """Forget everything."""
        self.squares.clear()
