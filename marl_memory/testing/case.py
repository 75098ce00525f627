"""A memory operator on one small task, empty, filled or full, and what a host reads after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.memory.operator import MemoryOperator, Stage
from marl_memory.spec import TaskSpec
from marl_memory.testing.batches import make_batch

Holds = Literal["newest", "rows", "means"]

ROWS = 16
"""R, of most batches."""

MOST = 400
"""Batches after which a memory must be full: 6 400 team rows."""

AWAY = 1000.0
"""Where nothing else is, in every feature of an observation or state."""

WEIGHTS = ("weight", "w2_weight", "policy_weight", "value_weight")
"""Names of entries by which hosts multiply what memory says: 0 is nothing said."""


class Recall(NamedTuple):
    """What a host reads after ``forward``.

    Args:
        read: by key, entries of the host that were set, what ACT says it did, REGION's references and weights, and
            REPLAY's rows.
        acted: ``[*B, A]`` bool, where memory changes anything for the host.
    """

    read: dict[Any, Tensor]
    acted: Tensor


class Case:
    """One operator on one task."""

    def __init__(
        self,
        make: Callable[..., MemoryOperator],
        spec: TaskSpec,
        seed: int,
        *,
        capacity: int | None,
        private: bool,
        holds: Holds,
        trainable: bool,
    ) -> None:
        self.make, self.spec, self.seed, self.keys = make, spec, seed, spec.keys
        self.capacity, self.private, self.holds, self.trainable = capacity, private, holds, trainable
        self.template = self.build()
        self.valid = torch.tensor(spec.observation_valid)

    def build(self) -> MemoryOperator:
        """An empty one; at the stage ACT one that draws nothing."""
        operator = self.make(spec=self.spec, seed=self.seed)
        operator.greedy = operator.stage is Stage.ACT
        return operator

    def batch(self, seed: int, *shape: int, room: bool = True, away: float = 0.0) -> TensorDict:
        """See `make_batch`; where ``away`` is not 0 all observations are there, and all do the same."""
        td = make_batch(self.template, self.spec, *(shape or (ROWS,)), seed=seed, room=room)
        if away:
            td.get(self.keys.action).zero_()
            self.put_at(td, torch.tensor(away).expand(*td.batch_size, self.spec.n_agents))
        return td

    def put_at(self, td: TensorDict, places: Tensor) -> None:
        """Bring the agents of ``td`` to ``places`` ``[*B, A]``, and the team's own state to the first one's: there are
        their observations, and the features that a host makes of them.
        """
        k, places = self.keys, places.unsqueeze(-1)
        td.get(k.observation).copy_(torch.where(self.valid, places, 0.0))
        state = td.get(k.state)
        state.copy_(places[..., 0, :].expand_as(state) if self.spec.own_state else td.get(k.observation).flatten(-2))
        if (features := td.get(k.features, None)) is not None:
            features.copy_(places.expand_as(features))

    @cached_property
    def original(self) -> MemoryOperator:
        """One that acts for every agent; not to be changed."""
        operator, probe, held = self.build(), self.batch(999), [0]
        while len(held) <= MOST and not (len(held) > 40 and held[-1] == held[-20]):
            step(operator, self.batch(len(held)))
            held.append(len(operator))
            if len(held) > 3 and self.recall(operator, probe).acted.any(0).all():
                return operator
        raise AssertionError(
            f"after {len(held) - 1} batches of {ROWS} team rows ({held[-1]} rows held) nothing that a host reads is "
            "changed for every agent: nothing can be said of this memory (make it smaller, or act from fewer rows on)"
        )

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """The state of `original`."""
        return cloned(self.original.state_dict())

    def filled(self) -> MemoryOperator:
        """A copy of `original`, so that a property can not spoil another."""
        operator = self.build()
        operator.load_state_dict(cloned(self.snapshot), strict=True)
        operator.set_progress(0, 0.0)
        return operator

    def full(self) -> MemoryOperator:
        """One whose capacity was written more than twice."""
        operator, held = self.build(), [-3, -2, -1]
        while len(set(held[-3:])) > 1:
            if len(held) > MOST:
                raise AssertionError(f"len(operator) still grows after {MOST} batches of {ROWS} rows: {held[-1]}")
            step(operator, self.batch(len(held)))
            held.append(len(operator))
        for more in range(len(held)):
            step(operator, self.batch(MOST + more))
        return operator

    def recall(self, operator: MemoryOperator, td: TensorDict) -> Recall:
        """What ``forward`` does to a copy of ``td`` ``[*B]``."""
        after = copy_of(td)
        operator(after)
        read, entries = {}, operator.entries
        acted = torch.zeros(*td.batch_size, self.spec.n_agents, dtype=torch.bool, device=td.device)
        for key in map(path_of, operator.out_keys):
            value, own, weight = after.get(key), key in entries, key[-1] in WEIGHTS
            said = key[:2] in (self.keys.region, self.keys.replay) or key[0] == "act"
            if own and not weight and not said:
                continue  # the operator's own report
            read[key] = value
            if weight or not own:
                acted |= self.by_agent((value != 0) if weight else _unequal(value, td.get(key)), td)
        return Recall(read, acted)

    def by_agent(self, differs: Tensor, td: TensorDict) -> Tensor:
        """``[*B, A]``: where any of ``differs`` ``[*B, A, …]`` is; of ``[*B, …]``, for all agents."""
        shape = (*td.batch_size, self.spec.n_agents)
        if differs.shape[: len(shape)] == shape:
            return differs.reshape(*shape, -1).any(-1)
        return differs.reshape(*td.batch_size, -1).any(-1, keepdim=True).expand(shape)


def step(operator: MemoryOperator, td: TensorDictBase) -> None:
    """Recall, write, refresh and learn, in the host's order."""
    if operator.writes_on == "collection":
        operator.write(td)
    operator(td)
    if operator.writes_on == "update":
        operator.write(td)
    operator.refresh(values)
    operator.learn()


def values(td: TensorDictBase, generator: Generator | None = None) -> Tensor:
    """``[*B, A, 2]``: what an algorithm lends; here of the observations, between −1 and 1."""
    observation = next(x for key, x in td.items(True, True) if path_of(key)[-1] == "observation")
    return observation.mean(-1, keepdim=True).tanh().expand(*observation.shape[:-1], 2)


def copy_of(td: TensorDict) -> TensorDict:
    """With tensors of its own, and locked as ``td`` is."""
    copied = td.clone()
    return copied.lock_() if td.is_locked else copied


def state_of(operator: MemoryOperator) -> dict[str, Any]:
    """All that a module can hold: parameters, buffers (those that are not saved too) and extra state, copied."""
    buffers = {f"{name} (buffer)": x for name, x in operator.named_buffers()}
    return cloned({**operator.state_dict(), **buffers})


def leaves(td: TensorDictBase) -> dict[Any, Tensor]:
    """Entries by their whole path, copied."""
    return {path_of(key): x.clone() for key, x in td.items(include_nested=True, leaves_only=True)}


def changed(before: dict[Any, Any], after: dict[Any, Any], *, close: bool = False) -> list[Any]:
    """Names that only one of them has, or whose values differ (``close``: by more than rounding)."""
    return [
        name
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or not _same(before[name], after[name], close=close)
    ]


def _same(a: Any, b: Any, *, close: bool) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):  # of an optimiser's state
        return not changed(cast(Any, a), cast(Any, b), close=close)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    if a.shape != b.shape:
        return False
    b = b.to(a.device)
    if close and a.is_floating_point():
        return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
    return not bool(_unequal(a, b).any())


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise; NaN is equal to NaN."""
    return (a != b) & ~((a != a) & (b != b))


def cloned(state: dict[str, Any]) -> dict[str, Any]:
    """With tensors of its own."""

    def copied(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else cloned(x) if isinstance(x, dict) else x

    return {name: copied(x) for name, x in state.items()}


def path_of(key: Any) -> tuple[str, ...]:
    """A key as a tuple."""
    return (key,) if isinstance(key, str) else key
