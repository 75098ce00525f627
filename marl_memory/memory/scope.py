"""Who shares a memory with whom: the one place that maps agents to banks of rows."""

from __future__ import annotations

from typing import Literal, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marl_memory.networks.deterministic import ActionVector
from marl_memory.spec import TaskSpec

ScopeName = Literal["per_agent", "shared", "centralized"]
SCOPES = ("per_agent", "shared", "centralized")


class Scope(nn.Module):
    """Maps entries of A agents to G banks and back.

    | scope       | banks G            | key of a row        | members S | rows of a team step             |
    |-------------|--------------------|---------------------|-----------|---------------------------------|
    | per_agent   | A                  | own observation     | 1         | one in each bank                |
    | shared      | 1 per kind of agent| own observation     | 1         | one for every agent of the kind |
    | centralized | 1                  | the team's state    | A         | one, with a payload per agent   |

    Agents are of one kind if their unpadded observations and actions have the same sizes.  A batch ``[*B, A]`` becomes
    ``[G, R, S]``: R rows offered to each bank, S payloads in a row.  Where kinds are unequally large, rows of the
    smaller ones are filled up, and not *present*.

    Args:
        name: ``per_agent``, ``shared`` or ``centralized``.
        spec: the task.
        actions: whether an action is part of a key: the own one, or in the team's state all agents'.
        feature_size: H, where rows are found by the features of the host's actor, the own ones or all agents' side by
            side, in the place of observation and state; None: they are not.
        planes: ``[F, D]``, a projection of pictures, brightness from 0 to 1, of which keys are made; None: keys are the
            pictures themselves.
        raw: keys are the pictures' bytes, as they come.

    Raises:
        ValueError: for another name.
    """

    def __init__(
        self,
        name: str,
        spec: TaskSpec,
        *,
        actions: bool = False,
        feature_size: int | None = None,
        planes: Tensor | None = None,
        raw: bool = False,
    ) -> None:
        super().__init__()
        if name not in SCOPES:
            raise ValueError(f"scope={name!r} must be one of {', '.join(SCOPES)}")
        self.name, self.n_agents, self.key_names = cast(ScopeName, name), spec.n_agents, spec.keys
        sizes = list(zip(spec.observation_sizes, spec.action_sizes, strict=True))
        agents = range(self.n_agents)
        if name == "shared":
            kinds = list(dict.fromkeys(sizes))
            groups = [[i for i in agents if sizes[i] == kind] for kind in kinds]
        else:
            groups = [[i] for i in agents]
        widest = max(len(group) for group in groups)
        self.members: Tensor
        self.places: Tensor
        self.present: Tensor
        present = [[i < len(group) for i in range(widest)] for group in groups]
        filled = [[group[min(i, len(group) - 1)] for i in range(widest)] for group in groups]
        flat = [agent for group in filled for agent in group]
        self.register_buffer("members", torch.tensor(flat), persistent=False)
        self.register_buffer("places", torch.tensor([flat.index(i) for i in agents]), persistent=False)
        self.register_buffer("present", torch.tensor(present), persistent=False)
        self.bank_of: Tensor
        self.register_buffer("bank_of", self.places // widest, persistent=False)
        self.all_present = bool(self.present.all())
        self.padded = not all(all(row) for row in spec.observation_valid)
        self.joint = name == "centralized"
        self.feature_size = feature_size
        self.features = spec.state_size if self.joint else spec.observation_size
        """F, of a key."""
        self.pictures = spec.picture is not None and not raw
        self.planes: Tensor | None
        self.register_buffer("planes", planes)
        if planes is not None:
            self.features = planes.shape[-1]
        if feature_size is not None:
            self.features = feature_size * (self.n_agents if self.joint else 1)
        self.vectors = ActionVector(spec) if actions else None
        if actions:
            self.features += spec.action_size * (self.n_agents if self.joint else 1)
        self.own_state = spec.own_state
        self.valid: Tensor
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)
        self.banks = 1 if self.joint else len(groups)
        """G."""
        self.payloads = self.n_agents if self.joint else 1
        """S, payloads in a row."""
        self.per_step = 1 if self.joint else widest
        """Rows that a team step offers to each bank."""
        self.one_bank = self.banks == 1 and (self.joint or self.all_present)
        """Whether rows need no sorting."""

    def rows_per_bank(self, capacity: int, budget: str) -> int:
        """Rows of a bank, for a budget counted in payloads of single agents.

        Args:
            capacity: C, payloads: of all banks together (``total``) or of each (``per_bank``).
            budget: ``total`` or ``per_bank``.

        Raises:
            ValueError: for another budget, or one that gives a bank no row.
        """
        if budget not in ("total", "per_bank"):
            raise ValueError(f"budget={budget!r} must be 'total' or 'per_bank'")
        rows = capacity // (self.payloads * (self.banks if budget == "total" else 1))
        if rows < 1:
            raise ValueError(
                f"capacity={capacity} with budget={budget!r} leaves no row in a bank: scope={self.name} has "
                f"{self.banks} banks of rows with {self.payloads} payloads each"
            )
        return rows

    def keys_of(self, td: TensorDictBase) -> Tensor:
        """What rows are found by: own observations ``[G, R, F]``, or the state ``[1, R, F]``; actions behind them.

        Padding and the dead have 0 there, whatever ``td`` holds.  In their place, where so asked, features.
        """
        alive: Tensor = td.get(self.key_names.alive)
        if self.feature_size is not None:
            own = torch.where(alive.unsqueeze(-1), td.get(self.key_names.features), 0.0)
            key = self._with_action(own.flatten(-2) if self.joint else own, td, alive)
            return key.reshape(1, -1, self.features) if self.joint else self.to_banks(key).squeeze(2)
        if self.joint:
            there = state_there(alive, self.valid, own=self.own_state)
            state = self._seen(torch.where(there, td.get(self.key_names.state), 0))
            return self._with_action(state, td, alive).reshape(1, -1, self.features)
        counts = alive.unsqueeze(-1) & self.valid if self.padded else alive.unsqueeze(-1)
        observation = self._seen(torch.where(counts, td.get(self.key_names.observation), 0))
        return self.to_banks(self._with_action(observation, td, alive)).squeeze(2)

    def _seen(self, x: Tensor) -> Tensor:
        """``[*, F]`` as it comes; of pictures, which come as bytes, what keys are made of, ``[*, D]``."""
        if not self.pictures:
            return x
        bright = x.float() / 255
        return bright if self.planes is None else bright @ self.planes

    def _with_action(self, key: Tensor, td: TensorDictBase, alive: Tensor) -> Tensor:
        """``key`` ``[*B, F']`` or ``[*B, A, F']``, and the actions behind it where they are part of it."""
        if self.vectors is None:
            return key
        action = td.get(self.key_names.action)
        action = torch.where(alive.reshape(*alive.shape, *[1] * (action.ndim - alive.ndim)), action, 0)
        vector = self.vectors.encode(action)
        vector = torch.where(alive.unsqueeze(-1) & self.vectors.valid, vector, 0.0)
        return torch.cat([key, vector.flatten(-2) if self.joint else vector], -1)

    def to_banks(self, x: Tensor, trailing: int = 1) -> Tensor:
        """``[*B, A, …] → [G, R, S, …]`` with ``trailing`` dimensions behind the agents'."""
        tail = x.shape[x.ndim - trailing :]
        if self.one_bank:
            return x.reshape(1, -1, self.payloads, *tail)
        x = x.reshape(-1, self.n_agents, *tail).index_select(1, self.members)
        x = x.reshape(len(x), self.banks, -1, *tail)
        return x.transpose(0, 1).reshape(self.banks, -1, 1, *tail)

    def to_agents(self, y: Tensor, batch: torch.Size) -> Tensor:
        """The inverse of `to_banks`: ``[G, R, S, …] → [*B, A, …]``."""
        tail = y.shape[3:]
        if self.one_bank:
            return y.reshape(*batch, self.n_agents, *tail)
        y = y.reshape(self.banks, -1, self.per_step, *tail).transpose(0, 1)
        y = y.reshape(-1, self.banks * self.per_step, *tail).index_select(1, self.places)
        return y.reshape(*batch, self.n_agents, *tail)

    def per_agent(self, x: Tensor) -> Tensor:
        """What belongs to banks and their payloads, ``[G, S]``, for each agent: ``[A]``."""
        if x.numel() == 1 or self.joint:
            return x.view(-1).expand(self.n_agents)
        return x[self.bank_of, 0]

    def means(self, x: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``[G, S, P]`` of ``[*B, A, P]`` over the `living` ``[G, R, S]``, and of how many each ``[G, S, 1]``."""
        counts = live.unsqueeze(-1)
        count = counts.sum(1)
        return torch.where(counts, self.to_banks(x), 0.0).sum(1) / count.clamp(min=1), count

    def living(self, alive: Tensor) -> Tensor:
        """Which payloads ``[G, R, S]`` are an agent's that lives, of ``alive`` ``[*B, A]``; filled-up rows are not."""
        living = self.to_banks(alive, trailing=0)
        if self.all_present:
            return living
        steps = living.shape[1] // self.per_step
        return living & self.present.unsqueeze(1).expand(-1, steps, -1).reshape(self.banks, -1, 1)


def state_there(alive: Tensor, valid: Tensor, *, own: bool) -> Tensor:
    """What of a team's state is there: one that is all observations has the dead and padding in it too.

    Args:
        alive: ``[*B, A]`` bool.
        valid: ``[A, F]`` bool, `TaskSpec.observation_valid`.
        own: `TaskSpec.own_state`.

    Returns:
        bool ``[*B, A·F]``, or ``[*B, 1]`` of a state of the task's own.
    """
    return alive.any(-1, keepdim=True) if own else (alive.unsqueeze(-1) & valid).flatten(-2)
