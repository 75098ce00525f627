"""Self-imitation: what turned out better than the critic expects is done again."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Entries, Entry
from marl_memory.memory.episodes import Ended, RunningEpisodes
from marl_memory.memory.operator import Bootstrap, MemoryOperator, Payloads, Stage, check_positive, put
from marl_memory.memory.scope import Scope
from marl_memory.spec import TaskSpec

NAME = "self_imitation"


class SelfImitation(MemoryOperator):
    r"""Replays steps whose return R lay above the critic's present value V beside the batch's own rows.

    Remembered, once an episode is over: each of its steps with its discounted return.  Before every update the values
    of all of them are computed anew, and rows are drawn with probability $p_n \propto g_n^a$ of their gain:

    $$
    g = \min\big((R - V(o))_+ / \sigma_R,\ \texttt{clip}\big), \qquad
    w_n = (p_n / \min_m p_m)^{-b}, \qquad
    L = L_{\mathrm{host}} + \mathbb{E}\,\big[ -c\, w g \log \pi(a|o) + c\, c_V\, w\, \tfrac12 (V - R)^2 \big]
    $$

    with the deviation $\sigma_R$ of the returns held (1 without ``normalise``).  c is multiplied by strength.  Gains,
    and which rows have one, are those of the last refresh: the paper computes $(R - V)_+$ in every gradient step.

    One row is drawn for every team row of the batch.  It is a step of one agent, and who imitates it takes turns; an
    agent imitates itself (scope ``per_agent``), or any agent of its kind (``shared``), whose step is then valued by the
    imitator's critic.  In the scope ``centralized`` it is a step of the whole team, drawn by its agents' mean gain.
    Beside a row whose agent is dead nothing is replayed.  A batch is written after its update.  Returns of truncated
    episodes go on with the value of the state they were left in; steps of episodes that a reset cut are dropped.

    Args:
        spec: the task.
        seed: of the draws.
        n_envs, batch_steps, horizon, gamma: see `RunningEpisodes`.
        scope, capacity, budget: see `Scope`.
        coefficient: c.
        value_coefficient: $c_V$.
        priority: a, the exponent of gains.
        correction: b, how far unequal draws are corrected for.
        clip: the largest gain; None: there is none.
        normalise: whether gains are in units of the deviation of the returns held; else of the reward.
        strength, strength_final: see `MemoryOperator`.

    Raises:
        ValueError: for a value out of range, or a scope that the task does not admit.

    Reference: Oh et al. 2018, "Self-Imitation Learning" (arXiv 1806.05635), equations 1 to 3; draws: Schaul et al. 2016
    (arXiv 1511.05952).
    """

    stage: ClassVar[Stage] = Stage.REPLAY
    writes_on = "update"
    keeps_rewards = True

    def __init__(
        self,
        *,
        spec: TaskSpec,
        seed: int = 0,
        n_envs: int = 1,
        batch_steps: int = 256,
        scope: str | None = None,
        capacity: int = 10_000,
        budget: Literal["total", "per_bank"] = "total",
        coefficient: float = 0.1,
        value_coefficient: float = 0.01,
        priority: float = 0.6,
        correction: float = 0.1,
        clip: float | None = 1.0,
        normalise: bool = True,
        gamma: float = 0.99,
        horizon: int | None = None,
        strength: float = 1.0,
        strength_final: float | None = None,
    ) -> None:
        super().__init__(strength=strength, strength_final=strength_final)
        check_positive(capacity=capacity, coefficient=coefficient, clip=clip)
        for name, value in (("priority", priority), ("correction", correction)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must lie in [0, 1]")
        if not value_coefficient >= 0:
            raise ValueError(f"value_coefficient={value_coefficient!r} must not be negative")
        self.spec, self.n_envs = spec, n_envs
        self.coefficient, self.value_coefficient = coefficient, value_coefficient
        self.priority, self.correction, self.clip, self.normalise = priority, correction, clip, normalise
        self.episodes = RunningEpisodes(
            spec, n_envs=n_envs, batch_steps=batch_steps, horizon=horizon, gamma=gamma, learnt=True
        )
        self.scope = Scope(scope or "shared", spec)
        self.size = self.scope.rows_per_bank(capacity, budget)
        self.generator = Generator().manual_seed(seed)
        k, a, p = spec.keys, spec.n_agents, spec.action_size
        action = Entry((p,)) if spec.continuous else Entry((), torch.int64)
        seen = torch.uint8 if spec.picture else torch.float32
        self.rows: dict[Any, Entry] = {k.observation: Entry((spec.observation_size,), seen), k.action: action}
        if not spec.continuous:
            self.rows[k.action_mask] = Entry((p,), torch.bool)
        banks = (self.scope.banks, self.size)
        for key, entry in self.rows.items():
            self.register_buffer(key[-1], entry.zeros((*banks, self.scope.payloads), torch.float32))
        self.register_buffer("state", torch.zeros(*banks, spec.state_size, dtype=seen))
        self.register_buffer("returns", torch.zeros(*banks, self.scope.payloads))
        self.register_buffer("live", torch.zeros(*banks, self.scope.payloads, dtype=torch.bool))
        self.register_buffer("written", torch.zeros(self.scope.banks, dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros(self.scope.banks, dtype=torch.int64))
        self.imitators = 1 if self.scope.joint else a
        self.register_buffer("values", torch.zeros(self.imitators, self.size, self.scope.payloads))
        self.register_buffer("offset", torch.zeros(self.imitators, dtype=torch.float64))
        place = {
            **{key: Entry((a, *entry.shape), entry.dtype) for key, entry in self.rows.items()},
            (k.state,): Entry((spec.state_size,), seen),
            k.alive: Entry((a,), torch.bool),
            ("value_target",): Entry((a, 1)),
            ("policy_weight",): Entry((a,)),
            ("value_weight",): Entry((a,)),
        }
        self._entries: Entries = {(*k.replay, NAME, *key): entry for key, entry in place.items()}
        self.in_keys = [k.alive]
        self.out_keys = list(self._entries)
        self.write_keys = self.episodes.write_keys

    state: Tensor
    """``[G, N, S]``."""
    returns: Tensor
    """``[G, N, S']``: R, of every payload (the agents of a team row, else one)."""
    live: Tensor
    """``[G, N, S']``: the payload is an agent's that lived."""
    written: Tensor
    """``[G]`` rows taken in since the beginning."""
    rejected: Tensor
    """``[G]`` rows refused because they were not finite."""
    values: Tensor
    """``[I, N, S']``: V of every row, by the critic of each imitator (of the team: 1)."""
    offset: Tensor
    """``[I]``: where the next draws begin in the cumulated chances, in [0, 1)."""

    @property
    def entries(self) -> Entries:
        """See `MemoryOperator.entries`."""
        return self._entries

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`."""
        return Payloads(int(self.live.sum()), self.live.numel())

    def __len__(self) -> int:
        return int(self.live.any(-1).sum())

    def clear(self) -> None:
        """Forget everything."""
        self.episodes.clear()
        for x in (self.live, self.written, self.rejected):
            x.zero_()

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state)

    # ---------------------------------------------------------------------------------------------------------- recall

    @torch.no_grad()
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Set a row beside every team row ``[*B]``, with its weights ``[*B, A]``; nothing is drawn here."""
        k, alive = self.spec.keys, td.get(self.spec.keys.alive)
        count, agents = td.numel(), self.spec.n_agents
        gain = self.gains()
        mean = gain.sum(-1) / self._of_imitators(self.live).sum(-1).clamp(min=1)
        chances = torch.where(mean > 0, mean.double() ** self.priority, 0.0)  # 0 ** 0 is 1
        drawn = self._drawn(chances, -(-count // self.imitators))
        number = drawn.T.flatten()[:count]  # [B]: row b is for imitator b mod I
        row = torch.arange(count, device=number.device)
        imitator = row % self.imitators
        bank = self._bank_of_imitator()[imitator]
        # [B, A]: of a team row all slots are the team's, else only the imitator's own
        mine = (row.unsqueeze(1) % agents == torch.arange(agents, device=row.device)) | self.scope.joint
        chance = chances[imitator, number]
        least = torch.where(chances > 0, chances, torch.inf).amin(-1)[imitator]
        weight = torch.where(chance > 0, (chance / least) ** -self.correction, 0.0).to(gain.dtype).unsqueeze(-1)
        there = mine & self.live[bank, number] & (gain[imitator, number] > 0) & alive.reshape(count, agents)

        def place(key: tuple[str, ...], x: Tensor) -> None:
            put(td, (*k.replay, NAME, *key), x.reshape(*td.batch_size, *x.shape[1:]))

        def of_agents(x: Tensor) -> Tensor:
            """``[G, N, S', …] → [B, A, …]``, 0 where nobody replays."""
            x = x[bank, number].expand(-1, agents, *x.shape[3:])
            return x.masked_fill(~there.reshape(count, agents, *[1] * (x.ndim - 2)), 0)

        for key in self.rows:
            place(key, of_agents(getattr(self, key[-1])))
        weight = self.strength * self.coefficient * torch.where(there, weight, 0.0)
        place((k.state,), torch.where(there.any(-1, keepdim=True), self.state[bank, number], 0))
        place(("value_target",), of_agents(self.returns).unsqueeze(-1))
        place(("policy_weight",), weight * gain[imitator, number].expand(-1, agents))
        place(("value_weight",), weight * self.value_coefficient / 2)
        place(k.alive, there & (weight > 0))
        return td

    def gains(self) -> Tensor:
        """g ``[I, N, S']`` of every row, 0 where there is none."""
        returns, live = self._of_imitators(self.returns), self._of_imitators(self.live)
        gain = torch.where(live, returns - self.values, 0.0).clamp(min=0)
        if self.normalise:
            gain = gain / self._deviation()
        return gain if self.clip is None else gain.clamp(max=self.clip)

    def _deviation(self) -> Tensor:
        """σ_R ``[]`` of the returns held; 1 where they do not differ."""
        held = self.returns[self.live]
        std = held.std(correction=0) if len(held) > 0 else held.sum()
        return torch.where(std > 1e-6, std, 1.0)

    def _drawn(self, chances: Tensor, count: int) -> Tensor:
        """Numbers ``[I, J]`` of rows, drawn in J equal strata of the cumulated ``chances`` ``[I, N]``.

        They go round from the offset, so that the first rows held do not always stand beside the first of the batch.
        """
        cumulated = chances.cumsum(-1)
        strata = (torch.arange(count, device=chances.device) / count + self.offset.unsqueeze(-1)) % 1
        return torch.searchsorted(cumulated, strata * cumulated[:, -1:], right=True).clamp_(max=self.size - 1)

    # --------------------------------------------------------------------------------------------------------- remember

    def write(self, td: TensorDictBase) -> None:
        """Take in steps ``[T, N]``; they are remembered once their episodes are over, by `refresh`."""
        self.episodes.write(td)

    def cut_episodes(self) -> None:
        """See `MemoryOperator.cut_episodes`."""
        self.episodes.drop_running()

    @torch.no_grad()
    def refresh(self, bootstrap: Bootstrap) -> None:
        """Remember the episodes that ended, value all rows by the present critic, and draw for the next update."""
        ended = self.episodes.take(bootstrap)
        if ended is not None:
            self._remember(ended)
        self._value(bootstrap)
        self.offset.copy_(torch.rand(self.imitators, generator=self.generator, dtype=torch.float64))

    def _remember(self, ended: Ended) -> None:
        """Write rows ``[M]`` round the rings; of more than they hold, the last."""
        scope, k = self.scope, self.spec.keys
        live, state = scope.living(ended.rows.get(k.alive)), ended.rows.get(k.state)
        shared_out = state.unsqueeze(1).expand(-1, self.spec.n_agents, -1)
        rows = {key[-1]: scope.to_banks(ended.rows.get(key), len(entry.shape)) for key, entry in self.rows.items()}
        rows["returns"] = scope.to_banks(ended.returns, 0)
        rows = {name: x.masked_fill(~live.reshape(*live.shape, *[1] * (x.ndim - 3)), 0) for name, x in rows.items()}
        rows["state"] = state.unsqueeze(0) if scope.joint else scope.to_banks(shared_out).squeeze(2)
        offered = live.any(-1)
        finite = torch.stack([x.flatten(2).isfinite().all(-1) for x in rows.values()]).all(0)
        self.rejected += (offered & ~finite).sum(1)
        offered = offered & finite
        rank, total = offered.cumsum(1) - 1, offered.sum(1, keepdim=True)
        kept = offered & (rank >= total - self.size)
        at = (self.written.unsqueeze(1) + rank) % self.size
        at = (at + torch.arange(scope.banks, device=at.device).unsqueeze(1) * self.size)[kept]
        for name, x in {**rows, "live": live}.items():
            getattr(self, name).flatten(0, 1)[at] = x[kept]
        self.written += total.squeeze(1)

    def _value(self, bootstrap: Bootstrap) -> None:
        """V of all rows, which stand in every agent's place, for the critic of each who may imitate them."""
        k, agents, held = self.spec.keys, self.spec.n_agents, int(self.written.max().clamp(max=self.size))
        if held == 0:
            return
        for bank in range(self.scope.banks):
            rows = TensorDict(batch_size=(held,))
            for key in self.rows:
                x = getattr(self, key[-1])[bank, :held]
                rows.set(key, x.expand(held, agents, *x.shape[2:]))
            rows.set(k.state, self.state[bank, :held])
            rows.set(k.alive, self.live[bank, :held].expand(held, agents))
            value = bootstrap(rows).amin(-1)
            if self.scope.joint:
                self.values[0, :held] = value
            else:
                mine = self.scope.bank_of == bank
                self.values[mine, :held, 0] = value.T[mine]

    def _of_imitators(self, x: Tensor) -> Tensor:
        """``[G, N, …]`` as ``[I, N, …]``: of the bank that each imitator draws from."""
        return x[self._bank_of_imitator()]

    def _bank_of_imitator(self) -> Tensor:
        """``[I]``."""
        return torch.zeros_like(self.written) if self.scope.joint else self.scope.bank_of

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """The state of the memory, and of what was drawn: rows of agents, their mean gain and weight."""
        weight: Tensor = td.get((*self.spec.keys.replay, NAME, "policy_weight"))
        used = td.get((*self.spec.keys.replay, NAME, *self.spec.keys.alive)).sum()
        gain, live = self.gains(), self._of_imitators(self.live)
        return {
            "rows": torch.tensor(float(len(self))),
            "bytes": torch.tensor(float(self.bytes)),
            "strength": torch.tensor(self.strength),
            "rejected": self.rejected.sum().float(),
            "dropped": self.episodes.dropped.float(),
            "used": used.float(),
            "better": (gain > 0).sum() / live.sum().clamp(min=1),
            "gain": gain.sum() / (gain > 0).sum().clamp(min=1),
            "effective_strength": weight.sum() / used.clamp(min=1),
        }
