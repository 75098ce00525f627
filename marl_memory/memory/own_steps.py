"""The newest steps of environments, kept by an operator whose host has no replay, and rows drawn from them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.functional.returns import team_value
from marl_memory.keys import Entries, Entry
from marl_memory.memory.episodes import after, clean
from marl_memory.memory.operator import Bootstrap, put
from marl_memory.memory.return_table import BLOCK, Facts, ReturnTable
from marl_memory.spec import TaskSpec


class StepRing(nn.Module):
    """The last T vector steps of N environments, in order, as buffers (`Steps`).

    Args:
        spec: the task.
        steps: T.
        n_envs: N.
    """

    def __init__(self, spec: TaskSpec, *, steps: int, n_envs: int) -> None:
        super().__init__()
        self.spec, self.steps, self.n_envs = spec, steps, n_envs
        k, a, p = spec.keys, spec.n_agents, spec.action_size
        seen = torch.uint8 if spec.picture else None
        self.paid: list[Any] = [k.learn_reward, ("next", *k.discount)]
        self.inputs: dict[Any, Entry] = {
            k.observation: Entry((a, spec.observation_size), seen),
            k.state: Entry((spec.state_size,), seen),
            k.alive: Entry((a,), torch.bool),
        }
        if not spec.continuous:
            self.inputs[k.action_mask] = Entry((a, p), torch.bool)
        kept: dict[Any, Entry] = {
            **self.inputs,
            k.action: Entry((a, p)) if spec.continuous else Entry((a,), torch.int64),
            **{after(key): entry for key, entry in self.inputs.items()},
            **dict.fromkeys(self.paid, Entry((a, 1))),
        }
        self.names = {key: "_".join((key,) if isinstance(key, str) else key) for key in kept}
        self.write_keys: list[Any] = [*kept, ("next", k.done)]
        for key, entry in kept.items():
            self.register_buffer(self.names[key], entry.zeros((steps, n_envs), torch.float32))
        self.register_buffer("ends", torch.zeros(steps, n_envs, dtype=torch.bool))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.valid: Tensor
        self.action_valid: Tensor
        self.register_buffer("valid", torch.tensor(spec.observation_valid), persistent=False)
        self.register_buffer("action_valid", torch.tensor(spec.action_valid), persistent=False)

    ends: Tensor
    """``[T, N]``: no episode goes on after the row."""
    taken: Tensor
    """``[]``: vector steps since the run began."""

    @property
    def written(self) -> int:
        """The number after the newest step's."""
        return int(self.taken)

    @property
    def oldest(self) -> int:
        """The number of the oldest step."""
        return max(self.written - self.steps, 0)

    def of(self, key: Any) -> Tensor:
        """An entry ``[T, N, …]``, in the ring's order."""
        return getattr(self, self.names[key])

    def clear(self) -> None:
        """Forget all steps."""
        self.taken.zero_()

    def write(self, td: TensorDictBase) -> None:
        """Take in a batch ``[T', N]``, or any that is one when its rows are laid out so; of more than fit, the last.

        Raises:
            ValueError: for rows that are no multiple of N.
        """
        n, rows = self.n_envs, td.numel()
        if rows % n:
            raise ValueError(f"a batch of {rows} rows must be steps of n_envs={n} environments")
        skip = max(rows // n - self.steps, 0)
        slots = (self.taken + torch.arange(skip, rows // n, device=self.ends.device)) % self.steps
        for key in self.names:
            x = clean(key, td, self.spec, self.valid, self.action_valid)
            if key in self.paid:
                x = self._of_living(x, td.get(self.spec.keys.alive))
            self.of(key)[slots] = x.reshape(-1, n, *x.shape[td.ndim :])[skip:]
        self.ends[slots] = td.get(("next", self.spec.keys.done)).reshape(-1, n)[skip:]
        self.taken += rows // n

    def _of_living(self, x: Tensor, alive: Tensor) -> Tensor:
        """``x`` ``[*B, A, 1]``, 0 for the dead; of a common reward, what a living one gets."""
        if self.spec.common_reward:
            first = alive.long().argmax(-1).view(*alive.shape[:-1], 1, 1)
            x, alive = x.take_along_dim(first, -2).expand_as(x), alive.any(-1, keepdim=True)
        return torch.where(alive.unsqueeze(-1), x, 0.0)

    def cut_episodes(self) -> None:
        """No episode goes on after the newest step."""
        if self.written:
            self.ends[(self.written - 1) % self.steps] = True

    def block(self, first: int, last: int) -> TensorDict:
        """See `Steps.block`."""
        slots = self._slots(first, last)
        return TensorDict({key: self.of(key)[slots] for key in self.names}, batch_size=(last - first, self.n_envs))

    def ends_between(self, first: int, last: int) -> Tensor:
        """See `Steps.ends_between`."""
        return self.ends[self._slots(first, last)]

    def _slots(self, first: int, last: int) -> Tensor:
        return torch.arange(first, last, device=self.ends.device) % self.steps


class OwnSteps(nn.Module):
    """A `StepRing` with the values of its rows, and REPLAY rows drawn from it.

    Args:
        name: of the operator, which the replayed rows are put under.
        spec: the task.
        steps: T.
        n_envs: N.
        coefficients: c of the imitation and $c_V$ of the value.
    """

    def __init__(
        self, name: str, spec: TaskSpec, *, steps: int, n_envs: int, coefficients: tuple[float, float]
    ) -> None:
        super().__init__()
        self.name, self.spec, self.coefficients = name, spec, coefficients
        self.steps = StepRing(spec, steps=steps, n_envs=n_envs)
        k, a = spec.keys, spec.n_agents
        self.register_buffer("values", torch.zeros(steps, n_envs, a))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))
        self.taken: dict[Any, Entry] = {
            **self.steps.inputs,
            k.action: Entry((a, spec.action_size)) if spec.continuous else Entry((a,), torch.int64),
        }
        place = {
            **{(key,) if isinstance(key, str) else key: entry for key, entry in self.taken.items()},
            ("value_target",): Entry((a, 1)),
            ("policy_weight",): Entry((a,)),
            ("value_weight",): Entry((a,)),
        }
        self.entries: Entries = {(*k.replay, name, *key): entry for key, entry in place.items()}

    values: Tensor
    """``[T, N, A]``: V of the rows' states, of the last refresh."""
    offset: Tensor
    """``[]``: where in their cells the next draws lie, in [0, 1)."""

    @torch.no_grad()
    def refresh(self, table: ReturnTable, bootstrap: Bootstrap, first: int, generator: Generator) -> None:
        """Returns and values of the steps from ``first`` on; and a new offset of the draws."""
        facts = table.sweep(bootstrap, self.steps, first)
        if facts is not None:
            self._value(facts, bootstrap)
        self.offset.copy_(torch.rand((), generator=generator, dtype=torch.float64))

    def _value(self, facts: Facts, bootstrap: Bootstrap) -> None:
        """V of the newest rows: what was said of the state that followed the row before; else it is asked for."""
        ring, count = self.steps, len(facts.reward)
        slots = torch.arange(ring.written - count, ring.written, device=self.values.device) % ring.steps
        self.values[slots[1:]] = facts.bootstrap[:-1].amin(-1)
        begins = torch.ones_like(facts.ends)
        begins[1:] = facts.ends[:-1]
        for at in begins.nonzero().split(BLOCK):
            here = (slots[at[:, 0]], at[:, 1])
            rows = TensorDict({key: ring.of(key)[here] for key in ring.inputs}, batch_size=(len(at),))
            value = bootstrap(rows)
            value = team_value(value, rows.get(self.spec.keys.alive)) if self.spec.common_reward else value
            self.values[here] = value.amin(-1)

    @torch.no_grad()
    def replay(self, td: TensorDictBase, table: ReturnTable, strength: float) -> None:
        """Put one team row, drawn evenly from all, beside every team row of ``td`` ``[*B]``; nothing is drawn here."""
        k, count, held = self.spec.keys, td.numel(), len(table)
        cell = (torch.arange(count, device=self.offset.device) + self.offset) / count
        drawn = (cell * held).long().clamp(max=max(held - 1, 0))
        number = drawn + (int(table.written) * table.n_envs - held)
        at = (number // table.n_envs % table.steps, number % table.n_envs)
        returns, there = table.find(number)
        there &= self.steps.of(k.alive)[at] & td.get(k.alive).reshape(count, -1)
        returns = torch.where(there, returns.amin(-1), 0.0)
        gain = torch.where(there, returns - self.values[at], 0.0).clamp(min=0) / self._deviation(table)

        def place(key: Any, x: Tensor) -> None:
            key = (key,) if isinstance(key, str) else key
            put(td, (*k.replay, self.name, *key), x.reshape(*td.batch_size, *x.shape[1:]))

        some = there.any(-1)
        for key in self.taken:
            x, mask = self.steps.of(key)[at], some if key == k.state else there
            place(key, x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), 0))
        policy, value = (strength * c * torch.where(there, 1.0, 0.0) for c in self.coefficients)
        place(k.alive, there & (strength > 0))
        place("value_target", returns.unsqueeze(-1))
        place("policy_weight", policy * gain.clamp(max=1))
        place("value_weight", value / 2)

    def _deviation(self, table: ReturnTable) -> Tensor:
        """σ_R ``[]`` of the returns held; 1 where they do not differ."""
        held = len(table) // table.n_envs
        found = table.returns[:held].amin(-1)[self.steps.of(self.spec.keys.alive)[:held]]
        found = found[found.isfinite()]
        std = found.std(correction=0) if len(found) > 0 else found.sum()
        return torch.where(std > 1e-6, std, 1.0)

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """Rows of agents that were drawn, the share of them that did better than V, and their mean weight."""
        mine = td.get((*self.spec.keys.replay, self.name))
        weight, used = mine.get("policy_weight"), mine.get(self.spec.keys.alive).sum().clamp(min=1)
        return {
            "used": mine.get(self.spec.keys.alive).sum().float(),
            "better": (weight > 0).sum() / used,
            "effective_strength": (weight.sum() + mine.get("value_weight").sum()) / used,
        }
