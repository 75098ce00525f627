"""Reflection where the right answer is known: at the cliff, and in four rooms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.tabular import DOWN, RIGHT, advantages, four_rooms, inclusion, reflected, walked
from marl_memory_envs.toy.cliff_walking import CliffWalking
from marl_memory_envs.toy.tabular import CLIFF
from tests.envs.solve import optimal_values


def test_stepping_off_the_cliff_is_not_trusted_and_its_safe_neighbour_is() -> None:
    """Where the last step alone is blamed; the longer ago a step is that is, the more of those on the safe way are."""
    operator, rules = walked(0.1)
    assert operator.successes.held.sum() >= 8 and operator.failures.held.sum() >= 8
    found, kinds = reflected(operator, rules), rules.grid.kinds
    below = rules.tables.successors[:, DOWN, 0]
    edge = (kinds[below] == CLIFF) & (kinds != CLIFF)
    edge &= np.arange(len(edge)) != rules.tables.starts[0]
    assert edge.sum() == 10
    assert found.confidence[edge, DOWN].max() < 0.05  # off the cliff
    safe = found.confidence[edge, RIGHT]  # its safe neighbour
    assert safe.min() > 0.7 and safe.mean() > 0.85
    assert (found.mode[edge] == RIGHT).all()


def test_advantages_of_a_policy_are_exact() -> None:
    """Of the best policy none is positive and its own are 0; of any policy their mean under it is 0."""
    tables = CliffWalking(cliff="terminate", slip=0.1).tables
    best = optimal_values(tables, 0.9)
    going_on = ~tables.terminal
    policy = np.eye(4)[best.argmax(1)]
    found = advantages(tables, policy, 0.9)
    np.testing.assert_allclose(found[going_on], (best - best.max(1, keepdims=True))[going_on], atol=1e-6)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), len(tables.terminal))
    found = advantages(tables, policy, 0.9)
    np.testing.assert_allclose((policy * found).sum(1), 0.0, atol=1e-9)


def test_inclusion_is_counted_over_the_states_that_memory_acts_in() -> None:
    operator, rules = walked(0.1)
    found, tables = reflected(operator, rules), rules.tables
    gain = advantages(tables, np.full((len(tables.terminal), 4), 0.25), 0.99)
    acts, right = inclusion(found, gain, tables.terminal, 0.7)
    going_on = [s for s in range(len(tables.terminal)) if not tables.terminal[s]]
    taken = [s for s in going_on if found.confidence[s, found.mode[s]] > 0.7]
    assert acts == pytest.approx(len(taken) / len(going_on)) and len(taken) > 10
    assert right == pytest.approx(sum(gain[s, found.mode[s]] >= 0 for s in taken) / len(taken)) and right > 0.3
    none, nothing = inclusion(found, gain, tables.terminal, 1.0)
    assert none == 0 and np.isnan(nothing)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_four_rooms_memory_takes_over_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [row for row in four_rooms(tmp_path, 3) if row["host"] > 0]  # some never find the goal, and memory nothing
    assert len(rows) >= 2
    for row in rows:
        assert row["share_late"] > row["share_early"] + 0.1
        assert row["with_memory_end"] >= row["host_end"] and row["reflection"] >= row["host"] - 0.02
        assert row["states_acted_in"] > 0 and row["of_these_no_worse"] > 0.5
