"""The networks of `Reflection`: what to do where something went well before, and how far that can be trusted."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.memory.scope import state_there
from marl_memory.networks.actor import AgentInput, Body
from marl_memory.networks.cnn import CNN
from marl_memory.networks.deterministic import ActionVector
from marl_memory.networks.distributions import Box, Distribution, MaskedCategorical, TanhNormal
from marl_memory.networks.mlp import MLP
from marl_memory.networks.normalisation import RunningMoments
from marl_memory.spec import TaskSpec

Array = TypeVar("Array", Tensor, np.ndarray)

NARROWEST = -3.0
"""The least log-deviation of a prediction, before squashing: successes that all did the same would make it a point."""

LIMIT = 0.995
"""Actions are predicted within ± this share of their bounds: beyond, the squashed Gaussian's own place is far out."""


def bodies(spec: TaskSpec, hidden: tuple[int, ...]) -> Body:
    """Makes network bodies for what the task's agents observe: vectors, or pictures."""
    if spec.picture is not None:
        return partial(CNN, picture=spec.picture, hidden=hidden)
    return partial(MLP, hidden=hidden)


class Seen(nn.Module):
    """What networks read of observations or states: padding 0, the rest scaled by statistics that only `settle` moves.

    Args:
        valid: ``[A, F]`` bool (of states ``[1, S]``): False marks padding.
        banks: A where each agent has scales of its own, else 1.
        pictures: they are left as they are: networks of pictures divide them by 255 themselves.
    """

    def __init__(self, valid: Tensor, *, banks: int = 1, pictures: bool) -> None:
        super().__init__()
        self.pictures = pictures
        self.moments = RunningMoments(banks, valid.shape[-1])
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("shift", torch.zeros(banks, valid.shape[-1]))
        self.register_buffer("slope", torch.ones(banks, valid.shape[-1]))
        self.all_valid = bool(valid.all())

    valid: Tensor
    shift: Tensor
    slope: Tensor

    def update(self, x: Tensor, there: Tensor) -> None:
        """Take in rows ``[*B, A, F]`` where ``there``, ``[*B, A, F]`` or ``[*B, A, 1]``, if they are finite."""
        if self.pictures:
            return
        self.moments.update(x, there & x.isfinite().all(-1, keepdim=True) & self.valid)

    def settle(self) -> None:
        """Scale by what was taken in."""
        self.slope.copy_(1 / self.moments.std)
        self.shift.copy_(-self.moments.mean * self.slope)

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, A, F] → [*B, A, F]``."""
        if self.pictures:
            return x
        scaled = torch.addcmul(self.shift, x, self.slope).clamp_(-10, 10)
        return scaled if self.all_valid else torch.where(self.valid, scaled, 0.0)


class Judged(NamedTuple):
    """What the networks say of observations ``[*B, A, F]`` and of an action at each.

    Args:
        policy: P_ω.
        action: ``[*B, A]`` or ``[*B, A, P]``.
        logits: ``[*B, A, E]`` of C for the action.
        outlook: ``[*B, A]``, the logit of C of the observation alone.
    """

    policy: Distribution
    action: Tensor
    logits: Tensor
    outlook: Tensor

    @property
    def logit(self) -> Tensor:
        """``[*B, A]``, of the confidence in the action: see `confidence_logit`."""
        return confidence_logit(self.logits.amin(-1), self.outlook)


class Networks(nn.Module):
    r"""$P_\omega(a_i | o_i)$, E members of $C_\psi(o_i, a_i)$, and one $C_\psi(o_i)$ that sees no action.

    To judge the team there are also E of $C(s, a_1, …, a_A)$, in training only: they judge the joint action, and the
    others learn what they say.

    All actions of a discrete task are judged at once: P and C are then heads of equal shape, 2 + E side by side in one
    body (a few rows cost more in calls than in arithmetic).  Real actions are an input of C; C(o) is given zeros.

    Args:
        spec: the task.
        apart: agents share no parameters; else they do, and are told apart by their number.
        joint: whether the team is judged as one.
        hidden: widths of hidden layers.
        members: E.
        seed: of the initial weights.
    """

    def __init__(
        self, spec: TaskSpec, *, apart: bool, joint: bool, hidden: tuple[int, ...], members: int, seed: int
    ) -> None:
        super().__init__()
        g, make, p = Generator().manual_seed(seed), bodies(spec, hidden), spec.action_size
        self.members, self.apart, self.own_state = members, apart, spec.own_state
        pictures = spec.picture is not None
        self.input = AgentInput(spec, share_parameters=not apart, normalise=False)
        self.vectors = ActionVector(spec)
        width, banks = self.input.features, self.input.banks
        self.observed = Seen(torch.tensor(spec.observation_valid), banks=banks, pictures=pictures)
        self.heads = 1 if spec.continuous else 2 + members
        self.policy = make(width, p, banks=banks * self.heads, output_gain=0.1, generator=g)
        self.box = self.judges = self.log_std = None
        if spec.continuous:
            self.log_std = nn.Parameter(torch.zeros(banks, p))
            self.box = Box(*map(torch.tensor, (spec.action_low, spec.action_high, spec.action_valid)))
            self.judges = make(width + p, 1, banks=banks * (members + 1), output_gain=0.1, generator=g)
        self.team = self.stated = None
        if joint:
            self.stated = Seen(torch.ones(1, spec.state_size, dtype=torch.bool), pictures=pictures)
            size = spec.state_size + spec.n_agents * p
            self.team = make(size, 1, banks=members, output_gain=0.1, generator=g)

    @torch.no_grad()
    def widen(self) -> None:
        """Bring P back to `NARROWEST` after a step of learning: a limit where it is read would end its gradient."""
        if self.log_std is not None:
            self.log_std.clamp_(min=NARROWEST)

    def settle(self) -> None:
        """Scale observations, and states, by what their statistics took in."""
        for seen in (self.observed, self.stated):
            if seen is not None:
                seen.settle()

    def seen(self, observation: Tensor) -> Tensor:
        """``[*B, A, F] → [*B, A, F']``: what `both` reads."""
        return self.input(self.observed(observation))

    def both(self, seen: Tensor, mask: Tensor | None, action: Tensor | None = None) -> Judged:
        """P_ω, and C at an action.

        Args:
            seen: ``[*B, A, F']``, see `seen`.
            mask: ``[*B, A, P]``, the allowed actions, where they are discrete.
            action: ``[*B, A]`` or ``[*B, A, P]``; None: P's mode.
        """
        output = self._side_by_side(self.policy, _again(seen, self.heads))
        if self.log_std is None or self.box is None:
            assert mask is not None
            policy = MaskedCategorical(output[..., 0, :], mask)
            action = policy.mode if action is None else action
            index = action[..., None, None].expand(*action.shape, self.members, 1)
            return Judged(policy, action, output[..., 1:-1, :].gather(-1, index).squeeze(-1), output[..., -1, 0])
        assert self.judges is not None
        policy = TanhNormal(output[..., 0, :], self.log_std, self.box)
        action = policy.mode if action is None else action
        done = self._encoded(action)
        done = torch.cat([_again(done, self.members), torch.zeros_like(done).unsqueeze(-2)], -2)
        x = torch.cat([_again(seen, self.members + 1), done], -1)
        logits = self._side_by_side(self.judges, x).squeeze(-1)
        return Judged(policy, action, logits[..., :-1], logits[..., -1])

    def _side_by_side(self, body: nn.Module, x: Tensor) -> Tensor:
        """``[*B, A, banks, in] → [*B, A, banks, out]``: a body of ``banks``, of all agents or of each."""
        if self.input.banks == 1:
            return body(x)
        return body(x.flatten(-3, -2)).unflatten(-2, x.shape[-3:-1])

    def log_density(self, policy: Distribution, action: Tensor) -> Tensor:
        """log P_ω ``[*B, A]`` of actions that were done, before squashing and a little inside the bounds."""
        if self.box is None:
            return policy.log_density(action)
        inside = self.vectors.decode(self.vectors.encode(action).clamp(-LIMIT, LIMIT))
        return policy.log_density(self.box.unsquash(inside)[0])

    def team_confidence(self, state: Tensor, action: Tensor, alive: Tensor) -> Tensor:
        """Logits of the joint C ``[*B, 1, E]``; the dead do nothing, and are nothing in a state of observations."""
        assert self.team is not None and self.stated is not None
        vectors = torch.where(alive.unsqueeze(-1), self._encoded(action), 0.0)
        there = state_there(alive, self.observed.valid, own=self.own_state).unsqueeze(-2)
        scaled = torch.where(there, self.stated(state.unsqueeze(-2)), 0)
        x = torch.cat([scaled, vectors.flatten(-2).unsqueeze(-2)], -1)
        return self.team(x.expand(*x.shape[:-2], self.members, x.shape[-1])).squeeze(-1).unsqueeze(-2)

    def _encoded(self, action: Tensor) -> Tensor:
        return self.vectors.without_padding(self.vectors.encode(action))


def _again(x: Tensor, banks: int) -> Tensor:
    """``[*B, in] → [*B, banks, in]``."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], banks, x.shape[-1])


def confidence_logit(least: Array, outlook: Array) -> Array:
    r"""The logit of the confidence in an action.

    The odds of success factor into those of the observation and those of the action there,

    $$
    \frac{C(o, a)}{1 - C(o, a)} = \frac{p_{\mathrm{succ}}(o)}{p_{\mathrm{fail}}(o)} \cdot
    \frac{p_{\mathrm{succ}}(a | o)}{p_{\mathrm{fail}}(a | o)}
    $$

    and confidence is in what is the action's doing: the lesser of all of it and of its second factor.

    Args:
        least: ``[*B]``, the logit of C(o, a), the least of the ensemble.
        outlook: ``[*B]``, that of C(o), the first factor.

    Returns:
        ``[*B]``.
    """
    return least - outlook.clip(min=0)


def reflection_loss(logits: Tensor, target: Tensor) -> Tensor:
    r"""$-y \log C - (1 - y) \log(1 - C)$, mean over members.

    Args:
        logits: ``[*B, E]`` of C.
        target: ``[*B]`` or ``[*B, E]``, y.

    Returns:
        ``[*B]``.
    """
    y = target if target.ndim == logits.ndim else target.unsqueeze(-1).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(-1)
