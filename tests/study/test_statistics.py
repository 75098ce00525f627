"""Statistics of studies: hand-worked numbers, properties, and rliable's numbers for the same scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from marl_memory.study import statistics
from marl_memory.study.statistics import (
    Estimate,
    area_under_curve,
    difference_estimate,
    improvement,
    improvement_estimate,
    interval,
    iqm,
    iqm_band,
    iqm_estimate,
    normalise,
    pooled_iqm,
    profile_band,
    share_above,
)

NUMBERS = st.integers(-50, 50).map(float)  # ties are wanted
SCORES = arrays(np.float64, st.integers(1, 9), elements=NUMBERS)


def scores(runs: int, tasks: int, seed: int, shift: float = 0.0) -> np.ndarray[Any, Any]:
    """``[runs, tasks]``, as rliable has them; tasks differ in height and spread."""
    rng = np.random.default_rng(seed)
    return shift + np.arange(tasks) + rng.normal(size=(runs, tasks)) * (1 + 0.5 * np.arange(tasks))


def sample(table: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return list(table.T)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # nothing to leave out
        ([100.0, 1.0, 3.0, -5.0], 2.0),
        ([0.0, 1.0, 2.0, 3.0, 100.0], 2.0),
        ([8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0], 4.5),
    ],
)
def test_the_interquartile_mean_of_a_few_numbers(values: list[float], expected: float) -> None:
    assert iqm(np.array(values)) == expected


@given(st.data())
def test_the_interquartile_mean_does_not_depend_on_the_order(data: st.DataObject) -> None:
    values = data.draw(SCORES)
    assert iqm(np.array(data.draw(st.permutations(list(values))))) == iqm(values)
    assert values.min() <= iqm(values) <= values.max()
    np.testing.assert_allclose(iqm(2 * values + 3), 2 * iqm(values) + 3)


def test_tasks_are_pooled() -> None:
    assert pooled_iqm(np.array([0.0, 10.0]), np.array([4.0, 6.0])) == 5.0
    table = scores(7, 3, seed=0)
    assert pooled_iqm(*sample(table)) == pytest.approx(stats.trim_mean(table.ravel(), 0.25))


def test_the_probability_of_improvement_by_hand() -> None:
    # 3 beats 1 and 2, ties with 3; 2 beats 1, ties with 2, loses to 3
    assert improvement([np.array([3.0, 2.0])], [np.array([1.0, 2.0, 3.0])]) == pytest.approx((2.5 + 1.5) / 6)
    both = improvement([np.array([1.0]), np.array([0.0])], [np.array([0.0]), np.array([0.0])])
    assert both == pytest.approx((1 + 0.5) / 2)  # a mean over tasks


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=3))
def test_one_of_two_improves_on_the_other(tasks: list[Any]) -> None:
    x, y = [a for a, _ in tasks], [b for _, b in tasks]
    assert improvement(x, y) + improvement(y, x) == pytest.approx(1.0)
    assert improvement(x, x) == pytest.approx(0.5)
    found = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in tasks]
    assert improvement(x, y) == pytest.approx(np.mean(found))


@given(SCORES)
def test_a_performance_profile_falls_from_one_to_zero(values: Any) -> None:
    where = np.linspace(-51, 50, 40)
    found = share_above(values, where)
    assert found[0] == 1.0 and found[-1] == 0.0
    assert (np.diff(found) <= 0).all()
    assert share_above(np.array([1.0, 2.0, 2.0, 4.0]), np.array([2.0]))[0] == 0.25


def test_the_area_under_a_curve_by_hand() -> None:
    assert area_under_curve(np.array([0.0, 10.0, 20.0]), np.array([0.0, 4.0, 4.0])) == 3.0
    assert area_under_curve(np.array([5.0]), np.array([2.0])) == 2.0


@given(NUMBERS, st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.floats(0.5, 4.0, allow_nan=False), st.data())
def test_the_area_is_the_height_of_a_constant_in_any_unit(
    height: float, steps: list[int], scale: float, data: st.DataObject
) -> None:
    frames = np.cumsum(steps).astype(np.float64)
    assert area_under_curve(frames, np.full(len(frames), height)) == pytest.approx(height)
    values = np.array(data.draw(st.lists(NUMBERS, min_size=len(frames), max_size=len(frames))))
    assert area_under_curve(scale * frames, values) == pytest.approx(area_under_curve(frames, values))


def test_scores_are_put_on_a_common_scale() -> None:
    np.testing.assert_allclose(normalise(np.array([-4.0, 0.0, 4.0]), -4.0, 4.0), [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(normalise(np.array([3.0, 3.0]), 3.0, 3.0), [0.0, 0.0])


def test_an_interval_takes_three_runs_on_each_task() -> None:
    assert iqm_estimate([np.arange(2.0)]) == Estimate(0.5)
    assert iqm_estimate([np.arange(5.0), np.arange(2.0)]).interval is None
    assert iqm_estimate([np.arange(3.0)]).interval is not None
    assert difference_estimate([np.ones(1)], [np.zeros(1)]) == Estimate(1.0)
    assert improvement_estimate([np.ones(3)], [np.zeros(2)]) == Estimate(1.0)
    assert iqm_band(np.ones((4, 2)))[1] is None
    assert profile_band([np.ones(2)], np.array([0.0]))[1] is None


def test_the_same_scores_give_the_same_interval() -> None:
    table = sample(scores(5, 2, seed=1))
    first = iqm_estimate(table)
    np.random.default_rng().random(7)
    iqm_estimate(sample(scores(5, 2, seed=2)))
    assert iqm_estimate(table) == first


def test_strata_are_drawn_by_themselves() -> None:
    # Whatever is drawn, half of the runs are those of the task that always scores 0: only pooling could change that.
    ends = interval(lambda a, b, axis: a.mean(axis) + b.mean(axis), [np.zeros(5), np.full(5, 8.0)])
    assert ends == (8.0, 8.0)


def test_a_difference_is_paired() -> None:
    x = sample(scores(6, 2, seed=3))
    assert difference_estimate(x, x) == Estimate(0.0, 0.0, 0.0)
    shifted = difference_estimate([a + 2 for a in x], x)
    assert shifted.interval == pytest.approx((2.0, 2.0)) and shifted.value == pytest.approx(2.0)
    # Unpaired, the same runs leave room for an interval.
    swapped = difference_estimate([a[::-1] + 2 for a in x], x)
    assert swapped.value == pytest.approx(2.0)
    assert swapped.interval is not None and swapped.interval[1] - swapped.interval[0] > 0.5


def test_an_estimate_in_the_other_direction() -> None:
    assert Estimate(0.25, 0.0, 0.5).mirrored(1.0) == Estimate(0.75, 0.5, 1.0)
    assert Estimate(2.0).mirrored(0.0) == Estimate(-2.0)
    assert Estimate(2.0, 1.0, 3.0).excludes(0.0) and not Estimate(2.0, 0.0, 3.0).excludes(0.0)
    assert not Estimate(2.0).excludes(0.0)


@settings(max_examples=20, deadline=None)
@given(st.lists(arrays(np.float64, st.integers(3, 6), elements=NUMBERS), min_size=1, max_size=2))
def test_intervals_hold_their_estimate_and_stay_among_the_scores(table: list[Any]) -> None:
    found = iqm_estimate(table)
    pooled = np.concatenate(table)
    assert found.interval is not None
    assert pooled.min() <= found.interval[0] <= found.interval[1] <= pooled.max()
    chance = improvement_estimate(table, table[::-1])
    assert chance.interval is not None and 0 <= chance.interval[0] <= chance.interval[1] <= 1


def test_a_band_draws_whole_curves() -> None:
    seeds = np.array([0.0, 1.0, 5.0, 6.0])
    middle, band = iqm_band(seeds + np.arange(3.0)[:, None])
    np.testing.assert_allclose(middle, [3.0, 4.0, 5.0])
    assert band is not None
    np.testing.assert_allclose(np.diff(band[0]), 1.0)
    np.testing.assert_allclose(np.diff(band[1]), 1.0)


def test_batches_do_not_change_what_is_drawn_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [np.arange(6.0) ** 2]
    whole = iqm_estimate(table)
    monkeypatch.setattr(statistics, "_AT_ONCE", 6 * 1000)
    assert iqm_estimate(table) == whole


# rliable, which breaks with pandas 3, is what papers use; its bootstrap draws from NumPy's global generator.


def rliable_interval(table: Any, function: Any, reps: int) -> tuple[float, float]:
    from rliable.library import get_interval_estimates

    np.random.seed(0)  # noqa: NPY002
    found = get_interval_estimates({"x": table}, function, reps=reps)[1]["x"]
    return float(found[0, 0]), float(found[1, 0])


def test_the_interquartile_mean_and_its_interval_are_those_of_rliable() -> None:
    from rliable.metrics import aggregate_iqm

    table = scores(10, 3, seed=4)
    found = iqm_estimate(sample(table))
    assert found.value == pytest.approx(aggregate_iqm(table))
    theirs = rliable_interval(table, lambda x: np.array([aggregate_iqm(x)]), reps=4000)
    assert found.interval is not None
    assert found.interval == pytest.approx(theirs, abs=0.06 * (theirs[1] - theirs[0]))


def test_the_probability_of_improvement_and_its_interval_are_those_of_rliable() -> None:
    from rliable.metrics import probability_of_improvement

    x, y = scores(8, 2, seed=5, shift=0.5), scores(8, 2, seed=6)
    found = improvement_estimate(sample(x), sample(y))
    assert found.value == pytest.approx(probability_of_improvement(x, y))
    theirs = rliable_interval([x, y], lambda a, b: np.array([probability_of_improvement(a, b)]), reps=1500)
    assert found.interval is not None
    assert found.interval == pytest.approx(theirs, abs=0.08 * (theirs[1] - theirs[0]))


def test_the_performance_profile_and_its_band_are_those_of_rliable() -> None:
    from rliable.library import create_performance_profile

    np.random.seed(0)  # noqa: NPY002
    table, where = scores(10, 2, seed=7), np.linspace(-3, 5, 9)
    share, band = profile_band(sample(table), where)
    theirs, ends = create_performance_profile({"x": table}, where, reps=2000)
    np.testing.assert_allclose(share, theirs["x"])
    np.testing.assert_allclose(np.stack(band or ()), ends["x"], atol=0.06)  # a run more or less is 0.05
