"""DQN and IDQN: one learner, one switch.

| algorithm | share_parameters |
|-----------|------------------|
| DQN       | no               |
| IDQN      | yes              |

With one agent the two are one computation; DQN on a team is independent learners that share nothing.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.algorithm import (
    OffPolicyAlgorithm,
    ReplaySettings,
    check_indicator,
    check_positive,
    check_range,
    derive_seed,
)
from marl_memory.algorithms.exploration import EpsilonGreedy
from marl_memory.keys import Entries, Entry
from marl_memory.networks.actor import Body
from marl_memory.networks.greedy import GreedyActor
from marl_memory.networks.optimiser import FlatAdam
from marl_memory.spec import TaskSpec


class DQN(OffPolicyAlgorithm):
    r"""Deep Q-networks for teams: every agent values its own actions; one agent is A = 1.

    $$
    y_i = r_i + \gamma\, d_i\, \min_c Q'_{c,i}(o'_i, a^*_i), \qquad
    L = \textstyle\sum_c \mathbb{E}\, \ell\big(Q_{c,i}(o_i, a_i) - y_i\big)
    $$

    $a^*_i$ is the best allowed action by the present network (``double``), else each target network's own best.  With
    two critics both learn from the smaller value, and the first alone chooses, in $a^*$ as in behaviour and evaluation:
    clipped double Q-learning as Fujimoto et al. state it for finite actions.  Errors below the target count
    ``under_weight`` times.  Means run over rows in which an agent lives, and over agents that share parameters; agents
    that do not are summed, as if each had an optimiser of its own.

    Args:
        spec: the task.
        network: maker of network bodies (`MLP` with its architecture chosen).
        seed: the run's seed; every generator here is derived from it.
        critics: C, 1 or 2.
        double: the present network chooses the action that the target network values; else the target does both.
        dueling: see `GreedyActor`.
        share_parameters: agents share parameters (IDQN).
        agent_indicator: agents that share a network are told apart by their number, one-hot.
        loss: ℓ(δ), ``huber``: δ²/2 up to 1, beyond |δ| − 1/2; ``mse``: δ².
        gamma: discount factor γ.
        tau: share of the present networks that the targets take over; 1 copies them.
        target_every: updates between two such moves.
        lr, adam_eps: Adam's step size and ε.
        lr_final: what the step size becomes, linearly in frames, at the end of the run; None: it stays.
        max_grad_norm: gradient norm limit; None for none.
        batch_size, capacity, storage, warmup_frames, updates_per_frame, train_every: see `ReplaySettings`.
        epsilon, epsilon_final, epsilon_fraction: see `EpsilonGreedy`.

    Raises:
        ValueError: for a value out of range.

    References: Mnih et al. 2015 (Nature 518), algorithm 1; van Hasselt et al. 2016 (arXiv 1509.06461), eq. 4; Wang et
    al. 2016 (arXiv 1511.06581); Fujimoto et al. 2018 (arXiv 1802.09477), appendix A; Tampuu et al. 2017 (arXiv
    1511.08779), teams.
    """

    stages = frozenset({"act", "reward", "target"})
    actions = frozenset({"discrete"})
    actor: GreedyActor

    def __init__(
        self,
        *,
        spec: TaskSpec,
        network: Body,
        seed: int,
        critics: int = 1,
        double: bool = True,
        dueling: bool = False,
        share_parameters: bool = False,
        agent_indicator: bool = True,
        loss: Literal["huber", "mse"] = "huber",
        gamma: float = 0.99,
        tau: float = 1.0,
        target_every: int = 500,
        lr: float = 5e-4,
        lr_final: float | None = None,
        adam_eps: float = 1e-8,
        max_grad_norm: float | None = 10.0,
        batch_size: int = 64,
        capacity: int = 100_000,
        storage: str = "ram",
        warmup_frames: int = 1_000,
        updates_per_frame: float = 0.25,
        train_every: int = 1,
        epsilon: float = 1.0,
        epsilon_final: float = 0.05,
        epsilon_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if critics not in (1, 2):
            raise ValueError(f"algorithm.critics={critics!r} must be 1 or 2")
        if loss not in ("huber", "mse"):
            raise ValueError(f"algorithm.loss={loss!r} must be 'huber' or 'mse'")
        if target_every < 1:
            raise ValueError(f"algorithm.target_every={target_every!r} must be at least 1")
        check_range(gamma=(gamma, 0, 1), tau=(tau, 0, 1))
        check_positive(tau=tau, lr=lr, adam_eps=adam_eps, max_grad_norm=max_grad_norm)
        if lr_final is not None and lr_final < 0:
            raise ValueError(f"algorithm.lr_final={lr_final!r} must not be negative")
        check_indicator(spec, agent_indicator, shared=share_parameters)
        self.spec, self.keys, self.gamma, self.tau = spec, spec.keys, gamma, tau
        self.double_q, self.loss, self.target_every, self.max_grad_norm = double, loss, target_every, max_grad_norm
        self.lr, self.lr_final = lr, lr if lr_final is None else lr_final
        self.replay = ReplaySettings(
            capacity=capacity,
            batch_size=batch_size,
            warmup_frames=warmup_frames,
            updates_per_frame=updates_per_frame,
            train_every=train_every,
            storage=storage,
        )
        self.actor = GreedyActor(
            spec,
            network,
            critics=critics,
            dueling=dueling,
            share_parameters=share_parameters,
            init_generator=Generator().manual_seed(derive_seed(seed, "critic", "init")),
            agent_indicator=agent_indicator,
        )
        self.target = deepcopy(self.actor).requires_grad_(False)
        self.optimiser = FlatAdam(self.actor, lr=lr, eps=adam_eps)
        self.updates = 0
        self.behaviour = EpsilonGreedy(
            self.actor,
            epsilon=epsilon,
            epsilon_final=epsilon_final,
            fraction=epsilon_fraction,
            seed=derive_seed(seed, "exploration"),
        )

    @property
    def learn_entries(self) -> Entries:
        """``learn_reward``, ``under_weight`` ``[A, 1]`` and ``value_target`` ``[A, C]``."""
        k, a = self.keys, self.spec.n_agents
        one, each = Entry((a, 1)), Entry((a, len(self.actor.twins)))
        return {k.learn_reward: one, k.under_weight: one, k.value_target: each}

    @property
    def offers(self) -> set[tuple[str, ...]]:
        """``td_error`` ``[A, C']``."""
        return {self.keys.td_error}

    @property
    def reach(self) -> str:
        """See `Algorithm.reach`."""
        return "shared" if self.actor.input.banks < self.spec.n_agents else "per_agent"

    @property
    def replay_keys(self) -> list[NestedKey]:
        """Observation, who lives and the action; one step later what can be chosen there, reward and discount."""
        k = self.keys
        after = (k.observation, k.action_mask, k.alive, k.reward, k.discount)
        return [k.observation, k.alive, k.action, *(("next", *key) for key in after)]

    def set_progress(self, progress: float) -> None:
        """Follow the schedules of exploration and step size."""
        super().set_progress(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr + (self.lr_final - self.lr) * min(progress, 1.0)

    # --------------------------------------------------------------------------------------------- steps of an update

    @torch.no_grad()
    def bootstrap_values(self, td: TensorDictBase, generator: Generator | None = None) -> Tensor:
        """$Q'_c(o, a^*)$ ``[*B, A, C]``, see above."""
        values = self.target.values(td)
        if not self.double_q:
            return self.target.masked(td, values).amax(-2)
        return taken(values, self.actor.choose(td))

    @torch.no_grad()
    def estimate(self, td: TensorDictBase) -> Tensor:
        """See `Algorithm.estimate`: Q of the greedy action, by the present networks."""
        return taken(self.actor.values(td), self.actor.choose(td)).mean(-1)

    @torch.no_grad()
    def compute_targets(self, rows: TensorDictBase) -> None:
        """Write $y$ ``[B, A, C]``, the same for both critics."""
        self.write_targets(rows, self.bootstrap_values(rows.get("next")).amin(-1, keepdim=True))

    def update_critic(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """One Adam step on $L$."""
        value = taken(self.actor.values(rows), rows.get(self.keys.action))
        loss = self.critic_loss(rows, value, apart=self.actor.input.banks > 1, huber=self.loss == "huber")
        norm = self.descend(loss, self.optimiser, "critic")
        self.updates += 1
        return {"loss/critic": loss.detach(), "value/mean": value.detach().mean(), **norm}

    @property
    def actor_is_due(self) -> bool:
        """Always: whoever is greedy in the values moves with them."""
        return True

    def compute_action_gradient(self, rows: TensorDictBase) -> None:
        """Nothing: there is no gradient in a choice among actions."""

    def update_actor(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    @torch.no_grad()
    def update_targets(self) -> None:
        r"""$\theta' \leftarrow \theta' + \tau (\theta - \theta')$, once in ``target_every`` updates."""
        if self.updates % self.target_every == 0:
            targets: list[Tensor] = list(self.target.parameters())
            torch._foreach_lerp_(targets, list(self.actor.parameters()), self.tau)  # pyright: ignore[reportPrivateImportUsage]

    # -------------------------------------------------------------------------------------------------------- state

    def get_extra_state(self) -> dict[str, Any]:
        """What parameters do not hold: optimiser slots, the explorer's generator, the number of updates."""
        named = dict(self.actor.named_parameters())
        return {
            "optimiser": self.optimiser.named_state(named),
            "behaviour": self.behaviour.state_dict(),
            "updates": self.updates,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.optimiser.load_named_state(dict(self.actor.named_parameters()), state["optimiser"])
        self.behaviour.load_state_dict(state["behaviour"])
        self.updates = state["updates"]


def taken(values: Tensor, action: Tensor) -> Tensor:
    """``[*B, A, C]``, the ``values`` ``[*B, A, P, C]`` of one ``action`` ``[*B, A]`` each."""
    index = action[..., None, None].expand(*action.shape, 1, values.shape[-1])
    return values.gather(-2, index).squeeze(-2)
