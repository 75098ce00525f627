"""Action-value functions: of the own observation and action, or of the global state and all actions (centralised)."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.networks.actor import AgentInput, Body
from marl_memory.spec import TaskSpec


class ActionValueCritic(nn.Module):
    """Q_i for every agent, C of them side by side (twins).

    | centralised | shared | network                                                                                   |
    |-------------|--------|-------------------------------------------------------------------------------------------|
    | no          | yes    | Q(o_i, a_i, i), one network with an agent indicator                                       |
    | no          | no     | Q_i(o_i, a_i), A networks                                                                 |
    | yes         | yes    | one of state and all actions: one value where the reward is common, else one head each    |
    | yes         | no     | Q_i(s, a_1 … a_A), A networks                                                             |

    Actions are vectors (see `ActionVector`).

    Args:
        spec: the task.
        body: maker of the network body.
        centralised: read ``state`` and all actions instead of the own observation and action.
        share_parameters: one network for all agents, or one each.
        critics: C.
        init_generator: where initial weights are drawn from.
        agent_indicator: whether agents that share a network of their own observations are told apart.
        action_twice: whether bodies read the actions once more after their first layer (``again`` of `Body`).
    """

    def __init__(
        self,
        spec: TaskSpec,
        body: Body,
        *,
        centralised: bool,
        share_parameters: bool,
        critics: int,
        init_generator: Generator,
        agent_indicator: bool = True,
        action_twice: bool = False,
    ) -> None:
        super().__init__()
        self.keys, self.n_agents = spec.keys, spec.n_agents
        self.centralised, self.banks = centralised, 1 if share_parameters else spec.n_agents
        self.in_keys = [spec.keys.state if centralised else spec.keys.observation]
        heads = 1
        if centralised:
            features = spec.state_size + spec.n_agents * spec.action_size
            heads = 1 if spec.common_reward or not share_parameters else spec.n_agents
        else:
            self.input = AgentInput(spec, share_parameters=share_parameters, normalise=False, indicate=agent_indicator)
            features = self.input.features + spec.action_size
        self.one_head = heads == 1
        vectors = spec.action_size * (spec.n_agents if centralised else 1)
        more = {"again": vectors} if action_twice else {}
        self.mine: Tensor
        # [A, A, 1]: whose own action row i of a joint action holds
        self.register_buffer("mine", torch.eye(spec.n_agents, dtype=torch.bool).unsqueeze(-1), persistent=False)
        self.twins = nn.ModuleList(
            body(features, heads, banks=self.banks, output_gain=1.0, generator=init_generator, **more)
            for _ in range(critics)
        )

    def forward(self, td: TensorDictBase, vectors: Tensor, *, critics: slice = slice(None)) -> Tensor:
        """Values ``[*B, A, C]`` of one joint action.

        Args:
            td: holds ``state`` or ``observation``.
            vectors: ``[*B, A, P]``, what each agent does.
            critics: which of the C.
        """
        if not self.centralised:
            x = torch.cat([self.input(td.get(self.keys.observation)), vectors], dim=-1)
        else:
            x = torch.cat([td.get(self.keys.state), vectors.flatten(-2)], dim=-1)
            if self.banks > 1:
                x = x.unsqueeze(-2).expand(*x.shape[:-1], self.n_agents, x.shape[-1])
        return torch.stack([self._per_agent(twin(x)) for twin in self.twins[critics]], dim=-1)

    def of_own_actions(self, td: TensorDictBase, own: Tensor, others: Tensor, *, critics: slice) -> Tensor:
        """Q_i at agent i's ``own`` action and the others' ``others``, both ``[*B, A, P]``: ``[*B, A, C]``.

        The value of agent i depends on no other row of ``own``, so that its gradient is that of Lowe et al. 2017
        (arXiv 1706.02275), eq. 6.
        """
        if not self.centralised:
            return self(td, own, critics=critics)
        a = self.n_agents
        joint = torch.where(self.mine, own.unsqueeze(-3), others.unsqueeze(-3))  # [*B, A, A, P]
        state = td.get(self.keys.state).unsqueeze(-2)
        x = torch.cat([state.expand(*state.shape[:-2], a, -1), joint.flatten(-2)], dim=-1)
        values = [twin(x) for twin in self.twins[critics]]
        if self.banks == 1 and not self.one_head:  # head i of row i
            return torch.stack([value.diagonal(dim1=-2, dim2=-1) for value in values], dim=-1)
        return torch.cat(values, dim=-1)

    def _per_agent(self, value: Tensor) -> Tensor:
        """``[*B, A]`` from a body's output for one joint action."""
        if self.centralised and self.banks == 1:
            return value.expand(*value.shape[:-1], self.n_agents)
        return value.squeeze(-1)
