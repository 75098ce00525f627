"""What ended well and what ended badly: which episodes count as which, and two bounded stores of their steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor, nn

from marl_memory.keys import Entry
from marl_memory.memory.operator import check_positive
from marl_memory.memory.trajectories import Finished

LOWEST = torch.finfo(torch.float64).min
"""No score is below it."""

CELL = 0.01
"""End states whose features round to the same multiples of it are one."""


class Outcomes(nn.Module):
    r"""Tells successes from failures.

    A success: the task says so, where it can tell; else the return is $\ge$ the upper quantile of the last W episodes',
    its own with them, **and** > the lower one (so there is none while the two are equal).  A failure: no success, and
    the return $\le$ the lower quantile, however the episode ended.

    Args:
        window: W.
        upper, lower: the quantiles' levels.

    Raises:
        ValueError: for a level out of range, or levels that are crossed.
    """

    def __init__(self, *, window: int, upper: float, lower: float) -> None:
        super().__init__()
        check_positive(window=window)
        if not 0 <= lower < upper <= 1:
            raise ValueError(f"lower={lower!r} and upper={upper!r} must be quantiles with 0 ≤ lower < upper ≤ 1")
        self.window = window
        self.levels: Tensor
        self.register_buffer("levels", torch.tensor([lower, upper], dtype=torch.float64), persistent=False)
        self.register_buffer("recent", torch.zeros(window, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    recent: Tensor
    """``[W]``: the returns of the last episodes, the newest behind."""
    seen: Tensor
    """``[3]``: episodes, successes and failures since the beginning."""

    def clear(self) -> None:
        """Forget all episodes."""
        self.recent.zero_()
        self.seen.zero_()

    @torch.no_grad()
    def judge(self, episodes: Finished) -> tuple[Tensor, Tensor]:
        """Which of ``episodes`` succeeded and which failed, ``[E]`` bool each; they are taken in."""
        returns = episodes.returns
        known = torch.arange(self.window, 0, -1, device=returns.device) <= self.seen[0]
        line = torch.cat([torch.where(known, self.recent, torch.nan), returns])
        lower, upper = line.unfold(0, self.window, 1)[1:].nanquantile(self.levels, dim=-1)
        success = episodes.success
        if success is None:
            success = (returns >= upper) & (returns > lower)
        failure = ~success & (returns <= lower)
        self.recent.copy_(line[-self.window :].nan_to_num(0.0))
        self.seen += torch.stack([torch.ones_like(success), success, failure]).sum(1)
        return success, failure


class Taken(NamedTuple):
    """E episodes that are offered to a store, and their M steps.

    Args:
        score: ``[E]`` float64: the higher ones stay.
        length: ``[E]``: of equal scores the shorter stay.
        ends: ``[E]`` int64: equal where episodes end alike.
        rows: ``[M]``: their steps.
        episode: ``[M]`` in 0 … E − 1: which episode a step is of.
        weight: ``[M]``: what a step counts.
    """

    score: Tensor
    length: Tensor
    ends: Tensor
    rows: TensorDictBase
    episode: Tensor
    weight: Tensor


class OutcomeStore(nn.Module):
    """The best episodes by a score, step by step, in a fixed room.

    Of all that was offered since, and of what it held, those stay that come first: by score, then by length, then by
    age; of each kind of end at most ``alike``; and as many as fit, in episodes and in steps, without leaving one out:
    what is below the best that there was no room for does not come in, though it may be short enough.

    Args:
        entries: of a step.
        episodes: the most episodes.
        steps: the most steps of all of them.
        alike: the most episodes with the same end; None: any number.
    """

    def __init__(self, entries: dict[str, Entry], *, episodes: int, steps: int, alike: int | None) -> None:
        super().__init__()
        self.entries, self.episodes, self.steps = list(entries), episodes, steps
        self.alike = episodes if alike is None else alike
        for name, entry in entries.items():
            self.register_buffer(name, entry.zeros((steps,), torch.float32))
        self.register_buffer("weight", torch.zeros(steps))
        self.register_buffer("owner", torch.full((steps,), -1))
        self.register_buffer("held", torch.zeros(episodes, dtype=torch.bool))
        self.register_buffer("score", torch.zeros(episodes, dtype=torch.float64))
        for name in ("length", "count", "ends", "age"):
            self.register_buffer(name, torch.zeros(episodes, dtype=torch.int64))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bar", torch.tensor(LOWEST, dtype=torch.float64))

    weight: Tensor
    """``[steps]``."""
    owner: Tensor
    """``[steps]``: the place of the episode that a step is of; −1: there is no step."""
    held: Tensor
    """``[episodes]``: there is one."""
    score: Tensor
    length: Tensor
    count: Tensor
    """``[episodes]``: its steps in the store."""
    ends: Tensor
    age: Tensor
    """``[episodes]``: the how-manieth that was offered."""
    offered: Tensor
    bar: Tensor
    """``[]``: the highest score that there was no room for."""

    def clear(self) -> None:
        """Forget everything."""
        self.held.zero_()
        self.count.zero_()
        self.owner.fill_(-1)
        self.bar.fill_(LOWEST)

    def __len__(self) -> int:
        """Steps."""
        return int(self.count.sum())

    @torch.no_grad()
    def offer(self, taken: Taken) -> None:
        """Keep what belongs to the best, and let go what no longer does."""
        places, new = self.held.nonzero().squeeze(1), len(taken.score)
        count = torch.bincount(taken.episode, minlength=new)
        age = self.offered + torch.arange(new, device=count.device)
        of_new = {"score": taken.score, "length": taken.length, "count": count, "ends": taken.ends, "age": age}
        table = {name: torch.cat([getattr(self, name)[places], x]) for name, x in of_new.items()}
        stays = self._stays(table)
        self.offered += new
        gone = places[~stays[: len(places)]]
        self.held[gone], self.count[gone] = False, 0
        self.owner[torch.isin(self.owner, gone)] = -1
        kept = stays[len(places) :]
        if not bool(kept.any()):
            return
        free = (~self.held).nonzero().squeeze(1)[: int(kept.sum())]
        self.held[free] = True
        for name, x in of_new.items():
            getattr(self, name)[free] = x[kept]
        place = torch.full((new,), -1, device=free.device).masked_scatter_(kept, free)[taken.episode]
        steps = place >= 0
        at = (self.owner < 0).nonzero().squeeze(1)[: int(steps.sum())]
        self.owner[at], self.weight[at] = place[steps], taken.weight[steps].to(self.weight.dtype)
        for name in self.entries:
            getattr(self, name)[at] = taken.rows.get(name)[steps]

    def _stays(self, table: dict[str, Tensor]) -> Tensor:
        """``[M]`` bool, of a table of episodes ``[M]``: see the class.  Raises the bar."""
        order = table["age"].argsort()
        order = order[table["length"][order].argsort(stable=True)]
        order = order[table["score"][order].argsort(stable=True, descending=True)]
        score = table["score"][order]
        counts = (_rank_among_equals(table["ends"][order]) < self.alike) & (score >= self.bar)
        # Behind the first that does not fit nothing does.
        fits = (counts.cumsum(0) <= self.episodes) & ((counts * table["count"][order]).cumsum(0) <= self.steps)
        self.bar.copy_(torch.cat([self.bar.view(1), score[counts & ~fits]]).amax())
        return torch.zeros_like(counts).scatter_(0, order, counts & fits)

    def rows(self, at: Tensor) -> TensorDict:
        """The steps ``[M]`` at places ``at`` ``[M]``, with their ``weight``."""
        return TensorDict({name: getattr(self, name)[at] for name in (*self.entries, "weight")}, batch_size=(len(at),))

    def draw(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Places of steps, all alike likely, in ``shape``; there must be one."""
        there = (self.owner >= 0).nonzero().squeeze(1)
        return there[torch.randint(len(there), shape, generator=generator).to(there.device)]


def _rank_among_equals(x: Tensor) -> Tensor:
    """The how-manieth of its value each of ``x`` ``[M]`` is, from 0."""
    order = x.argsort(stable=True)
    number = torch.arange(len(x), device=x.device)
    first = torch.ones_like(x, dtype=torch.bool)
    first[1:] = x[order][1:] != x[order][:-1]
    begin = torch.where(first, number, 0).cummax(0).values
    return torch.empty_like(number).scatter_(0, order, number - begin)


class Ends(nn.Module):
    """A number for each state in which an episode can end: equal for states that agree within `CELL`, in every feature.

    Args:
        features: S.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        odd = torch.randint(2**62, (features,), generator=Generator().manual_seed(0)) * 2 + 1
        self.factors: Tensor
        self.register_buffer("factors", odd, persistent=False)

    def forward(self, state: Tensor) -> Tensor:
        """``[E, S] → [E]`` int64."""
        cells = state.long() if not state.is_floating_point() else (state / CELL).round().nan_to_num(0, 0, 0).long()
        return (cells * self.factors).sum(-1)


def blame(follow: Tensor, length: Tensor, terminated: Tensor, *, decay: float) -> Tensor:
    r"""What the steps of failures count: $\gamma_f^{T-t}$ where the task ended the episode, else $1/T$.

    Args:
        follow: ``[M]``, T − t: how many steps of the episode follow.
        length: ``[M]``, T.
        terminated: ``[M]`` bool.
        decay: $\gamma_f$.

    Returns:
        ``[M]``.
    """
    return torch.where(terminated, decay ** follow.double(), 1.0 / length.double())
