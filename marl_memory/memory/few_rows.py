"""What `Reflection` does at a vector step of few environments, by NumPy: there calls cost more than the arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from marl_memory.memory.reflecting import Networks, confidence_logit
from marl_memory.networks.distributions import LOWEST, TINY
from marl_memory.networks.mlp import MLP

MOST = 2**18
"""Multiplications of a layer up to which rows are few: OpenBLAS, NumPy's, then keeps to one thread."""


class Chosen(NamedTuple):
    """Where memory acts, with which probability, how confident it is, what it would do, and P's parameters.

    Args:
        taken: ``[*B, A]`` bool.
        weight: ``[*B, A]``, w.
        confidence: ``[*B, A]``, c.
        action: ``[*B, A]`` or ``[*B, A, P]``.
        parameters: see `Distribution`.
    """

    taken: Tensor
    weight: Tensor
    confidence: Tensor
    action: Tensor
    parameters: dict[str, Tensor]


class FewRows:
    """The choice among discrete actions of observed vectors: what PyTorch would choose, but for numbers' last digits.

    Args:
        networks: P and C; their parameters are read where they lie, at every call.
    """

    def __init__(self, networks: Networks) -> None:
        body, self.seen, self.input, self.heads = networks.policy, networks.observed, networks.input, networks.heads
        vectors = isinstance(body, MLP) and networks.box is None
        self.layers: list[Any] = list(body.layers) if vectors else []  # pyright: ignore[reportArgumentType]
        self.most = min((MOST // layer.weight[0].numel() for layer in self.layers), default=0)
        self.first: Tensor = self.layers[0].weight if vectors else torch.empty(0)
        self.at = 0

    def _look(self) -> None:
        """Find where parameters and scales lie: `FlatAdam` and conversions move them, all at once."""
        self.at = self.first.data_ptr()
        self.lowest = np.array(LOWEST[self.first.dtype], dtype=str(self.first.dtype).removeprefix("torch."))
        self.slope, self.shift = self.seen.slope.numpy(), self.seen.shift.numpy()
        shape = (self.input.banks, self.heads, -1)
        self.maps = [
            tuple(p.detach().numpy().reshape(*shape, p.shape[-1]) for p in (layer.weight, layer.bias))
            for layer in self.layers
        ]

    def fit(self, observation: Tensor) -> bool:
        """Whether ``[*B, A, F]`` are such rows."""
        few = 0 < observation.numel() <= self.most * observation.shape[-1]
        return few and observation.dtype == self.first.dtype and observation.device.type == "cpu"

    def choose(
        self,
        observation: Tensor,
        mask: Tensor,
        able: Tensor,
        *,
        threshold: float,
        strength: float,
        greedy: bool,
        generator: Generator,
    ) -> Chosen:
        """What is to be done.

        Args:
            observation: ``[*B, A, F]``.
            mask: ``[*B, A, P]``, the allowed actions.
            able: ``[*B, A]``, where memory may act.
            threshold: the logit of κ.
            strength: see `MemoryOperator`.
            greedy: take P's mode, and draw nothing.
            generator: of the draws.
        """
        if self.first.data_ptr() != self.at:
            self._look()
        output = self._output(observation.numpy())
        logits = np.where(mask.numpy(), output[0], self.lowest)
        action = logits.argmax(-1)
        least = output[1:-1].min(0).reshape(-1, output.shape[-1])
        least = least[np.arange(len(least)), action.reshape(-1)].reshape(action.shape)
        logit = confidence_logit(least, output[-1, ..., 0])
        logits -= logits.max(-1, keepdims=True)
        probs = np.exp(logits)
        logits -= np.log(probs.sum(-1, keepdims=True))
        taken = (logit > threshold) & able.numpy()
        weight = taken * self.lowest.dtype.type(strength)
        if not greedy:
            if strength < 1:
                taken = torch.rand(taken.shape, generator=generator).numpy() < weight
            # As in `MaskedCategorical`, and in its order of numbers.
            clocks = torch.empty(probs.shape[-1:] + probs.shape[:-1], dtype=observation.dtype)
            rings = np.maximum(clocks.exponential_(generator=generator).numpy(), TINY)
            action = (probs.transpose(probs.ndim - 1, *range(probs.ndim - 1)) / rings).argmax(0)
        taken, weight, logit, action, logits = map(torch.from_numpy, (taken, weight, logit, action, logits))
        return Chosen(taken, weight, logit.sigmoid(), action, {"log_probs": logits})

    def _output(self, observation: np.ndarray) -> np.ndarray:
        """``[*B, A, F] → [2 + E, *B, A, P]``: of P, of the members of C, and of C without an action (at index 0)."""
        batch, banks, who = observation.shape[:-1], self.input.banks, self.input.indicator
        x = observation * self.slope
        x += self.shift
        np.minimum(np.maximum(x, -10, out=x), 10, out=x)
        if not self.seen.all_valid:
            x = np.where(self.seen.valid.numpy(), x, np.zeros_like(x))
        if who is not None:
            x = np.concatenate([x, np.broadcast_to(who.numpy(), (*batch, len(who)))], -1)
        # [banks, 1, rows, features]: of all agents, or of each, to each of the heads.
        x = x.reshape(-1, banks, batch[-1] // banks, x.shape[-1]).swapaxes(0, 1).reshape(banks, 1, -1, x.shape[-1])
        for i, (weight, bias) in enumerate(self.maps):
            x = np.matmul(np.maximum(x, 0, out=x) if i > 0 else x, weight)
            x += bias
        x = x.reshape(banks, self.heads, -1, batch[-1] // banks, x.shape[-1]).transpose(1, 2, 0, 3, 4)
        return x.reshape(self.heads, *batch, x.shape[-1])
