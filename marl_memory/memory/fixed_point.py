"""The gate that closes a memory where the critic satisfies its Bellman equation."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marl_memory.functional.returns import masked_mean
from marl_memory.keys import Keys

FORGET = 0.99
"""Decay of running means, per write."""

TINY = 1e-12


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
        self.register_buffer("seen", torch.zeros(()))

    def update(self, x: Tensor) -> None:
        """Take in ``x`` ``[*shape]``; what is not finite counts as 0."""
        self.sum.lerp_(torch.where(x.isfinite(), x, 0.0), 1 - FORGET)
        self.seen.lerp_(torch.ones_like(self.seen), 1 - FORGET)

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
    mean square of δ itself in the place of S would close nothing.)

    Args:
        keys: of the task.
        slope: c.
        gamma: γ, the host's.
    """

    def __init__(self, keys: Keys, *, slope: float, gamma: float) -> None:
        super().__init__()
        if not 0 < slope <= 1:
            raise ValueError(f"gate_slope={slope!r} must lie in (0, 1]")
        self.keys, self.slope, self.gamma = keys, slope, gamma
        self.target_square, self.reward_square = RunningMean(), RunningMean()

    def update(self, td: TensorDictBase) -> None:
        """Take in value targets and rewards of the living."""
        alive = td.get(self.keys.alive).unsqueeze(-1)
        self.target_square.update(masked_mean(td.get(self.keys.value_target)[..., :1].square(), alive))
        self.reward_square.update(masked_mean(td.get(self.keys.learn_reward).square(), alive))

    @property
    def scale(self) -> Tensor:
        """S ``[]``."""
        floor = self.reward_square.value.sqrt() / max(1 - self.gamma, 1e-6)
        return torch.maximum(self.target_square.value.sqrt(), floor).clamp(min=TINY)

    def forward(self, error: Tensor, around: Tensor, weight: Tensor) -> Tensor:
        """The gate ``[*S]``.

        Args:
            error: ``[*S]``, δ here.
            around: ``[*S]``, Σ w_i δ_i of the neighbours.
            weight: ``[*S]``, Σ w_i.
        """
        mean = (error + around) / (1 + weight)
        return (self.slope * mean.abs() / self.scale).clamp(max=1.0)

    def clear(self) -> None:
        """Forget everything."""
        self.target_square.clear()
        self.reward_square.clear()
