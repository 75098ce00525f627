"""A time-ordered ring of collected rows, from which off-policy learners draw."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.keys import Entries, Keys
from marl_memory.training.frames import FrameRing


class ReplayRing:
    """The last T vector steps of N environments, time first: each entry is ``[T, N, …]``.

    Rows are numbered from the start of the run, environment within vector step: row = step × N + environment, so that a
    number is never used twice.  Steps are kept in order, with the ends of episodes, so that trajectories can be read
    back; a draw is uniform over rows.

    Args:
        capacity: rows kept; T = capacity // N.
        n_envs: N.
        batch_size: rows of a draw, B.
        entries: what is kept of a collected batch, by key.
        learn_entries: the learner's entries and their shapes behind ``[B]``.
        frame_stack: of how many pictures an observation is made, which are then kept once each (see `FrameRing`); None:
            observations are no pictures.
        seed: of the draws.
        folder: where the entries lie as memory-mapped files; None keeps them in RAM.

    Raises:
        ValueError: if the ring cannot hold one vector step.
    """

    def __init__(
        self,
        *,
        capacity: int,
        n_envs: int,
        batch_size: int,
        entries: Sequence[NestedKey],
        learn_entries: Entries,
        keys: Keys,
        seed: int,
        frame_stack: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if capacity < n_envs:
            raise ValueError(f"algorithm.capacity={capacity} must hold a step of training.n_envs={n_envs} environments")
        self.steps, self.n_envs, self.batch_size = capacity // n_envs, n_envs, batch_size
        self.learn_entries, self.keys, self.folder = learn_entries, keys, folder
        self.frames = None
        if frame_stack is not None:
            self.frames = FrameRing(steps=self.steps, n_envs=n_envs, stack=frame_stack, keys=keys, room=self._room)
        self.stacks = [key for key in entries if self.frames and key in self.frames.sources]
        """Entries that are made of single pictures when they are drawn."""
        self.entries = [key for key in entries if key not in self.stacks]
        self.generator = Generator().manual_seed(seed)
        self.written = 0
        """Vector steps written since the run began."""
        self.ends = torch.zeros(self.steps, n_envs, dtype=torch.bool)
        """``[T, N]``: the row is its episode's last, or the environment was reset after it."""
        self.kept: list[Tensor] = []
        self.drawn: TensorDict | None = None

    def __len__(self) -> int:
        """Rows held now."""
        return min(self.written, self.steps) * self.n_envs

    @property
    def oldest(self) -> int:
        """The number of the oldest step held, counted from the run's start."""
        return max(self.written - self.steps, 0)

    @property
    def bytes(self) -> int:
        """Of the entries, RAM or file."""
        return sum(x.numel() * x.element_size() for x in self.kept) + (self.frames.bytes if self.frames else 0)

    # ------------------------------------------------------------------------------------------------ writing, drawing

    def extend(self, batch: TensorDictBase) -> None:
        """Write the vector steps of a collected batch ``[T', N]``, in order; the oldest go.

        Raises:
            ValueError: if the batch is longer than the ring.
        """
        length = batch.shape[0]
        if length > self.steps:
            raise ValueError(
                f"algorithm.capacity={self.steps * self.n_envs} must hold a batch of {length} steps of {self.n_envs}"
            )
        if self.drawn is None:
            self._allocate({key: batch.get(key) for key in (*self.entries, *self.stacks)})
        if self.frames is not None:
            self.frames.extend(batch, self.written)
        new = [batch.get(key) for key in self.entries]
        new.append(batch.get(("next", self.keys.done)).squeeze(-1))
        first, rings = self.written % self.steps, [*self.kept, self.ends]
        fits = min(length, self.steps - first)
        if fits < length:  # the rest goes to the beginning
            for ring, x in zip(rings, new, strict=True):
                ring[: length - fits].copy_(x[fits:])
            new = [x[:fits] for x in new]
        for ring, x in zip(rings, new, strict=True):
            ring[first : first + fits].copy_(x)
        self.written += length

    def cut_episodes(self) -> None:
        """The environments were reset: no episode goes on after the last step written."""
        if self.written:
            self.ends[(self.written - 1) % self.steps] = True
        if self.frames is not None:
            self.frames.cut(self.written)

    def draw(self) -> TensorDictBase:
        """B rows ``[B]``, uniformly and with replacement; the same memory at every call.

        Holds the entries, ``row`` and the learner's entries (not cleared).

        Raises:
            RuntimeError: if nothing was written.
        """
        if self.drawn is None:
            raise RuntimeError("draw() from an empty replay: extend() it first")
        index = torch.randint(len(self), (self.batch_size,), generator=self.generator)
        for out, flat in zip(self.outs, self.flat, strict=True):
            torch.index_select(flat, 0, index, out=out)
        rows = self.row_of(index)
        self.drawn.get(self.keys.row).copy_(rows)
        if self.frames is not None:
            self.frames.draw(rows // self.n_envs, rows % self.n_envs, self.stacks, self.drawn)
        return self.drawn

    def row_of(self, index: Tensor) -> Tensor:
        """The numbers ``[*B]`` of the rows at flat positions ``index`` ``[*B]`` (slot × N + environment)."""
        laps, newest = divmod(self.written - 1, self.steps)
        slot = index // self.n_envs
        lap = torch.where(slot <= newest, laps, laps - 1)
        return (lap * self.steps) * self.n_envs + index

    def block(self, first: int, last: int) -> TensorDict:
        """Steps ``first`` to ``last`` − 1 (counted from the run's start), ``[S, N]``.

        There is room for the learner's entries.  Where steps do not wrap round the ring, entries are the ring's own
        memory: to be read only.
        """
        td = TensorDict(batch_size=(last - first, self.n_envs))
        for key, kept in zip(self.entries, self.kept, strict=True):
            td.set(key, self._between(kept, first, last))
        if self.frames is not None:
            for key, stacks in self._stacks_between(first, last).items(True, True):
                td.set(key, stacks)
        dtype = td.get(("next", *self.keys.reward)).dtype
        for key, entry in self.learn_entries.items():
            td.set(key, entry.zeros(tuple(td.batch_size), dtype))
        return td

    def _stacks_between(self, first: int, last: int) -> TensorDict:
        """The entries ``[S, N, …]`` that are stacks of pictures, made again."""
        assert self.frames is not None and self.drawn is not None
        rows = torch.arange(first * self.n_envs, last * self.n_envs)
        td = TensorDict(batch_size=rows.shape)
        for key in self.stacks:
            one = self.drawn.get(key)
            td.set(key, one.new_empty(len(rows), *one.shape[1:]))
        self.frames.draw(rows // self.n_envs, rows % self.n_envs, self.stacks, td)
        return td.unflatten(0, (last - first, self.n_envs))

    def ends_between(self, first: int, last: int) -> Tensor:
        """``[S, N]`` bool, the ends of episodes in steps ``first`` to ``last`` − 1."""
        return self._between(self.ends, first, last)

    def in_order(self, key: NestedKey) -> Tensor:
        """One entry ``[T', N, …]`` of all steps held, oldest first (a copy once the ring has wrapped)."""
        return self._in_order(self.kept[self.entries.index(key)], 0)

    def ends_in_order(self) -> Tensor:
        """``[T', N]`` bool, the ends of episodes in the order of `in_order`."""
        return self._in_order(self.ends, 0)

    def _in_order(self, x: Tensor, since: int) -> Tensor:
        """Steps ``since`` (counted from the run's start) to the last of ``x`` ``[T, N, …]``, oldest first."""
        return self._between(x, max(self.oldest, since), self.written)

    def _between(self, x: Tensor, first: int, last: int) -> Tensor:
        """Steps ``first`` to ``last`` − 1 of ``x`` ``[T, N, …]``."""
        if first == last:
            return x[:0]
        begin, end = first % self.steps, (last - 1) % self.steps + 1
        return x[begin:end] if begin < end else torch.cat([x[begin:], x[:end]])

    def _allocate(self, examples: Mapping[NestedKey, Tensor]) -> None:
        self.kept = [
            self._room(f"entry_{i:02d}", (self.steps, self.n_envs, *examples[key].shape[2:]), examples[key].dtype)
            for i, key in enumerate(self.entries)
        ]
        self.flat = [kept.flatten(0, 1) for kept in self.kept]
        drawn = TensorDict(batch_size=(self.batch_size,))
        for key, x in examples.items():
            drawn.set(key, torch.zeros(self.batch_size, *x.shape[2:], dtype=x.dtype))
        drawn.set(self.keys.row, torch.zeros(self.batch_size, dtype=torch.int64))
        dtype = examples[("next", *self.keys.reward)].dtype
        for key, entry in self.learn_entries.items():
            drawn.set(key, entry.zeros((self.batch_size,), dtype))
        self.drawn = drawn.lock_()
        self.outs = [drawn.get(key) for key in self.entries]

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.zeros(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        count = torch.Size(shape).numel()
        file = str(self.folder / f"{name}.bin")
        return torch.from_file(file, shared=True, size=count, dtype=dtype).reshape(shape)

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Counters and the generator; the rows themselves are `part`s, which checkpoints refer to."""
        state = {"written": self.written, "generator": self.generator.get_state(), "ends": self.ends.clone()}
        return {**state, "frames": self.frames.state_dict()} if self.frames else state

    def part(self, since: int) -> bytes:
        """The steps from number ``since`` on (those still held), as bytes that `load_state_dict` reads."""
        oldest = max(self.oldest, since)
        entries = [self._in_order(kept, since).clone() for kept in self.kept]
        part: dict[str, Any] = {"first": oldest, "entries": entries}
        if self.frames is not None:
            part["frames"] = self.frames.part(oldest, self.written)
        stream = io.BytesIO()
        torch.save(part, stream)
        return stream.getvalue()

    def load_state_dict(self, state: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> None:
        """Hold what was held when ``state`` was taken.

        Args:
            state: what `state_dict` gave.
            parts: what `part` gave, read back, oldest first; together they cover the steps that were held.

        Raises:
            ValueError: if the parts do not cover these steps.
        """
        self.written = state["written"]
        covered = oldest = self.oldest
        for part in parts:
            first, entries = part["first"], part["entries"]
            end = min(first + len(entries[0]), self.written)
            if first > covered or end <= covered:
                continue
            if self.drawn is None:
                self._allocate(dict(zip(self.entries, entries, strict=True)) | self._stack_examples(part))
            if self.frames is not None:
                self.frames.load(part["frames"], self.written)
            slots = torch.arange(covered, end) % self.steps
            for kept, x in zip(self.kept, entries, strict=True):
                kept[slots] = x[covered - first : end - first]
            covered = end
        if covered < self.written:
            raise ValueError(f"the replay's parts hold steps {oldest} to {covered}; {self.written} were written")
        self.generator.set_state(state["generator"])
        self.ends.copy_(state["ends"])
        if self.frames is not None:
            self.frames.load_state_dict(state["frames"])

    def _stack_examples(self, part: Mapping[str, Any]) -> dict[NestedKey, Tensor]:
        """Empty entries of stacks, ``[1, N, …]``, as a batch has them."""
        if self.frames is None:
            return {}
        _, n, agents, size = part["frames"]["pictures"].shape
        stack = torch.zeros(1, n, agents, size * self.frames.stack, dtype=torch.uint8)
        joint = (self.keys.state, ("next", self.keys.state))
        return {key: stack.flatten(2) if key in joint else stack for key in self.stacks}
