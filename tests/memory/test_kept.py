"""Neighbours that are kept with a row of the replay."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marl_memory.keys import Entry
from marl_memory.memory.gradient_field import GradientField
from marl_memory.memory.kept import KeptNeighbours
from marl_memory.memory.store import RingStore
from marl_memory.spec import TaskSpec
from tests.memory.tasks import SCOPES, K, normal, rows, task, uniform


def full(banks: int = 1) -> RingStore:
    store = RingStore(banks=banks, rows=64, features=3, payload_size=2, neighbours=4, policy="fifo")
    put_in(store, uniform(banks, 64, 3, seed=0))
    return store


def put_in(store: RingStore, keys: Tensor) -> None:
    shape = keys.shape[:2]
    store.write(keys, torch.zeros(*shape, 1, 2), torch.ones(*shape, 1, dtype=torch.bool))


def test_rows_that_are_known_have_the_neighbours_that_a_search_finds() -> None:
    store, kept = full(2), KeptNeighbours(2, 100, 4, 10)
    keys, numbers = uniform(2, 16, 3, seed=1), torch.arange(32).view(2, 16)
    before = kept.state_dict()
    found = kept.nearest(store, keys, numbers)
    exact = store.nearest(keys)
    assert torch.equal(found.rows, exact.rows)
    torch.testing.assert_close(found.squared, exact.squared)
    assert all(torch.equal(x, kept.state_dict()[name]) for name, x in before.items())
    kept.keep(found, numbers)
    searched = []
    store.nearest = lambda queries: searched.append(queries) or exact  # type: ignore[method-assign]
    again = kept.nearest(store, keys, numbers)
    assert torch.equal(again.rows, exact.rows) and not searched


def test_only_unknown_rows_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store, kept = full(), KeptNeighbours(1, 100, 4, 10)
    keys, numbers = uniform(1, 8, 3, seed=1), torch.arange(8).unsqueeze(0)
    kept.keep(store.nearest(keys[:, :5]), numbers[:, :5])
    asked, search = [], store.nearest
    monkeypatch.setattr(store, "nearest", lambda queries: asked.append(queries) or search(queries))
    found = kept.nearest(store, keys, numbers)
    assert torch.equal(asked[0], keys[:, 5:])
    assert torch.equal(found.rows, search(keys).rows)


def test_what_gave_way_has_the_distance_of_what_lies_there_now_until_it_is_searched_anew() -> None:
    store, kept = full(), KeptNeighbours(1, 100, 4, updates=3)
    keys, numbers = uniform(1, 8, 3, seed=1), torch.arange(8).unsqueeze(0)
    found = store.nearest(keys)
    kept.keep(found, numbers)
    first = found.rows
    put_in(store, 50 + uniform(1, 64, 3, seed=2))  # a ring: everything is replaced by something far away
    far = kept.nearest(store, keys, numbers)
    assert torch.equal(far.rows.sort(-1).values, first.sort(-1).values)
    direct = (store.scaled[0][far.rows[0]] - (keys * store.scale)[0].unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(far.squared[0], direct)
    assert (far.squared.diff(dim=-1) >= 0).all()
    for _ in range(2):
        kept.keep(far, numbers)  # a known row keeps its date: P counts from the search
    exact = store.nearest(keys).rows
    assert not torch.equal(exact.sort(-1).values, first.sort(-1).values)
    assert torch.equal(kept.nearest(store, keys, numbers).rows, exact)


def test_two_rows_in_one_place_are_told_apart() -> None:
    store, kept = full(), KeptNeighbours(1, 4, 4, 10)
    keys = uniform(1, 2, 3, seed=1)
    kept.keep(store.nearest(keys), torch.tensor([[0, 1]]))
    kept.keep(store.nearest(-keys), torch.tensor([[4, 5]]))
    assert torch.equal(kept.nearest(store, keys, torch.tensor([[0, 1]])).rows, store.nearest(keys).rows)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_field_asks_again_for_the_places_that_a_row_had(scope: str) -> None:
    spec = task(2)
    plain, keeping = (
        GradientField(spec=spec, scope=scope, capacity=512, min_rows=1, keep_neighbours=kept, fixed_point_gate=False)
        for kept in (None, 50)
    )

    def drawn(field: GradientField, numbers: Tensor, seed: int) -> TensorDict:
        entries = {**field.asks, **field.entries, K.action_gradient: Entry((2, 2))}
        td = rows(spec, normal(len(numbers), 2, 2, seed=seed), entries, numbers=numbers)
        td.set(K.action_gradient, normal(len(numbers), 2, 2, seed=seed + 1))
        return field(td)

    for field in (plain, keeping):
        field.write(drawn(field, torch.arange(100), seed=0))
    first, same = drawn(keeping, torch.arange(500, 516), seed=7), drawn(plain, torch.arange(500, 516), seed=7)
    torch.testing.assert_close(first.get(K.action_gradient), same.get(K.action_gradient))
    keeping.write(first)
    again = drawn(keeping, torch.arange(500, 516), seed=7)
    places = keeping.trace.rows_key
    assert torch.equal(again.get(places).sort(-1).values, first.get(places).sort(-1).values)
    assert not torch.equal(drawn(keeping, torch.arange(600, 616), seed=7).get(places), first.get(places))


def test_a_bank_of_few_rows_counts_each_of_them_once() -> None:
    """Rows that a search did not find have no place; those who lacked some are searched for at the next draw."""
    store, kept = RingStore(banks=1, rows=64, features=3, payload_size=2, neighbours=4), KeptNeighbours(1, 100, 4, 10)
    keys, numbers = uniform(1, 8, 3, seed=1), torch.arange(8).unsqueeze(0)
    for held in (0, 3):
        found = kept.nearest(store, keys, numbers)
        assert found.squared.isfinite().sum(-1).eq(held).all()
        kept.keep(found, numbers)
        put_in(store, uniform(1, 3, 3, seed=held))
    found, exact = kept.nearest(store, keys, numbers), store.nearest(keys)
    assert torch.equal(found.rows, exact.rows) and found.squared.isfinite().all()


@pytest.mark.parametrize(
    "spec", [task(1, features=3), task(2, features=3), task(4, features=(3, 3, 2, 2))], ids=["one", "two", "kinds"]
)
@pytest.mark.parametrize("scope", SCOPES)
def test_keep_rows_rows_are_kept(scope: str, spec: TaskSpec) -> None:
    n = spec.n_agents
    field = GradientField(
        spec=spec, scope=scope, capacity=64 * n, min_rows=0, keep_neighbours=50, keep_rows=8, fixed_point_gate=False
    )
    entries = {**field.asks, **field.entries, K.action_gradient: Entry((n, 2))}
    for number in (100, 0):  # the first finds nothing yet
        td = rows(spec, normal(32, n, 3, seed=number), entries, numbers=number + torch.arange(32))
        td.set(K.action_gradient, normal(32, n, 2, seed=1))
        field.write(field(td))
    trace = field.trace
    assert trace.kept is not None
    numbers = trace._numbers(td[-8:])
    assert numbers is not None
    assert trace.kept._known(numbers % trace.kept.rows + trace.kept.offsets, numbers).all()
    assert len(trace.kept.numbers) == 8 * trace.scope.per_step * trace.scope.banks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_neighbours": 0}, "keep_neighbours=0 must be positive"),
        (
            {"keep_neighbours": 5, "policy": "fourier", "beta_rule": "mass", "action_bandwidth": None},
            "policy='fourier' has no neighbours: leave keep_neighbours=5 null",
        ),
    ],
)
def test_what_can_not_be_kept(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        GradientField(spec=task(), **options)  # type: ignore[arg-type]
