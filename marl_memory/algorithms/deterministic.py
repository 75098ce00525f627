"""What the deterministic hosts have in common: networks, exploration, the action gradient and the actor's step."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.algorithms.algorithm import (
    OffPolicyAlgorithm,
    ReplaySettings,
    check_indicator,
    check_positive,
    check_range,
    derive_seed,
)
from marl_memory.algorithms.exploration import Explorer, Kind
from marl_memory.functional.returns import mean_over_living
from marl_memory.keys import Entries, Entry
from marl_memory.networks.action_value import ActionValueCritic
from marl_memory.networks.actor import Body
from marl_memory.networks.deterministic import DeterministicActor
from marl_memory.networks.optimiser import FlatAdam
from marl_memory.spec import TaskSpec


class DeterministicHost(OffPolicyAlgorithm):
    r"""Actor, C critics and their targets; a subclass says what the targets are and when the actor moves.

    Critics: $L_Q = \sum_c \mathbb{E}\,(Q_c(s, a) - y_c)^2$, where errors below the target count ``under_weight``
    times.  Actors, with $g_i = \partial Q_1 / \partial a_i$ at $a_i = \mu_i(o_i)$ as an entry of its own, which
    GRADIENT operators may change:

    $$
    L_\mu = -\,\mathbb{E}\,\langle \mathrm{stopgrad}(g_i),\ \mu_i(o_i) \rangle
    $$

    whose gradient is that of $-Q_1$.  With discrete actions ``logit_penalty`` times the mean square of the logits of
    allowed actions is added: without it the softmax may saturate early, and then nothing moves.  Means run over rows in
    which an agent lives, and over agents that share parameters; agents that do not are summed, as if each had an
    optimiser of its own.

    Args:
        spec: the task.
        network: maker of network bodies.
        seed: the run's seed.
        critics: C.
        centralised_critic: critics of the global state and all actions.
        share_actor, share_critic: whether agents share parameters.
        agent_indicator: whether agents that share a network are told apart by their number, one-hot.
        actor_gradient: ``own``: agent i follows its own critic through its own action, the others' actions are those
            of the replay (Lowe et al. 2017, eq. 6); ``joint``: all critics, through all present choices.
        actor_uses: g is the gradient of the ``first`` of an agent's C critics, or of their ``mean``.
        action_twice: see `ActionValueCritic`.
        gamma: discount factor γ.
        tau: share of the present networks in the targets after each `update_targets`.
        actor_lr, critic_lr: Adam's step sizes.
        max_grad_norm: gradient norm limit of actor and critics separately; None for none.
        temperature: of the Gumbel-softmax; None for 1 where actions are discrete.
        logit_penalty: weight of the actors' mean square logits (discrete actions); None for none.
        replay: see `ReplaySettings`.
        exploration, noise, noise_final, ou_theta: see `Explorer`; None for ``gaussian`` (discrete actions: ``gumbel``),
            0.1 and a constant σ.

    Raises:
        ValueError: for a value out of range, or an option that the action space forbids.
    """

    stages = frozenset({"act", "reward", "target", "gradient"})
    actions = frozenset({"discrete", "continuous"})
    actor: DeterministicActor

    def __init__(
        self,
        spec: TaskSpec,
        network: Body,
        seed: int,
        *,
        critics: int,
        centralised_critic: bool,
        share_actor: bool,
        share_critic: bool,
        agent_indicator: bool,
        actor_gradient: Literal["own", "joint"],
        actor_uses: Literal["first", "mean"] = "first",
        action_twice: bool = False,
        gamma: float,
        tau: float,
        actor_lr: float,
        critic_lr: float,
        max_grad_norm: float | None,
        temperature: float | None,
        logit_penalty: float | None,
        replay: ReplaySettings,
        exploration: Kind | None,
        noise: float | None,
        noise_final: float | None,
        ou_theta: float,
    ) -> None:
        super().__init__()
        check_range(gamma=(gamma, 0, 1), tau=(tau, 0, 1))
        check_positive(actor_lr=actor_lr, critic_lr=critic_lr, max_grad_norm=max_grad_norm)
        check_positive(temperature=temperature, logit_penalty=logit_penalty)
        if actor_gradient not in ("own", "joint"):
            raise ValueError(f"algorithm.actor_gradient={actor_gradient!r} must be 'own' or 'joint'")
        if actor_uses not in ("first", "mean"):
            raise ValueError(f"algorithm.actor_uses={actor_uses!r} must be 'first' or 'mean'")
        only_continuous(spec, noise=noise, noise_final=noise_final)
        for name, value in (("temperature", temperature), ("logit_penalty", logit_penalty)):
            if spec.continuous and value is not None:
                raise ValueError(f"algorithm.{name}={value} has no effect on continuous actions: leave it null")
        check_indicator(spec, agent_indicator, shared=share_actor or (share_critic and not centralised_critic))
        self.spec, self.keys, self.replay = spec, spec.keys, replay
        self.gamma, self.tau, self.max_grad_norm, self.logit_penalty = gamma, tau, max_grad_norm, logit_penalty
        self.actor_gradient, self.followed = actor_gradient, slice(0, 1 if actor_uses == "first" else critics)

        def init(name: str) -> Generator:
            return Generator().manual_seed(derive_seed(seed, name, "init"))

        self.actor = DeterministicActor(
            spec,
            network,
            share_parameters=share_actor,
            init_generator=init("actor"),
            agent_indicator=agent_indicator,
            temperature=1.0 if temperature is None else temperature,
        )
        self.critic = ActionValueCritic(
            spec,
            network,
            centralised=centralised_critic,
            share_parameters=share_critic,
            critics=critics,
            init_generator=init("critic"),
            agent_indicator=agent_indicator,
            action_twice=action_twice,
        )
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.actor_optimiser = FlatAdam(self.actor, lr=actor_lr)
        self.critic_optimiser = FlatAdam(self.critic, lr=critic_lr)
        self.generator = Generator().manual_seed(derive_seed(seed, "update"))
        self.updates = 0
        self._chosen: Tensor | None = None
        self._output: Tensor | None = None
        noise = 0.1 if noise is None else noise
        self.behaviour = Explorer(
            self.actor,
            kind=exploration or ("gaussian" if spec.continuous else "gumbel"),
            noise=noise,
            noise_final=noise if noise_final is None else noise_final,
            theta=ou_theta,
            seed=derive_seed(seed, "exploration"),
        )

    @property
    def learn_entries(self) -> Entries:
        """``learn_reward``, ``under_weight`` ``[A, 1]``, ``value_target`` ``[A, C]``, ``action_gradient`` ``[A, P]``"""
        k, a = self.keys, self.spec.n_agents
        return {
            k.learn_reward: Entry((a, 1)),
            k.value_target: Entry((a, len(self.critic.twins))),
            k.under_weight: Entry((a, 1)),
            k.action_gradient: Entry((a, self.spec.action_size)),
        }

    @property
    def offers(self) -> set[tuple[str, ...]]:
        """``td_error`` ``[A, C']``, ``policy_action`` ``[A, P]`` and ``features`` ``[A, H]``."""
        return {self.keys.td_error, self.keys.policy_action, self.keys.features}

    @property
    def replay_keys(self) -> list[NestedKey]:
        """Inputs of actor and critic and who lives, at t and at t + 1; action, reward and discount."""
        k = self.keys
        inputs: list[Any] = list(dict.fromkeys([*self.actor.in_keys, *self.critic.in_keys, k.alive]))
        after = [("next", key) if isinstance(key, str) else ("next", *key) for key in (*inputs, k.reward, k.discount)]
        return [*inputs, k.action, *after]

    @torch.no_grad()
    def estimate(self, td: TensorDictBase) -> Tensor:
        """See `Algorithm.estimate`: Q of the present actors' choice, by the present critics."""
        output = self.actor.output(td)
        vectors = output if self.spec.continuous else self.actor.vectors.encode(output.argmax(-1))
        return self.critic(td, vectors).mean(-1)

    # --------------------------------------------------------------------------------------------- steps of an update

    def update_critic(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """One Adam step of the critics on $L_Q$."""
        value = self.critic(rows, self.actor.vectors.encode(rows.get(self.keys.action)))
        loss = self.critic_loss(rows, value, apart=self.critic.banks > 1)
        norm = self.descend(loss, self.critic_optimiser, "critic")
        self.updates += 1
        return {"loss/critic": loss.detach(), "value/mean": value.detach().mean(), **norm}

    def compute_action_gradient(self, rows: TensorDictBase) -> None:
        """Write $g_i$ at a present choice of the actors (discrete: a straight-through sample)."""
        k = self.keys
        features = rows.get(k.features, None)
        hidden = {} if features is None else {"hidden": features}
        self._chosen, self._output = self.actor.relaxed(rows, self.generator, **hidden)
        if (asked := rows.get(k.policy_action, None)) is not None:
            output = self._output.detach()
            asked.copy_(output if self.spec.continuous else output.softmax(-1))
        chosen = self._chosen.detach().requires_grad_()
        if self.actor_gradient == "own" and self.critic.centralised:
            others = self.actor.vectors.encode(rows.get(k.action))
            value = self.critic.of_own_actions(rows, chosen, others, critics=self.followed)
        else:
            value = self.critic(rows, chosen, critics=self.followed)
        # Of the choice only: the critics' own is not computed.
        (gradient,) = torch.autograd.grad(value.mean(-1).sum(), chosen)
        rows.get(k.action_gradient).copy_(gradient)

    def update_actor(self, rows: TensorDictBase) -> dict[str, Tensor]:
        r"""One Adam step of the actor on $L_\mu$; follows `compute_action_gradient` of the same rows.

        Raises:
            RuntimeError: if it does not.
        """
        if self._chosen is None or self._output is None:
            raise RuntimeError("update_actor() moves the choice that compute_action_gradient() made: call that first")
        gradient, alive = rows.get(self.keys.action_gradient), rows.get(self.keys.alive)
        gain = torch.where(alive.unsqueeze(-1), gradient * self._chosen, 0.0).sum(-1, keepdim=True)
        if self.logit_penalty is not None:
            allowed = rows.get(self.keys.action_mask) & alive.unsqueeze(-1)
            gain = gain - self.logit_penalty * mean_square_logit(self._output, allowed)
        loss = -mean_over_living(gain, alive, apart=self.actor.input.banks > 1)
        norm = self.descend(loss, self.actor_optimiser, "actor")
        self._chosen = self._output = None
        size = gradient.norm(dim=-1).mean()
        return {"loss/actor": loss.detach(), "policy/action_gradient": size, **norm}

    @torch.no_grad()
    def update_targets(self) -> None:
        r"""$\theta' \leftarrow \theta' + \tau (\theta - \theta')$, critics and actors."""
        targets: list[Tensor] = [*self.target_critic.parameters(), *self.target_actor.parameters()]
        present: list[Tensor] = [*self.critic.parameters(), *self.actor.parameters()]
        torch._foreach_lerp_(targets, present, self.tau)  # pyright: ignore[reportPrivateImportUsage]

    # -------------------------------------------------------------------------------------------------------- state

    def _optimisers(self) -> dict[str, tuple[FlatAdam, dict[str, nn.Parameter]]]:
        return {
            "actor": (self.actor_optimiser, dict(self.actor.named_parameters())),
            "critic": (self.critic_optimiser, dict(self.critic.named_parameters())),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What parameters do not hold: optimiser slots, generators, the noise process, the number of updates."""
        return {
            "optimisers": {name: adam.named_state(named) for name, (adam, named) in self._optimisers().items()},
            "generator": self.generator.get_state(),
            "behaviour": self.behaviour.state_dict(),
            "updates": self.updates,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        for name, (adam, named) in self._optimisers().items():
            adam.load_named_state(named, state["optimisers"][name])
        self.generator.set_state(state["generator"])
        self.behaviour.load_state_dict(state["behaviour"])
        self.updates = state["updates"]


def mean_square_logit(logits: Tensor, allowed: Tensor) -> Tensor:
    """Of the allowed actions of each agent, ``[*B, A, P]`` both to ``[*B, A, 1]``; 0 where none is."""
    squares = torch.where(allowed, logits, 0.0).square().sum(-1, keepdim=True)
    return squares / allowed.sum(-1, keepdim=True).clamp(min=1)


def only_continuous(spec: TaskSpec, **values: float | None) -> None:
    """Raise ValueError if an option of continuous actions is set on a task whose actions are discrete."""
    for name, value in values.items():
        if value is not None and not spec.continuous:
            raise ValueError(
                f"algorithm.{name}={value} has no effect on discrete actions, which {spec.name} has: leave it null"
            )
