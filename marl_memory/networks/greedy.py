"""Values of every discrete action over [*, A, F] observations, and the policy that is greedy in them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Generator, Tensor, nn

from marl_memory.networks.actor import AgentInput, Body
from marl_memory.spec import TaskSpec


class GreedyActor(TensorDictModuleBase):
    r"""Q_i(o_i, ·) for every agent, C of them side by side (twins), and the best allowed action by the first.

    Reads ``observation`` and ``action_mask``, writes ``action``.  Nothing is drawn.  A dueling network gives the value
    of the state and the advantages of the actions; its streams share all layers but the last:

    $$
    Q(o, a) = V(o) + A(o, a) - \tfrac{1}{|\mathcal{A}_i|} \textstyle\sum_{a'} A(o, a')
    $$

    with the mean over all actions that the agent has, allowed at the moment or not.

    Args:
        spec: the task, whose actions are discrete.
        body: maker of the network body.
        critics: C.
        dueling: see above.
        share_parameters: one network for all agents (with an agent indicator), or one each.
        init_generator: where initial weights are drawn from.
        agent_indicator: whether agents that share a network are told apart.

    Reference: Wang et al. 2016 (arXiv 1511.06581), eq. 9.
    """

    def __init__(
        self,
        spec: TaskSpec,
        body: Body,
        *,
        critics: int,
        dueling: bool,
        share_parameters: bool,
        init_generator: Generator,
        agent_indicator: bool = True,
    ) -> None:
        super().__init__()
        self.spec, self.keys, self.dueling = spec, spec.keys, dueling
        self.greedy = True  # as `Actor` has it; here there is nothing else
        self.in_keys: list[Any] = [self.keys.observation, self.keys.action_mask]
        self.out_keys: list[Any] = [self.keys.action]
        self.input = AgentInput(spec, share_parameters=share_parameters, normalise=False, indicate=agent_indicator)
        outputs = spec.action_size + dueling
        self.twins = nn.ModuleList(
            body(self.input.features, outputs, banks=self.input.banks, output_gain=1.0, generator=init_generator)
            for _ in range(critics)
        )
        valid = torch.tensor(spec.action_valid, dtype=torch.get_default_dtype())
        self.share: Tensor  # [A, P], what an action counts in the mean over its agent's
        self.register_buffer("share", valid / valid.sum(-1, keepdim=True), persistent=False)

    @property
    def body(self) -> nn.Module:
        """The network that chooses: the first critic's."""
        return self.twins[0]

    def values(self, td: TensorDictBase) -> Tensor:
        """``[*B, A, P, C]``, those of forbidden and of padded actions too: see `masked`."""
        x = self.input(td.get(self.keys.observation))
        return torch.stack([self._of(twin, x) for twin in self.twins], dim=-1)

    def masked(self, td: TensorDictBase, values: Tensor) -> Tensor:
        """``values`` ``[*B, A, P, C]`` with the lowest number where an action is forbidden."""
        allowed = td.get(self.keys.action_mask).unsqueeze(-1)
        return torch.where(allowed, values, torch.finfo(values.dtype).min)

    def choose(self, td: TensorDictBase) -> Tensor:
        """``[*B, A]``, the allowed action that the first critic values most."""
        agents = td.get(self.keys.group)  # one look-up of a path costs as much as two of a name
        values = self._of(self.body, self.input(agents.get(self.keys.observation[-1])))
        allowed = agents.get(self.keys.action_mask[-1])
        return torch.where(allowed, values, torch.finfo(values.dtype).min).argmax(-1)

    def _of(self, body: nn.Module, x: Tensor) -> Tensor:
        """``[*B, A, P]`` by one critic."""
        output: Tensor = body(x)
        if not self.dueling:
            return output
        advantage, value = output[..., :-1], output[..., -1:]
        return value + advantage - (self.share * advantage).sum(-1, keepdim=True)

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose greedily; sets ``action``."""
        return td.set(self.keys.action, self.choose(td))
