"""TD3, ITD3 and MATD3: one learner, three switches.

| algorithm | centralised_critic | share_actor, share_critic |
|-----------|--------------------|---------------------------|
| TD3       | no                 | no                        |
| ITD3      | no                 | yes                       |
| MATD3     | yes                | no                        |

With one agent the three are one computation; TD3 on a team is independent learners that share nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.algorithm import ReplaySettings
from marl_memory.algorithms.deterministic import DeterministicHost, only_continuous
from marl_memory.algorithms.exploration import Kind
from marl_memory.functional.gumbel import straight_through_gumbel
from marl_memory.networks.actor import Body
from marl_memory.networks.deterministic import uniform
from marl_memory.spec import TaskSpec


class TD3(DeterministicHost):
    r"""Twin delayed deep deterministic policy gradient for teams; one agent is A = 1.

    $$
    \tilde a'_i = \mathrm{clip}(\mu'_i(o'_i) + \mathrm{clip}(\sigma' \epsilon, \pm c), \pm 1), \qquad
    y_i = r_i + \gamma\, d_i\, \min_c Q'_{c,i}(s', \tilde a'_1, \dots, \tilde a'_A)
    $$

    in units where an agent's bounds are ±1; all critics learn from y, the actor follows the first one, and actor and
    targets move once in ``policy_delay`` updates.  Discrete actions: ã' is a Gumbel sample of the target policy.

    Args:
        spec: the task.
        network: maker of network bodies (`MLP` with its architecture chosen).
        seed: the run's seed; every generator here is derived from it.
        critics: C, at least 2.
        centralised_critic: critics read the global state and all actions (MATD3) instead of the own ones.
        share_actor, share_critic: agents share parameters.
        agent_indicator: agents that share a network are told apart by their number, one-hot.
        actor_gradient: ``own`` (Lowe et al., eq. 6) or ``joint``, see `DeterministicHost`.
        actor_uses: the ``first`` critic, or the ``mean`` of all.
        action_twice: critics read actions as inputs and, once more, after their first layer.
        gamma: discount factor γ.
        tau: share of the present networks that the targets take over.
        actor_lr, critic_lr: Adam's step sizes.
        max_grad_norm: gradient norm limit of actor and critics separately; None for none.
        temperature: of the Gumbel-softmax, for discrete actions; None for 1.
        logit_penalty: weight of the actors' mean square logits, for discrete actions (0.001 in the code of Lowe et
            al.); None for none.
        batch_size, capacity, storage, warmup_frames, updates_per_frame, train_every: see `ReplaySettings`.
        exploration, noise, noise_final, ou_theta: see `Explorer`; None for what suits the action space.
        target_noise: σ' of the smoothing; None for 0.2 where actions are continuous.
        target_noise_clip: c; None for 0.5 where actions are continuous.
        policy_delay: critic updates for each update of actor and targets.
        target_every: critic updates for each move of the targets, a multiple of ``policy_delay``; None for that.

    Raises:
        ValueError: for a value out of range, or an option that the action space forbids.

    References: Fujimoto et al. 2018 (arXiv 1802.09477), algorithm 1; Ackermann et al. 2019 (arXiv 1910.01465), teams.
    """

    def __init__(
        self,
        *,
        spec: TaskSpec,
        network: Body,
        seed: int,
        critics: int = 2,
        centralised_critic: bool = False,
        share_actor: bool = False,
        share_critic: bool = False,
        agent_indicator: bool = True,
        actor_gradient: Literal["own", "joint"] = "own",
        actor_uses: Literal["first", "mean"] = "first",
        action_twice: bool = False,
        gamma: float = 0.99,
        tau: float = 0.005,
        actor_lr: float = 1e-3,
        critic_lr: float = 1e-3,
        max_grad_norm: float | None = None,
        temperature: float | None = None,
        logit_penalty: float | None = None,
        batch_size: int = 256,
        capacity: int = 1_000_000,
        storage: str = "ram",
        warmup_frames: int = 10_000,
        updates_per_frame: float = 1.0,
        train_every: int = 1,
        exploration: Kind | None = None,
        noise: float | None = None,
        noise_final: float | None = None,
        ou_theta: float = 0.15,
        target_noise: float | None = None,
        target_noise_clip: float | None = None,
        policy_delay: int = 2,
        target_every: int | None = None,
    ) -> None:
        if critics < 2:
            raise ValueError(f"algorithm.critics={critics!r} must be at least 2: DDPG has one")
        super().__init__(
            spec,
            network,
            seed,
            critics=critics,
            centralised_critic=centralised_critic,
            share_actor=share_actor,
            share_critic=share_critic,
            agent_indicator=agent_indicator,
            actor_gradient=actor_gradient,
            actor_uses=actor_uses,
            action_twice=action_twice,
            gamma=gamma,
            tau=tau,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            max_grad_norm=max_grad_norm,
            temperature=temperature,
            logit_penalty=logit_penalty,
            replay=ReplaySettings(
                capacity=capacity,
                batch_size=batch_size,
                warmup_frames=warmup_frames,
                updates_per_frame=updates_per_frame,
                train_every=train_every,
                storage=storage,
            ),
            exploration=exploration,
            noise=noise,
            noise_final=noise_final,
            ou_theta=ou_theta,
        )
        only_continuous(spec, target_noise=target_noise, target_noise_clip=target_noise_clip)
        for name, value in (("target_noise", target_noise), ("target_noise_clip", target_noise_clip)):
            if value is not None and value < 0:
                raise ValueError(f"algorithm.{name}={value!r} must not be negative")
        if policy_delay < 1:
            raise ValueError(f"algorithm.policy_delay={policy_delay!r} must be at least 1")
        self.target_noise = 0.2 if target_noise is None else target_noise
        self.target_noise_clip = 0.5 if target_noise_clip is None else target_noise_clip
        if target_every is not None and (target_every < 1 or target_every % policy_delay):
            raise ValueError(
                f"algorithm.target_every={target_every!r} must be a multiple of algorithm.policy_delay={policy_delay}"
            )
        self.policy_delay, self.target_every = policy_delay, target_every or policy_delay

    @property
    def actor_is_due(self) -> bool:
        """Once in ``policy_delay`` updates."""
        return self.updates % self.policy_delay == 0

    @torch.no_grad()
    def bootstrap_values(self, td: TensorDictBase, generator: Generator | None = None) -> Tensor:
        """$Q'_1, Q'_2, …$ ``[*B, A, C]`` at the target actors' choice, smoothed only by noise from a ``generator``."""
        if generator is not None:
            return self.target_critic(td, self._smoothed(td, generator))
        output = self.target_actor.output(td)
        vectors = output if self.spec.continuous else self.actor.vectors.encode(output.argmax(-1))
        return self.target_critic(td, vectors)

    def _smoothed(self, td: TensorDictBase, generator: Generator) -> Tensor:
        actor, output = self.target_actor, self.target_actor.output(td)
        if not self.spec.continuous:
            return straight_through_gumbel(output, uniform(output, generator), temperature=actor.temperature)
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype).mul_(self.target_noise)
        noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
        return actor.vectors.without_padding(noise.add_(output).clamp_(-1, 1))

    def update_targets(self) -> None:
        """See `DeterministicHost.update_targets`; once in ``target_every`` updates."""
        if self.updates % self.target_every == 0:
            super().update_targets()

    @torch.no_grad()
    def compute_targets(self, rows: TensorDictBase) -> None:
        """Write $y$ ``[B, A, C]``, the same for all critics."""
        after = rows.get("next")
        twins = self.bootstrap_values(after, self.generator)
        self.write_targets(rows, twins.amin(-1, keepdim=True))
