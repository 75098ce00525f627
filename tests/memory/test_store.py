"""The store against plain lists, its measures, and what each policy keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from marl_memory.memory.store import RESERVOIR, RingStore


def store(
    policy: str = "fifo", *, banks: int = 2, rows: int = 8, features: int = 2, payloads: int = 1, **options: object
) -> RingStore:
    generator = Generator().manual_seed(0)
    defaults = {"neighbours": 2, "payload_size": 3, "half_life": None, "generator": generator}
    sizes = {"banks": banks, "rows": rows, "features": features, "payloads": payloads}
    return RingStore(policy=policy, **{**defaults, **sizes, **options})  # type: ignore[arg-type]


def offered(r: int, *, seed: int, banks: int = 2, payloads: int = 1, living: float = 0.7) -> tuple[Tensor, ...]:
    g = Generator().manual_seed(seed)
    keys, payload = torch.randn(banks, r, 2, generator=g), torch.randn(banks, r, payloads, 3, generator=g)
    return keys, payload, torch.rand(banks, r, payloads, generator=g) < living


# ------------------------------------------------------------------------------------------------------------- fifo


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 13), min_size=1, max_size=6), seed=st.integers(0, 2**20))
def test_fifo_is_a_list_that_forgets_its_beginning(sizes: list[int], seed: int) -> None:
    ring, lists = store("fifo"), [[], []]  # type: ignore[var-annotated]
    for step, r in enumerate(sizes):
        keys, payload, live = offered(r, seed=seed + step)
        ring.now.fill_(step)
        numbers = torch.arange(r).expand(2, r) + 100 * step
        ring.write(keys, payload, live, numbers)
        for bank in range(2):
            kept = live[bank, :, 0]
            rows = zip(keys[bank][kept], payload[bank][kept], numbers[bank][kept], strict=True)
            lists[bank] = [*lists[bank], *((k.tolist(), p[0].tolist(), int(n), step) for k, p, n in rows)][-ring.rows :]
    for bank, expected in enumerate(lists):
        held = ring.mass[bank, :, 0] > 0
        found = sorted(
            (k.tolist(), p[0].tolist(), int(n), int(t))
            for k, p, n, t in zip(
                ring.keys[bank][held],
                ring.payload[bank][held],
                ring.numbers[bank][held],
                ring.time[bank][held],
                strict=True,
            )
        )
        assert found == sorted(expected)
        assert int(ring.held[bank]) == len(expected)
    assert len(ring) == sum(map(len, lists))


# ------------------------------------------------------------------------------------------------------------ merge


class PlainMerge:
    """What `merge` does, row by row; nearest rows are those before the write."""

    def __init__(self, rows: int) -> None:
        self.rows, self.kept = rows, []  # type: ignore[var-annotated]

    def write(self, keys: Tensor, payload: Tensor, numbers: list[int], scale: Tensor, radius: float, now: int) -> None:
        before, groups, fresh = list(self.kept), {}, []  # type: ignore[var-annotated]
        free = self.rows - len(before)
        for i, key in enumerate(keys):
            row = {"key": key.clone(), "payload": payload[i].clone(), "n": 1.0, "time": now, "number": numbers[i]}
            distance = [((r["key"] - key) * scale).square().sum().sqrt().item() for r in before]
            nearest = min(range(len(before)), key=distance.__getitem__, default=None)
            if i < free:
                fresh.append((None, row))
            elif nearest is not None and distance[nearest] <= radius:
                groups.setdefault(nearest, []).append(row)
            else:
                fresh.append(("evict", row))
        for index, rows in groups.items():
            row = before[index]
            row["n"], row["time"] = row["n"] + len(rows), now
            for entry in ("key", "payload"):
                row[entry] = row[entry] + sum(other[entry] - row[entry] for other in rows) / row["n"]
            if any(other["number"] != row["number"] for other in rows):
                row["number"] = -1
        open_ = sorted((i for i in range(len(before)) if i not in groups), key=lambda i: before[i]["n"])
        evicting = [row for how, row in fresh if how]
        evicting = evicting[max(len(evicting) - len(open_), 0) :]
        for index, row in zip(open_, evicting, strict=False):
            self.kept[index] = row
        self.kept += [row for how, row in fresh if not how]


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=8), seed=st.integers(0, 2**20))
def test_merge_is_what_plain_lists_do(sizes: list[int], seed: int) -> None:
    ring = store("merge", banks=1)
    plain = PlainMerge(ring.rows)
    for step, r in enumerate(sizes):
        keys, payload, _ = offered(r, seed=seed + step, banks=1)
        numbers = torch.arange(r).unsqueeze(0) + 100 * step
        # Every row has a mass of its own, so that it is never a toss-up which one goes.
        extra = torch.arange(1.0, ring.rows + 1).sqrt() * 1e-3 * (step + 1)
        ring.mass[0, :, 0] += torch.where(ring.mass[0, :, 0] > 0, extra, 0.0)
        ring.utility.copy_(ring.mass.amax(-1).log())
        for i, row in enumerate(plain.kept):
            row["n"] += extra[i].item()
        ring._sample(keys, torch.ones(1, r, dtype=torch.bool))
        ring._measure_when_due()
        ring.sampled -= r  # as if not seen yet
        scale, radius = ring.scale[0].clone(), ring.merge_radius.item()
        ring.measured.copy_(ring.sampled + r)  # nothing is measured anew in between
        ring.write(keys, payload, torch.ones(1, r, 1, dtype=torch.bool), numbers)
        plain.write(keys[0], payload[0, :, 0], numbers[0].tolist(), scale, radius, 0)
        assert int(ring.held) == len(plain.kept) <= ring.rows
    expected = sorted((row["key"].tolist(), row["payload"].tolist(), row["n"], row["number"]) for row in plain.kept)
    n = len(expected)
    stored = zip(ring.keys[0, :n], ring.payload[0, :n, 0], ring.mass[0, :n, 0], ring.numbers[0, :n], strict=True)
    found = sorted((k.tolist(), p.tolist(), float(m), int(i)) for k, p, m, i in stored)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)
        assert mine[1] == pytest.approx(theirs[1], abs=1e-5)
        assert mine[2:] == (pytest.approx(theirs[2], abs=1e-3), theirs[3])


def recalled(ring: RingStore, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w ``[G, R]`` around ``keys`` ``[G, R, F]``, and the weighted mean payload ``[G, R, P]``."""
    found = ring.nearest(keys)
    weights = ring.weights(found)[..., 0]
    total = weights.sum(-1)
    payload = ring.take(ring.payload, found.rows)[..., 0, :]
    return total, (weights.unsqueeze(-1) * payload).sum(2) / total.unsqueeze(-1)


def test_ages_of_what_is_averaged_by_hand() -> None:
    """Payloads 1 and 4 come to one state at 0 and 10, with a half life of 10; it is looked up at 20."""
    ring = store("merge", banks=1, rows=2, payload_size=1, half_life=10.0)
    key, alive = torch.ones(1, 1, 2), torch.ones(1, 1, 1, dtype=torch.bool)
    ring.write(key + 5, torch.zeros(1, 1, 1, 1), alive)  # elsewhere, so that the bank is full after the next
    for now, x in ((0, 1.0), (10, 4.0)):
        ring.now.fill_(now)
        ring.write(key, torch.full((1, 1, 1, 1), x), alive)
    assert ring.mass[0, 1, 0] == 1.5
    assert ring.payload[0, 1, 0].item() == (0.5 * 1 + 4) / 1.5
    ring.now.fill_(20)
    assert ring.weights(ring.nearest(key))[0, 0, 0, 0].item() == pytest.approx(0.75)


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=8),
    half_life=st.sampled_from([None, 3.0, 25.0]),
    seed=st.integers(0, 2**20),
)
def test_averaged_rows_recall_what_all_rows_would(
    steps: list[tuple[int, int]], half_life: float | None, seed: int
) -> None:
    """Three states come again and again: a bank of eight rows recalls as one that holds every row."""
    states = torch.tensor([[0.0, 0.0], [7.0, 0.0], [0.0, 9.0]])
    small = store("merge", banks=1, rows=8, neighbours=8, half_life=half_life)
    whole = store("fifo", banks=1, rows=128, neighbours=128, half_life=half_life)
    g, now = Generator().manual_seed(seed), 0
    for step, (r, waited) in enumerate([(8, 0), *steps]):
        now += waited
        keys = states[torch.randint(3, (1, r), generator=g) if step else torch.arange(8).view(1, 8) % 3]
        payload = torch.randn(1, r, 1, 3, generator=g)
        for ring in (small, whole):
            ring.now.fill_(now)
            ring.write(keys, payload, torch.ones(1, r, 1, dtype=torch.bool))
    for ring in (small, whole):  # states are far from each other, whatever the bandwidth was measured to be
        ring.bandwidth.fill_(1e-3)
    for found, expected in zip(recalled(small, states.unsqueeze(0)), recalled(whole, states.unsqueeze(0)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 8])
def test_a_merging_bank_fills_and_its_bandwidth_shrinks_with_capacity(d: int) -> None:
    bandwidths = []
    for rows in (64, 512):
        ring = store("merge", banks=1, rows=rows, features=d, neighbours=8)
        generator = Generator().manual_seed(d)
        for _ in range(10 * rows // 64):
            keys = torch.rand(1, 64, d, generator=generator)
            ring.write(keys, torch.zeros(1, 64, 1, 3), torch.ones(1, 64, 1, dtype=torch.bool))
        assert len(ring) == rows
        ring.measure()
        bandwidths.append(float(ring.bandwidth))
    assert bandwidths[1] < 0.8 * bandwidths[0]


def test_simhash_averages_what_has_the_same_signs() -> None:
    ring = store("simhash", banks=1, rows=8)
    for sign in (-1.0, 1.0, 1.0):
        keys = sign * torch.tensor([[[3.0, 4.0]]])
        ring.centre.zero_()
        ring.measured.fill_(10**6)  # the centre stays where it is
        ring.write(keys, torch.full((1, 1, 1, 3), sign), torch.ones(1, 1, 1, dtype=torch.bool))
    assert len(ring) == 2
    assert sorted(ring.mass[ring.mass > 0].tolist()) == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------------------- best


class PlainBest:
    """What `best` does, row by row: a ring of (key, score, number)."""

    def __init__(self, rows: int) -> None:
        self.slots: list[tuple[tuple[float, ...], float, int] | None] = [None] * rows
        self.written = 0

    def write(self, offered: list[tuple[tuple[float, ...], float, int]]) -> None:
        rows = len(self.slots)
        best: dict[tuple[float, ...], tuple[tuple[float, ...], float, int]] = {}
        for row in offered:
            if row[0] not in best or row[1] > best[row[0]][1]:
                best[row[0]] = row
        chosen, added = sorted(best.values(), key=lambda row: row[2]), -1
        places: dict[tuple[float, ...], int] = {}
        while added != len([row for row in chosen if row[0] not in places]):
            added = len([row for row in chosen if row[0] not in places]) if added >= 0 else 0
            stays = {(self.written + i) % rows for i in range(added, rows)}
            places = {row[0]: slot for slot in stays if (row := self.slots[slot]) is not None}
        for row in chosen:
            slot = places.get(row[0])
            if slot is None:
                self.slots[self.written % rows], self.written = row, self.written + 1
            elif row[1] > self.slots[slot][1]:  # type: ignore[index]
                self.slots[slot] = row
        keys = [row[0] for row in self.slots if row is not None]
        assert len(set(keys)) == len(keys)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 13), min_size=2, max_size=10), seed=st.integers(0, 2**20))
def test_best_keeps_the_highest_of_equal_keys_and_is_a_ring_else(sizes: list[int], seed: int) -> None:
    ring, plain, g = store("best", banks=1, rows=8), PlainBest(8), Generator().manual_seed(seed)
    for step, r in enumerate(sizes):
        keys = torch.randint(-2, 3, (1, r, 2), generator=g).float()  # 25 places
        payload, live = torch.randn(1, r, 1, 3, generator=g), torch.rand(1, r, 1, generator=g) < 0.8
        numbers = torch.arange(r).unsqueeze(0) + 100 * step
        ring.write(keys, payload, live, numbers)
        rows = zip(keys[0].tolist(), payload[0, :, 0, 0].tolist(), numbers[0].tolist(), live[0, :, 0], strict=True)
        plain.write([(tuple(key), score, number) for key, score, number, lives in rows if lives])
    assert int(ring.written) == plain.written
    for slot, row in enumerate(plain.slots):
        assert (float(ring.mass[0, slot, 0]) > 0) == (row is not None)
        if row is not None:
            assert tuple(ring.keys[0, slot].tolist()) == row[0]
            assert (ring.payload[0, slot, 0, 0].item(), int(ring.numbers[0, slot])) == row[1:]


def test_the_best_row_of_a_team_has_the_highest_mean_of_the_living() -> None:
    ring = store("best", banks=1, payloads=2, payload_size=1)
    for value, live in (((1.0, 3.0), (True, True)), ((99.0, 1.5), (False, True)), ((2.5, 2.0), (True, True))):
        ring.write(torch.zeros(1, 1, 2), torch.tensor(value).view(1, 1, 2, 1), torch.tensor(live).view(1, 1, 2))
    assert int(ring.held) == 1
    assert ring.payload[0, 0].flatten().tolist() == [2.5, 2.0]


# --------------------------------------------------------------------------------------------------------- every policy

POLICIES = ["merge", "fifo", "simhash", "best"]


@pytest.mark.parametrize("policy", POLICIES)
def test_banks_do_not_mix_and_the_dead_are_not_kept(policy: str) -> None:
    ring = store(policy, banks=2, rows=16)
    for step in range(12):
        keys, payload, _ = offered(9, seed=step)
        payload[0], payload[1] = 1.0, 2.0
        live = torch.ones(2, 9, 1, dtype=torch.bool)
        live[1, 3:] = False
        payload[1, 3:], keys[1, 4:] = torch.nan, torch.nan
        ring.write(keys, payload, live)
    assert ring.rejected.tolist() == [0, 0]
    for bank, value in ((0, 1.0), (1, 2.0)):
        rows = ring.payload[bank][ring.mass[bank, :, 0] > 0]
        assert len(rows) > 0
        assert (rows - value).abs().max() < 1e-5
    assert ring.written.tolist() == [12 * 9, 12 * 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_finite_is_refused_and_counted(policy: str) -> None:
    ring = store(policy, banks=1, rows=8)
    keys, payload, _ = offered(6, seed=0, banks=1)
    keys[0, 1, 0], payload[0, 4, 0, 2] = torch.inf, torch.nan
    ring.write(keys, payload, torch.ones(1, 6, 1, dtype=torch.bool))
    assert int(ring.rejected) == 2
    assert int(ring.written) == 4
    assert all(x.isfinite().all() for x in (ring.keys, ring.payload, ring.scaled, ring.scale, ring.bandwidth))


@pytest.mark.parametrize("policy", POLICIES)
def test_state_survives_a_trip(policy: str) -> None:
    ring, other = store(policy, payloads=2), store(policy, payloads=2)
    for step in range(5):
        keys, payload, live = offered(5, seed=step, payloads=2)
        ring.write(keys, payload, live)
    size = ring.bytes
    other.load_state_dict(ring.state_dict())
    keys, payload, live = offered(5, seed=99, payloads=2)
    for one in (ring, other):
        one.write(keys, payload, live)
    first, second = ring.nearest(keys), other.nearest(keys)
    assert torch.equal(first.squared, second.squared)
    assert torch.equal(ring.weights(first), other.weights(second))
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in ring.state_dict().items())
    assert ring.bytes == other.bytes == size


def test_neighbours_are_those_of_the_present_scale() -> None:
    """A change of statistics gives the neighbours of a bank whose keys had been scaled so from the beginning."""
    ring = store("fifo", banks=1, rows=64, neighbours=4)
    g = Generator().manual_seed(3)
    for stretch in (1.0, 1.0, 20.0, 20.0, 20.0):
        keys = torch.randn(1, 40, 2, generator=g) * torch.tensor([1.0, stretch])
        ring.write(keys, torch.zeros(1, 40, 1, 3), torch.ones(1, 40, 1, dtype=torch.bool))
    ring.measure()
    recent = torch.cat([ring.recent[0, : int(ring.sampled)]])
    std = recent.std(0, correction=0)
    queries = torch.randn(1, 30, 2, generator=g) * torch.tensor([1.0, 10.0])
    distance = torch.cdist(queries / std, ring.keys / std)
    expected = distance.topk(4, largest=False)
    found = ring.nearest(queries)
    torch.testing.assert_close(found.squared.sqrt(), expected.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.rows, expected.indices)


def test_weights_by_hand() -> None:
    ring = store("fifo", banks=1, rows=4, half_life=10.0)
    ring.write(torch.zeros(1, 1, 2), torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[7]]))
    ring.now.fill_(20)
    ring.bandwidth.fill_(0.5)
    ring.mass.mul_(3.0)
    found = ring.nearest(torch.tensor([[[0.3, 0.4], [0.0, 1.4], [0.0, 1.6]]]))
    weights = ring.weights(found)[0, :, 0, 0]
    # exp(−d²/2h²) · 2^(−20/10) · 3; the third lies beyond 3h = 1.5
    expected = torch.tensor([math.exp(-0.25 / 0.5) / 4 * 3, math.exp(-1.96 / 0.5) / 4 * 3, 0.0])
    torch.testing.assert_close(weights, expected)
    assert ring.weights(found, torch.tensor([[7, 8, 9]]))[0, 0, 0, 0] == 0


def test_only_the_last_of_more_keys_than_the_reservoir_holds() -> None:
    ring = store("fifo", banks=1, rows=8)
    keys = torch.arange(RESERVOIR + 5.0).view(1, -1, 1).expand(1, -1, 2)
    count = keys.shape[1]
    ring.write(keys, torch.zeros(1, count, 1, 3), torch.ones(1, count, 1, dtype=torch.bool))
    assert set(ring.recent[0, :, 0].tolist()) == set(range(5, RESERVOIR + 5))
    assert set(ring.keys[0, :, 0].tolist()) == set(range(RESERVOIR - 3, RESERVOIR + 5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "newest"}, "policy='newest' must be one of merge, fifo, simhash"),
        ({"rows": 4, "neighbours": 5}, "neighbours=5 are more than the 4 rows that capacity and budget give each bank"),
        ({"policy": "simhash", "generator": None}, "needs a generator"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        store(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["merge", "simhash"])
def test_a_key_is_a_mean_of_rows_also_where_their_agents_take_turns(policy: str) -> None:
    """Two team rows at one place, in each another agent alive: the row they become lies there, not at twice it."""
    store = RingStore(
        banks=1, rows=4, features=2, payload_size=1, payloads=2, policy=policy, neighbours=1, generator=Generator()
    )
    if policy == "merge":
        far = torch.tensor([[[10.0, 10.0], [10.0, 9.0], [9.0, 10.0], [0.5, 0.5]]])
        store.write(far, torch.zeros(1, 4, 2, 1), torch.ones(1, 4, 2, dtype=torch.bool))
        store.mass.mul_(1e-6)
        store.measured.fill_(10**9)
        store.merge_radius.fill_(100.0)
    turns = torch.eye(2, dtype=torch.bool).unsqueeze(0)
    store.write(torch.ones(1, 2, 2), torch.zeros(1, 2, 2, 1), turns)
    torch.testing.assert_close(store.keys[0, store.mass[0].sum(-1).argmax()], torch.ones(2), rtol=0, atol=1e-3)
