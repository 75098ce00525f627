"""DDPG, IDDPG and MADDPG: one learner, three switches.

| algorithm | centralised_critic | share_actor, share_critic |
|-----------|--------------------|---------------------------|
| DDPG      | no                 | no                        |
| IDDPG     | no                 | yes                       |
| MADDPG    | yes                | no                        |

With one agent the three are one computation; DDPG on a team is independent learners that share nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.algorithm import ReplaySettings
from marl_memory.algorithms.deterministic import DeterministicHost
from marl_memory.algorithms.exploration import Kind
from marl_memory.networks.actor import Body
from marl_memory.spec import TaskSpec


class DDPG(DeterministicHost):
    r"""Deep deterministic policy gradient for teams; one agent is A = 1.

    $$
    y_i = r_i + \gamma\, d_i\, Q'_i(s', \mu'_1(o'_1), \dots, \mu'_A(o'_A)), \qquad
    L_Q = \mathbb{E}\,(Q_i(s, a_1, \dots, a_A) - y_i)^2
    $$

    and the actor's loss of `DeterministicHost`.  Independent critics read $(o_i, a_i)$.  Discrete actions are one-hot
    vectors: the actor's gradient passes a straight-through Gumbel-softmax, targets take the most probable choice.

    Args:
        spec: the task.
        network: maker of network bodies (`MLP` with its architecture chosen).
        seed: the run's seed; every generator here is derived from it.
        critics: 1, or 2 for a memory that needs twins; each learns from its own target, the actor follows the first.
        centralised_critic: critics read the global state and all actions (MADDPG) instead of the own ones.
        share_actor, share_critic: agents share parameters.
        agent_indicator: agents that share a network are told apart by their number, one-hot.
        actor_gradient: ``own`` (Lowe et al., eq. 6) or ``joint``, see `DeterministicHost`.
        gamma: discount factor γ.
        tau: share of the present networks that the targets take over.
        actor_lr, critic_lr: Adam's step sizes.
        max_grad_norm: gradient norm limit of actor and critics separately; None for none.
        temperature: of the Gumbel-softmax, for discrete actions; None for 1.
        logit_penalty: weight of the actors' mean square logits, for discrete actions (0.001 in the code of Lowe et
            al.); None for none.
        batch_size, capacity, storage, warmup_frames, updates_per_frame, train_every: see `ReplaySettings`.
        exploration, noise, noise_final, ou_theta: see `Explorer`; None for what suits the action space.

    Raises:
        ValueError: for a value out of range, or an option that the action space forbids.

    References: Lillicrap et al. 2016 (arXiv 1509.02971), algorithm 1; Lowe et al. 2017 (arXiv 1706.02275), eq. 6 and 7;
    Jang et al. 2017 (arXiv 1611.01144) for discrete actions.
    """

    def __init__(
        self,
        *,
        spec: TaskSpec,
        network: Body,
        seed: int,
        critics: int = 1,
        centralised_critic: bool = False,
        share_actor: bool = False,
        share_critic: bool = False,
        agent_indicator: bool = True,
        actor_gradient: Literal["own", "joint"] = "own",
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
    ) -> None:
        if critics not in (1, 2):
            raise ValueError(f"algorithm.critics={critics!r} must be 1 or 2")
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

    @property
    def actor_is_due(self) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def bootstrap_values(self, td: TensorDictBase, generator: Generator | None = None) -> Tensor:
        """$Q'$ ``[*B, A, C]`` at the target actors' choice."""
        output = self.target_actor.output(td)
        vectors = output if self.spec.continuous else self.actor.vectors.encode(output.argmax(-1))
        return self.target_critic(td, vectors)

    @torch.no_grad()
    def compute_targets(self, rows: TensorDictBase) -> None:
        """Write $y$ ``[B, A, C]``."""
        self.write_targets(rows, self.bootstrap_values(rows.get("next")))
