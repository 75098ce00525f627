"""What collects for a learner with a replay: random actions first, then the policy, disturbed."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.functional.gumbel import straight_through_gumbel
from marl_memory.networks.deterministic import DeterministicActor, uniform
from marl_memory.networks.greedy import GreedyActor

Kind = Literal["gaussian", "ou", "gumbel"]


class Explorer:
    r"""A deterministic policy that collects; sets ``action``.

    While ``uniform`` is set, actions are uniform over the box, or over the allowed choices.  Then, in units where an
    agent's bounds are ±1 and with ε ~ N(0, 1) for each environment, agent and dimension:

    | kind       | action                                                                                             |
    |------------|----------------------------------------------------------------------------------------------------|
    | `gaussian` | clip(μ(o) + σ ε, ±1)                                                                               |
    | `ou`       | clip(μ(o) + x, ±1), x ← x − θ x + σ ε, 0 at the start of an episode                                |
    | `gumbel`   | a sample of softmax(logits): discrete actions                                                      |

    Args:
        actor: the policy.
        kind: see above.
        noise: σ at the start.
        noise_final: what σ becomes, linearly in frames, at the end of the run.
        theta: θ of the Ornstein–Uhlenbeck process, per step.
        seed: of the generator.

    Raises:
        ValueError: for a kind that the action space forbids, or a number out of range.

    Reference: Lillicrap et al. 2016 (arXiv 1509.02971), section 3 (Ornstein–Uhlenbeck, with a time step of 1).
    """

    def __init__(
        self, actor: DeterministicActor, *, kind: Kind, noise: float, noise_final: float, theta: float, seed: int
    ) -> None:
        allowed = ("gaussian", "ou") if actor.spec.continuous else ("gumbel",)
        if kind not in allowed:
            actions = "continuous" if actor.spec.continuous else "discrete"
            raise ValueError(f"algorithm.exploration={kind!r} must be {' or '.join(allowed)} for {actions} actions")
        for name, value in (("noise", noise), ("noise_final", noise_final)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"algorithm.{name}={value!r} must not be negative")
        if not 0 < theta <= 1:
            raise ValueError(f"algorithm.ou_theta={theta!r} must lie in (0, 1]")
        self.actor, self.kind, self.noise, self.noise_final, self.theta = actor, kind, noise, noise_final, theta
        self.uniform, self.scale = True, noise
        self.generator = Generator().manual_seed(seed)
        self.process: Tensor | None = None  # [N, A, P]

    def set_progress(self, progress: float) -> None:
        """σ for this share of the run."""
        self.scale = self.noise + (self.noise_final - self.noise) * min(progress, 1.0)

    @torch.no_grad()
    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions for the observations in ``td``."""
        return td.set(self.actor.keys.action, self.actor.vectors.decode(self._vectors(td)))

    def _vectors(self, td: TensorDictBase) -> Tensor:
        actor, output = self.actor, self.actor.output(td)
        if self.kind == "gumbel":
            if self.uniform:  # forbidden actions keep their lowest logit
                output = torch.where(td.get(actor.keys.action_mask), 0.0, output)
            return straight_through_gumbel(output, uniform(output, self.generator), temperature=1.0)
        if self.uniform:
            return actor.vectors.without_padding(2 * uniform(output, self.generator) - 1)
        noise = self.scale * torch.randn(output.shape, generator=self.generator, dtype=output.dtype)
        if self.kind == "ou":
            self.process = noise if self.process is None else (1 - self.theta) * self.process + noise
            noise = self.process
        return actor.vectors.without_padding((output + noise).clamp(-1, 1))

    def episodes_ended(self, done: Tensor) -> None:
        """Start the noise anew where ``done`` ``[N, 1]``."""
        if self.process is not None:
            self.process = torch.where(done.unsqueeze(-1), 0.0, self.process)

    def cut_episodes(self) -> None:
        """Start the noise anew everywhere."""
        self.process = None

    def state_dict(self) -> dict[str, Any]:
        """The generator and the noise process."""
        return {"generator": self.generator.get_state(), "process": self.process}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.generator.set_state(state["generator"])
        self.process = state["process"]


class EpsilonGreedy:
    r"""A greedy policy that collects; sets ``action``.

    Each agent of each environment takes, with probability ε, an action drawn uniformly from those it is allowed, else
    the greedy one.  ε is 1 while ``uniform`` is set, else falls linearly in frames.

    Args:
        actor: the policy.
        epsilon: ε at the start of the run.
        epsilon_final: what ε falls to.
        fraction: the share of the run's frames in which it does.
        seed: of the generator.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, actor: GreedyActor, *, epsilon: float, epsilon_final: float, fraction: float, seed: int) -> None:
        for name, value in (("epsilon", epsilon), ("epsilon_final", epsilon_final)):
            if not 0 <= value <= 1:
                raise ValueError(f"algorithm.{name}={value!r} must lie in [0, 1]")
        if not 0 < fraction <= 1:
            raise ValueError(f"algorithm.epsilon_fraction={fraction!r} must lie in (0, 1]")
        self.actor, self.epsilon, self.epsilon_final, self.fraction = actor, epsilon, epsilon_final, fraction
        self.uniform, self.scale = True, epsilon
        self.generator = Generator().manual_seed(seed)

    def set_progress(self, progress: float) -> None:
        """ε for this share of the run."""
        self.scale = self.epsilon + (self.epsilon_final - self.epsilon) * min(progress / self.fraction, 1.0)

    @torch.no_grad()
    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        """Choose actions for the observations in ``td``."""
        k = self.actor.keys
        agents = td.get(k.group)
        mask: Tensor = agents.get(k.action_mask[-1])
        u = torch.rand(*mask.shape[:-1], mask.shape[-1] + 1, generator=self.generator)  # the last one is ε's
        action = torch.where(mask, u[..., :-1], -1.0).argmax(-1)
        if not self.uniform:
            action = torch.where(u[..., -1] < self.scale, action, self.actor.choose(td))
        agents.set(k.action[-1], action)
        return td

    def episodes_ended(self, done: Tensor) -> None:
        """Nothing is carried from step to step."""

    def cut_episodes(self) -> None:
        """Nothing is carried from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """The generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.generator.set_state(state["generator"])
