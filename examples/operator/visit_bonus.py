"""A memory operator of one's own: an intrinsic reward for observations seldom seen, by hashed counts.

marl-memory train --config-dir . env=toy/rendezvous algorithm=mappo memory=[visit_bonus]
"""

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.memory.operator import MemoryOperator, Stage, put
from marl_memory.spec import TaskSpec


class VisitBonus(MemoryOperator):
    r"""Adds $\eta / \sqrt{1 + n(o)}$ to the reward, n(o) counting how often memory holds observations like o.

    Two observations are alike if the signs of ``bits`` random projections of them agree.

    Args:
        spec: the task.
        seed: of the projections.
        eta: η.
        bits: more bits tell finer; memory holds 2 ** bits counters.
        strength, strength_final: what η is multiplied by, and what that changes to; see `MemoryOperator`.

    Reference: Tang et al., "#Exploration" (2017), section 2.2.
    """

    stage = Stage.REWARD
    writes_on = "update"  # after the update: what is recalled never holds the batch itself

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int,
        eta: float = 0.01,
        bits: int = 10,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        if eta < 0 or bits < 1:
            raise ValueError(f"eta={eta} must not be negative, bits={bits} must be at least 1")
        self.keys, self.eta = spec.keys, eta
        self.write_keys = [self.keys.observation, self.keys.alive]
        self.in_keys, self.out_keys = [*self.write_keys, self.keys.learn_reward], [self.keys.learn_reward]
        generator = Generator().manual_seed(seed)
        self.register_buffer("projection", torch.randn(spec.observation_size, bits, generator=generator))
        self.register_buffer("powers", 2 ** torch.arange(bits))
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)
        self.register_buffer("counts", torch.zeros(2**bits, dtype=torch.int64))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Recall: add the bonus of living agents to ``learn_reward`` ``[*B, A, 1]``, in place."""
        if len(self) > 0 and self.strength > 0:
            bonus = self.strength * self.eta / (1 + self.counts[self.code(td)]).sqrt()
            reward = td.get(self.keys.learn_reward)
            put(td, self.keys.learn_reward, reward + (bonus * td.get(self.keys.alive)).unsqueeze(-1))
        return td

    def write(self, td: TensorDictBase) -> None:
        """Remember: count the observations of living agents."""
        seen = self.code(td)[td.get(self.keys.alive)]
        self.counts += torch.bincount(seen, minlength=len(self.counts))

    def code(self, td: TensorDictBase) -> Tensor:
        """``[*B, A]``: the counter of each agent's observation."""
        observation = torch.where(self.valid, td.get(self.keys.observation), 0.0)  # padding says nothing
        return ((observation @ self.projection > 0) * self.powers).sum(-1)

    def clear(self) -> None:
        """Forget everything."""
        self.counts.zero_()

    def __len__(self) -> int:
        """Counters in use."""
        return int((self.counts > 0).sum())

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """What is logged where the host logs this stage."""
        return {"rows": torch.tensor(float(len(self))), "strength": torch.tensor(self.strength)}
