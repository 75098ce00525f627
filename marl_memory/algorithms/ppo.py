"""PPO, IPPO and MAPPO: one learner, two switches.

| algorithm | centralised_critic | share_parameters |
|-----------|--------------------|------------------|
| PPO       | no                 | no               |
| IPPO      | no                 | yes              |
| MAPPO     | yes                | yes              |

With one agent the three are one computation; PPO on a team is independent learners that share nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from marl_memory.algorithms.algorithm import (
    OnPolicyAlgorithm,
    check_indicator,
    derive_seed,
)
from marl_memory.algorithms.mixed import settle, taken_by_memory
from marl_memory.functional.returns import discounted_sum, gae, leaves_alone, masked_mean, team_value
from marl_memory.keys import Entries, Entry
from marl_memory.networks.actor import Actor, Body
from marl_memory.networks.critic import Critic, ValueHead
from marl_memory.networks.distributions import Distribution
from marl_memory.networks.normalisation import RunningMoments, ValueNorm
from marl_memory.networks.optimiser import FlatAdam
from marl_memory.spec import TaskSpec

LEAST, MOST = ("learn", "least_ratio"), ("learn", "most_ratio")
"""``[R, A]``: where the surrogate's ratio is cut."""

WEIGHTS = ("weight", "w2_weight")
"""What a REGION operator writes beside its reference: how much KL(p*‖π), or W₂², counts in the loss."""


class PPO(OnPolicyAlgorithm):
    r"""Proximal policy optimisation for teams; one agent is A = 1.

    With $\rho_i = \pi_\theta(a_i|o_i)/\pi_{old}(a_i|o_i)$ and means over living agents i and rows:

    $$
    L = -\mathbb{E}\,\min(\rho_i \hat A_i,\ \mathrm{clip}(\rho_i, 1\pm\epsilon)\,\hat A_i)
      - c_H\,\mathbb{E}\,H(\pi_\theta)
      + c_V\,\mathbb{E}\,\max\big((V - y)^2,\ (V_{old} + \mathrm{clip}(V - V_{old}, \pm\epsilon_V) - y)^2\big)
    $$

    and what REGION and REPLAY operators add to it (see `Keys`).  Where memory acted (ACT) there is no policy loss, and
    advantages are weighted by truncated ratios, see `gae` and `settle`.

    Args:
        spec: the task.
        network: maker of network bodies (`MLP` with its architecture chosen).
        seed: the run's seed; every generator here is derived from it.
        centralised_critic: the critic reads the global state (MAPPO) instead of the own observation (PPO, IPPO).
        share_parameters: agents share actor and critic.
        agent_indicator: agents that share a network are told apart by their number, one-hot.
        share_body: actor and critic are one network that differs in the last layer only, as published for pictures
            (Schulman et al. 2017, §5); not with a centralised critic, which reads something else.
        gamma: discount factor γ.
        gae_lambda: λ of the advantages.
        clip: ε of the ratio.
        value_clip: $\epsilon_V$ in the critic's units, or None for the plain squared error.
        value_coef: $c_V$, weight of the value loss.
        entropy_coef: $c_H$, weight of the entropy.
        lr: Adam's step size at the start.
        lr_final: what ``lr`` decays to, linearly in frames, at the end of the run (equal to ``lr``: constant).
        adam_eps: Adam's ε.
        max_grad_norm: gradient norm limit, of each network separately.
        epochs: passes over a batch.
        minibatches: gradient steps per pass.
        value_norm: train the critic on normalised targets (`ValueNorm`).
        normalise_advantages: zero mean and unit deviation over the batch's living agents.
        normalise_observations: scale observations by running statistics (updated after each update).
        scale_rewards: divide rewards by the running deviation of their discounted sum.

    Raises:
        ValueError: for a value out of range.

    References: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 and 9; Yu et al. 2022 (arXiv 2103.01955), appendix.
    """

    stages = frozenset({"act", "reward", "target", "region", "replay"})
    actions = frozenset({"discrete", "continuous"})
    actor: Actor

    def __init__(
        self,
        *,
        spec: TaskSpec,
        network: Body,
        seed: int,
        centralised_critic: bool = False,
        share_parameters: bool = False,
        agent_indicator: bool = True,
        share_body: bool = False,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        value_clip: float | None = None,
        value_coef: float = 1.0,
        entropy_coef: float = 0.01,
        lr: float = 1e-3,
        lr_final: float = 0.0,
        adam_eps: float = 1e-5,
        max_grad_norm: float = 10.0,
        epochs: int = 4,
        minibatches: int = 16,
        value_norm: bool = True,
        normalise_advantages: bool = True,
        normalise_observations: bool = False,
        scale_rewards: bool = False,
    ) -> None:
        super().__init__()
        _check_ranges(gamma=gamma, gae_lambda=gae_lambda)
        _check_positive(clip=clip, value_clip=1.0 if value_clip is None else value_clip, lr=lr, adam_eps=adam_eps)
        _check_positive(max_grad_norm=max_grad_norm, epochs=epochs, minibatches=minibatches)
        _check_not_negative(value_coef=value_coef, entropy_coef=entropy_coef, lr_final=lr_final)
        self.spec, self.keys = spec, spec.keys
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip, self.value_clip = clip, value_clip
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.lr, self.lr_final, self.max_grad_norm = lr, lr_final, max_grad_norm
        self.epochs, self.n_minibatches = epochs, minibatches
        self.normalise_advantages = normalise_advantages

        check_indicator(spec, agent_indicator, shared=share_parameters)
        if share_body and centralised_critic:
            raise ValueError(
                "algorithm.share_body=true needs algorithm.centralised_critic=false: what reads the global state can "
                "not be the actor's network"
            )
        self.share_body = share_body
        shared = {
            "share_parameters": share_parameters,
            "normalise_observations": normalise_observations,
            "agent_indicator": agent_indicator,
        }
        self.actor = Actor(
            spec,
            network,
            **shared,
            init_generator=Generator().manual_seed(derive_seed(seed, "actor", "init")),
            seed=derive_seed(seed, "actor", "sample"),
            value_head=share_body,
        )
        self.actor.densities = not spec.continuous  # those are computed for a whole batch in `compute_advantages`
        self.critic = (
            ValueHead(self.actor)
            if share_body
            else Critic(
                spec,
                network,
                centralised=centralised_critic,
                **shared,
                init_generator=Generator().manual_seed(derive_seed(seed, "critic", "init")),
            )
        )
        self.value_norm = ValueNorm() if value_norm else None
        scales = 1 if spec.common_reward else self.actor.input.banks  # one reward has one scale
        self.return_moments = RunningMoments(scales, 1) if scale_rewards else None
        self.rescales_rewards = scale_rewards
        self.return_carry: Tensor | None = None
        self.generator = Generator().manual_seed(derive_seed(seed, "minibatches"))
        self.entropy_generator = Generator().manual_seed(derive_seed(seed, "entropy"))
        self.optimiser = FlatAdam(*([self.actor] if share_body else [self.actor, self.critic]), lr=lr, eps=adam_eps)

    @property
    def learn_entries(self) -> Entries:
        """``learn_reward``, values, ``advantage`` and ``value_target``: ``[A, 1]`` each; ``log_prob`` ``[A]``."""
        k, a = self.keys, self.spec.n_agents
        entries = (k.learn_reward, k.value_output, k.value, k.next_value, k.advantage, k.value_target)
        late = {} if self.actor.densities else {k.log_prob: Entry((a,))}
        return {**dict.fromkeys(entries, Entry((a, 1))), **late}

    @property
    def offers(self) -> set[tuple[str, ...]]:
        """``policy(name)`` ``[A, P]``: the parameters of the policy that acted; its ``features`` ``[A, H]``; the
        ``behaviour_log_prob`` ``[A]`` of what was done.
        """
        names = ("loc", "scale") if self.spec.continuous else ("log_probs",)
        k = self.keys
        return {k.features, k.behaviour_log_prob, *(k.policy(name) for name in names)}

    def check_batch(self, rows: int) -> None:
        """Every minibatch needs a row."""
        if rows < self.n_minibatches:
            raise ValueError(f"algorithm.minibatches={self.n_minibatches} must not exceed the {rows} rows of a batch")

    def set_progress(self, progress: float) -> None:
        """Linear decay of the learning rate from ``lr`` to ``lr_final``."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr + (self.lr_final - self.lr) * min(progress, 1.0)

    # ------------------------------------------------------------------------------------- rewards, values, advantages

    def derive_rewards(self, batch: TensorDictBase) -> None:
        """Write ``learn_reward``: the environment's reward, divided by the deviation of its discounted sum if asked."""
        reward, scaled = self.clipped_rewards(batch), batch.get(self.keys.learn_reward)
        if self.return_moments is None:
            scaled.copy_(reward)
            return
        carry = torch.zeros_like(reward[0]) if self.return_carry is None else self.return_carry
        sums, self.return_carry = discounted_sum(reward, self._cut(batch), carry, gamma=self.gamma)
        self.return_moments.update(sums, batch.get(self.keys.alive).unsqueeze(-1))
        scale = self.return_moments.std.to(reward.dtype)
        scaled.copy_((reward.reshape(-1, *scale.shape) / scale).reshape(reward.shape))

    @torch.no_grad()
    def compute_advantages(self, batch: TensorDictBase) -> dict[str, float]:
        """Write values, `gae` advantages and λ-return targets, and what is known of the policy that acted."""
        k, alive = self.keys, batch.get(self.keys.alive)
        asked = batch.get(k.policy("log_probs")[:-1], None)
        features, behaviour = batch.get(k.features, None), batch.get(k.behaviour_log_prob, None)
        taken, ratio = taken_by_memory(batch, k), None
        if asked is not None or features is not None or taken is not None or not self.actor.densities:
            acted = self.actor.distribution(batch, **({} if features is None else {"hidden": features}))
            if asked is not None:
                asked.update_(acted.parameters)
            if not self.actor.densities:
                batch.get(k.log_prob).copy_(acted.log_prob(batch.get(k.action)))
            if taken is not None:
                ratio = settle(batch, self.actor, acted, taken).unsqueeze(-1)
        if behaviour is not None and taken is None:
            behaviour.copy_(batch.get(k.log_prob))
        output = self.critic(batch)
        value = self._team_value(self._denormalise(output), alive)
        next_value = self._next_values(batch, value)
        advantage = gae(
            batch.get(k.learn_reward),
            value,
            next_value,
            batch.get(("next", *k.discount)),
            self._cut(batch),
            gamma=self.gamma,
            lam=self.gae_lambda,
            ratio=ratio,
        )
        target = advantage + value
        for key, x in (
            (k.value_output, output),
            (k.value, value),
            (k.next_value, next_value),
            (k.value_target, target),
        ):
            batch.get(key).copy_(x)
        living = advantage.squeeze(-1)[alive]
        explained = 1 - living.var(correction=0) / target.squeeze(-1)[alive].var(correction=0).clamp(min=1e-12)
        if taken is not None:  # those that the policy's loss is made of
            living = advantage.squeeze(-1)[alive & ~taken]
        if self.normalise_advantages and len(living) > 0:
            advantage = (advantage - living.mean()) / (living.std(correction=0) + 1e-8)
        batch.get(k.advantage).copy_(advantage)
        return {"value/explained_variance": explained.item(), "value/mean": value.squeeze(-1)[alive].mean().item()}

    def bootstrap_values(self, td: TensorDictBase, generator: Generator | None = None) -> Tensor:
        """V ``[*B, A, 1]`` in units of ``learn_reward``."""
        return self._denormalise(self.critic(td))

    @torch.no_grad()
    def estimate(self, td: TensorDictBase) -> Tensor:
        """V ``[*B, A]``, of the policy that samples, in the units of the environment's reward."""
        value = self.bootstrap_values(td).mean(-1)
        return value if self.return_moments is None else value * self.return_moments.std.squeeze(-1).to(value.dtype)

    def _next_values(self, batch: TensorDictBase, value: Tensor) -> Tensor:
        """V(s_{t+1}) ``[T, N, A, 1]``: the next row's value; of the true last state where the next row is not it."""
        next_value = torch.empty_like(value)
        next_value[:-1] = value[1:]
        k = self.keys
        alive, lives_on, discount = (batch.get(key) for key in (k.alive, ("next", *k.alive), ("next", *k.discount)))
        elsewhere = leaves_alone(alive, lives_on, discount, self.spec.common_reward).any(-1)
        elsewhere |= batch.get(("next", k.truncated)).squeeze(-1)
        elsewhere[-1] = True
        last = batch.get("next").select(*self.critic.in_keys, self.keys.alive)[elsewhere]
        next_value[elsewhere] = self._team_value(self.bootstrap_values(last), last.get(self.keys.alive))
        return next_value

    def _team_value(self, value: Tensor, alive: Tensor) -> Tensor:
        return team_value(value, alive) if self.spec.common_reward else value

    def _cut(self, batch: TensorDictBase) -> Tensor:
        """``[T, N, A, 1]``: where an agent's sum stops: its episode's end or, without a common reward, its own."""
        done = batch.get(("next", self.keys.done)).unsqueeze(-2)
        if self.spec.common_reward:
            return done.expand(*done.shape[:-2], self.spec.n_agents, 1)
        return done | ~batch.get(("next", *self.keys.alive)).unsqueeze(-1)

    def _denormalise(self, output: Tensor) -> Tensor:
        return output if self.value_norm is None else self.value_norm.denormalise(output)

    # ------------------------------------------------------------------------------------------------- gradient steps

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """``epochs`` × ``minibatches`` random parts of the batch's team rows, ``[R]`` each, as `prepare` makes them.

        The value normaliser takes in the batch's targets first, so that memory's TARGET operators are behind it.
        """
        if self.value_norm is not None:
            self.value_norm.update(batch.get(self.keys.value_target).squeeze(-1), batch.get(self.keys.alive))
        rows = self.prepare(batch)
        sizes = [len(part) for part in torch.arange(len(rows)).tensor_split(self.n_minibatches)]
        for _ in range(self.epochs):
            order = torch.randperm(len(rows), generator=self.generator)
            yield from rows[order].split(sizes)

    @torch.no_grad()
    def prepare(self, batch: TensorDictBase) -> TensorDict:
        """The team rows ``[R]`` of a batch as `update` reads them: what does not change in an update is computed once.

        Actions and their log-probabilities are those before squashing (see `Actor.unsquash`), advantages
        ``[R, A]`` 0 for the dead, targets in the critic's units.  Where everybody lives there is no ``alive``.
        """
        k, alive = self.keys, batch.get(self.keys.alive)

        def of_living(key: tuple[str, ...]) -> Tensor:
            """A dead agent's entries may be anything, NaN too: here is 0, before a gradient could pass through them."""
            x = batch.get(key)
            return torch.where(alive.reshape(*alive.shape, *[1] * (x.ndim - alive.ndim)), x, 0)

        action, log_prob = self.actor.unsquash(of_living(k.action), of_living(k.log_prob))
        advantage, target = of_living(k.advantage).squeeze(-1), of_living(k.value_target)
        inputs = dict.fromkeys([*self.actor.in_keys, *self.critic.in_keys])
        entries = {
            **{key: batch.get(key) for key in inputs},
            k.value_output: of_living(k.value_output),
            k.action: action,
            k.log_prob: log_prob,
            k.advantage: advantage,
            # min(r A, clip(r) A) is A times r, kept below 1 + ε where A is positive, else above 1 − ε.
            LEAST: torch.where(advantage > 0, 0.0, 1 - self.clip),
            MOST: torch.where(advantage > 0, 1 + self.clip, torch.inf),
            k.value_target: target if self.value_norm is None else self.value_norm.normalise(target),
        }
        if not bool(alive.all()):
            entries[k.alive] = alive
        if (taken := taken_by_memory(batch, k)) is not None:
            entries[k.taken] = taken
            entries[k.advantage].masked_fill_(taken, 0.0)
        for name, region in batch.get(k.region, {}).items():
            for weight in WEIGHTS:
                if (x := region.get(weight, None)) is not None and bool(x.any()):
                    settled = self.actor.settled(region)
                    entries |= {(*k.region, name, key): leaf for key, leaf in {weight: x, **settled}.items()}
        for name, rows in batch.get(k.replay, {}).items():
            if bool(rows.get(k.alive).any()):
                entries[(*k.replay, name)] = self._replayed(rows)
        return TensorDict(batch_size=batch.batch_size).update(entries).reshape(-1)

    def _replayed(self, rows: TensorDictBase) -> TensorDict:
        """The rows of a REPLAY operator as `update` reads them, in the units of the batch's own."""
        k, weights = self.keys, ("policy_weight", "value_weight")
        kept = dict.fromkeys([*self.actor.in_keys, *self.critic.in_keys, k.alive, *weights])
        target = rows.get("value_target")
        entries: dict[Any, Tensor] = {key: rows.get(key) for key in kept}
        entries[k.action], _ = self.actor.unsquash(rows.get(k.action), torch.zeros_like(rows.get(weights[0])))
        entries["value_target"] = target if self.value_norm is None else self.value_norm.normalise(target)
        return TensorDict(batch_size=rows.batch_size).update(entries)

    def update(self, minibatch: TensorDictBase) -> dict[str, Tensor]:
        """One Adam step on L (see the class) over living agents."""
        distribution, value = self._evaluate(minibatch)
        policy_loss, entropy, approx_kl, clipped = self._policy_terms(minibatch, distribution)
        value_loss = self._value_loss(minibatch, value)
        loss = policy_loss - self.entropy_coef * entropy + self.value_coef * value_loss
        memory = self._region_terms(minibatch, distribution) | self._replay_terms(minibatch)
        self.optimiser.zero_grad()
        sum(memory.values(), loss).backward()
        self.optimiser.gather()
        norms = zip(("grad_norm/actor", "grad_norm/critic"), self.optimiser.clip(self.max_grad_norm), strict=False)
        self.optimiser.step()
        return {
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "policy/entropy": entropy.detach(),
            "policy/approx_kl": approx_kl,
            "policy/clip_fraction": clipped,
            **dict(norms),
            **{name: term.detach() for name, term in memory.items()},
        }

    def _evaluate(self, rows: TensorDictBase) -> tuple[Distribution, Tensor]:
        """The policy at rows ``[R]``, and values ``[R, A, 1]`` in the critic's units."""
        if self.share_body:
            return self.actor.evaluate(rows)
        return self.actor.distribution(rows), self.critic(rows)

    def _region_terms(self, rows: TensorDictBase, distribution: Distribution) -> dict[str, Tensor]:
        """Mean over the living of weight · KL(p*‖π), for every REGION operator that has a weight somewhere."""
        terms, alive = {}, rows.get(self.keys.alive, None)
        for name, region in rows.get(self.keys.region, {}).items():
            for key, divergence in zip(WEIGHTS, (distribution.kl_from, distribution.w2_from), strict=True):
                if (weight := region.get(key, None)) is not None:
                    terms[f"loss/{name}"] = masked_mean(weight * divergence(region), alive)
        return terms

    def _replay_terms(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """Means over the rows of every REPLAY operator of −policy_weight · log π(a|o) and value_weight · (V − y)²."""
        terms, k = {}, self.keys
        for name, replayed in rows.get(k.replay, {}).items():
            alive, (distribution, value) = replayed.get(k.alive), self._evaluate(replayed)
            density = distribution.log_density(replayed.get(k.action))
            error = mse_loss(value, replayed.get("value_target"), reduction="none").squeeze(-1)
            terms[f"loss/{name}_policy"] = -masked_mean(replayed.get("policy_weight") * density, alive)
            terms[f"loss/{name}_value"] = masked_mean(replayed.get("value_weight") * error, alive)
        return terms

    def _policy_terms(self, rows: TensorDictBase, distribution: Distribution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, alive = self.keys, rows.get(self.keys.alive, None)
        log_ratio, chose = distribution.log_density(rows.get(k.action)) - rows.get(k.log_prob), alive
        if (taken := rows.get(k.taken, None)) is not None:  # where memory acted there is nothing to learn of π's choice
            chose = ~taken if alive is None else alive & ~taken
        if chose is not None:
            log_ratio = torch.where(chose, log_ratio, 0.0)
        ratio = log_ratio.exp()
        surrogate = ratio.clamp(rows.get(LEAST), rows.get(MOST)) * rows.get(k.advantage)
        with torch.set_grad_enabled(self.entropy_coef > 0):
            entropy = masked_mean(distribution.entropy(self.entropy_generator), alive)
        with torch.no_grad():
            change = ratio - 1
            approx_kl = masked_mean(change - log_ratio, chose)
            clipped = masked_mean((change.abs() > self.clip).to(ratio.dtype), chose)
        return -masked_mean(surrogate, chose), entropy, approx_kl, clipped

    def _value_loss(self, rows: TensorDictBase, value: Tensor) -> Tensor:
        k, alive = self.keys, rows.get(self.keys.alive, None)
        target = rows.get(k.value_target)
        living = None if alive is None else alive.unsqueeze(-1)
        error = mse_loss(value, target, reduction="none")
        if self.value_clip is not None:
            old = rows.get(k.value_output)
            near = old + (value - old).clamp(-self.value_clip, self.value_clip)
            error = torch.max(error, mse_loss(near, target, reduction="none"))
        return masked_mean(error, living)

    @torch.no_grad()
    def finish_update(self, batch: TensorDictBase) -> None:
        """Take the batch's observations into the running statistics, so that they are constant during an update."""
        self.actor.input.update_moments(batch.get(self.keys.observation), batch.get(self.keys.alive))
        self.critic.update_moments(batch)

    def cut_episodes(self) -> None:
        """Drop the running discounted sums of the reward scaler."""
        self.return_carry = None

    # ---------------------------------------------------------------------------------------------------------- state

    def get_extra_state(self) -> dict[str, Any]:
        """Optimiser slots by parameter name, generators and the reward scaler's carry."""
        state: dict[str, Any] = {
            "optimiser": self.optimiser.named_state(dict(self.named_parameters())),
            "generators": {name: g.get_state() for name, g in self._generators().items()},
        }
        if self.return_carry is not None:
            state["return_carry"] = self.return_carry
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.optimiser.load_named_state(dict(self.named_parameters()), state["optimiser"])
        for name, generator in self._generators().items():
            generator.set_state(state["generators"][name])
        self.return_carry = state.get("return_carry")

    def _generators(self) -> dict[str, Generator]:
        return {"sample": self.actor.generator, "minibatches": self.generator, "entropy": self.entropy_generator}


def _check_ranges(**values: float) -> None:
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"algorithm.{name}={value!r} must lie in [0, 1]")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"algorithm.{name}={value!r} must not be negative")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (_is_number(value) and value > 0):
            raise ValueError(f"algorithm.{name}={value!r} must be positive")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
