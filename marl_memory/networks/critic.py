"""State-value functions: of the own observation, or of the global state (centralised), or beside the actor."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.networks.actor import Actor, AgentInput, Body
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.spec import TaskSpec


class Critic(nn.Module):
    """V_i for every agent, from its own observation or from the global state.

    | centralised | shared | network                                                                              |
    |-------------|--------|--------------------------------------------------------------------------------------|
    | no          | yes    | V(o_i, i), one network with an agent indicator                                       |
    | no          | no     | V_i(o_i), A networks                                                                 |
    | yes         | yes    | one of the state: one value where the reward is common, else one head per agent      |
    | yes         | no     | V_i(s), A networks of the state                                                      |

    Args:
        spec: the task.
        body: maker of the network body.
        centralised: read ``state`` instead of ``observation``.
        share_parameters: one network for all agents, or one each.
        normalise_observations: scale inputs by running statistics.
        init_generator: where initial weights are drawn from.
        agent_indicator: whether agents that share a network of their own observations are told apart.
    """

    def __init__(
        self,
        spec: TaskSpec,
        body: Body,
        *,
        centralised: bool,
        share_parameters: bool,
        normalise_observations: bool,
        init_generator: Generator,
        agent_indicator: bool = True,
    ) -> None:
        super().__init__()
        self.keys, self.n_agents = spec.keys, spec.n_agents
        self.centralised, self.banks = centralised, 1 if share_parameters else spec.n_agents
        self.in_keys = [spec.keys.state if centralised else spec.keys.observation]
        self.moments = RunningMoments(1, spec.state_size) if centralised and normalise_observations else None
        if centralised:
            features = spec.state_size
            heads = 1 if spec.common_reward or not share_parameters else spec.n_agents
        else:
            self.input = AgentInput(
                spec, share_parameters=share_parameters, normalise=normalise_observations, indicate=agent_indicator
            )
            features, heads = self.input.features, 1
        self.body = body(features, heads, banks=self.banks, output_gain=0.01, generator=init_generator)

    def forward(self, td: TensorDictBase) -> Tensor:
        """Values ``[*B, A, 1]``, in the network's own units."""
        if not self.centralised:
            return self.body(self.input(td.get(self.keys.observation)))
        state = td.get(self.keys.state)
        if self.moments is not None:
            state = self.moments.normalise(state.unsqueeze(-2)).squeeze(-2)
        if self.banks > 1:
            return self.body(state.unsqueeze(-2).expand(*state.shape[:-1], self.n_agents, -1))
        return self.body(state).unsqueeze(-1).expand(*state.shape[:-1], self.n_agents, 1)

    def update_moments(self, td: TensorDictBase) -> None:
        """Take a batch into the running statistics of the inputs (nothing where inputs are not normalised)."""
        alive = td.get(self.keys.alive)
        if not self.centralised:
            self.input.update_moments(td.get(self.keys.observation), alive)
        elif self.moments is not None:
            self.moments.update(td.get(self.keys.state).unsqueeze(-2), alive.any(-1)[..., None, None])


class ValueHead(nn.Module):
    """V(o_i) as the last output of the actor's network: no parameters and no statistics of its own.

    Args:
        actor: with ``value_head``.
    """

    centralised = False

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.value = actor.value  # a method, not the module: parameters are the actor's only
        self.banks, self.in_keys = actor.input.banks, [actor.keys.observation]

    def forward(self, td: TensorDictBase) -> Tensor:
        """Values ``[*B, A, 1]``, in the network's own units."""
        return self.value(td)

    def update_moments(self, td: TensorDictBase) -> None:
        """Nothing: the actor's are updated as the actor's."""
