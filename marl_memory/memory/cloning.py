"""The policy learns what memory did in its place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.functional.returns import masked_mean
from marl_memory.keys import Entries, Entry
from marl_memory.memory.operator import MemoryOperator, Stage, check_positive, put
from marl_memory.spec import TaskSpec

NAME = "cloning"

NOBODY = {"log_probs": torch.finfo(torch.float32).min, "loc": 0.0, "scale": 1.0}
"""What stands where memory did not act: no probability anywhere, so that a KL of weight 0 is finite."""


class Cloning(MemoryOperator):
    r"""Beside `Reflection`, in the same ``memory=[…]``: draws the policy to memory's where memory acted.

    $$
    L = L_{\mathrm{host}} + c\, \mathbb{E}\,[\, m\, \mathrm{KL}(P_\omega(\cdot|o) \,\|\, \pi_\theta(\cdot|o)) \,]
    $$

    m is 1 where memory's action was executed and 0 elsewhere: just there the host's own policy loss says nothing.  It
    remembers nothing itself.  A run whose host has no such stage leaves it out: those with a replay need no such term.

    Args:
        spec: the task.
        seed: nothing is drawn.
        coefficient: c, multiplied by strength.
        strength, strength_final: see `MemoryOperator`.

    Raises:
        ValueError: for a value out of range.
    """

    stage: ClassVar[Stage] = Stage.REGION
    writes_on = "update"
    companion = True

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        coefficient: float = 0.1,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        check_positive(coefficient=coefficient)
        self.spec, self.coefficient = spec, coefficient
        k, shape = spec.keys, (spec.n_agents, spec.action_size)
        self.names = ("loc", "scale") if spec.continuous else ("log_probs",)
        self.weight = (*k.region, NAME, "weight")
        self._entries: Entries = {
            **{(*k.region, NAME, name): Entry(shape) for name in self.names},
            self.weight: Entry((spec.n_agents,)),
        }
        self.in_keys: list[Any] = [k.alive, k.taken, *map(k.memory_policy, self.names)]
        self.out_keys = list(self._entries)
        self.write_keys: list[Any] = []

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return self._entries

    def write(self, td: TensorDictBase) -> None:
        """Nothing is remembered."""

    def clear(self) -> None:
        """There is nothing to forget."""

    def __len__(self) -> int:
        return 0

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Set memory's policy as reference, and its weight ``[*B, A]``.

        Raises:
            KeyError: if no operator acted before.
        """
        k = self.spec.keys
        taken: Tensor | None = td.get(k.taken, None)
        if taken is None:
            raise KeyError(
                "memory=cloning reads what a memory at the stage ACT did: list one, as reflection, beside it"
            )
        taken = torch.logical_and(taken, td.get(k.alive))
        for name in self.names:
            x = td.get(k.memory_policy(name))
            put(td, (*k.region, NAME, name), torch.where(taken.unsqueeze(-1), x, NOBODY[name]))
        put(td, self.weight, taken * (self.strength * self.coefficient))
        return td

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Where it acted: the share of rows, and the mean weight."""
        alive, weight = td.get(self.spec.keys.alive), td.get(self.weight)
        return {
            "strength": torch.tensor(self.strength),
            "used": ((weight > 0) & alive).sum().float(),
            "effective_strength": masked_mean(weight, alive),
        }
