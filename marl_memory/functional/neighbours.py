"""The k nearest rows of a bank by Euclidean distance: exact search, and an inverted-file index for large banks.

Every function treats G banks at once and never mixes them.  Nothing here has a gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from marl_memory.functional.linear import linear

# Elements of one block of scores on a CPU: 2 MiB of float32 stay in a core's caches between the product and the
# minima.  Larger blocks gain nothing; a GPU wants few, large kernels.
BLOCK = 2**19
BLOCK_CUDA = 2**24
# Elements of the tensors that live from block to block; they decide how many queries are treated at a time.
SCRATCH = 2**22
SCRATCH_CUDA = 2**26
# Least columns of a block of group minima: torch.amin is some twenty times slower along narrower ones on a CPU.
WIDTH = 32
# torch.topk is about three times faster a column on a CPU where there are 64 columns for each one sought.
TOPK_COLUMNS = 64
GROUP = 16
# The same among the groups' minima, where the least of few are found in a fraction of the time of the least of many.
SECOND_GROUP = 8
# Rows of a list that are read together: gathering row by row takes three times as long.
PIECE = 8


class InvertedLists(NamedTuple):
    """An inverted-file index over rows ``[G, N, D]``: which rows lie nearest to which of C centroids.

    A snapshot: rows that are overwritten later are found as they were, until ``invert`` is called again.

    Lists are stored one after the other in pieces of ``PIECE`` rows, M in all; what a list does not fill lies at
    infinity, and so does the last piece.

    Args:
        centroids: ``[G, C, D]``.
        pieces: ``[G, M, PIECE, D]``, the bank's rows list by list, rows in no list last.
        numbers: ``[G, M, PIECE]`` int64, their numbers in the bank; 0 at infinity.
        offsets: ``[G, C + 1]`` int64: list c is ``pieces[offsets[c] : offsets[c + 1]]``.
    """

    centroids: Tensor
    pieces: Tensor
    numbers: Tensor
    offsets: Tensor


@torch.no_grad()
def nearest(
    queries: Tensor, rows: Tensor, k: int, *, valid: Tensor | None = None, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Exact k nearest rows of each query in its own bank.

    $$ d^2(q, r) = \sum_j (q_j - r_j)^2 $$

    Rows are sifted by $\|r - c\|^2 - 2 \langle q - c, r - c\rangle$ with c the mean of a block of the bank's queries,
    which is one matrix product, and the survivors are compared by differences: returned distances carry no
    cancellation, and a row equal to its query is at exactly 0.  Sifting rounds: a row may be missed for one whose
    $d^2$ is larger by up to some $2 (1 + \sqrt D)\, \epsilon\, \|q - c\|^2$, ε the precision of the type.  It takes
    products in full precision, PyTorch's default.

    At a time it holds blocks of about ``BLOCK`` and ``SCRATCH`` elements and N row numbers, never Q·N; only where one
    query takes more, G·max(N/16, 16·k·D).  ``rows`` that are not contiguous are copied once.

    Args:
        queries: ``[G, Q, D]`` float32 or float64, finite.
        rows: ``[G, N, D]`` of the same type, finite where valid.
        k: number of rows sought.
        valid: ``[G, N]`` bool, rows that may be found; all by default.  Others may hold anything, NaN too.
        exclude: ``[G, Q]`` int64, a row that is not to be found for this query; -1 for none.

    Returns:
        squared distances ``[G, Q, k]``, ascending, and row numbers ``[G, Q, k]`` int64.  Of rows at equal distance any
        may be found.  Where fewer than k rows can be found the rest have distance inf and row number 0, which can be
        gathered and then weighs exp(-inf) = 0.

    Raises:
        ValueError: k < 1, shapes or devices that do not fit, types other than those above.

    Reference: the two-stage selection of Chern et al., "TPU-KNN" (2022), with all k groups kept, which makes it exact.
    """
    _check(queries, rows, k, exclude, valid)
    _, n, d = rows.shape
    # One more is sought where one may be thrown away: the k nearest others are among the k + 1 nearest.
    sought = min(k + (exclude is not None), n)
    group = _group_size(n, sought, d)
    width = max(-(-n // group), sought * group * d)
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.autocast(queries.device.type, enabled=False):
        for part in _query_blocks(queries, width):
            some = queries[:, part]
            minima, members = _group_minima(some, rows, valid, group)
            # The k groups with the smallest minima contain the k nearest rows: if a row's group is not among them, each
            # of those k groups holds a row (its minimum) that is no farther.
            chosen = _smallest(minima, min(sought, minima.shape[-1]))
            candidates = members[chosen].flatten(2)
            missing = None
            if n % group or valid is not None:
                missing = candidates >= n
                candidates = candidates.clamp_(max=n - 1)
                if valid is not None:
                    missing |= ~valid.gather(1, candidates.flatten(1)).view_as(candidates)
            squared, place = _closest(some, _take(rows, candidates), sought, missing)
            parts.append(_finish(squared, candidates.gather(-1, place), k, exclude, part))
    return _join(parts)


@torch.no_grad()
def nearest_listed(
    queries: Tensor, lists: InvertedLists, k: int, *, probes: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate k nearest rows: those of the lists whose centroids are nearest to the query.

    Of the nearest ``probes`` lists that hold rows the first 9/8·probes·M/C pieces are looked at, the nearest list's
    first, so that one crowded list costs no more than others; with ``probes`` = C all are, and the search is exact.

    Args:
        queries: ``[G, Q, D]`` float32 or float64, finite.
        lists: of rows ``[G, N, D]`` of the same type; see ``invert``.
        k: number of rows sought.
        probes: how many lists are looked at, up to C.
        exclude: ``[G, Q]`` int64, a row that is not to be found for this query; -1 for none.

    Returns:
        as ``nearest`` does: squared distances by differences ``[G, Q, k]``, ascending, and row numbers ``[G, Q, k]``;
        inf and 0 where the lists hold too few.

    Raises:
        ValueError: as ``nearest``; ``probes`` outside [1, C].

    Reference: the inverted file of Jégou et al., "Product Quantization for Nearest Neighbor Search" (2011), with whole
    rows in place of codes.
    """
    g, m, size, d = lists.pieces.shape
    pieces = lists.pieces.view(g, m, size * d)
    _check(queries, lists.pieces.view(g, m * size, d), k, exclude)
    c = lists.centroids.shape[1]
    if not 1 <= probes <= c:
        raise ValueError(f"probes must be in [1, {c}], the number of lists; got {probes}")
    looked_at = m if probes == c else min(m, -(-9 * probes * m // (8 * c)))
    sought = min(k + (exclude is not None), looked_at * size)
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.autocast(queries.device.type, enabled=False):
        lengths = lists.offsets.diff(dim=1)
        full = lengths > 0
        away, probed = nearest(queries, lists.centroids, probes, valid=None if bool(full.all()) else full)
        starts, lengths = (x.gather(1, probed.flatten(1)).view_as(probed) for x in (lists.offsets, lengths))
        lengths.masked_fill_(away == torch.inf, 0)  # fewer lists than probes hold rows
        for part in _query_blocks(queries, looked_at * size * d):
            some = queries[:, part]
            chosen = _places(starts[:, part], lengths[:, part], looked_at, m - 1)
            near = _take(pieces, chosen).view(g, -1, looked_at * size, d)
            squared, place = _closest(some, near, sought)
            place = chosen.gather(-1, place // size) * size + place % size
            index = lists.numbers.view(g, m * size).gather(1, place.flatten(1)).view_as(place)
            parts.append(_finish(squared, index, k, exclude, part))
    return _join(parts)


@torch.no_grad()
def fit_centroids(
    rows: Tensor,
    lists: int,
    generator: torch.Generator,
    *,
    valid: Tensor | None = None,
    iterations: int = 5,
    rows_per_list: int = 32,
) -> Tensor:
    r"""Centroids by k-means (Lloyd) over a sample of each bank's rows; one without rows starts again at a row of it.

    $$ a_i = \arg\min_c \|r_i - m_c\|^2, \qquad m_c = \operatorname{mean}\{r_i : a_i = c\} $$

    Many small lists find more for the rows looked at than few large ones: some 64 rows a list, 16 probes.

    Args:
        rows: ``[G, N, D]`` float32 or float64, finite where valid.
        lists: C, the number of centroids.
        generator: draws the sample, whose first C rows are the first centroids.  On a GPU the sums' order, and so their
            last bits, may differ from call to call.
        valid: ``[G, N]`` bool, rows that may be drawn; all by default.
        iterations: of Lloyd's algorithm.
        rows_per_list: sample size over C; where a bank has fewer valid rows they are drawn repeatedly.

    Returns:
        ``[G, C, D]``; of a bank without valid rows, zeros.

    Raises:
        ValueError: ``lists`` < 1; shapes or types as in ``nearest``.

    Reference: Lloyd, "Least Squares Quantization in PCM" (1982).
    """
    _check(rows, rows, 1, None, valid)
    if lists < 1 or rows_per_list < 1:
        raise ValueError(f"lists and rows_per_list must be at least 1, got {lists} and {rows_per_list}")
    g, n, d = rows.shape
    draws = torch.rand(g, n, generator=generator, device=generator.device).to(rows.device)
    counts = torch.full((g, 1), n, device=rows.device)
    if valid is not None:
        draws.masked_fill_(~valid, 2.0)
        counts = valid.sum(-1, keepdim=True)
    size = max(lists, min(n, lists * rows_per_list))
    turn = torch.arange(size, device=rows.device) % counts.clamp(min=1)
    drawn = draws.argsort(-1).gather(1, turn)
    sample = _take(rows, drawn).masked_fill_((counts == 0).unsqueeze(-1), 0.0)
    centroids = sample[:, :lists].clone()
    bank = torch.arange(g, device=rows.device).unsqueeze(-1) * lists
    one = sample.new_ones(g * size)
    for i in range(iterations):
        owner = (nearest(sample, centroids, 1)[1].squeeze(-1) + bank).flatten()
        sums = sample.new_zeros(g * lists, d).index_add_(0, owner, sample.flatten(0, 1)).view(g, lists, d)
        owned = sample.new_zeros(g * lists).index_add_(0, owner, one).view(g, lists, 1)
        fresh = sample[:, torch.arange((i + 1) * lists, (i + 2) * lists, device=rows.device) % size]
        centroids = torch.where(owned > 0, sums / owned.clamp(min=1), fresh)
    return centroids


def assign(rows: Tensor, centroids: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The list of each row: its nearest centroid.

    A store keeps this per slot and replaces the entries of the slots that it overwrites.

    Args:
        rows: ``[G, N, D]``.
        centroids: ``[G, C, D]``.
        valid: ``[G, N]`` bool; the others get list C, which is never probed.

    Returns:
        ``[G, N]`` int64 in [0, C].

    Raises:
        ValueError: shapes or types as in ``nearest``.
    """
    _check(rows, rows, 1, None, valid)
    number = nearest(rows, centroids, 1)[1].squeeze(-1)
    return number if valid is None else number.masked_fill_(~valid, centroids.shape[1])


def invert(rows: Tensor, assigned: Tensor, centroids: Tensor) -> InvertedLists:
    """Lists by the rows' numbers of lists: one stable sort and a copy, some milliseconds for 131 072 rows.

    Args:
        rows: ``[G, N, D]``.
        assigned: ``[G, N]`` int64 in [0, C]; C for a row in no list, which is never found.
        centroids: ``[G, C, D]``.

    Returns:
        the index.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    _check(centroids, rows, 1, None)
    (g, n, d), c = rows.shape, centroids.shape[1]
    if assigned.shape != (g, n) or assigned.dtype != torch.int64:
        raise ValueError(f"assigned must be int64 {[g, n]}, got {assigned.dtype} {list(assigned.shape)}")
    # One sort of one dimension: PyTorch sorts those of int32 by radix on a CPU, several times faster.
    bank = torch.arange(g, device=rows.device).unsqueeze(-1)
    by_list, order = (assigned + bank * (c + 1)).flatten().int().sort(stable=True)
    bounds = torch.arange(c + 1, device=rows.device) + bank * (c + 1)
    first = torch.searchsorted(by_list, bounds.int()) - bank * n  # where each list begins among the sorted rows
    order, by_list = order.view(g, n) - bank * n, by_list.view(g, n).long() - bank * (c + 1)
    lengths = (first.diff(dim=1) + PIECE - 1) // PIECE
    offsets = pad(lengths.cumsum(1), (1, 0))
    place = torch.arange(n, device=rows.device) + (offsets * PIECE - first).gather(1, by_list)
    m = -(-n // PIECE) + c + 2
    pieces = rows.new_full((g * m * PIECE, d), torch.inf)
    pieces.index_copy_(0, (place + bank * (m * PIECE)).flatten(), _take(rows, order).flatten(0, 1))
    numbers = order.new_zeros(g, m * PIECE).scatter_(1, place, order)
    return InvertedLists(centroids, pieces.view(g, m, PIECE, d), numbers.view(g, m, PIECE), offsets)


def recall(found: Tensor, exact: Tensor) -> Tensor:
    """Share of the exact neighbours that were found.

    Args:
        found: ``[*B, K]`` row numbers, no number twice.
        exact: ``[*B, k]`` row numbers.

    Returns:
        ``[]`` float32 in [0, 1].
    """
    return (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).float().mean()


def _check(queries: Tensor, rows: Tensor, k: int, exclude: Tensor | None, valid: Tensor | None = None) -> None:
    """Raise ValueError where the arguments of a search do not fit."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 3 or rows.ndim != 3 or queries.shape[::2] != rows.shape[::2] or 0 in rows.shape:
        raise ValueError(
            f"queries must be [G, Q, D] and rows [G, N, D], none of G, N, D zero; "
            f"got {list(queries.shape)} and {list(rows.shape)}"
        )
    if queries.dtype != rows.dtype or rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"queries and rows must both be float32 or both float64, got {queries.dtype} and {rows.dtype}")
    if exclude is not None and (exclude.shape != queries.shape[:2] or exclude.dtype != torch.int64):
        raise ValueError(f"exclude must be int64 {list(queries.shape[:2])}, got {exclude.dtype} {list(exclude.shape)}")
    if valid is not None and (valid.shape != rows.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {list(rows.shape[:2])}, got {valid.dtype} {list(valid.shape)}")
    if any(x is not None and x.device != rows.device for x in (queries, exclude, valid)):
        raise ValueError("queries, rows, valid and exclude must be on one device")


def _group_size(n: int, k: int, d: int) -> int:
    """Rows a group: a power of two that leaves topk its columns and makes sifting about as dear as ranking."""
    most = min(GROUP, n / (TOPK_COLUMNS * k), (4 * n / (k * d)) ** 0.5)
    return 2 ** int(math.log2(max(most, 1)))


def _query_blocks(queries: Tensor, width: int) -> list[slice]:
    """Slices of Q so that ``[G, q, width]`` has at most ``SCRATCH`` elements, or q = 1."""
    g, q, _ = queries.shape
    size = max(1, (SCRATCH_CUDA if queries.is_cuda else SCRATCH) // (g * width))
    return [slice(start, start + size) for start in range(0, max(q, 1), size)]


def _group_minima(queries: Tensor, rows: Tensor, valid: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Smallest score in each of M groups of rows ``[G, Q, M]``, inf where none is valid, and the groups' rows.

    The groups' rows ``[M, group]`` are equally far apart within a block, so that minima run along contiguous columns;
    numbers from N on are no rows.
    """
    (g, n, _), q = rows.shape, queries.shape[1]
    centre = queries.mean(1, keepdim=True)
    toward = torch.cat([(queries - centre) * -2, queries.new_ones(g, q, 1)], -1)
    size = max((BLOCK_CUDA if rows.is_cuda else BLOCK) // (g * max(q, 1)) // group, WIDTH) * group
    minima = rows.new_empty(g, q, -(-n // group))
    # One for all blocks: fresh pages cost as much as the product.
    memory = rows.new_empty(g * q * min(size, n) if g > 1 else 0)
    members: list[Tensor] = []
    first = 0
    for start in range(0, n, size):
        some = rows[:, start : start + size] - centre
        away = None if valid is None else ~valid[:, start : start + size].unsqueeze(-1)
        if away is not None:
            some.masked_fill_(away, 0.0)
        norms = some.square().sum(-1, keepdim=True)
        if away is not None:
            norms.masked_fill_(away, torch.inf)
        there = torch.cat([some, norms], -1)
        if g == 1:  # the fastest product, which takes its own memory
            scores = linear(toward[0], there[0]).unsqueeze(0)
        else:
            scores = torch.bmm(toward, there.mT, out=memory[: g * q * some.shape[1]].view(g, q, some.shape[1]))
        if short := -scores.shape[2] % group:
            scores = pad(scores, (0, short), value=torch.inf)
        columns = scores.shape[2] // group
        smallest = scores if group == 1 else scores.view(g, q, group, columns).amin(2)
        minima[..., first : first + columns] = smallest
        members.append(torch.arange(start, start + group * columns, device=rows.device).view(group, columns).mT)
        first += columns
    return minima, torch.cat(members)


def _smallest(values: Tensor, k: int) -> Tensor:
    """Where the k smallest of ``[G, Q, M]`` stand, ``[G, Q, k]``, in no order; in two stages again where M is large."""
    g, q, m = values.shape
    columns = m // SECOND_GROUP
    if m < 2 * SECOND_GROUP * k:
        return _least(values, k)
    whole = values[..., : columns * SECOND_GROUP].reshape(g, q, SECOND_GROUP, columns)
    chosen = _smallest(whole.amin(2), k)
    steps = torch.arange(SECOND_GROUP, device=values.device) * columns
    tail = torch.arange(columns * SECOND_GROUP, m, device=values.device).expand(g, q, -1)
    places = torch.cat([(chosen.unsqueeze(-1) + steps).flatten(-2), tail], -1)
    return places.gather(-1, _least(values.gather(-1, places), k))


def _least(values: Tensor, k: int) -> Tensor:
    """Where the k smallest of ``[G, Q, M]`` stand, ``[G, Q, k]``, in no order."""
    if values.is_cuda or k == values.shape[-1]:
        return values.topk(k, largest=False, sorted=False).indices
    # NumPy partitions short rows in half the time.
    return torch.as_tensor(np.argpartition(values.numpy(), k - 1, -1)[..., :k])


def _places(starts: Tensor, lengths: Tensor, count: int, none: int) -> Tensor:
    """The first ``count`` places in each query's lists ``[G, Q, P]``, ``none`` beyond them: ``[G, Q, count]``."""
    before = lengths.cumsum(-1) - lengths
    shift = starts - before
    # Within a list places are consecutive; where one begins they jump by the difference of shifts.
    jump = shift.diff(dim=-1, prepend=torch.zeros_like(shift[..., :1]))
    steps = lengths.new_zeros(*lengths.shape[:2], count + 1).scatter_add_(-1, before.clamp(max=count), jump)
    slots = torch.arange(count, device=lengths.device)
    places = steps[..., :count].cumsum(-1).add_(slots)
    return places.masked_fill_(slots >= lengths.sum(-1, keepdim=True), none)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``[G, *S, D]`` of ``[G, N, D]`` by their numbers ``[G, *S]``."""
    g, n, d = rows.shape
    first = torch.arange(g, device=rows.device).view(g, *[1] * (index.ndim - 1)) * n
    return rows.reshape(g * n, d).index_select(0, (index + first).flatten()).view(*index.shape, d)


def _closest(queries: Tensor, near: Tensor, k: int, missing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared distances of the k ≤ M nearest of each query's candidates ``[G, Q, M, D]``, ascending; their places."""
    at, shape = queries.flatten(0, 1).unsqueeze(1), near.shape[:3]
    # cdist without products sums squared differences in one pass.
    distance = torch.cdist(at, near.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist").view(shape)
    if missing is not None:
        distance.masked_fill_(missing, torch.inf)
    place = _smallest(distance, k)
    found, order = distance.gather(-1, place).sort(-1)
    return found.square_(), place.gather(-1, order)


def _finish(squared: Tensor, index: Tensor, k: int, exclude: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
    """Found rows ``[G, Q, K]``, ascending, as ``nearest`` returns them: without the excluded ones, k of them."""
    if exclude is not None:
        squared = squared.masked_fill(index == exclude[:, part].unsqueeze(-1), torch.inf)
        squared, rank = squared.sort(-1)
        index = index.gather(-1, rank)
    index = index.masked_fill_(squared == torch.inf, 0)
    short = k - index.shape[-1]  # negative where one more was sought
    return (squared, index) if short == 0 else (pad(squared, (0, short), value=torch.inf), pad(index, (0, short)))


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The answers of all blocks of queries."""
    squared, index = zip(*parts, strict=True)
    return torch.cat(squared, 1), torch.cat(index, 1)
