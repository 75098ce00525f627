"""Nearest neighbours against brute force by differences in float64, at block borders, and on clustered data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marl_memory.functional import neighbours
from marl_memory.functional.neighbours import assign, fit_centroids, invert, nearest, nearest_listed, recall


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(queries: Tensor, rows: Tensor, k: int, forbidden: Tensor | None = None) -> Tensor:
    """Sorted squared distances ``[G, Q, k]`` in float64, inf where there are too few rows."""
    squared = (queries.double().unsqueeze(2) - rows.double().unsqueeze(1)).square().sum(-1)
    if forbidden is not None:
        squared = squared.masked_fill(forbidden, torch.inf)
    found = squared.sort(-1).values[..., :k]
    return torch.nn.functional.pad(found, (0, k - found.shape[-1]), value=torch.inf)


def check(found: tuple[Tensor, Tensor], queries: Tensor, rows: Tensor, expected: Tensor) -> None:
    """Distances are the expected ones, belong to the rows named, and no row is named twice."""
    squared, index = found
    tolerance = 1e-5 if rows.dtype == torch.float32 else 1e-12
    assert squared.dtype == rows.dtype and index.dtype == torch.int64
    torch.testing.assert_close(squared.double(), expected, rtol=tolerance, atol=tolerance)
    bank = torch.arange(len(rows)).view(-1, 1, 1)
    by_name = (rows.double()[bank, index] - queries.double().unsqueeze(2)).square().sum(-1)
    there = expected < torch.inf
    torch.testing.assert_close(squared.double()[there], by_name[there], rtol=tolerance, atol=0)
    assert (index[~there] == 0).all()
    for names, real in zip(index.flatten(0, 1), there.flatten(0, 1), strict=True):
        assert len(names[real].unique()) == real.sum()


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small bank has many."""
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    monkeypatch.setattr(neighbours, "SCRATCH", 512)
    monkeypatch.setattr(neighbours, "TOPK_COLUMNS", 1)
    monkeypatch.setattr(neighbours, "WIDTH", 1)


@pytest.mark.parametrize("blocks", ["default", "small"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_nearest_is_brute_force(blocks: str, data: st.DataObject) -> None:
    g, q, n = (data.draw(st.integers(1, most), label=name) for name, most in (("G", 3), ("Q", 9), ("N", 200)))
    d, k = data.draw(st.integers(1, 20), label="D"), data.draw(st.integers(1, 24), label="k")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), label="dtype")
    seed = data.draw(st.integers(0, 2**30), label="seed")
    generator = torch.Generator().manual_seed(seed)
    rows, queries = normal(g, n, d, seed=seed, dtype=dtype), normal(g, q, d, seed=seed + 1, dtype=dtype)
    if data.draw(st.booleans(), label="duplicates"):
        rows, queries = rows.round(), queries.round()
    forbidden = torch.zeros(g, q, n, dtype=torch.bool)
    valid = exclude = None
    if data.draw(st.booleans(), label="some invalid"):
        valid = torch.rand(g, n, generator=generator) < data.draw(st.sampled_from([0.0, 0.1, 0.9]), label="share valid")
        forbidden |= ~valid.unsqueeze(1)
    if data.draw(st.booleans(), label="some excluded"):
        exclude = torch.randint(-1, n, (g, q), generator=generator)
        forbidden |= torch.arange(n) == exclude.unsqueeze(-1)
    expected = brute_force(queries, rows, k, forbidden)
    stored = rows if valid is None else rows.masked_fill(~valid.unsqueeze(-1), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        if blocks == "small":
            small_blocks(patch)
        found = nearest(queries, stored, k, valid=valid, exclude=exclude)
    check(found, queries, rows, expected)
    if exclude is not None:
        assert not ((found[1] == exclude.unsqueeze(-1)) & (found[0] < torch.inf)).any()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049, 16384, 16385, 40000])
@pytest.mark.parametrize("k", [1, 16])
def test_borders_of_groups_and_blocks(n: int, k: int) -> None:
    rows, queries = normal(1, n, 3), normal(1, 5, 3, seed=1)
    queries[0, 0] = rows[0, -1]  # the last row of the last, perhaps incomplete, block
    squared, index = nearest(queries, rows, k)
    check((squared, index), queries, rows, brute_force(queries, rows, k))
    assert squared[0, 0, 0] == 0.0 and index[0, 0, 0] == n - 1
    tree = cKDTree(rows[0].double().numpy())
    torch.testing.assert_close(squared[0, :, 0].double().sqrt(), torch.from_numpy(tree.query(queries[0].double())[0]))


def test_minima_in_two_stages_of_columns() -> None:
    values = normal(2, 3, 16 * 300 + 7)
    found = values.gather(-1, neighbours._smallest(values, 5)).sort(-1).values
    torch.testing.assert_close(found, values.sort(-1).values[..., :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_keys_are_at_exactly_zero(dtype: torch.dtype) -> None:
    rows = normal(2, 3000, 17, dtype=dtype) * 1e3 + 1e4
    squared, index = nearest(rows[:, :64].clone(), rows, 3)
    assert (squared[..., 0] == 0).all() and (squared[..., 1:] > 0).all()
    assert torch.equal(index[..., 0], torch.arange(64).expand(2, -1))


def test_large_offset_and_small_spacing() -> None:
    """Keys near 1000, 0.001 apart: their squares differ by less than float32 resolves, their differences do not."""
    line = (1000.0 + 1e-3 * torch.arange(2000, dtype=torch.float64)).float()
    rows = torch.stack([line, line.flip(0), torch.full_like(line, 1000.0)], -1).unsqueeze(0)
    squared, index = nearest(rows[:, 500:1500:7], rows, 3)
    middle = torch.arange(500, 1500, 7)
    assert torch.equal(index[0].sort(-1).values, torch.stack([middle - 1, middle, middle + 1], -1))
    check((squared, index), rows[:, 500:1500:7], rows, brute_force(rows[:, 500:1500:7], rows, 3))


@pytest.mark.parametrize("d", [2, 17, 64])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_what_sifting_rounds_is_bounded(d: int, spread: float) -> None:
    """Two heaps far apart, so tight that float32 scores can not tell their rows: the documented bound holds."""
    rows = spread * normal(1, 4000, d)
    rows[:, ::2, 0] += 2.0
    queries = rows[:, :100] + 0.1 * spread * normal(1, 100, d, seed=1)
    excess = nearest(queries, rows, 8)[0].double() - brute_force(queries, rows, 8)
    from_centre = (queries - queries.mean(1, keepdim=True)).square().sum(-1, keepdim=True)
    assert (excess <= 2 * (1 + d**0.5) * torch.finfo(torch.float32).eps * from_centre).all()
    exact = nearest(queries.double(), rows.double(), 8)
    check(exact, queries.double(), rows.double(), brute_force(queries, rows, 8))


def test_banks_do_not_mix_and_views_are_searched() -> None:
    rows, queries = normal(4, 500, 12)[..., ::2], normal(7, 4, 6, seed=1).transpose(0, 1)
    squared, index = nearest(queries, rows, 4)
    for g in range(4):
        alone = nearest(queries[g : g + 1], rows[g : g + 1], 4)
        assert torch.equal(squared[g], alone[0][0]) and torch.equal(index[g], alone[1][0])


def test_an_empty_bank_finds_nothing_and_no_query_asks_nothing() -> None:
    rows = torch.full((2, 40, 3), torch.nan)
    squared, index = nearest(normal(2, 5, 3), rows, 4, valid=torch.zeros(2, 40, dtype=torch.bool))
    assert (squared == torch.inf).all() and (index == 0).all()
    squared, index = nearest(normal(2, 0, 3), normal(2, 40, 3), 4)
    assert squared.shape == index.shape == (2, 0, 4)


def test_autocast_changes_nothing() -> None:
    rows, queries = normal(1, 5000, 17), normal(1, 8, 17, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(queries, rows, 5)
    assert torch.equal(found[1], nearest(queries, rows, 5)[1]) and found[0].dtype == torch.float32


def test_no_gradient() -> None:
    assert not nearest(normal(1, 2, 3).requires_grad_(), normal(1, 9, 3).requires_grad_(), 2)[0].requires_grad


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made anew."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and not out._is_view():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("g", "q", "n"), [(1, 2048, 100_000), (8, 512, 16_384)])
def test_memory_is_bounded(g: int, q: int, n: int) -> None:
    rows, queries = normal(g, n, 4), normal(g, q, 4, seed=1)
    with Largest() as largest:
        nearest(queries, rows, 16)
    assert largest.elements <= neighbours.SCRATCH < g * q * n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"queries": torch.zeros(4, 3)}, "queries must be"),
        ({"queries": torch.zeros(2, 4, 5)}, "queries must be"),
        ({"rows": torch.zeros(2, 0, 3)}, "queries must be"),
        ({"queries": torch.zeros(2, 4, 3, dtype=torch.float64)}, "both be float32 or both float64"),
        ({"queries": torch.zeros(2, 4, 3).half(), "rows": torch.zeros(2, 9, 3).half()}, "both be float32"),
        ({"valid": torch.ones(2, 8, dtype=torch.bool)}, "valid must be bool"),
        ({"valid": torch.ones(2, 9)}, "valid must be bool"),
        ({"exclude": torch.zeros(2, 9, dtype=torch.int64)}, "exclude must be int64"),
        ({"exclude": torch.zeros(2, 4)}, "exclude must be int64"),
        ({"exclude": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, "one device"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": torch.zeros(2, 4, 3), "rows": torch.zeros(2, 9, 3), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        nearest(**arguments)


def clustered(n: int, seed: int, banks: int = 1, d: int = 17) -> Tensor:
    """Rows ``[G, N, D]`` around a few hundred centres, near a plane of five dimensions."""
    plane, centres = normal(banks, 5, d, seed=100), 3 * normal(banks, 300, 5, seed=101)
    member = torch.randint(300, (banks, n), generator=torch.Generator().manual_seed(seed))
    flat = centres[torch.arange(banks).unsqueeze(1), member] + normal(banks, n, 5, seed=seed)
    return flat @ plane + 0.05 * normal(banks, n, d, seed=seed + 1)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_all_lists_probed_is_exact(data: st.DataObject) -> None:
    g, q, n = (data.draw(st.integers(1, most), label=name) for name, most in (("G", 3), ("Q", 6), ("N", 150)))
    c, k = data.draw(st.integers(1, 20), label="C"), data.draw(st.integers(1, 20), label="k")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30), label="seed"))
    rows, queries = torch.randn(g, n, 4, generator=generator), torch.randn(g, q, 4, generator=generator)
    valid = torch.rand(g, n, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), label="share valid")
    exclude = torch.randint(-1, n, (g, q), generator=generator)
    stored = rows.masked_fill(~valid.unsqueeze(-1), torch.nan)
    centroids = fit_centroids(stored, c, generator, valid=valid)
    assert centroids.shape == (g, c, 4) and centroids.isfinite().all()
    lists = invert(stored, assign(stored, centroids, valid=valid), centroids)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), label="small blocks"):
            small_blocks(patch)
        found = nearest_listed(queries, lists, k, probes=c, exclude=exclude)
    forbidden = ~valid.unsqueeze(1) | (torch.arange(n) == exclude.unsqueeze(-1))
    check(found, queries, rows, brute_force(queries, rows, k, forbidden))


def test_recall_on_clustered_rows() -> None:
    rows, queries = clustered(20_000, 0, banks=2), clustered(100, 5, banks=2)
    centroids = fit_centroids(rows, 256, torch.Generator().manual_seed(0))
    lists = invert(rows, assign(rows, centroids), centroids)
    exact = nearest(queries, rows, 16)
    few, more = (nearest_listed(queries, lists, 16, probes=probes) for probes in (1, 16))
    assert recall(more[1], exact[1]) >= 0.9 > recall(few[1], exact[1])
    same = more[1] == exact[1]
    torch.testing.assert_close(more[0][same], exact[0][same], rtol=1e-6, atol=0)


def test_one_crowded_list_costs_no_more_and_spoils_no_other() -> None:
    """Half of all rows are equal, so one list holds them; what is looked at stays bounded."""
    rows = clustered(8000, 0)
    rows[:, ::2] = rows[:, :1]
    centroids = fit_centroids(rows, 64, torch.Generator().manual_seed(0))
    lists = invert(rows, assign(rows, centroids), centroids)
    with Largest() as largest:
        squared, _ = nearest_listed(rows[:, :50], lists, 16, probes=4)
    assert (squared[..., 0] == 0).all() and (squared < torch.inf).all()
    assert largest.elements <= 50 * 17 * 8 * (9 / 8 * 4 / 64 * lists.pieces.shape[1] + 1)


def test_overwritten_rows_are_found_under_their_new_keys_only() -> None:
    rows, new = clustered(3000, 0), clustered(200, 7)
    centroids = fit_centroids(rows, 32, torch.Generator().manual_seed(0))
    assigned = assign(rows, centroids)
    slots, old = torch.arange(2900, 3100) % 3000, rows[:, torch.arange(2900, 3100) % 3000].clone()
    rows[:, slots] = new
    assigned[:, slots] = assign(new, centroids)
    lists = invert(rows, assigned, centroids)
    squared, index = nearest_listed(new, lists, 1, probes=4)
    assert (squared == 0).all() and torch.equal(index[0, :, 0], slots)
    assert (nearest_listed(old, lists, 1, probes=4)[0] > 0).all()


def test_rows_in_no_list_are_never_found() -> None:
    rows = clustered(500, 0)
    centroids = fit_centroids(rows, 8, torch.Generator().manual_seed(0))
    assigned = torch.full((1, 500), 8)
    assert (nearest_listed(rows, invert(rows, assigned, centroids), 3, probes=8)[0] == torch.inf).all()
    assigned[0, 17] = assign(rows[:, 17:18], centroids)
    squared, index = nearest_listed(rows[:, 17:18], invert(rows, assigned, centroids), 3, probes=8)
    assert squared.tolist() == [[[0.0, torch.inf, torch.inf]]] and index.tolist() == [[[17, 0, 0]]]


def test_centroids_are_a_function_of_the_generator() -> None:
    rows, state = clustered(2000, 0, banks=2), torch.random.get_rng_state()
    first, again, other = (fit_centroids(rows, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_k_means_on_separate_clusters_finds_their_means() -> None:
    rows = torch.tensor([0.0, 1.0, 2.0, 100.0, 101.0, 102.0]).view(1, 6, 1)
    centroids = fit_centroids(rows, 2, torch.Generator().manual_seed(0), iterations=4)
    assert sorted(centroids.flatten().tolist()) == [1.0, 101.0]


def test_recall_by_hand() -> None:
    assert recall(torch.tensor([[5, 2, 9], [1, 0, 4]]), torch.tensor([[2, 3, 9], [7, 8, 6]])).item() == pytest.approx(
        1 / 3
    )


def test_bad_index_arguments_are_named() -> None:
    rows = clustered(100, 0)
    centroids = fit_centroids(rows, 8, torch.Generator())
    lists = invert(rows, assign(rows, centroids), centroids)
    for probes in (0, 9):
        with pytest.raises(ValueError, match=r"probes must be in \[1, 8\]"):
            nearest_listed(rows, lists, 2, probes=probes)
    with pytest.raises(ValueError, match="k must be at least 1"):
        nearest_listed(rows, lists, 0, probes=1)
    with pytest.raises(ValueError, match="lists and rows_per_list"):
        fit_centroids(rows, 0, torch.Generator())
    with pytest.raises(ValueError, match="assigned must be int64"):
        invert(rows, torch.zeros(1, 99, dtype=torch.int64), centroids)
    with pytest.raises(ValueError, match="valid must be bool"):
        assign(rows, centroids, valid=torch.ones(1, 99, dtype=torch.bool))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds() -> None:
    rows, queries = clustered(30_000, 0, banks=2), clustered(300, 5, banks=2)
    valid, exclude = (
        torch.rand(2, 30_000, generator=torch.Generator().manual_seed(3)) < 0.9,
        torch.arange(600).view(2, -1),
    )
    expected = nearest(queries, rows, 16, valid=valid, exclude=exclude)
    on = [x.cuda() for x in (queries, rows, valid, exclude)]
    found = nearest(on[0], on[1], 16, valid=on[2], exclude=on[3])
    torch.testing.assert_close(found[0].cpu(), expected[0])
    centroids = fit_centroids(on[1], 64, torch.Generator().manual_seed(0), valid=on[2])
    lists = invert(on[1], assign(on[1], centroids, valid=on[2]), centroids)
    torch.testing.assert_close(nearest_listed(on[0], lists, 16, probes=64, exclude=on[3])[0].cpu(), expected[0])
