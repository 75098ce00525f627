"""Deterministic policies over [*, A, F] observations, and the vectors in which a critic reads actions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.functional.gumbel import straight_through_gumbel
from marl_memory.networks.actor import AgentInput, Body
from marl_memory.spec import TaskSpec


class ActionVector(nn.Module):
    """Actions as vectors ``[*B, A, P]``, the form in which critics read them and gradients are taken.

    A real action is scaled to [−1, 1] by the agent's own bounds, padded dimensions are 0; one of P discrete actions is
    its one-hot vector.

    Args:
        spec: the task.
    """

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.continuous, self.size = spec.continuous, spec.action_size
        self.padded = len(set(spec.action_sizes)) > 1
        valid = torch.tensor(spec.action_valid)
        self.valid: Tensor
        self.unit: Tensor
        self.centre: Tensor
        self.half_range: Tensor
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("unit", torch.ones(()), persistent=False)  # its type is that of one-hot vectors
        if spec.continuous:
            low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
            self.register_buffer("centre", (high + low) / 2, persistent=False)
            # A padded dimension has an empty range: 1 there, so that nothing is divided by 0.
            self.register_buffer("half_range", torch.where(valid, (high - low) / 2, 1.0), persistent=False)

    def encode(self, action: Tensor) -> Tensor:
        """The vectors of actions ``[*B, A, P]``, or of integer actions ``[*B, A]``."""
        if self.continuous:
            return (action - self.centre) / self.half_range
        return F.one_hot(action, self.size).to(self.unit.dtype)

    def decode(self, vector: Tensor) -> Tensor:
        """The inverse of `encode`; of any vector of a discrete task, the action with the largest entry."""
        if self.continuous:
            return self.centre + self.half_range * vector
        return vector.argmax(-1)

    def without_padding(self, vector: Tensor) -> Tensor:
        """``vector`` ``[*B, A, P]`` of a continuous task, 0 in padded dimensions."""
        return torch.where(self.valid, vector, 0.0) if self.padded else vector


class DeterministicActor(TensorDictModuleBase):
    r"""μ(o_i) for every agent: $\tanh$ of a network, or for discrete actions the choice with the largest logit.

    Reads ``observation`` (and ``action_mask``), writes ``action`` in the environment's units.  Nothing is drawn.

    Args:
        spec: the task.
        body: maker of the network body.
        share_parameters: one network for all agents (with an agent indicator), or one each.
        init_generator: where initial weights are drawn from.
        temperature: of the Gumbel-softmax (discrete actions).
        agent_indicator: whether agents that share a network are told apart.
    """

    def __init__(
        self,
        spec: TaskSpec,
        body: Body,
        *,
        share_parameters: bool,
        init_generator: Generator,
        temperature: float = 1.0,
        agent_indicator: bool = True,
    ) -> None:
        super().__init__()
        keys = spec.keys
        self.spec, self.keys, self.temperature = spec, keys, temperature
        self.greedy = True  # as `Actor` has it; here there is nothing else
        inputs = [keys.observation] if spec.continuous else [keys.observation, keys.action_mask]
        self.in_keys: list[Any] = inputs
        self.out_keys: list[Any] = [keys.action]
        self.input = AgentInput(spec, share_parameters=share_parameters, normalise=False, indicate=agent_indicator)
        self.body = body(
            self.input.features, spec.action_size, banks=self.input.banks, output_gain=0.01, generator=init_generator
        )
        self.vectors = ActionVector(spec)

    def output(self, td: TensorDictBase, **hidden: Tensor) -> Tensor:
        """``[*B, A, P]``: actions scaled to [−1, 1], padding 0; or logits, the lowest number where forbidden.

        For ``hidden`` see `MLP`.
        """
        raw = self.body(self.input(td.get(self.keys.observation)), **hidden)
        if self.spec.continuous:
            return self.vectors.without_padding(torch.tanh(raw))
        return torch.where(td.get(self.keys.action_mask), raw, torch.finfo(raw.dtype).min)

    def relaxed(self, td: TensorDictBase, generator: Generator, **hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Action vectors ``[*B, A, P]`` that gradients pass through, and `output`, from which they come.

        Continuous: `output` itself, nothing is drawn.  Discrete: a straight-through Gumbel-softmax sample.
        """
        output = self.output(td, **hidden)
        if self.spec.continuous:
            return output, output
        return straight_through_gumbel(output, uniform(output, generator), temperature=self.temperature), output

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Choose greedily; sets ``action``."""
        return td.set(self.keys.action, self.vectors.decode(self.output(td)))


def uniform(like: Tensor, generator: Generator) -> Tensor:
    """Numbers drawn uniformly from (0, 1), in the shape and type of ``like``."""
    u = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    return u.clamp_(min=torch.finfo(like.dtype).tiny)
