"""A bounded store of rows in banks: what an operator remembers, found again by the nearness of keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.neighbours import nearest
from marl_memory.memory.index import SEARCHES, Lists
from marl_memory.memory.policies import Best, Fifo, Merge, Policy, SimHash, score_of

POLICIES = ("merge", "fifo", "simhash")

RESERVOIR = 2048
"""Recent keys, as they were before any merging, from which scales and bandwidths are taken."""

SAMPLE = 256
"""How many rows a median is taken over."""

LEAST_SCALE = 1e-3
"""The least standard deviation that a feature is divided by, in its own units."""

MAKERS = {"merge": Merge, "fifo": Fifo, "best": Best}

LEAST_BANDWIDTH = 1e-6
"""In scaled units: keys that coincide have distance 0, and still need a width."""


class Neighbours(NamedTuple):
    """What lies near R queries in each bank; where fewer than K rows can be found, the rest lie at infinity.

    Args:
        rows: ``[G, R, K]`` int64, numbers of rows in their bank.
        squared: ``[G, R, K]``, squared distances in scaled units, ascending.
    """

    rows: Tensor
    squared: Tensor


class RingStore(nn.Module):
    r"""G banks of N rows: a key, S payloads with a mass each, their second moment, an age, and a number.

    Keys are stored as they come, and compared after division by the standard deviation of the recent keys, one per
    feature.  With the bandwidth h, the median distance to the K-th neighbour, a neighbour i of the query s weighs

    $$
    \kappa_i(s) = e^{-d_i^2 / 2h^2}\, \lambda^{\mathrm{age}_i / T}, \qquad d_i \le 3h, \qquad
    w_i = \kappa_i n_i
    $$

    with n its mass when it was last written: the payloads averaged in it, each halved with every half life that had
    passed by then.  So a row weighs what the rows averaged in it would, each by its own age.  Everything is a buffer of
    a shape fixed here.

    Args:
        banks: G.
        rows: N.
        features: F, of a key.
        projection: D, to which scaled keys are brought by a fixed Gaussian projection before they are compared (images,
            large states); None: they are compared as they are.
        payloads: S, in a row.
        payload_size: P.
        signal_size: of how many of the payload's leading entries the second moment is kept; None: of all.
        newest: how many of the payload's last entries are those of the newest of what a row holds, and no mean.
        policy: ``merge``, ``fifo``, ``simhash`` or ``best`` (see `policies`).
        neighbours: K.
        half_life: environment steps after which a row counts half; None: rows do not age.
        search: ``exact``, or ``lists``: an index for large banks, see `Lists`; scales stay as they are once there
            are lists.
        probes: of ``lists``.
        least_bandwidth: the least h, in scaled units.
        generator: where ``simhash`` draws its projections, and ``lists`` its centroids.

    Raises:
        ValueError: for an unknown policy, or banks smaller than K.
    """

    def __init__(
        self,
        *,
        banks: int,
        rows: int,
        features: int,
        payload_size: int,
        projection: int | None = None,
        signal_size: int | None = None,
        newest: int = 0,
        payloads: int = 1,
        policy: str = "merge",
        neighbours: int = 16,
        half_life: float | None = 50_000.0,
        search: str = "exact",
        probes: int = 16,
        least_bandwidth: float = LEAST_BANDWIDTH,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if policy not in (*POLICIES, "best"):
            raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)} or best")
        if rows < neighbours:
            raise ValueError(
                f"neighbours={neighbours} are more than the {rows} rows that capacity and budget give each bank"
            )
        if search not in SEARCHES:
            raise ValueError(f"search={search!r} must be one of {', '.join(SEARCHES)}")
        if search == "lists" and (generator is None or policy == "simhash"):
            raise ValueError("search='lists' needs a generator, and another policy than 'simhash', which leaves gaps")
        self.banks, self.rows, self.payloads, self.neighbours = banks, rows, payloads, neighbours
        self.decay = 0.0 if half_life is None else math.log(2) / half_life
        self.least_bandwidth = least_bandwidth
        self.signal_size = payload_size if signal_size is None else signal_size
        self.newest = slice(payload_size - newest, payload_size)
        compared = features if projection is None else projection
        self.planes: Tensor | None
        planes = None if projection is None else random_projection(features, projection, generator)
        self.register_buffer("planes", planes)
        self.policy = self._make_policy(policy, compared, generator)
        self.index = None
        if search == "lists" and generator is not None:
            self.index = Lists(banks, rows, compared, probes=probes, generator=generator)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "keys": ((rows, features), torch.float32),
            "values": ((rows, payloads, payload_size + 2), torch.float32),
            "time": ((rows,), torch.int64),
            "numbers": ((rows,), torch.int64),
            "utility": ((rows,), torch.float32),
            "recent": ((RESERVOIR, features), torch.float32),
            "scale": ((features,), torch.float32),
            "centre": ((compared,), torch.float32),
            "bandwidth": ((), torch.float32),
            "merge_radius": ((), torch.float32),
            "held": ((), torch.int64),
            "written": ((), torch.int64),
            "rejected": ((), torch.int64),
            "sampled": ((), torch.int64),
            "measured": ((), torch.int64),
            "offset": ((rows, payloads if newest else 0), torch.float32),
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(banks, *shape, dtype=dtype))
        self.register_buffer("now", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scaled", torch.zeros(banks, rows, compared), persistent=False)
        self.offsets: Tensor
        self.recent_offsets: Tensor
        self.register_buffer("offsets", torch.arange(banks).unsqueeze(1) * rows, persistent=False)
        self.register_buffer("recent_offsets", torch.arange(banks).unsqueeze(1) * RESERVOIR, persistent=False)
        self.clear()
        self.register_load_state_dict_post_hook(lambda module, _: module._rescale())

    keys: Tensor
    """``[G, N, F]``, as they came."""
    values: Tensor
    """``[G, N, S, P + 2]``: payload, square and mass side by side, that a row is one piece of memory."""
    time: Tensor
    """``[G, N]`` environment steps when the row was last written."""
    numbers: Tensor
    """``[G, N]``: which row of the run it is; -1 for several in one, or an unknown one (no query has that number)."""
    utility: Tensor
    """``[G, N]``: log of mass × age decay, up to a constant that is the same for all rows."""
    recent: Tensor
    """``[G, RESERVOIR, F]``, a ring of keys."""
    scale: Tensor
    """``[G, F]``: 1/σ."""
    centre: Tensor
    """``[G, D]``, mean of the recent keys, as they are compared."""
    bandwidth: Tensor
    """``[G]``: h."""
    merge_radius: Tensor
    """``[G]``: ρ."""
    held: Tensor
    """``[G]`` rows in use."""
    written: Tensor
    """``[G]`` rows taken in since the beginning; of `Best` those that were given a place of their own."""
    rejected: Tensor
    """``[G]`` rows refused because they were not finite."""
    sampled: Tensor
    """``[G]`` keys put into ``recent`` since the beginning."""
    measured: Tensor
    """``[G]``: ``sampled`` when scale, h and ρ were measured last."""
    offset: Tensor
    """``[G, N, S]``: squared distance, as keys are compared, from a row's key to that of the newest in it."""
    now: Tensor
    """``[]`` environment steps."""
    scaled: Tensor
    """``[G, N, D]``: keys as they are compared: scaled (and projected)."""

    def _make_policy(self, name: str, features: int, generator: Generator | None) -> Policy:
        if name == "simhash":
            if generator is None:
                raise ValueError("policy='simhash' draws projections: it needs a generator")
            return SimHash(features, self.rows, generator)
        return MAKERS[name]()

    @property
    def payload(self) -> Tensor:
        """``[G, N, S, P]``."""
        return self.values[..., :-2]

    @property
    def square(self) -> Tensor:
        """``[G, N, S]``: mean squared norm of the signals that were averaged into the payload."""
        return self.values[..., -2]

    @property
    def mass(self) -> Tensor:
        """``[G, N, S]``; 0 where there is nothing."""
        return self.values[..., -1]

    @property
    def seen(self) -> Tensor:
        """``[G]`` rows that came since the beginning, whether they were given a place or not."""
        return self.sampled

    def __len__(self) -> int:
        """Rows held, all banks together."""
        return int(self.held.sum())

    @property
    def bytes(self) -> int:
        """Of all buffers; constant."""
        return sum(x.numel() * x.element_size() for x in self.buffers())

    def clear(self) -> None:
        """Forget everything."""
        for name, buffer in self.named_buffers(recurse=False):
            if name not in ("planes", "offsets", "recent_offsets"):
                buffer.zero_()
        self.scale.fill_(1.0)
        self.numbers.fill_(-1)
        self.utility.fill_(-torch.inf)
        self.bandwidth.fill_(self.least_bandwidth)
        if self.index is not None:
            self.index.clear()

    # ---------------------------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def nearest(self, keys: Tensor) -> Neighbours:
        """The K rows nearest to each of ``keys`` ``[G, R, F]``, as they come, finite where they count."""
        return self.nearest_scaled(self.scaled_keys(keys), self.neighbours)

    def nearest_scaled(self, keys: Tensor, k: int) -> Neighbours:
        """The k rows nearest to ``keys`` ``[G, R, F]``, which are scaled already."""
        if self.index is not None and self.index.ready:
            squared, rows = self.index.nearest(keys, self.scaled, k)
        else:
            squared, rows = nearest(keys, self.scaled, k, valid=self._in_use())
        return Neighbours(rows, squared)

    def _in_use(self) -> Tensor | None:
        """``[G, N]`` bool: rows that hold something; None where all do."""
        return None if self.full else self.mass.amax(-1) > 0

    @property
    def full(self) -> bool:
        """Whether every row of every bank holds something."""
        return min(self.held.tolist()) == self.rows

    def measured_at(self, keys: Tensor, rows: Tensor) -> Neighbours:
        """Rows ``[G, R, K]`` in the order of their distances to ``keys`` ``[G, R, F]``; empty ones lie at infinity."""
        squared = (self.take(self.scaled, rows) - self.scaled_keys(keys).unsqueeze(2)).square().sum(-1)
        if not self.full:
            squared = squared.masked_fill_(self.take(self.mass, rows).amax(-1) == 0, torch.inf)
        squared, order = squared.sort(-1)
        return Neighbours(rows.gather(-1, order), squared)

    def weights(self, found: Neighbours, numbers: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        """$w_i$ ``[G, R, K, S]`` of neighbours: similarity × age decay × mass.

        0 beyond 3h, and where the neighbour is the query's own row.

        Args:
            found: what `nearest` gave.
            numbers: ``[G, R]`` int64, the numbers of the queries' own rows; None: they are not in the store.
            mass: ``[G, R, K, S]`` of the neighbours, where it was taken already.
        """
        at, squared = found.rows + self.offsets.unsqueeze(-1), self.in_reach(found)
        near = squared <= 9
        if numbers is not None:
            near &= self.numbers.take(at) != numbers.unsqueeze(-1)
        exponent = torch.add(squared, self.now - self.time.take(at), alpha=2 * self.decay).mul_(-0.5)
        gate = torch.where(near, exponent.exp_(), 0.0)
        return gate.unsqueeze(-1) * (self.take(self.mass, found.rows) if mass is None else mass)

    def in_reach(self, found: Neighbours) -> Tensor:
        """Squared distances ``[G, R, K]`` of neighbours in units of h²."""
        return found.squared / self.bandwidth.square().view(-1, 1, 1)

    def take(self, entry: Tensor, index: Tensor) -> Tensor:
        """Rows ``[G, R, K, …]`` of an entry ``[G, N, …]`` at ``index`` ``[G, R, K]``."""
        flat = (index + self.offsets.unsqueeze(-1)).flatten()
        return entry.flatten(0, 1).index_select(0, flat).view(*index.shape, *entry.shape[2:])

    # ---------------------------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def write(
        self,
        keys: Tensor,
        payload: Tensor,
        live: Tensor,
        numbers: Tensor | None = None,
        found: Neighbours | None = None,
    ) -> None:
        """Take in R rows a bank.  Rows that are not finite are refused and counted.

        Args:
            keys: ``[G, R, F]``.
            payload: ``[G, R, S, P]``.
            live: ``[G, R, S]`` bool, payloads that count; a row without any is not taken in.
            numbers: ``[G, R]`` int64, the numbers of the rows, by which they are known not to be neighbours of their
                own.
            found: what `nearest` gave for these keys since the last write.
        """
        x = torch.cat([payload, self._square_of(payload).unsqueeze(-1)], -1)
        offered = live.any(-1)
        if not math.isfinite(keys.sum() + x.sum()):  # a row is not, or a payload that does not count
            finite = (keys.sum(-1) + torch.where(live, x.sum(-1), 0.0).sum(-1)).isfinite()
            self.rejected += (offered & ~finite).sum(1)
            offered = offered & finite
            live = live & offered.unsqueeze(-1)
            keys, x = (torch.where(live.any(-1, keepdim=True), keys, 0.0), torch.where(live.unsqueeze(-1), x, 0.0))
        self._sample(keys, offered)
        self._measure_when_due()
        slot, fresh, merged = self.policy.place(self, keys, offered, found, lambda: score_of(payload[..., 0], live))
        at = slot + self.offsets
        if numbers is None:
            numbers = torch.full_like(at, -1)
        touched = fresh | merged
        self._take_in(*_chosen(touched, at, fresh, keys, x, live, numbers))
        if isinstance(self.policy, SimHash):
            torch.sum(self.mass.amax(-1) > 0, 1, out=self.held)
        if self.index is not None:
            self.index.note(self.scaled, int(self.held.min()), at, touched)

    def _square_of(self, payload: Tensor) -> Tensor:
        return payload[..., : self.signal_size].square().sum(-1)

    def _take_in(self, at: Tensor, fresh: Tensor, keys: Tensor, x: Tensor, live: Tensor, numbers: Tensor) -> None:
        """Running means: x̄ ← x̄ + Σ (x − x̄)/n, where n counts all that came, each halved with every half life since.

        So a row weighs what the rows averaged in it would, and its payload is their mean with these weights.  What was
        in the place of a ``fresh`` row is forgotten before; ``at`` ``[M]`` counts through all banks.
        """
        every_key, values, own = self.keys.flatten(0, 1), self.values.flatten(0, 1), self.numbers.view(-1)
        means, mass, time = values[..., :-1], values[..., -1], self.time.view(-1)
        faded = torch.exp(-self.decay * (self.now - time.index_select(0, at)))
        mass.index_copy_(0, at, mass.index_select(0, at) * faded.unsqueeze(-1))
        forgotten = at[fresh]
        every_key.index_fill_(0, forgotten, 0.0)
        values.index_fill_(0, forgotten, 0.0)
        own.index_copy_(0, forgotten, numbers[fresh])
        before, faded_mass = means.index_select(0, at), mass.index_select(0, at)
        mass.index_add_(0, at, live.to(mass.dtype))
        after = mass.index_select(0, at)
        n = after.clamp(min=1)
        means.index_add_(0, at, (x - before).mul_((live / n).unsqueeze(-1)))
        of_keys = n.amax(-1, keepdim=True)
        if self.payloads > 1:  # a key comes with every row, a payload with those in which its agent lives
            came = torch.zeros_like(mass[:, :1]).index_add_(0, at, torch.ones_like(of_keys))
            of_keys = torch.maximum(of_keys, faded_mass.amax(-1, keepdim=True) + came.index_select(0, at))
        every_key.index_add_(0, at, (keys - every_key.index_select(0, at)).div_(of_keys))
        own.scatter_reduce_(0, at, torch.where(own.take(at) == numbers, numbers, -1), "amin")
        time.index_fill_(0, at, self.now)
        self.utility.view(-1).index_copy_(0, at, after.amax(-1).log_().add_(self.now, alpha=self.decay))
        scaled = self._projected(every_key.index_select(0, at) * self.scale.index_select(0, at // self.rows))
        self.scaled.flatten(0, 1).index_copy_(0, at, scaled)
        if self.newest.start < self.newest.stop:
            own_keys = self._projected(keys * self.scale.index_select(0, at // self.rows))
            self._renew(at, live, x[..., self.newest], (own_keys - scaled).square().sum(-1))

    def _renew(self, at: Tensor, live: Tensor, newest: Tensor, offset: Tensor) -> None:
        """Keep what came last to the rows ``at`` ``[M]`` of ``newest`` ``[M, S, …]``, and its ``offset`` ``[M, S]``."""
        row, payload = live.nonzero().unbind(1)
        place = at[row] * self.payloads + payload
        latest = torch.full_like(self.offset.view(-1), -1, dtype=row.dtype).scatter_reduce_(0, place, row, "amax")
        row, payload, place = (x[latest[place] == row] for x in (row, payload, place))  # one for each place
        self.values.flatten(0, 2)[place, self.newest] = newest[row, payload]
        self.offset.view(-1)[place] = offset[row]

    # --------------------------------------------------------------------------------------------------------- measures

    def scaled_keys(self, keys: Tensor) -> Tensor:
        """As they are compared."""
        return self._projected(keys * self.scale.unsqueeze(1))

    def _projected(self, keys: Tensor) -> Tensor:
        return keys if self.planes is None else keys @ self.planes

    def _sample(self, keys: Tensor, offered: Tensor) -> None:
        first, length = [x % RESERVOIR for x in self.sampled.tolist()], keys.shape[1]
        if len(set(first)) == 1 and first[0] + length <= RESERVOIR and bool(offered.all()):
            self.recent[:, first[0] : first[0] + length].copy_(keys)
            self.sampled.add_(length)
            return
        number = offered.cumsum(1).add_(self.sampled.unsqueeze(1) - 1)
        self.sampled.add_(offered.sum(1))
        kept = offered if keys.shape[1] <= RESERVOIR else offered & (number >= self.sampled.unsqueeze(1) - RESERVOIR)
        slot = number.remainder_(RESERVOIR).add_(self.recent_offsets)
        slot, keys = _chosen(kept, slot, keys)
        self.recent.flatten(0, 1).index_copy_(0, slot, keys)

    def _measure_when_due(self) -> None:
        """Measure again once a bank has seen half as many rows more, or half of what it holds and samples."""
        most = max(self.rows, 4 * RESERVOIR)
        counts = zip(self.sampled.tolist(), self.measured.tolist(), strict=True)
        if any(sampled - measured >= max(min(measured, most) / 2, 1) for sampled, measured in counts):
            self.measure()

    def measure(self) -> None:
        """Measure the scale of the keys, the bandwidth and the radius within which rows are merged."""
        frozen = self.index is not None and self.index.ready
        frozen |= self.planes is not None and bool((self.sampled >= RESERVOIR).all() & (self.measured > 0).all())
        count = self.sampled.clamp(max=RESERVOIR)
        valid = torch.arange(RESERVOIR, device=count.device) < count.unsqueeze(1)
        n = count.clamp(min=1).view(-1, 1)
        mean = self.recent.sum(1) / n
        spread = torch.where(valid.unsqueeze(-1), self.recent - mean.unsqueeze(1), 0.0)
        std = (spread.square().sum(1) / n).sqrt()
        if not frozen:
            self.scale.copy_(torch.where(count.view(-1, 1) > 1, 1 / std.clamp(min=LEAST_SCALE), 1.0))
        self.centre.copy_(self._projected(mean * self.scale))
        self._rescale()
        self.bandwidth.copy_(self._bandwidth(count, None if bool(valid.all()) else valid))
        self.merge_radius.copy_(self._distances(self.scaled, self.held, self._in_use(), 1)[:, 0])
        self.measured.copy_(self.sampled)

    def _rescale(self) -> None:
        self.scaled.copy_(self.scaled_keys(self.keys))

    def _bandwidth(self, count: Tensor, valid: Tensor | None) -> Tensor:
        r"""Median distance to the K-th neighbour among m recent keys, brought to the n rows that a bank holds.

        In d dimensions distances shrink as $(m/n)^{1/d}$; d is read off how they grow with the number of neighbours.
        The keys are those before merging: with distances of merged rows a store would widen its own radius.
        """
        k = self.neighbours
        distances = self._distances(self.scaled_keys(self.recent), count, valid, k)
        some = -(-k // 4)
        near, far = distances[:, some - 1], distances[:, k - 1]
        if k > 1:
            slope = (far / near.clamp(min=LEAST_BANDWIDTH)).log() / math.log(k / some)
            slope = torch.where(near > 0, slope, 0.0).clamp(0.0, 1.0)
        else:
            slope = torch.zeros_like(far)
        held = torch.minimum(self.sampled, torch.full_like(count, self.rows)).clamp(min=1)
        ratio = count.clamp(min=1) / held
        return (far * ratio**slope).clamp(min=self.least_bandwidth)

    def _distances(self, keys: Tensor, count: Tensor, valid: Tensor | None, k: int) -> Tensor:
        """Medians ``[G, k]`` of the distances to the 1st … k-th other among the first ``count`` ``keys`` ``[G, M, F]``.

        Taken over `SAMPLE` rows spread evenly; where there are too few others, the farthest there is.
        """
        steps = torch.arange(SAMPLE, device=keys.device) * count.unsqueeze(1) // SAMPLE
        queries = keys.gather(1, steps.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
        squared, _ = nearest(queries, keys, k, valid=valid, exclude=steps)
        squared = torch.where(squared.isfinite(), squared, 0.0).cummax(-1).values
        return squared.median(1).values.sqrt()


def _chosen(mask: Tensor, *entries: Tensor) -> list[Tensor]:
    """The rows ``[M, …]`` of entries ``[G, R, …]`` where ``mask`` ``[G, R]`` is true."""
    flat = [entry.flatten(0, 1) for entry in entries]
    if bool(mask.all()):
        return flat
    rows = mask.view(-1).nonzero().squeeze(1)
    return [entry.index_select(0, rows) for entry in flat]


def random_projection(features: int, size: int, generator: Generator | None) -> Tensor:
    """``[F, D]``: keeps distances in expectation.

    Reference: Johnson and Lindenstrauss (1984).
    """
    if generator is None or not 1 <= size:
        raise ValueError(f"projection={size} must be at least 1, and needs a generator")
    return torch.randn(features, size, generator=generator) / math.sqrt(size)
