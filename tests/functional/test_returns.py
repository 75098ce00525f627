"""Advantages and returns against hand-worked numbers, naive oracles and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from marl_memory.functional.returns import discounted_returns, discounted_sum, gae, masked_mean


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gae_by_hand_with_a_truncation_and_a_termination() -> None:
    # Two steps, cut by the time limit; two steps, lost; one step of a third episode.  γ = 0.5, λ = 0.5.
    reward = column(1, 2, 3, 4, 5)
    value = column(10, 20, 30, 40, 50)
    next_value = column(20, 100, 40, 999, 60)  # 100: of the true last state; 999: behind a termination, unused
    discount = column(1, 1, 1, 0, 1)
    cut = torch.tensor([False, True, False, True, False])
    # δ = 1+10−10=1, 2+50−20=32, 3+20−30=−7, 4−40=−36, 5+30−50=−15
    expected = column(1 + 0.25 * 32, 32, -7 + 0.25 * -36, -36, -15)
    torch.testing.assert_close(gae(reward, value, next_value, discount, cut, gamma=0.5, lam=0.5), expected)


def test_gae_leaves_its_inputs_alone_and_keeps_their_type() -> None:
    inputs = [torch.rand(4, 3) for _ in range(4)]
    copies = [x.clone() for x in inputs]
    result = gae(*inputs, torch.zeros(4, 3, dtype=torch.bool), gamma=0.9, lam=0.9)
    assert result.dtype == torch.float32
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def lambda_return(rewards: list[float], values: list[float], ends_with: float, gamma: float, lam: float) -> list[float]:
    """Advantages of one episode as λ-weighted means of its n-step returns, in O(T²) per step.

    ``values`` are V of the states acted in, ``ends_with`` what the state behind the last reward is worth.
    """
    horizon, result = len(rewards), []
    following = [*values[1:], ends_with]
    for t in range(horizon):
        n_step = []
        for n in range(1, horizon - t + 1):
            discounted = sum(gamma**i * rewards[t + i] for i in range(n))
            n_step.append(discounted + gamma**n * following[t + n - 1])
        weights = [(1 - lam) * lam**i for i in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
        result.append(sum(w * g for w, g in zip(weights, n_step, strict=True)) - values[t])
    return result


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    ends=st.lists(st.sampled_from(["goes on", "terminated", "truncated"]), min_size=1, max_size=14),
    gamma=st.sampled_from([0.0, 0.7, 1.0]),
    lam=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_gae_is_the_lambda_return_of_every_episode(seed: int, ends: list[str], gamma: float, lam: float) -> None:
    random = np.random.default_rng(seed)
    steps = len(ends)
    reward, value = random.normal(size=steps), random.normal(size=steps)
    next_value = np.append(value[1:], random.normal())
    expected, start = [], 0
    for t, end in enumerate(ends):
        if end != "goes on":
            next_value[t] = random.normal()  # V of the true last state
        if end != "goes on" or t == steps - 1:
            last = 0.0 if end == "terminated" else next_value[t]
            expected += lambda_return(list(reward[start : t + 1]), list(value[start : t + 1]), last, gamma, lam)
            start = t + 1
    discount = np.array([float(end != "terminated") for end in ends])
    cut = torch.tensor([end != "goes on" for end in ends])
    found = gae(*map(torch.from_numpy, (reward, value, next_value, discount)), cut, gamma=gamma, lam=lam)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_gae_treats_columns_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(6, 2, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    cut = torch.rand(6, 2, 3, generator=generator) < 0.3
    whole = gae(*inputs, cut, gamma=0.9, lam=0.8)
    alone = gae(*(x[:, 1, 2] for x in inputs), cut[:, 1, 2], gamma=0.9, lam=0.8)
    torch.testing.assert_close(whole[:, 1, 2], alone)


@settings(deadline=None, max_examples=60)
@given(
    rewards=st.lists(st.floats(-10, 10), min_size=1, max_size=20),
    data=st.data(),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_discounted_sum_is_a_loop_and_two_batches_are_one(
    rewards: list[float], data: st.DataObject, gamma: float
) -> None:
    count = len(rewards)
    cuts = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    split = data.draw(st.integers(1, count))
    expected, running = [], 0.0
    for reward, cut in zip(rewards, cuts, strict=True):
        running = gamma * running + reward
        expected.append(running)
        running = 0.0 if cut else running
    r, c, zero = torch.tensor(rewards, dtype=torch.float64), torch.tensor(cuts), torch.zeros((), dtype=torch.float64)
    whole, carry = discounted_sum(r, c, zero, gamma=gamma)
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-12, atol=1e-12)
    first, between = discounted_sum(r[:split], c[:split], zero, gamma=gamma)
    if split < count:
        second, last = discounted_sum(r[split:], c[split:], between, gamma=gamma)
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last, carry, rtol=1e-12, atol=1e-12)
    assert torch.equal(r, torch.tensor(rewards, dtype=torch.float64))


def test_masked_mean_counts_only_the_mask() -> None:
    x = torch.tensor([[1.0, torch.nan], [5.0, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 3.0
    assert torch.equal(x.grad, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))


def test_masked_mean_of_nothing_is_zero() -> None:
    x = torch.full((3,), torch.nan, requires_grad=True)
    mean = masked_mean(x, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert torch.equal(x.grad, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_mean_keeps_the_type(dtype: torch.dtype) -> None:
    assert masked_mean(torch.ones(2, dtype=dtype), torch.tensor([True, False])).dtype == dtype


# -------------------------------------------------------------------------------------------------- discounted_returns


def test_discounted_returns_by_hand() -> None:
    """Terminated at 1 (no value is read), truncated at 3 with value 10, open at the end."""
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    discount = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    cut = torch.tensor([False, True, False, True, False, False])
    tail = torch.tensor([torch.nan, 99.0, torch.nan, 10.0, torch.nan, torch.nan])
    expected = [1 + 0.5 * 2, 2.0, 3 + 0.5 * (4 + 0.5 * 10), 4 + 0.5 * 10, 5 + 0.5 * 6, 6.0]
    assert discounted_returns(reward, discount, cut, tail, gamma=0.5).tolist() == expected


def test_discounted_returns_are_gae_of_lambda_1_above_a_value_of_0() -> None:
    g = Generator().manual_seed(0)
    reward, tail = torch.randn(2, 30, 4, 2, generator=g)
    cut = (torch.rand(30, 4, 1, generator=g) < 0.2).expand(30, 4, 2)
    discount = torch.where(torch.rand(30, 4, 2, generator=g) < 0.9, 1.0, 0.0)
    zero = torch.zeros_like(reward)
    mine = discounted_returns(reward, discount, cut, tail, gamma=0.9)
    other = torch.where(cut, tail, 0.0)  # V(s_{t+1}) is read at the cuts only
    expected = reward.clone()
    for t in range(29, -1, -1):
        after = other[t] if t == 29 else torch.where(cut[t], other[t], expected[t + 1])
        expected[t] += 0.9 * discount[t] * after
    torch.testing.assert_close(mine, expected)
    alive = torch.ones_like(discount)
    torch.testing.assert_close(
        discounted_returns(reward, alive, cut, zero, gamma=0.9),
        gae(reward, zero, zero, alive, cut, gamma=0.9, lam=1.0),
    )


def test_a_return_that_is_not_finite_stays_in_its_episode() -> None:
    reward = torch.tensor([1.0, 2.0, torch.inf, 4.0, torch.nan])
    cut = torch.tensor([False, True, False, True, False])
    one = torch.ones(5)
    found = discounted_returns(reward, one, cut, torch.zeros(5), gamma=0.5)
    assert found[:2].tolist() == [2.0, 2.0] and found[3] == 4.0
    assert not found[2].isfinite() and not found[4].isfinite()
