"""AdaMemento's reflection: memory acts in the policy's place where it is confident that it ends well."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Entries, Entry
from marl_memory.memory.few_rows import Chosen, FewRows
from marl_memory.memory.operator import Bootstrap, MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.outcomes import Ends, Outcomes, OutcomeStore, Taken, blame
from marl_memory.memory.reflecting import Judged, Networks, reflection_loss
from marl_memory.memory.scope import Scope, state_there
from marl_memory.memory.threshold import Threshold
from marl_memory.memory.trajectories import Finished, Trajectories
from marl_memory.networks.optimiser import FlatAdam
from marl_memory.spec import TaskSpec

HORIZON = 1000
"""Steps of an episode that are known at its end where the task declares no limit."""

TINY = 1e-12
"""What a sum of weights is divided by at least: where nobody is, 0 is."""

BINS = 10
"""Of the confidence's histogram."""


class Reflection(MemoryOperator):
    r"""Learns from successes what to do and from both successes and failures how far to trust it, and then does it.

    Two stores of episodes that ended well and badly (`Outcomes`, `OutcomeStore`).  On the first $P_\omega$ is trained,
    on half and half of both an ensemble $C_\psi$:

    $$
    L_P = -\mathbb{E}_{\mathrm{succ}}[\, u \log P_\omega(a|o) \,], \qquad
    L_C = -\tfrac12 \mathbb{E}_{\mathrm{succ}}[\log C_\psi(o, a)]
          - \tfrac12 \mathbb{E}_{\mathrm{fail}}[\omega_t \log(1 - C_\psi(o, a))]
    $$

    u is the softmax of the episodes' returns in units of their deviation, $\omega_t$ the `blame`; both have mean 1 over
    the agents that live in a batch (``per_agent``: over the rows of each).  One more $C_\psi(o)$ learns the same of the
    observation alone, so that memory does not take for the action's doing what is the observation's
    (`confidence_logit`).  With logits $\ell$ the confidence is

    $$
    \ell(c) = \min_e \ell(C_\psi^e(o, \hat a)) - \max(0, \ell(C_\psi(o))), \qquad
    \hat a = \mathrm{mode}\, P_\omega(\cdot|o)
    $$

    and

    $$
    b(\cdot|o) = w\, P_\omega(\cdot|o) + (1 - w)\, \pi_\theta(\cdot|o), \qquad
    w = \mathrm{strength} \cdot \mathbb{1}[c > \kappa]
    $$

    is executed: the gate does not look at what the policy chose, so the mixture is exact.  Until there are ``least``
    successes and one failure, and at κ = 1, it is exactly the host.  In evaluation (``greedy``) memory's mode is taken
    wherever c > κ, and nothing is drawn.

    P and C read own observations: agents with parameters of their own (scope ``per_agent``), or shared ones and their
    number (``shared``).  In the scope ``centralized`` the team's joint action is judged in the team's state, in
    training only, and C learns what that says.  The team's outcome is that of every agent.

    This is our instantiation of the published summary of AdaMemento (Yan et al., arXiv 2410.04498); the paper's own
    formulas, thresholds and algorithm may differ.

    Args:
        spec: the task.
        seed: of initial weights and draws.
        n_envs, batch_steps: N, and the vector steps between two writes.
        off_policy: whether the host learns from a replay, and writes come with every collection.
        scope: see above; None: ``shared``.
        execution: which form acts, ``per_agent`` or ``shared``; None: the scope's (of ``centralized``, ``shared``).
        capacity: steps of single agents, half of them for successes, half for failures.
        episodes: the most episodes in each half.
        alike: of successes with the same end state, at most so many stay.
        horizon: steps of an episode that are known at its end, the last; None: the task's time limit, else `HORIZON`,
            but so many that ``least`` successes fit into their store.
        window, upper, lower: see `Outcomes`.
        least: successes from which on something is learnt.
        blame_steps: the last steps of a terminated failure that count.
        blame_decay: $\gamma_f$, how much less the step before counts.
        balance: the share of successes in a batch, and in $L_C$.
        hidden: widths of the networks' hidden layers.
        members: E.
        lr: Adam's step size.
        batches, batch_size: gradient steps at the end of every iteration, and team rows of each.
        kappa, kappa_schedule, kappa_final, kappa_quantile: see `Threshold`.
        gamma: the host's γ, by which its critic judges what memory did (``included``); nothing else depends on it.
        strength, strength_final: see `MemoryOperator`.

    Raises:
        ValueError: for a value out of range, a scope that the task does not admit, or ``centralized`` at execution.
    """

    stage: ClassVar[Stage] = Stage.ACT

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        n_envs: int = 1,
        batch_steps: int = 256,
        off_policy: bool = False,
        scope: str | None = None,
        execution: Literal["per_agent", "shared"] | None = None,
        capacity: int = 100_000,
        episodes: int = 200,
        alike: int = 20,
        horizon: int | None = None,
        window: int = 200,
        upper: float = 0.8,
        lower: float = 0.2,
        least: int = 8,
        blame_steps: int = 20,
        blame_decay: float = 0.9,
        balance: float = 0.5,
        hidden: tuple[int, ...] = (128, 128),
        members: int = 2,
        lr: float = 3e-4,
        batches: int = 16,
        batch_size: int = 256,
        kappa: float = 0.7,
        kappa_schedule: Literal["constant", "linear", "adaptive"] = "constant",
        kappa_final: float | None = None,
        kappa_quantile: float = 0.5,
        gamma: float = 0.99,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        check_positive(episodes=episodes, alike=alike, horizon=horizon, least=least, members=members, lr=lr)
        check_positive(blame_steps=blame_steps, batches=batches, batch_size=batch_size, blame_decay=blame_decay)
        if not 0 < balance < 1:
            raise ValueError(f"balance={balance!r} must lie in (0, 1)")
        if not blame_decay <= 1:
            raise ValueError(f"blame_decay={blame_decay!r} must lie in (0, 1]")
        if not least <= min(alike, episodes):
            raise ValueError(
                f"least={least} must not exceed alike={alike}, nor episodes={episodes}: where all successes end in one "
                "state there would never be enough"
            )
        self.spec, self.least, self.balance = spec, least, balance
        self.blame_steps, self.blame_decay = blame_steps, blame_decay
        self.batches, self.batch_size = batches, batch_size
        self.writes_on = "collection" if off_policy else "update"
        self.greedy, self.gamma, self.off_policy = False, gamma, off_policy
        self._fresh: TensorDictBase | None = None
        self.register_buffer("judged", torch.zeros(2, dtype=torch.int64), persistent=False)  # 0 after every iteration
        self.scope = Scope(scope or "shared", spec)
        rows = capacity // (2 * spec.n_agents)
        most = rows // least
        if most < 1:
            raise ValueError(
                f"capacity={capacity} leaves {rows} steps of {spec.n_agents} agents in each of the two stores: no room "
                f"for least={least} successes"
            )
        if horizon is not None and horizon > most:
            raise ValueError(
                f"horizon={horizon} must not exceed {most}: capacity={capacity} leaves {rows} steps of "
                f"{spec.n_agents} agents in each of the two stores, and least={least} successes are to fit in"
            )
        horizon = horizon or min(spec.max_episode_steps or HORIZON, most)
        self.trajectories = Trajectories(
            spec, n_envs=n_envs, batch_steps=batch_steps, horizon=horizon, state=self.scope.joint
        )
        self.outcomes = Outcomes(window=window, upper=upper, lower=lower)
        self.ends = Ends(spec.state_size)
        entries = self.trajectories.entries
        self.successes = OutcomeStore(entries, episodes=episodes, steps=rows, alike=alike)
        self.failures = OutcomeStore(entries, episodes=episodes, steps=rows, alike=None)
        self.threshold = Threshold(kappa=kappa, schedule=kappa_schedule, final=kappa_final, quantile=kappa_quantile)
        self.seed = seed
        self.form = {
            "apart": _form(self.scope.name, execution) == "per_agent",
            "joint": self.scope.joint,
            "hidden": tuple(hidden),
            "members": members,
        }
        self.networks = Networks(spec, **self.form, seed=seed)
        self.few = FewRows(self.networks)
        self.optimiser = FlatAdam(self.networks, lr=lr)
        self.generator = Generator().manual_seed(seed)
        self.register_buffer("ready", torch.zeros(spec.n_agents, dtype=torch.bool))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("said", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64))
        k, a, p = spec.keys, spec.n_agents, spec.action_size
        self.names = ("loc", "scale") if spec.continuous else ("log_probs",)
        self._entries: Entries = {
            k.taken: Entry((a,), torch.bool),
            k.act_weight: Entry((a,)),
            k.confidence: Entry((a,)),
            **{k.memory_policy(name): Entry((a, p)) for name in self.names},
        }
        self._asks: Entries = {} if off_policy else {k.behaviour_log_prob: Entry((a,))}
        self.in_keys = [k.observation, k.alive, k.action, *([] if spec.continuous else [k.action_mask])]
        self.out_keys = [k.action, *self._entries]
        self.write_keys = [*self.trajectories.write_keys, k.confidence]
        if off_policy:  # and what the host's critic reads, before and after
            self.write_keys += [k.taken, k.state, ("next", *k.discount)]
            self.write_keys += [("next", *key) for key in (k.observation, k.alive, *self.in_keys[3:])]

    ready: Tensor
    """``[A]`` bool: of this agent successes and failures were learnt."""
    settled: Tensor
    """``[]``: vector steps that the scales of observations are of."""
    judged: Tensor
    """``[2]``: of memory's actions those that were no worse than the policy by a replay host's critic, and all."""
    said: Tensor
    rejected: Tensor
    """``[]``: episodes that were refused because something in them was not finite."""

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return self._entries

    @property
    def asks(self) -> Entries:
        """See `MemoryOperator.asks`."""
        return self._asks

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`."""
        return Payloads(len(self) * self.spec.n_agents, 2 * self.successes.steps * self.spec.n_agents)

    def __len__(self) -> int:
        return len(self.successes) + len(self.failures)

    def clear(self) -> None:
        """Forget everything, what was learnt too."""
        for part in (self.trajectories, self.outcomes, self.successes, self.failures, self.threshold):
            part.clear()
        self.networks.load_state_dict(Networks(self.spec, **self.form, seed=self.seed).state_dict())
        self.optimiser.adam.state.clear()
        self.settled.copy_(self.trajectories.taken)
        self._fresh = None
        for x in (self.ready, self.said, self.rejected, self.judged):
            x.zero_()

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        super().set_progress(frames, progress)
        self.threshold.set_progress(progress)

    def get_extra_state(self) -> dict[str, Any]:
        """The generator's state, and the optimiser's slots by parameter name."""
        slots = self.optimiser.named_state(dict(self.networks.named_parameters()))
        return {"generator": self.generator.get_state(), "optimiser": slots}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state["generator"])
        self.optimiser.load_named_state(dict(self.networks.named_parameters()), state["optimiser"])

    # ------------------------------------------------------------------------------------------------------------- act

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Put memory's action where it is to act, and say where, how probable that was, and by which policy."""
        k = self.spec.keys
        agents = td.get(k.group)  # by a path a name is found in twice the time
        alive = agents.get(k.alive[-1])
        if self.strength == 0 or self.threshold.closed or not bool(self.ready.any()):
            for key, entry in self._entries.items():
                put(td, key, entry.zeros(td.batch_size, torch.float32).to(alive.device))
            return td
        able = alive & self.ready
        # Gradients are cut off where some could begin: entering no_grad at every step takes longer.
        observation, before = agents.get(k.observation[-1]), agents.get(k.action[-1]).detach()
        mask = None if self.spec.continuous else agents.get(k.action_mask[-1])
        if mask is not None and self.few.fit(observation):
            chosen = self.few.choose(
                observation,
                mask,
                able,
                threshold=self.threshold.logit,
                strength=self.strength,
                greedy=self.greedy,
                generator=self.generator,
            )
        else:
            chosen = self._choose(observation, mask, able)
        where = chosen.taken
        if self.spec.continuous:
            where = where.unsqueeze(-1) & self.networks.vectors.valid
        return self._tell(td, torch.where(where, chosen.action, before), chosen)

    @torch.no_grad()
    def _choose(self, observation: Tensor, mask: Tensor | None, able: Tensor) -> Chosen:
        """What is to be done at any number of observations, by PyTorch."""
        judged = self.networks.both(self.networks.seen(observation), mask)
        policy, mode, logit = judged.policy, judged.action, judged.logit
        weight = torch.where((logit > self.threshold.logit) & able, self.strength, 0.0)
        if self.greedy or self.strength == 1:
            taken = weight > 0
        else:
            taken = torch.rand(weight.shape, generator=self.generator) < weight
        action = mode if self.greedy else policy.draw(self.generator)
        return Chosen(taken, weight, logit.sigmoid(), action, policy.parameters)

    def _tell(self, td: TensorDictBase, action: Tensor, chosen: Chosen) -> TensorDictBase:
        """Set the action and what stands under ``act``: at once where nothing is to be put into room that was made."""
        k = self.spec.keys
        numbers = {"taken": chosen.taken, "weight": chosen.weight, "confidence": chosen.confidence}
        if td.is_locked:
            put(td, k.action, action)
            for name, value in numbers.items():
                put(td, ("act", name), value)
            for name, value in chosen.parameters.items():
                put(td, k.memory_policy(name), value)
            return td
        td.get(k.group).set(k.action[-1], action)
        policy = TensorDict._new_unsafe(source=dict(chosen.parameters), batch_size=td.batch_size)
        return td.set("act", TensorDict._new_unsafe(source={**numbers, "policy": policy}, batch_size=td.batch_size))

    # --------------------------------------------------------------------------------------------------------- remember

    @torch.no_grad()
    def write(self, td: TensorDictBase) -> None:
        """Take in steps ``[T, N]``, and remember the episodes that ended well or badly."""
        k = self.spec.keys
        if self.strength > 0 and not self.threshold.closed:  # else none was computed
            self.threshold.take(td.get(k.confidence)[td.get(k.alive) & self.ready])
        if self.off_policy and bool((done := td.get(k.taken).any(-1)).any()):
            self._fresh = td[done]
        ended = self.trajectories.write(td)
        if ended is None:
            return
        finite = ended.returns.isfinite()
        self.rejected += (~finite).sum()
        if not bool(finite.any()):
            return
        ended = ended[finite]
        success, failure = self.outcomes.judge(ended)
        if bool(success.any()):
            won = ended[success]
            self._offer(self.successes, won, won.kept, won.returns)
        if bool(failure.any()):
            lost = ended[failure]
            count = torch.where(lost.terminated, lost.kept.clamp(max=self.blame_steps), lost.kept)
            # A random score is a reservoir: whoever ever came has the same chance to be among the best.
            score = torch.rand(len(count), generator=self.generator, dtype=torch.float64).to(count.device)
            self._offer(self.failures, lost, count, score)

    def _offer(self, store: OutcomeStore, episodes: Finished, count: Tensor, score: Tensor) -> None:
        """Offer the last ``count`` ``[E]`` steps of ``episodes``, but not of those in which something is not finite."""
        rows, which, follow = self.trajectories.steps(episodes, count)
        wrong = torch.zeros_like(which, dtype=torch.bool)
        for name in self.trajectories.entries:
            x: Tensor = rows.get(name)
            if x.is_floating_point():
                wrong |= ~x.flatten(1).isfinite().all(1)
        finite = torch.bincount(which[wrong], minlength=len(count)) == 0
        self.rejected += (~finite).sum()
        if not bool(finite.any()):
            return
        weight = torch.ones(len(which), dtype=torch.float64, device=which.device)
        if store is self.failures:
            weight = blame(follow, episodes.length[which], episodes.terminated[which], decay=self.blame_decay)
        number, kept = finite.cumsum(0) - 1, finite[which]
        store.offer(
            Taken(
                score=score[finite],
                length=episodes.length[finite],
                ends=self.ends(episodes.left[finite]),
                rows=rows[kept],
                episode=number[which[kept]],
                weight=weight[kept],
            )
        )

    @torch.no_grad()
    def refresh(self, bootstrap: Bootstrap) -> None:
        """On hosts with a replay, judge what memory just did by their critic: see `_right`."""
        rows, self._fresh = self._fresh, None
        if rows is None:
            return
        k, after = self.spec.keys, rows.get("next")
        reward, limit = rows.get(("next", *k.reward)), self.spec.clip_rewards
        if limit is not None:
            reward = reward.clamp(-limit, limit)  # as the critic learns it
        values = [bootstrap(x).amin(-1, keepdim=True) for x in (after, rows)]
        right = self._right(reward, rows, *values)
        self.judged += torch.stack([right.sum(), torch.tensor(len(right), device=right.device)])

    def _right(self, reward: Tensor, td: TensorDictBase, following: Tensor, value: Tensor) -> Tensor:
        r"""Where memory acted, whether that was no worse than the policy: $r + \gamma\, d\, V(s') \ge V(s)$.

        One step, and not the advantage: where the policy would hardly have done it, that is 0 but for rounding.

        Args:
            reward: ``[*B, A, 1]``, r, in the critic's units; so are the values.
            td: ``[*B]``.
            following, value: ``[*B, A, 1]``, V(s') and V(s).

        Returns:
            bool ``[M]``.
        """
        k = self.spec.keys
        gain = reward + self.gamma * td.get(("next", *k.discount)) * following - value
        return (gain >= 0).squeeze(-1)[td.get(k.taken) & td.get(k.alive)]

    def cut_episodes(self) -> None:
        """See `MemoryOperator.cut_episodes`."""
        self.trajectories.drop_running()

    # ------------------------------------------------------------------------------------------------------------ learn

    def learn(self) -> dict[str, Tensor]:
        """Train P, and C where there is a failure, on ``batches`` batches."""
        self._settle()
        self.judged.zero_()
        if int(self.successes.held.sum()) < self.least:
            return {}
        reports: list[dict[str, Tensor]] = []
        for succeeded, failed in self._batches():
            terms = self._losses(succeeded, failed)
            self.optimiser.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            self.optimiser.gather()
            self.optimiser.step()
            self.networks.widen()
            reports.append({name: term.detach() for name, term in terms.items()})
        self.optimiser.zero_grad()
        there = [self._lived(store) for store in (self.successes, self.failures)]
        self.ready.copy_(there[0] & there[1])
        return {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}

    def _settle(self) -> None:
        """Scale observations by those of the steps since the last time."""
        new = int(self.trajectories.taken - self.settled)
        if new == 0:
            return
        observation, alive = self.trajectories.latest(new)
        self.networks.observed.update(observation, alive.unsqueeze(-1))
        if self.networks.stated is not None:
            state = self.trajectories.latest_states(new)
            there = state_there(alive, self.networks.observed.valid, own=self.spec.own_state)
            self.networks.stated.update(state.unsqueeze(-2), there.unsqueeze(-2))
        self.networks.settle()
        self.settled.copy_(self.trajectories.taken)

    def _lived(self, store: OutcomeStore) -> Tensor:
        """``[A]``: whether its networks learnt a step of the agent: with shared parameters, of anybody."""
        lived = (store.get_buffer("alive") & (store.owner >= 0).unsqueeze(-1)).any(0)
        return lived if self.networks.apart else lived.any().expand_as(lived)

    def _batches(self) -> Any:
        """Pairs of ``balance`` and 1 − ``balance`` of ``batch_size`` rows; None where there is no failure."""
        won = max(round(self.balance * self.batch_size), 1)
        lost = max(self.batch_size - won, 1)
        shares = self._shares()
        succeeded = self.successes.draw((self.batches, won), self.generator)
        failed = self.failures.draw((self.batches, lost), self.generator) if len(self.failures) > 0 else None
        for i in range(self.batches):
            rows = self.successes.rows(succeeded[i])
            rows.set("share", shares[self.successes.owner[succeeded[i]]])
            yield rows, None if failed is None else self.failures.rows(failed[i])

    def _shares(self) -> Tensor:
        """``[episodes]``: softmax of the returns of the successes held, in units of their deviation."""
        held = self.successes.held
        score = self.successes.score
        deviation = score[held].std(correction=0).clamp(min=1e-8)
        return ((score - score[held].max()) / deviation).masked_fill(~held, -math.inf).softmax(0).float()

    def _losses(self, succeeded: TensorDictBase, failed: TensorDictBase | None) -> dict[str, Tensor]:
        """L_P, and where there is a failure L_C; of a joint judge also what the others learn from it."""
        parts = [succeeded] if failed is None else [succeeded, failed]
        judged, won = self._read(parts), succeeded.get("alive")
        density = self.networks.log_density(judged.policy, judged.action)[: len(succeeded)]
        losses = {"loss/prediction": -self._mean(density, succeeded.get("share"), won)}
        if failed is None:
            return losses
        # C is balanced of those only whom both halves know.
        lost = failed.get("alive")
        known = won.any(0) & lost.any(0) if self.networks.apart else won.any() & lost.any()
        counts = [len(succeeded), len(failed)]
        outcomes = zip(parts, judged.logits.split(counts), judged.outlook.split(counts), (1.0, 0.0), strict=True)
        good, bad = (self._judge(rows, known, logits, outlook, y) for rows, logits, outlook, y in outcomes)
        share = self.balance
        return losses | {f"loss/{name}": share * good[name] + (1 - share) * bad[name] for name in good}

    def _read(self, parts: list[TensorDictBase]) -> Judged:
        """P and C at the rows of ``parts`` ``[R]``, for what was done there."""
        names = ("observation", "action", *(() if self.spec.continuous else ("action_mask",)))
        observation, action, *mask = (torch.cat([part.get(name) for part in parts]) for name in names)
        return self.networks.both(self.networks.seen(observation), mask[0] if mask else None, action)

    def _judge(
        self, rows: TensorDictBase, known: Tensor, logits: Tensor, outlook: Tensor, outcome: float
    ) -> dict[str, Tensor]:
        """One half of L_C: of rows that all ended well (``outcome`` 1) or badly (0), of agents that are ``known``."""
        net, alive, weight = self.networks, rows.get("alive"), rows.get("weight")
        target, there = torch.full_like(outlook, outcome), alive & known
        found = {"outlook": self._mean(reflection_loss(outlook.unsqueeze(-1), target), weight, there)}
        if net.team is None:
            return found | {"reflection": self._mean(reflection_loss(logits, target), weight, there)}
        team = net.team_confidence(rows.get("state"), rows.get("action"), alive)
        joint = (weight * reflection_loss(team, target[:, :1]).squeeze(-1)).sum() / weight.sum()
        told = reflection_loss(logits, team.detach().sigmoid().expand_as(logits))
        return found | {"reflection": joint, "distillation": self._mean(told, weight, there)}

    def _mean(self, x: Tensor, weight: Tensor, there: Tensor) -> Tensor:
        """Mean ``[]`` of ``x`` ``[R, A]``, a row as often as its ``weight`` ``[R]``, where ``there`` ``[R, A]``.

        Of networks that share nothing the sum of each agent's mean, as if each had a loss of its own.
        """
        weights, over = weight.unsqueeze(-1) * there, 0 if self.networks.apart else (0, 1)
        return ((weights * torch.where(there, x, 0.0)).sum(over) / weights.sum(over).clamp(min=TINY)).sum()

    # --------------------------------------------------------------------------------------------------------- tell

    def remarks(self) -> list[str]:
        """See `MemoryOperator.remarks`: that a task never fails, or never succeeds, once."""
        seen, succeeded, failed = self.outcomes.seen.tolist()
        found = []
        for i, (name, count) in enumerate((("succeeded", succeeded), ("failed", failed))):
            if seen >= self.outcomes.window and count == 0 and not bool(self.said[i]):
                self.said[i] = True
                found.append(
                    f"none of the first {seen} episodes of {self.spec.name} {name}: until one does, memory does not "
                    "act, and the host goes on alone"
                )
        return found

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """How much memory did, how confident it was, how often that was right by the critic, and what it holds."""
        k, alive = self.spec.keys, td.get(self.spec.keys.alive)
        taken, confidence = td.get(k.taken) & alive, td.get(k.confidence)[alive & self.ready]
        living, none = alive.sum().clamp(min=1), len(confidence) == 0
        counts = torch.histc(confidence, BINS, 0.0, 1.0) / max(len(confidence), 1)
        held = [store.held.sum().float() for store in (self.successes, self.failures)]
        found = {
            "rows": torch.tensor(float(len(self))),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
            "used": taken.sum().float(),
            "share": taken.sum() / living,
            "effective_strength": torch.where(alive, td.get(k.act_weight), 0.0).sum() / living,
            "kappa": torch.tensor(self.threshold.value),
            "confidence": confidence.sum() if none else confidence.mean(),
            **{f"confidence_{i}": count for i, count in enumerate(counts)},
            "successes": held[0],
            "failures": held[1],
            "success_steps": torch.tensor(float(len(self.successes))),
            "failure_steps": torch.tensor(float(len(self.failures))),
            "imbalance": (held[0] - held[1]) / (held[0] + held[1]).clamp(min=1),
            "rejected": self.rejected.float(),
        }
        following = td.get(k.next_value, None)
        if following is not None and bool(taken.any()):
            found["included"] = self._right(td.get(k.learn_reward), td, following, td.get(k.value)).float().mean()
        if int(self.judged[1]) > 0:
            found["included"] = self.judged[0] / self.judged[1]
        return found


def _form(scope: str, execution: str | None) -> str:
    """Which form acts: ``per_agent`` or ``shared``.

    Raises:
        ValueError: for ``centralized``, or one that the scope is not.
    """
    own = "shared" if scope == "centralized" else scope
    if execution == "centralized":
        raise ValueError(
            "execution='centralized': at execution agents see their own observations only; choose 'per_agent' or "
            "'shared', into which scope=centralized distils what it learns of the team"
        )
    if execution not in (None, "per_agent", "shared"):
        raise ValueError(f"execution={execution!r} must be 'per_agent', 'shared' or None")
    if scope != "centralized" and execution not in (None, scope):
        raise ValueError(f"execution={execution!r} is another than scope={scope!r}: leave it out, or set it to that")
    return execution or own
