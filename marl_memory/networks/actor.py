"""Stochastic policies over [*, A, F] observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Generator, Tensor, nn

from marl_memory.networks.distributions import LOWEST, Box, Distribution, MaskedCategorical, TanhNormal
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.spec import TaskSpec


class Body(Protocol):
    """Makes a network body: `MLP`, or for pictures `CNN`, its architecture already chosen (``functools.partial``)."""

    def __call__(
        self,
        in_features: int,
        out_features: int,
        *,
        banks: int,
        output_gain: float,
        generator: Generator,
        again: int = 0,
    ) -> nn.Module:
        """A module ``[*B, in] → [*B, out]`` (one bank) or ``[*B, A, in] → [*B, A, out]`` (A banks).

        The last ``again`` inputs are read by the second layer too; who never asks for it need not offer it.
        For memories that find rows by the host's features it has a ``hidden_size`` H, and its ``forward`` takes
        ``hidden``, see `MLP`.
        """
        ...


class AgentInput(nn.Module):
    """What a network over local observations sees: the observation, normalised or not, and who is looking.

    The agent's one-hot indicator is appended where agents share parameters; a single agent needs none.

    Args:
        spec: the task.
        share_parameters: whether agents share parameters (and observation statistics).
        normalise: whether observations are scaled by their running mean and deviation.
        indicate: whether agents that share parameters are told apart.

    Raises:
        ValueError: if agents that differ in size are to share parameters and not to be told apart, or pictures are to
            be normalised.
    """

    def __init__(self, spec: TaskSpec, *, share_parameters: bool, normalise: bool, indicate: bool = True) -> None:
        super().__init__()
        self.indicator: Tensor
        self.valid: Tensor
        sizes = set(zip(spec.observation_sizes, spec.action_sizes, strict=True))
        if share_parameters and not indicate and len(sizes) > 1:
            raise ValueError(
                f"algorithm.agent_indicator=false does not fit {spec.name}, whose agents differ (observations "
                f"{spec.observation_sizes}, actions {spec.action_sizes}): set it to true, or share no parameters"
            )
        if normalise and spec.picture:
            raise ValueError(
                f"algorithm.normalise_observations=true does not fit {spec.name}, whose observations are pictures: set "
                "it to false (networks divide pictures by 255 themselves)"
            )
        indicate = indicate and share_parameters and spec.n_agents > 1
        self.banks = 1 if share_parameters else spec.n_agents
        self.features = spec.observation_size + (spec.n_agents if indicate else 0)
        # Of the pictures' own type, so that these stay bytes on their way to the network.
        eye = torch.eye(spec.n_agents, dtype=torch.uint8 if spec.picture else None)
        self.register_buffer("indicator", eye if indicate else None, persistent=False)
        self.moments = RunningMoments(self.banks, spec.observation_size) if normalise else None
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)

    def update_moments(self, observation: Tensor, alive: Tensor) -> None:
        """Take observations ``[*B, A, F]`` of agents ``alive`` ``[*B, A]`` into the statistics, without padding."""
        if self.moments is not None:
            self.moments.update(observation, alive.unsqueeze(-1) & self.valid)

    def forward(self, observation: Tensor) -> Tensor:
        """``[*B, A, F] → [*B, A, features]``."""
        if self.moments is not None:
            observation = torch.where(self.valid, self.moments.normalise(observation), 0.0)
        if self.indicator is None:
            return observation
        return torch.cat([observation, self.indicator.expand(*observation.shape[:-1], -1)], dim=-1)


class Actor(TensorDictModuleBase):
    """π(a_i | o_i) for every agent: masked categorical on discrete tasks, tanh-normal on continuous ones.

    Reads ``observation`` (and ``action_mask``), writes ``action`` and ``log_prob`` (see `Keys` for shapes).  It samples
    from a generator of its own; with ``greedy=True`` it takes the mode and draws nothing.  ``densities=False`` leaves
    ``log_prob`` to whoever has many rows at once: of a few squashed Gaussians it costs more than the action.

    Args:
        spec: the task.
        body: maker of the network body.
        share_parameters: one network for all agents (with an agent indicator), or one each.
        normalise_observations: scale observations by running statistics.
        init_generator: where initial weights are drawn from.
        seed: of the sampling generator.
        agent_indicator: whether agents that share a network are told apart.
        value_head: the network has one more output, V(o_i), see `value`.
    """

    def __init__(
        self,
        spec: TaskSpec,
        body: Body,
        *,
        share_parameters: bool,
        normalise_observations: bool,
        init_generator: Generator,
        seed: int,
        agent_indicator: bool = True,
        value_head: bool = False,
    ) -> None:
        super().__init__()
        keys = spec.keys
        self.spec, self.keys, self.greedy, self.densities = spec, keys, False, True
        inputs = [keys.observation] if spec.continuous else [keys.observation, keys.action_mask]
        self.in_keys: list[Any] = inputs  # TensorDict keys: names or paths of names
        self.out_keys: list[Any] = [keys.action, keys.log_prob]
        self.input = AgentInput(
            spec, share_parameters=share_parameters, normalise=normalise_observations, indicate=agent_indicator
        )
        self.value_head = value_head
        self.body = body(
            self.input.features,
            spec.action_size + value_head,
            banks=self.input.banks,
            output_gain=0.01,
            generator=init_generator,
        )
        self.generator = Generator().manual_seed(seed)
        self.log_std = nn.Parameter(torch.zeros(self.input.banks, spec.action_size)) if spec.continuous else None
        bounds = (spec.action_low, spec.action_high, spec.action_valid)
        self.box = Box(*map(torch.tensor, bounds)) if spec.continuous else None

    def distribution(self, td: TensorDictBase, **hidden: Tensor) -> Distribution:
        """The policy at the observations of ``td``; batch shape ``[*B, A]``.  For ``hidden`` see `MLP`."""
        output = self._output(td, **hidden)
        return self._policy(output[..., :-1] if self.value_head else output, td)

    def evaluate(self, td: TensorDictBase) -> tuple[Distribution, Tensor]:
        """`distribution` and `value` at once; only with ``value_head``."""
        output = self._output(td)
        return self._policy(output[..., :-1], td), output[..., -1:]

    def value(self, td: TensorDictBase) -> Tensor:
        """V(o_i) ``[*B, A, 1]``, in the network's own units; only with ``value_head``."""
        return self._output(td)[..., -1:]

    def _output(self, td: TensorDictBase, **hidden: Tensor) -> Tensor:
        return self.body(self.input(td.get(self.keys.observation)), **hidden)

    def _policy(self, output: Tensor, td: TensorDictBase) -> Distribution:
        if self.log_std is None or self.box is None:
            return MaskedCategorical(output, td.get(self.keys.action_mask))
        return TanhNormal(output, self.log_std, self.box)

    def of_parameters(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """The distribution of this actor's kind with ``parameters`` as `Distribution` tells them."""
        if self.box is None:
            log_probs = parameters["log_probs"]
            return MaskedCategorical(log_probs, log_probs > LOWEST[log_probs.dtype] / 2)
        return TanhNormal(parameters["loc"], parameters["scale"].log(), self.box)

    def unsquash(self, action: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and their log-probabilities ``[*B, A]`` before squashing, which cancels in a ratio of densities."""
        if self.box is None:
            return action, log_prob
        u, log_slope = self.box.unsquash(action)
        return u, log_prob + log_slope

    def settled(self, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A reference of a REGION operator as the distributions' `kl_from` reads it, computed once for many calls."""
        return (MaskedCategorical if self.box is None else TanhNormal).settled(reference)

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions; sets ``action`` and, with ``densities``, ``log_prob``."""
        distribution, log_prob = self.distribution(td), None
        if self.greedy:
            action = distribution.mode
            log_prob = distribution.log_prob(action) if self.densities else None
        elif self.densities:
            action, log_prob = distribution.sample(self.generator)
        else:
            action = distribution.draw(self.generator)
        agents = td.get(self.keys.group)  # by a path a name takes half as long again to be set
        agents.set(self.keys.action[-1], action)
        if log_prob is not None:
            agents.set(self.keys.log_prob[-1], log_prob)
        return td
