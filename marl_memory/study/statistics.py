r"""What is said of many runs, and how sure it is: aggregates that single lucky seeds do not move, with intervals.

A *sample* is one array of scores for each task, $x_t$ of shape ``[N_t]``, one score a run; the numbers of runs may
differ between tasks.  Tasks are the strata of every bootstrap: runs are drawn anew, with replacement, within a task.
Draws come from a fixed seed, so the same scores give the same interval, whatever else is computed.

References:
    Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*, NeurIPS 2021 (rliable):
    interquartile mean, stratified bootstrap, probability of improvement, performance profile.
    Gorsane et al., *Towards a Standardised Performance Evaluation Protocol for Cooperative MARL*, NeurIPS 2022:
    absolute metric, normalisation by the extremes of each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import integrate, stats

Array = np.ndarray[Any, np.dtype[Any]]
Sample = Sequence[Array]

CONFIDENCE = 0.95
"""Of every interval."""

LEAST_RUNS = 3
"""A task with fewer gives no interval: two runs drawn with replacement are equal half of the time."""

RESAMPLES = 10_000
"""Of an interval of one number."""

BAND_RESAMPLES = 2_000
"""Of a band."""

_AT_ONCE = 4_000_000
"""Numbers that one batch of resamples may take."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Args:
        value: the estimate.
        low, high: ends of its 95 % interval; None where there are too few runs for one.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def excludes(self, value: float) -> bool:
        """Whether there is an interval, and ``value`` lies outside."""
        return self.interval is not None and not self.interval[0] <= value <= self.interval[1]

    def mirrored(self, total: float) -> Estimate:
        """``total`` minus this: of the other direction."""
        ends = None if self.interval is None else (total - self.interval[1], total - self.interval[0])
        return Estimate(total - self.value, *(ends or ()))


def iqm(scores: Array, *, axis: int = -1) -> Any:
    r"""Interquartile mean: of what is left of N scores without the ⌊N/4⌋ least and the ⌊N/4⌋ greatest.

    The order of the scores does not change a bit of it.

    Args:
        scores: ``[…, N]`` along ``axis``.
        axis: of the runs.
    """
    return stats.trim_mean(np.sort(scores, axis=axis), 0.25, axis=axis)


def pooled_iqm(*sample: Array, axis: int = -1) -> Any:
    """The `iqm` of the runs of all tasks together, ``[…, N_t]`` each."""
    return iqm(np.concatenate(sample, axis=axis), axis=axis)


def improvement(x: Sample, y: Sample) -> Any:
    r"""Probability that a run of X scores higher than one of Y, on a task drawn at random:

    $$P(X>Y) = \frac1T \sum_t \frac{U_t}{N_t M_t},\qquad
      U_t = \sum_{i,j} \mathbb 1[x_{ti}>y_{tj}] + \tfrac12 \mathbb 1[x_{ti}=y_{tj}]$$

    with the Mann–Whitney statistic $U_t$.  $P(X>Y) + P(Y>X) = 1$.

    Args:
        x: ``[…, N_t]`` for each task.
        y: ``[…, M_t]`` for each task.
    """
    return sum((_above(a, b) for a, b in zip(x, y, strict=True)), start=np.zeros(())) / len(x)


def _above(x: Array, y: Array) -> Array:
    a, b = x[..., :, None], y[..., None, :]
    return (a > b).mean((-2, -1)) + 0.5 * (a == b).mean((-2, -1))


def share_above(scores: Array, thresholds: Array) -> Array:
    r"""Performance profile $F(\tau)$: the share of runs with a score greater than $\tau$.

    Args:
        scores: ``[N]``.
        thresholds: ``[P]`` values of τ.
    """
    return (scores > thresholds[:, None]).mean(-1)


def area_under_curve(frames: Array, values: Array) -> float:
    r"""Mean height of a curve: $\frac{1}{f_P-f_1}\int v\,df$ by the trapezoid rule; of one point, its value.

    Args:
        frames: ``[P]``, increasing.
        values: ``[P]``.
    """
    spanned = frames[-1] - frames[0]
    return float(integrate.trapezoid(values, frames) / spanned) if spanned > 0 else float(values[-1])


def normalise(scores: Array, least: float, greatest: float) -> Array:
    """Scores on a scale from 0 at ``least`` to 1 at ``greatest``; 0 where these are equal."""
    scores = np.asarray(scores, dtype=np.float64)
    return (scores - least) / (greatest - least) if greatest > least else np.zeros_like(scores)


def interval(
    statistic: Callable[..., Any], sample: Sample, *, resamples: int = RESAMPLES, numbers: int = 0
) -> tuple[Any, Any] | None:
    """Percentile interval of ``statistic`` by stratified bootstrap; None if a task has fewer than `LEAST_RUNS` runs.

    Args:
        statistic: takes the arrays of ``sample``, resampled, ``[…, R, N_t]``, and ``axis=-1``; gives ``[…, R]``.
        sample: ``[…, N_t]`` each, resampled along their last dimension, the same for all others.
        resamples: R.
        numbers: that the statistic computes for each resample, if more than it is given.
    """
    if min(array.shape[-1] for array in sample) < LEAST_RUNS:
        return None
    found = stats.bootstrap(
        sample,
        statistic,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // max(numbers, sum(array.size for array in sample))),
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high


def _estimate(value: Any, ends: tuple[Any, Any] | None) -> Estimate:
    return Estimate(float(value), *(() if ends is None else map(float, ends)))


def iqm_estimate(sample: Sample) -> Estimate:
    """The `pooled_iqm` of ``sample``, with its interval."""
    return _estimate(pooled_iqm(*sample), interval(pooled_iqm, sample))


def difference_estimate(x: Sample, y: Sample) -> Estimate:
    """How far the `pooled_iqm` of X lies above that of Y.

    Runs are paired: i of ``x_t`` and i of ``y_t`` share their seed, and are drawn together.

    Args:
        x, y: ``[N_t]`` for each task, of the same shapes.
    """

    def difference(*rows: Array, axis: int) -> Any:
        drawn = [row.astype(np.intp) for row in rows]
        above = pooled_iqm(*(a[i] for a, i in zip(x, drawn, strict=True)), axis=axis)
        return above - pooled_iqm(*(b[i] for b, i in zip(y, drawn, strict=True)), axis=axis)

    rows = [np.arange(len(scores)) for scores in x]
    return _estimate(difference(*rows, axis=-1), interval(difference, rows))


def improvement_estimate(x: Sample, y: Sample) -> Estimate:
    """The `improvement` of X over Y; runs of both are drawn independently."""

    def statistic(*both: Array, axis: int) -> Any:
        return improvement(both[: len(x)], both[len(x) :])

    pairs = sum(len(a) * len(b) for a, b in zip(x, y, strict=True))
    return _estimate(improvement(x, y), interval(statistic, [*x, *y], numbers=pairs))


def iqm_band(values: Array) -> tuple[Array, tuple[Array, Array] | None]:
    """The `iqm` of N curves at every point ``[P]``, and its pointwise interval, ``[P]`` each.

    Args:
        values: ``[P, N]``; a resample draws whole curves.
    """
    return iqm(values), interval(iqm, [values], resamples=BAND_RESAMPLES)


def profile_band(sample: Sample, thresholds: Array) -> tuple[Array, tuple[Array, Array] | None]:
    """The performance profile of the pooled runs ``[P]``, and its pointwise interval, ``[P]`` each.

    Args:
        sample: ``[N_t]`` for each task.
        thresholds: ``[P]``.
    """

    def share(*above: Array, axis: int) -> Any:
        return np.concatenate(above, axis=axis).mean(axis)

    above = [(scores > thresholds[:, None]).astype(np.float64) for scores in sample]
    return share_above(np.concatenate(list(sample)), thresholds), interval(share, above, resamples=BAND_RESAMPLES)
