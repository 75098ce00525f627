"""Twin back-propagation and its relatives: the scan against the definition, and what the definition promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from marl_memory.functional.returns import (
    discounted_returns,
    lambda_returns,
    max_backpropagation,
    n_step_returns,
    twin_backpropagation,
)

torch.set_num_threads(1)

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Reward, bootstrap, discount, cut."""


def rollouts(rows: Rows, t: int, gamma: float, most: int | None) -> list[list[float]]:
    """``V[i][h - 1]`` of row t of one trajectory, straight from the definition."""
    reward, bootstrap, discount, cut = (x.tolist() for x in rows)
    found = []
    for i in range(len(bootstrap[0])):
        values = []
        for h in range(1, len(reward) - t + 1 if most is None else min(most, len(reward) - t) + 1):
            last = t + h - 1
            if any(cut[s] or discount[s] == 0 for s in range(t, last)):
                break
            value = 0.0 if discount[last] == 0 else bootstrap[last][i]
            for s in range(last, t - 1, -1):
                value = reward[s] + gamma * value
            values.append(value)
        found.append(values)
    return found


def by_definition(rows: Rows, gamma: float, most: int | None = None, *, twin: bool) -> Tensor:
    """R ``[T, C]`` of one trajectory, in O(T²) and more."""
    result = []
    for t in range(len(rows[0])):
        values = rollouts(rows, t, gamma, most)
        best = [max(range(len(v)), key=v.__getitem__) for v in values]  # of equal ones the first
        result.append([values[1 - i if twin else i][best[i]] for i in range(len(values))])
    return torch.tensor(result, dtype=torch.float64)


@st.composite
def trajectories(draw: Any) -> Rows:
    """Quarters, so that with γ a power of ½ all sums are exact, and equal values are met often."""
    steps = draw(st.integers(1, 12))

    def quarters() -> st.SearchStrategy[float]:
        return st.integers(-8, 8).map(lambda x: x / 4)

    reward = draw(st.lists(quarters(), min_size=steps, max_size=steps))
    twins = draw(st.lists(st.tuples(quarters(), quarters()), min_size=steps, max_size=steps))
    ends = draw(
        st.lists(st.sampled_from(["on", "on", "on", "terminated", "truncated"]), min_size=steps, max_size=steps)
    )
    discount = [0.0 if end == "terminated" else 1.0 for end in ends]
    return (
        torch.tensor(reward, dtype=torch.float64),
        torch.tensor(twins, dtype=torch.float64),
        torch.tensor(discount, dtype=torch.float64),
        torch.tensor([end != "on" for end in ends]),
    )


@settings(deadline=None, max_examples=400)
@given(
    rows=trajectories(),
    gamma=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    most=st.one_of(st.none(), st.integers(1, 6)),
)
def test_the_scan_is_the_definition_ties_and_all(rows: Rows, gamma: float, most: int | None) -> None:
    for function, twin in ((twin_backpropagation, True), (max_backpropagation, False)):
        found = function(*rows, gamma=gamma, max_rollout=most)
        assert torch.equal(found, by_definition(rows, gamma, most, twin=twin))


@settings(deadline=None, max_examples=100)
@given(rows=trajectories(), gamma=st.sampled_from([0.25, 0.5, 1.0]))
def test_lambda_and_n_step_returns_are_their_definitions(rows: Rows, gamma: float) -> None:
    found = lambda_returns(*rows, gamma=gamma, lam=0.5)
    for t in range(len(rows[0])):
        for i, values in enumerate(rollouts(rows, t, gamma, None)):
            weights = [0.5**h / 2 for h in range(len(values) - 1)] + [0.5 ** (len(values) - 1)]
            assert found[t, i].item() == sum(w * v for w, v in zip(weights, values, strict=True))
            for n in (1, 2, 5):
                expected = values[min(n, len(values)) - 1]
                assert n_step_returns(*rows, gamma=gamma, n=n)[t, i].item() == expected
    one, every = (lambda_returns(*rows, gamma=gamma, lam=lam) for lam in (0.0, 1.0))
    assert torch.equal(one, n_step_returns(*rows, gamma=gamma, n=1))
    assert torch.equal(every, n_step_returns(*rows, gamma=gamma, n=len(rows[0])))


@settings(deadline=None, max_examples=100)
@given(rows=trajectories(), split=st.integers(0, 11))
def test_a_suffix_of_the_rows_has_the_returns_of_the_whole(rows: Rows, split: int) -> None:
    """So a ring that overwrites the oldest steps stays exact."""
    split = min(split, len(rows[0]) - 1)
    suffix = tuple(x[split:] for x in rows)
    for function in (twin_backpropagation, max_backpropagation):
        assert torch.equal(function(*suffix, gamma=0.5), function(*rows, gamma=0.5)[split:])


def test_trajectories_and_agents_are_columns() -> None:
    g = Generator().manual_seed(0)
    reward, discount = torch.randn(20, 3, 2, generator=g), (torch.rand(20, 3, 2, generator=g) < 0.9).float()
    bootstrap, cut = torch.randn(20, 3, 2, 2, generator=g), torch.rand(20, 3, 2, generator=g) < 0.1
    inputs = [reward, bootstrap, discount, cut]
    copies = [x.clone() for x in inputs]
    for most in (None, 4):
        found = twin_backpropagation(*inputs, gamma=0.9, max_rollout=most)  # type: ignore[arg-type]
        for n in range(3):
            for a in range(2):
                alone = twin_backpropagation(*(x[:, n, a] for x in inputs), gamma=0.9, max_rollout=most)  # type: ignore[arg-type]
                assert torch.equal(found[:, n, a], alone)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def one_trajectory(steps: int, columns: int = 1, *, terminated: bool = True) -> Rows:
    """Rewards 0, twins 0, which ends at its last row."""
    discount, cut = torch.ones(steps, columns), torch.zeros(steps, columns, dtype=torch.bool)
    discount[-1], cut[-1] = 0.0 if terminated else 1.0, True
    return torch.zeros(steps, columns), torch.zeros(steps, columns, 2), discount, cut


def test_without_bootstraps_it_is_the_monte_carlo_return() -> None:
    reward, twins, discount, cut = one_trajectory(30)
    reward = torch.randn(30, 1, generator=Generator().manual_seed(1))
    found = twin_backpropagation(reward, twins.fill_(-torch.inf), discount, cut, gamma=0.9)
    expected = discounted_returns(reward, discount, cut, torch.zeros_like(reward), gamma=0.9)
    torch.testing.assert_close(found, expected.unsqueeze(-1).expand(-1, -1, 2))


def test_where_bootstraps_dominate_it_is_the_other_twins_one_step_target() -> None:
    reward, twins, discount, cut = one_trajectory(30, terminated=False)
    twins = 1e3 * 1.2 ** torch.arange(29, -1, -1.0).view(30, 1, 1) + torch.tensor([1.0, 2.0])
    found = twin_backpropagation(reward, twins, discount, cut, gamma=0.9)
    torch.testing.assert_close(found, 0.9 * twins.flip(-1))


def test_a_termination_reads_no_value_and_a_truncation_does() -> None:
    reward, twins, discount, cut = one_trajectory(3)
    twins[-1] = torch.nan
    found = twin_backpropagation(reward + 1, twins, discount, cut, gamma=0.5)
    assert found[:, 0].tolist() == [[1.75, 1.75], [1.5, 1.5], [1.0, 1.0]]
    twins[-1] = torch.tensor([4.0, 8.0])
    truncated = twin_backpropagation(reward + 1, twins, discount.fill_(1.0), cut, gamma=0.5)
    assert truncated[:, 0].tolist() == [[2.75, 2.25], [3.5, 2.5], [5.0, 3.0]]


def test_a_reward_that_is_not_finite_stays_in_its_episode() -> None:
    reward, twins, discount, cut = one_trajectory(9)
    cut[3], reward[6] = True, torch.nan
    twins.fill_(-100.0)
    for function in (twin_backpropagation, max_backpropagation):
        found = function(reward, twins, discount, cut, gamma=0.9)
        assert found[:4].isfinite().all() and found[7:].isfinite().all() and not found[4:7].isfinite().any()


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rollout=0 must be at least 1, or null"):
        twin_backpropagation(*one_trajectory(3), gamma=0.9, max_rollout=0)


# -------------------------------------------------------------------------------------------------------------- biases


def test_which_estimators_overestimate() -> None:
    """Values are 0, their estimates noise of deviation 1, T = 100: means of the first row's target over draws."""
    draws, gamma = 20_000, 0.99
    reward, _, discount, cut = one_trajectory(100, draws)
    noise = torch.randn(100, draws, 4, generator=Generator().manual_seed(0))
    twins, pairs = noise[..., :2], noise.unflatten(-1, (2, 2)).amin(-1)

    def floored(b: Tensor) -> Tensor:
        """With the one-step target of the critic itself as a floor."""
        found = twin_backpropagation(reward, b, discount, cut, gamma=gamma)
        return torch.maximum(found, n_step_returns(reward, b, discount, cut, gamma=gamma, n=1))

    single = max_backpropagation(reward, twins, discount, cut, gamma=gamma)
    twin = twin_backpropagation(reward, twins, discount, cut, gamma=gamma)
    biases = [float(x[0].mean()) for x in (single, twin, floored(twins), floored(pairs))]
    assert biases == pytest.approx([1.83, 0.0, 0.52, -0.09], abs=0.03)


# ------------------------------------------------------------------------------- tables: what the targets converge to


def chain_table(length: int, sweeps: int, gamma: float) -> list[Tensor]:
    """Q ``[S, 2]`` of both twins after each refresh of a table of one trajectory through a chain whose end pays 1."""
    reward, _, discount, cut = one_trajectory(length)
    reward[-1] = 1.0
    q, found = torch.zeros(length, 1, 2), []
    for _ in range(sweeps):
        after = torch.cat([q[1:], torch.zeros(1, 1, 2)])
        q = twin_backpropagation(reward, after, discount, cut, gamma=gamma)
        found.append(q[:, 0])
    return found


def test_a_deterministic_chain_reaches_its_values_in_one_refresh() -> None:
    """One-step targets would take as many refreshes as the chain is long."""
    gamma, length = 0.9, 40
    values = gamma ** torch.arange(length - 1, -1, -1.0)
    first, *_, last = chain_table(length, 5, gamma)
    torch.testing.assert_close(first, values.unsqueeze(-1).expand(-1, 2))
    torch.testing.assert_close(last, first)


def two_ways(mu: float, gamma: float, seed: int, sweeps: int = 300) -> tuple[float, float]:
    """The largest error of a tabular critic on a near-deterministic task, and the bound 2μ/(1 − γ).

    States 0 … 11 in a ring, two actions: one step on, or two; r(s, a) in [0, 1 − μ].  A transition goes where it should
    and, once for all trajectories that pass there, its reward is up to μ too high: what a stored trajectory happened to
    see exceeds the expected Q by at most μ at every step.
    """
    g, states = Generator().manual_seed(seed), 12
    mean = torch.rand(states, 2, generator=g, dtype=torch.float64) * (1 - mu)
    follows = (torch.arange(states).unsqueeze(1) + torch.tensor([1, 2])) % states  # [S, 2]
    best = torch.zeros(states, 2, dtype=torch.float64)
    for _ in range(4000):
        best = mean + gamma * best.amax(1)[follows]
    steps, tracks = 60, 40
    state = torch.randint(states, (tracks,), generator=g)
    visited, actions, rewards = [], [], []
    for _ in range(steps):
        action = torch.randint(2, (tracks,), generator=g)
        noise = mu * (2 * torch.rand(tracks, generator=g, dtype=torch.float64) - 1)
        visited.append(state), actions.append(action), rewards.append(mean[state, action] + noise)
        state = follows[state, action]
    s, a, r = torch.stack(visited), torch.stack(actions), torch.stack(rewards)
    at = (s * 2 + a).flatten()
    assert len(at.unique()) == states * 2, "every pair is in the table"
    discount, cut = torch.ones_like(r), torch.zeros_like(r, dtype=torch.bool)
    cut[-1] = True
    q = torch.zeros(states * 2, 2, dtype=torch.float64)
    count = torch.zeros(states * 2, dtype=torch.float64).index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
    for _ in range(sweeps):
        greedy = q.view(states, 2, 2).amax(1)  # [S, twins]
        target = twin_backpropagation(r, greedy[follows[s, a]], discount, cut, gamma=gamma)
        q = torch.zeros_like(q).index_add_(0, at, target.flatten(0, 1)) / count.unsqueeze(-1)
    return float((q - best.view(-1, 1)).abs().max()), 2 * mu / (1 - gamma)


@pytest.mark.parametrize("mu", [0.02, 0.1, 0.3])
def test_the_error_on_a_near_deterministic_task_stays_within_its_bound(mu: float) -> None:
    for seed in range(3):
        error, bound = two_ways(mu, 0.9, seed)
        assert error <= bound
        assert error > bound / 100, "the task is so easy that the bound says nothing"


def test_without_noise_the_table_of_that_task_reaches_its_values() -> None:
    error, _ = two_ways(0.0, 0.9, 0)
    assert error < 1e-6


# ---------------------------------------------------------------------------------------------------- the loss's level


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_loss_is_minimal_at_the_expectile(alpha: float) -> None:
    """Of (δ)₊² + α (−δ)₊² with δ = q − R: where α/(1 + α) of the deviations' weight lies below."""
    targets = torch.randn(4000, generator=Generator().manual_seed(0), dtype=torch.float64).exp()
    q = targets.mean().clone().requires_grad_()
    for _ in range(400):
        delta = q - targets
        loss = torch.where(delta < 0, alpha, 1.0).mul(delta.square()).mean()
        (gradient,) = torch.autograd.grad(loss, q)
        q = (q - 0.4 * gradient).detach().requires_grad_()
    q = q.detach()
    above, below = (targets - q).clamp(min=0).mean(), (q - targets).clamp(min=0).mean()
    level = float(below / (above + below))
    assert math.isclose(level, alpha / (1 + alpha), abs_tol=1e-6)
    assert alpha < 1 or math.isclose(float(q), float(targets.mean()), rel_tol=1e-9)


@pytest.mark.parametrize("most", [None, 5])
def test_a_reward_that_is_no_number_reaches_all_earlier_rows_of_its_episode(most: int | None) -> None:
    reward, cut = torch.zeros(6), torch.tensor([False, True, False, False, False, True])
    reward[4] = torch.nan
    for function in (twin_backpropagation, max_backpropagation):
        found = function(reward, torch.ones(6, 2), torch.ones(6), cut, gamma=0.9, max_rollout=most)
        assert found.isfinite().all(-1).tolist() == [True, True, False, False, False, True]
