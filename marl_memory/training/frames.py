"""Stacked pictures of a replay, each picture kept once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from marl_memory.keys import Keys

Room = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""Makes room for an entry, by a name, a shape and a type."""


class FrameRing:
    """The newest picture of every step, of which the stacks of T steps at t and t + 1 can be made again.

    An observation is K pictures, oldest first; at t + 1 the oldest is gone and one is new.  A stack that reaches back
    beyond the start of its episode has zeros there, or the first picture again, whichever the environment gave.  The
    last picture of an episode belongs to no step that follows, and is kept apart.  An agent that is dead sees nothing,
    not what it saw before.

    Args:
        steps: T.
        n_envs: N.
        stack: K.
        keys: the task's.
        room: makes room for the pictures.
    """

    def __init__(self, *, steps: int, n_envs: int, stack: int, keys: Keys, room: Room) -> None:
        self.steps, self.n_envs, self.stack, self.keys, self.room = steps, n_envs, stack, keys, room
        self.slots = steps + stack
        """K - 1 before the oldest step, and one after the newest."""
        self.sources: dict[NestedKey, bool] = {
            keys.observation: False,
            keys.state: False,
            ("next", *keys.observation): True,
            ("next", keys.state): True,
        }
        """The entries that are made of pictures, and whether they are those at t + 1."""
        self.pictures: Tensor | None = None
        self.last: Tensor | None = None
        shape = (self.slots, n_envs)
        self.age = torch.zeros(shape, dtype=torch.int64)
        """``[T + K, N]``: steps since the episode began; K - 1 stands for all from there on."""
        self.repeats = torch.zeros(shape, dtype=torch.bool)
        """``[T + K, N]``: the episode began with its first picture repeated, not with zeros."""
        self.blank: dict[bool, Tensor] = {}
        """``[T + K, N, A]`` at t (False) and at t + 1 (True): the agent sees nothing."""
        self.place = torch.full(shape, -1)
        """``[T + K, N]``: where among ``last`` the picture lies that follows, if no step follows."""
        self.first, self.count = 0, 0
        """The oldest of ``last``, and how many there are: a ring too, that grows where it must."""
        self.fresh = torch.ones(n_envs, dtype=torch.bool)
        """``[N]``: the next step begins an episode."""

    pictures: Tensor | None
    """``[T + K, N, A, f]``: of step s in slot s mod (T + K); behind the last step, what follows it."""
    last: Tensor | None
    """``[M, A, f]``."""

    @property
    def bytes(self) -> int:
        """Of all that grows with T."""
        held = [self.age, self.repeats, self.place, self.pictures, self.last, *self.blank.values()]
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    # ------------------------------------------------------------------------------------------------ writing, drawing

    def extend(self, batch: TensorDictBase, written: int) -> None:
        """Write the steps of a batch ``[T', N]``, of which the first is number ``written``.

        Raises:
            ValueError: if what the batch holds are no stacks of K pictures.
        """
        now, following = batch.get(self.keys.observation), batch.get(("next", *self.keys.observation))
        done = batch.get(("next", self.keys.done)).squeeze(-1)
        size, length = now.shape[-1] // self.stack, len(now)
        blank = {False: _blank(now, size), True: _blank(following, size)}
        self._check(now, following, size, blank[True])
        if self.pictures is None or self.last is None:
            self._allocate(now.shape[2], size)
        assert self.pictures is not None
        begins = torch.cat([self.fresh.unsqueeze(0), done[:-1]])
        slots = torch.arange(written, written + length) % self.slots
        self._release(slots)
        for after, rows in blank.items():
            self.blank[after][slots] = rows
        self.pictures[slots] = now[..., -size:]
        self.pictures[(written + length) % self.slots] = following[-1, ..., -size:]
        # Ages, and how the episode began: of the latest beginning at or before each step.
        steps = torch.arange(length).unsqueeze(-1)
        begin = torch.where(begins, steps, -1).cummax(0).values
        before = (written - 1) % self.slots
        age = torch.where(begin >= 0, steps - begin, self.age[before] + 1 + steps)
        self.age[slots] = age.clamp(max=self.stack - 1)
        padded = self._repeated(now, begins, size)
        self.repeats[slots] = torch.where(begin >= 0, padded.gather(0, begin.clamp(min=0)), self.repeats[before])
        self.place[slots] = -1
        for t in done.any(1).nonzero()[:, 0].tolist():  # few steps end an episode
            envs = done[t].nonzero()[:, 0]
            self._keep(int(slots[t]), envs, following[t, envs][..., -size:])
        self.fresh = done[-1].clone()

    def cut(self, written: int) -> None:
        """The environments were reset after ``written`` steps: what followed the last one follows no more."""
        if self.pictures is None or written == 0:
            return
        slot = (written - 1) % self.slots
        envs = (self.place[slot] < 0).nonzero()[:, 0]
        self._keep(slot, envs, self.pictures[written % self.slots, envs])
        self.fresh = torch.ones_like(self.fresh)

    def draw(self, step: Tensor, env: Tensor, keys: Sequence[NestedKey], out: TensorDictBase) -> None:
        """Write the stacks of steps ``[B]`` of environments ``[B]`` into the entries ``keys`` of ``out``."""
        assert self.pictures is not None
        slot = step % self.slots
        back = torch.arange(self.stack - 1, -1, -1)
        age, repeats = self.age[slot, env].unsqueeze(-1), self.repeats[slot, env].unsqueeze(-1)
        source = (step.unsqueeze(-1) - torch.minimum(back, age)) % self.slots
        missing = (back > age) & ~repeats
        stacks = self.pictures.flatten(0, 1)[source * self.n_envs + env.unsqueeze(-1)]  # [B, K, A, f]
        stacks[missing] = 0
        asked = {key: self.sources[key] for key in keys}
        for after in sorted(set(asked.values())):
            if after:
                stacks = torch.cat([stacks[:, 1:], self._following(slot, step, env).unsqueeze(1)], 1)
            seen = stacks.transpose(1, 2).flatten(2)
            if (blank := self.blank[after][slot, env]).any():
                seen = seen.masked_fill(blank.unsqueeze(-1), 0)
            for key in (key for key, wanted in asked.items() if wanted == after):
                out.get(key).copy_(seen.reshape(out.get(key).shape))

    def _following(self, slot: Tensor, step: Tensor, env: Tensor) -> Tensor:
        """The pictures ``[B, A, f]`` that are new at t + 1."""
        assert self.pictures is not None and self.last is not None
        place = self.place[slot, env]
        following = self.pictures[(step + 1) % self.slots, env]
        ended = place >= 0
        following[ended] = self.last[place[ended]]
        return following

    # ------------------------------------------------------------------------------------------------- last pictures

    def _keep(self, slot: int, envs: Tensor, pictures: Tensor) -> None:
        """Keep the pictures ``[E, A, f]`` that follow a step of ``envs`` ``[E]``."""
        assert self.last is not None
        if self.count + len(envs) > len(self.last):
            self._grow(self.count + len(envs))
        places = (self.first + self.count + torch.arange(len(envs))) % len(self.last)
        self.last[places] = pictures
        self.place[slot, envs] = places
        self.count += len(envs)

    def _release(self, slots: Tensor) -> None:
        """Let go of the last pictures of steps that are overwritten; they are the oldest."""
        assert self.last is not None
        gone = int((self.place[slots] >= 0).sum())
        self.first, self.count = (self.first + gone) % len(self.last), self.count - gone

    def _grow(self, least: int) -> None:
        """Make ``last`` twice as large, or more; the oldest comes first."""
        assert self.last is not None
        old, size = self.last, len(self.last)
        held = (self.first + torch.arange(self.count)) % size
        self.last = torch.zeros(max(2 * size, least), *old.shape[1:], dtype=old.dtype)
        self.last[: self.count] = old[held]
        self.place = torch.where(self.place >= 0, (self.place - self.first) % size, -1)
        self.first = 0

    def _allocate(self, agents: int, size: int) -> None:
        self.pictures = self.room("pictures", (self.slots, self.n_envs, agents, size), torch.uint8)
        self.last = torch.zeros(16 * self.n_envs, agents, size, dtype=torch.uint8)
        shape = (self.slots, self.n_envs, agents)
        self.blank = {after: torch.zeros(shape, dtype=torch.bool) for after in (False, True)}

    # ------------------------------------------------------------------------------------------------------- checks

    def _check(self, now: Tensor, following: Tensor, size: int, blank: Tensor) -> None:
        before, after = now[..., size:], following[..., :-size]
        if not (torch.equal(after, before) or bool(((after == before).all(-1) | blank).all())):
            raise ValueError(
                f"frame_stack={self.stack}: an observation is not the one before with one picture more; the replay "
                "keeps single pictures: let the environment (or its wrappers) not call itself a stack of pictures"
            )

    def _repeated(self, now: Tensor, begins: Tensor, size: int) -> Tensor:
        """``[T', N]``: where an episode begins, whether by its first picture repeated; else by zeros."""
        padded = torch.zeros_like(begins)
        for t, n in begins.nonzero().tolist():  # few
            before, first = now[t, n, :, :-size], now[t, n, :, -size:]
            padded[t, n] = bool(before.any())
            if padded[t, n] and not torch.equal(before, first.repeat(1, self.stack - 1)):
                raise ValueError(
                    f"frame_stack={self.stack}: an episode begins neither with zeros nor with its first picture "
                    "repeated; such stacks can not be made again of single pictures"
                )
        return padded

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is known of the steps, without the pictures, which are `part`s."""
        return {"age": self.age.clone(), "repeats": self.repeats.clone(), "fresh": self.fresh.clone()}

    def part(self, first: int, written: int) -> dict[str, Any]:
        """The pictures that the steps from ``first`` to ``written`` are made of."""
        assert self.pictures is not None and self.last is not None
        steps = torch.arange(max(first - self.stack + 1, 0), written + 1)
        ended = torch.arange(max(first - 1, 0), written)  # the step before may have been cut since the part before
        place = self.place[ended % self.slots]
        rows, envs = (place >= 0).nonzero(as_tuple=True)
        return {
            "steps": steps,
            "pictures": self.pictures[steps % self.slots],
            "blank": [self.blank[after][steps % self.slots] for after in (False, True)],
            "ended": torch.stack([ended[rows], envs]),
            "last": self.last[place[rows, envs]],
        }

    def load(self, part: Mapping[str, Any], written: int) -> None:
        """Take in a `part`, oldest first, as far as it is held after ``written`` steps."""
        pictures: Tensor = part["pictures"]
        if self.pictures is None or self.last is None:
            self._allocate(*pictures.shape[2:])
        assert self.pictures is not None
        oldest = max(written - self.steps, 0)
        kept = (part["steps"] > oldest - self.stack) & (part["steps"] <= written)
        slots = part["steps"][kept] % self.slots
        self.pictures[slots] = pictures[kept]
        for after, rows in enumerate(part["blank"]):
            self.blank[bool(after)][slots] = rows[kept]
        for (step, env), picture in zip(part["ended"].T.tolist(), part["last"], strict=True):
            if oldest <= step < written and self.place[step % self.slots, env] < 0:
                self._keep(step % self.slots, torch.tensor([env]), picture.unsqueeze(0))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for an empty ring; `load` comes next."""
        self.age.copy_(state["age"])
        self.repeats.copy_(state["repeats"])
        self.fresh = state["fresh"].clone()


def _blank(seen: Tensor, size: int) -> Tensor:
    """``[T', N, A]``: whether an agent's observation ``[T', N, A, F]`` is nothing but zeros."""
    blank = seen[..., -size:].amax(-1) == 0
    if bool(blank.any()):
        blank &= seen.amax(-1) == 0
    return blank
