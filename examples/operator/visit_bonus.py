"""A memory operator of one's own: an intrinsic reward for observations seldom seen, by hashed counts.

marl-memory train --config-dir . env=toy/rendezvous algorithm=mappo memory=[visit_bonus]
"""

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.memory.operator import MemoryOperator, Stage
from marl_memory.spec import TaskSpec


class VisitBonus(MemoryOperator):
    r"""Adds $\eta / \sqrt{1 + n(o)}$ to the reward, n(o) counting how often memory holds observations like o.

    Two observations are alike if the signs of ``bits`` random projections of them agree.

    Args:
        spec: the task.
        seed: of the projections.
        strength: η; 0 leaves learning exactly as it is.
        bits: more bits tell finer; memory holds 2 ** bits counters.

    Reference: Tang et al., "#Exploration" (2017), section 2.2.
    """

    stage = Stage.REWARD
    writes_on = "update"  # after the update: what is recalled never holds the batch itself

    def __init__(self, *, spec: TaskSpec, seed: int, strength: float = 0.01, bits: int = 10) -> None:
        super().__init__()
        if strength < 0 or bits < 1:
            raise ValueError(f"strength={strength} must not be negative, bits={bits} must be at least 1")
        self.keys, self.strength = spec.keys, strength
        self.write_keys = [self.keys.observation, self.keys.alive]
        self.in_keys, self.out_keys = [*self.write_keys, self.keys.learn_reward], [self.keys.learn_reward]
        generator = Generator().manual_seed(seed)
        self.register_buffer("projection", torch.randn(spec.observation_size, bits, generator=generator))
        self.register_buffer("powers", 2 ** torch.arange(bits))
        self.register_buffer("counts", torch.zeros(2**bits, dtype=torch.int64))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Recall: add the bonus of living agents to ``learn_reward`` ``[*B, A, 1]``, in place."""
        if len(self) > 0 and self.strength > 0:
            bonus = self.strength / (1 + self.counts[self.code(td)]).sqrt()
            td.get(self.keys.learn_reward).add_((bonus * td.get(self.keys.alive)).unsqueeze(-1))
        return td

    def write(self, td: TensorDictBase) -> None:
        """Remember: count the observations of living agents."""
        seen = self.code(td)[td.get(self.keys.alive)]
        self.counts += torch.bincount(seen, minlength=len(self.counts))

    def code(self, td: TensorDictBase) -> Tensor:
        """``[*B, A]``: the counter of each agent's observation."""
        return ((td.get(self.keys.observation) @ self.projection > 0) * self.powers).sum(-1)

    def clear(self) -> None:
        """Forget everything."""
        self.counts.zero_()

    def __len__(self) -> int:
        return int(self.counts.sum())
