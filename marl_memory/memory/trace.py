"""A store and its scope together: what an operator remembers of a task's rows, and finds again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.keys import Entries, Entry
from marl_memory.memory.kept import KeptNeighbours
from marl_memory.memory.operator import Payloads, check_positive, put
from marl_memory.memory.scope import Scope
from marl_memory.memory.sketch import FourierSketch
from marl_memory.memory.store import LEAST_BANDWIDTH, Neighbours, RingStore, random_projection
from marl_memory.memory.store import POLICIES as RING_POLICIES
from marl_memory.spec import TaskSpec

POLICIES = (*RING_POLICIES, "fourier")

PICTURE_SIZE = 64
"""Numbers that a picture becomes before it is a key."""


class Neighbourhood(NamedTuple):
    """What lies around R queries in each bank.

    Args:
        payload: ``[G, R, K, S, P]``.
        weights: ``[G, R, K, S]``, similarity × age decay × mass; 0 where there is nothing, or the bank is not to act.
        mass: ``[G, R, K, S]``, at least 1: payloads averaged in one.
        squared: ``[G, R, K, S]``, squared distances in units of h²; ∞ where there is nothing.
        newest: ``[G, R, K, S]``, the same to the newest of what is in each, as is to be expected: it lies off the mean
            key in a direction of its own.
    """

    payload: Tensor
    weights: Tensor
    mass: Tensor
    squared: Tensor
    newest: Tensor


class Trace(nn.Module):
    """Reads keys, life and row numbers from a TensorDict ``[*B]``, and speaks to a store in banks.

    `find` leaves what was found in the TensorDict, so that a later write of the same rows need not search again.  With
    ``policy="fourier"`` the store is a `FourierSketch`, whose mean counts as one neighbour at distance 0.

    Args:
        name: of the operator, under which its entries lie.
        spec: the task.
        scope, capacity, budget: see `Scope`.
        payload_size: P.
        sketch_size: features of ``fourier``.
        signal_size, newest, policy, neighbours, half_life, search: see `RingStore`; ``fourier`` has means alone.
        projection: see `RingStore`; of pictures, whose keys are projected before they are stored, None stands for
            `PICTURE_SIZE`.
        min_rows: rows a bank must have seen before it acts; None: a quarter of what it can hold, at most 1 000.
        shuffled: whether payloads are stored with the keys of other rows (a control).
        seed: of projections and shuffles.
        keep_neighbours: writes for which a row of the replay keeps its neighbours, see `KeptNeighbours`; None: they are
            searched for at every draw.
        keep_rows: of how many rows of the replay.
        keys: ``observation`` (the state, where rows are the team's) or ``features`` (of the host's actor): what rows
            are found by.
        feature_size: H, of ``keys="features"``.
        actions: whether an action is part of a key, see `Scope`.
        least_bandwidth: see `RingStore`.
    """

    def __init__(
        self,
        name: str,
        spec: TaskSpec,
        *,
        scope: str | None,
        capacity: int,
        budget: str,
        payload_size: int,
        signal_size: int | None,
        policy: str,
        neighbours: int,
        half_life: float | None,
        search: str,
        projection: int | None,
        min_rows: int | None,
        payloads: str,
        seed: int,
        newest: int = 0,
        sketch_size: int = 512,
        keep_neighbours: int | None = None,
        keep_rows: int = 1_000_000,
        keys: str = "observation",
        feature_size: int | None = None,
        actions: bool = False,
        least_bandwidth: float = LEAST_BANDWIDTH,
    ) -> None:
        super().__init__()
        if payloads not in ("own", "shuffled"):
            raise ValueError(f"payloads={payloads!r} must be 'own' or 'shuffled'")
        check_positive(capacity=capacity, neighbours=neighbours, half_life=half_life, projection=projection)
        if min_rows is not None and min_rows < 0:
            raise ValueError(f"min_rows={min_rows!r} must not be negative")
        if keys not in ("observation", "features"):
            raise ValueError(f"keys={keys!r} must be 'observation' or 'features'")
        if keys == "features" and feature_size is None:
            raise ValueError("keys='features' needs feature_size, the width of what the host's actor gives as features")
        self.spec, self.shuffled = spec, payloads == "shuffled"
        self.feature_size = feature_size if keys == "features" else None
        self.generator = Generator().manual_seed(seed)
        planes = None
        if spec.picture and self.feature_size is None:  # thousands of numbers a row, of which neighbours need a few
            features = spec.state_size if scope == "centralized" else spec.observation_size
            planes, projection = random_projection(features, projection or PICTURE_SIZE, self.generator), None
        self.scope = Scope(scope or "shared", spec, actions=actions, feature_size=self.feature_size, planes=planes)
        rows = self.scope.rows_per_bank(capacity, budget)
        if policy not in (*POLICIES, "best"):
            raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
        sizes: dict[str, Any] = {
            "banks": self.scope.banks,
            "features": self.scope.features,
            "payloads": self.scope.payloads,
            "payload_size": payload_size,
            "neighbours": neighbours,
            "half_life": half_life,
            "generator": self.generator,
        }
        self.store: RingStore | FourierSketch
        if policy == "fourier":
            if search != "exact" or projection is not None:
                raise ValueError("policy='fourier' searches nothing: leave search='exact' and projection=null")
            self.store = FourierSketch(**sizes, size=sketch_size)
        else:
            self.store = RingStore(
                **sizes,
                rows=rows,
                signal_size=signal_size,
                newest=newest,
                policy=policy,
                search=search,
                projection=projection,
                least_bandwidth=least_bandwidth,
            )
        self.kept = None
        if keep_neighbours is not None:
            check_positive(keep_neighbours=keep_neighbours, keep_rows=keep_rows)
            if policy == "fourier":
                raise ValueError(f"policy='fourier' has no neighbours: leave keep_neighbours={keep_neighbours} null")
            self.kept = KeptNeighbours(self.scope.banks, keep_rows * self.scope.per_step, neighbours, keep_neighbours)
        self.min_rows = min(1000, rows // 4) if min_rows is None else min_rows
        self.rows_key, self.squared_key = (("learn", name, entry) for entry in ("rows", "squared"))
        own = () if self.scope.joint else (spec.n_agents,)
        self.entries: Entries = {}
        if policy != "fourier":
            self.entries[self.rows_key] = Entry((*own, neighbours), torch.int64)
            self.entries[self.squared_key] = Entry((*own, neighbours))
        k = spec.keys
        found_by = k.state if self.scope.joint else k.observation
        self.in_keys = [
            found_by if self.feature_size is None else k.features,
            k.alive,
            k.row,
            *([k.action] if actions else []),
        ]

    @property
    def asks(self) -> Entries:
        """See `MemoryOperator.asks`."""
        if self.feature_size is None:
            return {}
        return {self.spec.keys.features: Entry((self.spec.n_agents, self.feature_size))}

    @property
    def payloads(self) -> Payloads | None:
        """See `MemoryOperator.payloads`; a sketch holds sums, and no payloads."""
        if isinstance(self.store, FourierSketch):
            return None
        in_row = self.scope.payloads
        return Payloads(int(self.store.held.sum()) * in_row, self.store.banks * self.store.rows * in_row)

    def clear(self) -> None:
        """Forget everything."""
        self.store.clear()
        if self.kept is not None:
            self.kept.clear()

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state)

    @torch.no_grad()
    def find(self, td: TensorDictBase) -> Neighbourhood:
        """What lies around every row of ``td``."""
        keys, store = self.scope.keys_of(td), self.store
        if isinstance(store, FourierSketch):
            mean, weight = store.read(keys)
            mean, weight = mean.unsqueeze(2), self._of_ready(weight.unsqueeze(2))
            nothing = torch.zeros_like(weight)
            return Neighbourhood(mean, weight, torch.ones_like(weight), nothing, nothing)
        numbers = self._numbers(td)
        if self.kept is None or numbers is None:
            found = store.nearest(keys)
        else:
            found = self.kept.nearest(store, keys, numbers)
        put(td, self.rows_key, self._to_rows(found.rows, td))
        put(td, self.squared_key, self._to_rows(found.squared, td))
        values = store.take(store.values, found.rows)
        payload, mass = values[..., :-2], values[..., -1]
        weights = self._of_ready(store.weights(found, numbers, mass))
        squared = store.in_reach(found).unsqueeze(-1).expand_as(mass)
        newest = squared
        if store.offset.numel():
            newest = squared + store.take(store.offset, found.rows) / store.bandwidth.square().view(-1, 1, 1, 1)
        return Neighbourhood(payload, weights, mass.clamp(min=1), squared, newest)

    def _of_ready(self, weights: Tensor) -> Tensor:
        """Weights ``[G, …]``, 0 in the banks that are not to act yet."""
        seen = self.store.seen
        if min(seen.tolist()) >= self.min_rows:
            return weights
        return weights * (seen >= self.min_rows).view(-1, 1, 1, 1)

    @torch.no_grad()
    def write(self, td: TensorDictBase, payload: Tensor) -> None:
        """Remember ``payload`` ``[*B, A, P]`` of the living; a `find` on the same rows saves a search."""
        live, rows = self.scope.living(td.get(self.spec.keys.alive)), self.scope.to_banks(payload)
        if self.shuffled:
            order = torch.randperm(rows.shape[1], generator=self.generator)
            rows, live = rows[:, order], live & live[:, order]
        if isinstance(self.store, FourierSketch):
            self.store.write(self.scope.keys_of(td), rows, live)
            return
        found, numbers = None, self._numbers(td)
        if (near := td.get(self.rows_key, None)) is not None:
            found = Neighbours(self._to_banks(near), self._to_banks(td.get(self.squared_key)))
        if self.kept is not None and numbers is not None and found is not None:
            self.kept.keep(found, numbers)
        self.store.write(self.scope.keys_of(td), rows, live, numbers, found)

    def _numbers(self, td: TensorDictBase) -> Tensor | None:
        """``[G, R]``: a number in its bank for each payload's row, by which it is no neighbour of its own."""
        row: Tensor | None = td.get(self.spec.keys.row, None)
        if row is None:
            return None
        per_step = self.scope.per_step
        places = torch.arange(per_step, device=row.device)
        return (row.reshape(-1, 1) * per_step + places).reshape(1, -1).expand(self.scope.banks, -1)

    def _to_rows(self, x: Tensor, td: TensorDictBase) -> Tensor:
        """``[G, R, K] → [*B, A, K]``, or ``[*B, K]`` where rows are the team's."""
        if self.scope.joint:
            return x.reshape(*td.batch_size, x.shape[-1])
        return self.scope.to_agents(x.unsqueeze(2), td.batch_size)

    def _to_banks(self, x: Tensor) -> Tensor:
        """The inverse of `_to_rows`."""
        return x.reshape(1, -1, x.shape[-1]) if self.scope.joint else self.scope.to_banks(x).squeeze(2)
