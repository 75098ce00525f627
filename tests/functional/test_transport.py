"""Anchored barycenters against hand-worked numbers, numerical optimisers, POT and the theory's inequalities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, root
from scipy.special import logsumexp
from torch import Tensor

from marl_memory.functional import transport
from marl_memory.functional.pot import import_pot, pot_barycenter
from marl_memory.functional.transport import (
    categorical_barycenter,
    categorical_kl,
    gaussian_barycenter,
    gaussian_kl,
    gaussian_w2,
    one_hot_cost,
    ordinal_cost,
    sinkhorn_divergence,
    structured_cost,
    value_cost,
)

DOUBLE = torch.float64
seeds = st.integers(0, 2**31)
strengths = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e4, math.inf])


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def rows(*size: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gaussians(batch: tuple[int, ...], k: int, p: int, seed: int) -> tuple[Tensor, ...]:
    """mean, std, means, stds, weights, total."""
    means, stds = rows(*batch, k + 1, p, seed=seed), rows(*batch, k + 1, p, seed=seed + 1, spread=0.7).exp()
    total = rows(*batch, seed=seed + 3).sigmoid()
    weights = rows(*batch, k, seed=seed + 2).softmax(-1)
    return means[..., 0, :], stds[..., 0, :], means[..., 1:, :], stds[..., 1:, :], weights, total


def categoricals(batch: tuple[int, ...], k: int, p: int, seed: int, spread: float = 1.0) -> tuple[Tensor, ...]:
    """log_policy, log_neighbours, weights, total."""
    logs = rows(*batch, k + 1, p, seed=seed, spread=spread).log_softmax(-1)
    total = rows(*batch, seed=seed + 3).sigmoid()
    return logs[..., 0, :], logs[..., 1:, :], rows(*batch, k, seed=seed + 2).softmax(-1), total


def converged(*inputs: Any, **settings_: Any) -> Tensor:
    return categorical_barycenter(*inputs, iterations=50_000, tolerance=1e-12, **settings_)


# Gaussians.


def test_gaussian_by_hand() -> None:
    # W = λ = σ = 1: t = 2, c = 2/3.  m = 1/3·3 + 2/3·(0.25·0 + 0.75·8) = 5.
    # s̄ = 0.25·1 + 0.75·2 = 1.75: s = 7/12 + √((7/12)² + 1/3)
    mean, std = gaussian_barycenter(
        numbers(3.0),
        numbers(1.0),
        numbers([0.0], [8.0]),
        numbers([1.0], [2.0]),
        numbers(0.25, 0.75),
        numbers(1.0)[0],
        1,
    )
    torch.testing.assert_close(mean, numbers(5.0))
    torch.testing.assert_close(std, numbers(7 / 12 + math.sqrt(49 / 144 + 1 / 3)))


@pytest.mark.parametrize("lam", [1e-3, 0.3, 10.0])
def test_gaussian_is_what_an_optimiser_finds(lam: float) -> None:
    inputs = gaussians((4,), 3, 1, seed=5)
    found = torch.cat(gaussian_barycenter(*inputs, lam), -1).numpy()
    for b in range(4):
        mean, std, means, stds, a, w = (x[b].numpy() for x in inputs)

        def objective(x: np.ndarray, mean=mean, std=std, means=means, stds=stds, a=a, w=w) -> tuple[float, np.ndarray]:
            m, s = x[0], math.exp(x[1])
            value = w * (a @ ((m - means) ** 2 + (s - stds) ** 2))[0]
            value += ((s**2 + (m - mean[0]) ** 2) / (2 * std[0] ** 2) - math.log(s)) / lam
            by_m = 2 * w * a @ (m - means[:, 0]) + (m - mean[0]) / std[0] ** 2 / lam
            by_s = 2 * w * a @ (s - stds[:, 0]) + (s / std[0] ** 2 - 1 / s) / lam
            return value, np.array([by_m, s * by_s])

        best = minimize(objective, [0.0, 0.0], jac=True, method="BFGS").x
        best = root(lambda x, f=objective: lam * f(x)[1], best, tol=1e-13).x  # BFGS stops where values are rounded
        np.testing.assert_allclose(found[b], [best[0], math.exp(best[1])], atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, lam=strengths)
def test_gaussian_inequalities(seed: int, lam: float) -> None:
    mean, std, means, stds, a, total = inputs = gaussians((7,), 4, 3, seed)
    m, s = gaussian_barycenter(*inputs, lam)
    w = total.unsqueeze(-1) * a
    mean_bar, std_bar = (torch.einsum("bk,bkp->bp", a, x) for x in (means, stds))
    for new, old, bar in ((m, mean, mean_bar), (s, std, std_bar)):  # T2
        assert (new >= torch.minimum(old, bar) - 1e-12).all() and (new <= torch.maximum(old, bar) + 1e-12).all()

    def disagreement(x: Tensor, y: Tensor) -> Tensor:
        return (w * gaussian_w2(x.unsqueeze(1), y.unsqueeze(1), means, stds)).sum(-1)

    before = disagreement(mean, std)  # T1
    assert (disagreement(m, s) <= before + 1e-12).all()
    assert (gaussian_kl(m, s, mean, std) <= lam * before + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gaussian_ends_are_exact(dtype: torch.dtype) -> None:
    mean, std, means, stds, a, total = (x.to(dtype) for x in gaussians((50,), 4, 3, seed=1))
    total[:10] = 0
    for lam in (0.0, 1e-300, torch.zeros(50, dtype=dtype)):
        m, s = gaussian_barycenter(mean, std, means, stds, a, total, lam)
        assert torch.equal(m, mean) and torch.equal(s, std) and m.dtype == s.dtype == dtype
    hollow = torch.full_like(means, torch.nan)
    for lam in (1.0, math.inf):
        m, s = gaussian_barycenter(mean, std, hollow, hollow, a, total, lam)
        assert torch.equal(m[:10], mean[:10]) and torch.equal(s[:10], std[:10])
    for lam in (math.inf, 1e30, torch.full((50,), math.inf, dtype=dtype)):
        m, s = gaussian_barycenter(mean, std, means, stds, a, total, lam)
        torch.testing.assert_close(m[10:], torch.einsum("bk,bkp->bp", a, means)[10:])
        torch.testing.assert_close(s[10:], torch.einsum("bk,bkp->bp", a, stds)[10:])


def test_gaussian_of_one_opinion_stays() -> None:
    mean, std, means, stds, a, total = gaussians((6,), 4, 3, seed=2)
    same = mean.unsqueeze(1).expand_as(means), std.unsqueeze(1).expand_as(stds)
    for lam in (0.1, 10.0, math.inf):
        for new, old in zip(gaussian_barycenter(mean, std, *same, a, total, lam), (mean, std), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-14, atol=1e-14)


def test_gaussian_float32_extremes() -> None:
    mean, std, means, stds, a, total = gaussians((500,), 16, 6, seed=3)
    std = std * 10 ** rows(500, 6, seed=9)
    for lam in (1e-30, 1e-6, 1.0, 1e6, 1e38, math.inf):
        exact = gaussian_barycenter(mean, std, means, stds, a, total, lam)
        single = gaussian_barycenter(*(x.float() for x in (mean, std, means, stds, a, total)), lam)
        for x, y in zip(single, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)


# Categoricals.


class Oracle:
    """Σ w_i S_ε(p, ν_i) + KL(p‖π) / λ of one row, by potentials of its own, and its minimum by BFGS."""

    def __init__(self, log_pi: np.ndarray, log_nu: np.ndarray, w: np.ndarray, lam: float, cost: np.ndarray, eps: float):
        self.log_pi, self.log_nu, self.w, self.lam, self.exponent, self.eps = log_pi, log_nu, w, lam, -cost / eps, eps

    def transport(self, log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, np.ndarray]:
        """OT_ε(p, q) and its gradient: Sinkhorn, then Newton's method on the concave dual, which is all but exact."""
        p, q, g = np.exp(log_p), np.exp(log_q), np.zeros_like(log_q)
        for _ in range(50):
            f = -logsumexp(self.exponent + log_q + g, axis=1)
            g = -logsumexp(self.exponent.T + log_p + f, axis=1)
        for _ in range(50):
            logits = self.exponent + log_q + g
            f = -logsumexp(logits, axis=1)
            plan = np.exp(logits + (f + log_p)[:, None])
            slope = q - plan.sum(0)
            if np.abs(slope).max() < 1e-15:
                break
            hessian = np.diag(plan.sum(0)) - plan.T @ (plan / p[:, None])
            step = np.linalg.lstsq(hessian, slope, rcond=1e-14)[0]
            g = g + step / max(1.0, np.abs(step).max())
        return self.eps * (p @ f + q @ g), self.eps * f

    def __call__(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = logits - logsumexp(logits)
        p, drift = np.exp(log_p), log_p - self.log_pi
        own, own_slope = self.transport(log_p, log_p)
        value = p @ drift / self.lam - self.w.sum() * own / 2
        # The two potentials of the own transport differ by a constant that moves no probability.
        slope = drift / self.lam - self.w.sum() * own_slope
        for w, log_nu in zip(self.w, self.log_nu, strict=True):
            one, one_slope = self.transport(log_p, log_nu)
            value, slope = value + w * one, slope + w * one_slope
        return value, p * (slope - p @ slope)

    def best(self) -> np.ndarray:
        found = minimize(self, self.log_pi, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 500}).x
        return np.exp(found - logsumexp(found))


def test_oracle_gradient_is_the_slope_of_its_value() -> None:
    pi, nu, a, _ = (x.numpy() for x in categoricals((), 3, 4, seed=0))
    oracle = Oracle(pi, nu, a, 2.0, ordinal_cost(4, dtype=DOUBLE).numpy(), 0.2)
    slope = oracle(pi)[1]
    for i in range(4):
        step = 1e-5 * np.eye(4)[i]
        assert (oracle(pi + step)[0] - oracle(pi - step)[0]) / 2e-5 == pytest.approx(slope[i], abs=1e-8)


@pytest.mark.parametrize("kind", ["one_hot", "ordinal", "value"])
@pytest.mark.parametrize(("lam", "eps"), [(0.3, 0.1), (10.0, 0.1), (1.0, 0.5)])
def test_categorical_is_what_an_optimiser_finds(kind: str, lam: float, eps: float) -> None:
    pi, nu, a, total = inputs = categoricals((3,), 3, 4, seed=4)
    cost = {"one_hot": None, "ordinal": ordinal_cost(4, dtype=DOUBLE), "value": value_cost(rows(3, 4, seed=8))}[kind]
    found = converged(*inputs, lam, cost=cost, eps=eps).exp().numpy()
    ground = (one_hot_cost(4, dtype=DOUBLE) if cost is None else cost).expand(3, 4, 4)
    for b in range(3):
        oracle = Oracle(pi[b].numpy(), nu[b].numpy(), (a * total[:, None])[b].numpy(), lam, ground[b].numpy(), eps)
        np.testing.assert_allclose(found[b], oracle.best(), atol=1e-6)


@pytest.mark.parametrize("kind", ["one_hot", "ordinal"])
def test_categorical_without_anchor_is_as_good_as_pots(kind: str) -> None:
    pi, nu, a, total = inputs = categoricals((4,), 5, 6, seed=6)
    cost = {"one_hot": None, "ordinal": ordinal_cost(6, dtype=DOUBLE)}[kind]
    ground = one_hot_cost(6, dtype=DOUBLE) if cost is None else cost
    # On an ordered ground the objective is so flat that p itself is hardly determined.
    found = categorical_barycenter(*inputs, math.inf, cost=cost, iterations=3000)
    for b in range(4):
        pots = import_pot().bregman.barycenter_debiased(
            nu[b].exp().T.numpy(), ground.numpy(), 0.1, a[b].numpy(), stopThr=1e-12, numItermax=3000, warn=False
        )

        def objective(log_p: Tensor, b: int = b) -> float:
            each = sinkhorn_divergence(log_p.expand_as(nu[b]), nu[b], cost=cost, iterations=1000)
            return (a[b] * each).sum().item()

        theirs = torch.as_tensor(pots / pots.sum()).log()
        assert objective(found[b]) <= objective(theirs) + 1e-6
        if cost is None:
            torch.testing.assert_close(found[b].exp(), theirs.exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "eps", "lam"), [("ordinal", 0.1, 2.0), ("one_hot", 0.5, 2.0), ("one_hot", 0.5, math.inf)]
)
def test_categorical_agrees_with_mirror_descent_on_pots_potentials(kind: str, eps: float, lam: float) -> None:
    inputs = categoricals((2,), 3, 4, seed=7)
    cost = {"one_hot": None, "ordinal": ordinal_cost(4, dtype=DOUBLE)}[kind]
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    pots = pot_barycenter(*inputs, lam, cost=cost, eps=eps, mask=mask)
    torch.testing.assert_close(
        pots.exp(), converged(*inputs, lam, cost=cost, eps=eps, mask=mask).exp(), atol=1e-5, rtol=0
    )
    assert torch.equal(pot_barycenter(*inputs, 0.0), inputs[0])


@pytest.mark.parametrize("kind", ["one_hot", "ordinal"])
@pytest.mark.parametrize("actions", [5, 9, 18])
@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_error_of_the_training_setting(kind: str, actions: int, lam: float) -> None:
    inputs = categoricals((256,), 16, actions, seed=11)
    cost = {"one_hot": None, "ordinal": ordinal_cost(actions, dtype=DOUBLE)}[kind]
    exact = converged(*inputs, lam, cost=cost).exp()
    single = None if cost is None else cost.float()
    trained = categorical_barycenter(*(x.float() for x in inputs), lam, cost=single).exp().double()
    assert (trained - exact).abs().max() <= 2e-3
    assert (trained - exact).abs().amax(-1).median() <= 2e-4


@settings(deadline=None, max_examples=40)
@given(seed=seeds, lam=st.sampled_from([0.01, 1.0, 10.0]), kind=st.sampled_from(["one_hot", "ordinal"]))
def test_categorical_inequalities(seed: int, lam: float, kind: str) -> None:
    pi, nu, a, total = inputs = categoricals((5,), 3, 5, seed, spread=1.5)
    cost = {"one_hot": None, "ordinal": ordinal_cost(5, dtype=DOUBLE)}[kind]
    p = categorical_barycenter(*inputs, lam, cost=cost, eps=0.2, iterations=500)

    def disagreement(log_p: Tensor) -> Tensor:
        each = sinkhorn_divergence(log_p.unsqueeze(1).expand_as(nu), nu, cost=cost, eps=0.2, iterations=500)
        return total * (a * each).sum(-1)

    before = disagreement(pi)  # T1
    assert (disagreement(p) <= before + 1e-7).all()
    assert (categorical_kl(p, pi) <= lam * before + 1e-7).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    spread=st.sampled_from([0.1, 3.0, 30.0, 1000.0]),
    lam=strengths,
    eps=st.sampled_from([0.02, 0.034, 0.1, 1.0]),
    iterations=st.sampled_from([30, 200]),
)
def test_categorical_float32_is_finite_and_normalised(
    seed: int, spread: float, lam: float, eps: float, iterations: int
) -> None:
    pi, nu, a, total = (x.float() for x in categoricals((20,), 6, 5, seed, spread=spread))
    mask = rows(20, 5, seed=seed) > -0.5
    mask[:, 2] = True
    for cost in (None, ordinal_cost(5)):
        p = categorical_barycenter(pi, nu, a, total, lam, cost=cost, eps=eps, mask=mask, iterations=iterations).exp()
        assert p.isfinite().all()
        torch.testing.assert_close(p.sum(-1), torch.ones(20), atol=1e-5, rtol=0)
        assert (p[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_categorical_ends_are_exact(dtype: torch.dtype) -> None:
    pi, nu, a, total = (x.to(dtype) for x in categoricals((12,), 4, 5, seed=1))
    total[:5] = 0
    for lam in (0.0, torch.zeros(12, dtype=dtype)):
        assert torch.equal(categorical_barycenter(pi, nu, a, total, lam), pi)
    for lam in (1.0, math.inf):
        p = categorical_barycenter(pi, nu, a, total, lam)
        assert torch.equal(p[:5], pi[:5]) and p.dtype == dtype
        assert not torch.equal(p[5:], pi[5:])
    free = categorical_barycenter(pi, nu, a, total, math.inf)
    torch.testing.assert_close(categorical_barycenter(pi, nu, a, total, 1e12), free, rtol=1e-4, atol=1e-4)


def test_categorical_of_one_opinion_stays() -> None:
    pi, nu, a, total = categoricals((12,), 4, 5, seed=2, spread=2)
    same = pi.unsqueeze(1).expand_as(nu)
    for lam in (0.1, 10.0, math.inf):
        for cost in (None, ordinal_cost(5, dtype=DOUBLE)):
            p = categorical_barycenter(pi, same, a, total, lam, cost=cost, iterations=3000)
            torch.testing.assert_close(p.exp(), pi.exp(), atol=1e-5 if lam < math.inf else 2e-3, rtol=0)


def test_mask_is_the_smaller_task() -> None:
    pi, nu, a, total = categoricals((6,), 4, 5, seed=3)
    keep = torch.tensor([0, 2, 3])
    mask = torch.zeros(6, 5, dtype=torch.bool).index_fill_(1, keep, True)
    for cost in (None, ordinal_cost(5, dtype=DOUBLE), value_cost(rows(6, 5, seed=1))):
        for eps in (0.1, 0.03):
            masked = categorical_barycenter(pi, nu, a, total, 2.0, cost=cost, eps=eps, mask=mask)
            assert (masked.exp()[~mask] == 0).all()
            part = None if cost is None else cost[..., keep, :][..., keep]
            small = categorical_barycenter(
                pi[:, keep].log_softmax(-1), nu[..., keep].log_softmax(-1), a, total, 2.0, cost=part, eps=eps
            )
            torch.testing.assert_close(masked[:, keep], small)
    single = torch.zeros(6, 5, dtype=torch.bool).index_fill_(1, torch.tensor([1]), True)
    only = categorical_barycenter(pi, nu, a, total, 2.0, mask=single).exp()
    torch.testing.assert_close(only, single.double())


def test_neighbours_that_only_took_forbidden_actions_say_nothing_in_particular() -> None:
    pi, nu, a, total = categoricals((1,), 2, 4, seed=3)
    mask = torch.tensor([[True, True, False, True]])
    nu[0, 0] = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf])
    uniform = nu.clone()
    uniform[0, 0] = math.log(0.25)
    p, q = (categorical_barycenter(pi, x, a, total, 2.0, mask=mask) for x in (nu, uniform))
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("each", [False, True])
def test_scalings_and_logarithms_agree(each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = categoricals((9,), 4, 6, seed=3)
    mask = rows(9, 6, seed=5) > -0.6
    mask[:, 0] = True
    for cost in (None, value_cost(rows(9, 6, seed=2)) if each else ordinal_cost(6, dtype=DOUBLE)):
        scalings = categorical_barycenter(*inputs, 3.0, cost=cost, mask=mask)
        with monkeypatch.context() as patched:
            patched.setattr(transport, "SCALING_LIMIT", 0.0)
            logarithms = categorical_barycenter(*inputs, 3.0, cost=cost, mask=mask)
        torch.testing.assert_close(scalings, logarithms)


@pytest.mark.parametrize("cost", [None, one_hot_cost(6, dtype=DOUBLE)])
def test_the_cheap_cost_is_the_general_one(cost: Tensor | None) -> None:
    inputs = categoricals((9,), 4, 6, seed=3)
    for eps in (0.1, 0.02):
        expected = categorical_barycenter(*inputs, 3.0, eps=eps, cost=one_hot_cost(6, dtype=DOUBLE).expand(9, 6, 6))
        torch.testing.assert_close(categorical_barycenter(*inputs, 3.0, eps=eps, cost=cost), expected)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes_chunks_and_strides(batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CHUNK", 5 * 4 * 2)  # two rows at a time
    inputs = categoricals(batch, 4, 5, seed=3)
    lam = 0.5 + rows(*batch, seed=4).sigmoid()
    costs = value_cost(rows(*batch, 5, seed=6))
    normal = gaussians(batch, 4, 5, seed=3)
    p, (m, s) = categorical_barycenter(*inputs, lam, cost=costs), gaussian_barycenter(*normal, lam)
    assert p.shape == m.shape == s.shape == (*batch, 5)
    for index in np.ndindex(*batch):
        alone = categorical_barycenter(*(x[index] for x in inputs), lam[index].item(), cost=costs[index])
        torch.testing.assert_close(p[index], alone)
        torch.testing.assert_close(m[index], gaussian_barycenter(*(x[index] for x in normal), lam[index])[0])
    turned = [x.flip(0).contiguous().flip(0) if x.dim() else x for x in inputs]
    torch.testing.assert_close(categorical_barycenter(*turned, lam, cost=costs), p)


def test_order_of_neighbours_does_not_matter() -> None:
    pi, nu, a, total = categoricals((6,), 5, 4, seed=3)
    order = torch.tensor([3, 0, 4, 2, 1])
    p, q = (categorical_barycenter(pi, x, y, total, 2.0) for x, y in ((nu, a), (nu[:, order], a[:, order])))
    torch.testing.assert_close(p, q)
    mean, std, means, stds, a, total = gaussians((6,), 5, 4, seed=3)
    one = gaussian_barycenter(mean, std, means, stds, a, total, 2.0)
    two = gaussian_barycenter(mean, std, means[:, order], stds[:, order], a[:, order], total, 2.0)
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y)


def test_inputs_are_left_alone_and_no_gradient_is_recorded() -> None:
    inputs = [x.requires_grad_() for x in categoricals((6,), 5, 4, seed=3)]
    copies = [x.detach().clone() for x in inputs]
    assert not categorical_barycenter(*inputs, 2.0).requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


# Costs and divergences.


def test_costs_by_hand() -> None:
    torch.testing.assert_close(ordinal_cost(3), torch.tensor([[0, 0.25, 1], [0.25, 0, 0.25], [1, 0.25, 0]]))
    assert torch.equal(ordinal_cost(1), torch.zeros(1, 1))
    assert torch.equal(one_hot_cost(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    torch.testing.assert_close(structured_cost(points) * 25, torch.tensor([[0.0, 25, 16], [25, 0, 9], [16, 9, 0]]))
    values = value_cost(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(values[0], torch.tensor([[0, 1, 0.5], [1, 0, 0.5], [0.5, 0.5, 0]]))
    assert torch.equal(values[1], torch.zeros(3, 3))


def test_divergences_by_hand() -> None:
    p, q = numbers(0.5, 0.5, 0.0).log(), numbers(0.25, 0.5, 0.25).log()
    torch.testing.assert_close(categorical_kl(p, q), numbers(0.5 * math.log(2))[0])
    one, two = (numbers(0.0), numbers(1.0)), (numbers(2.0), numbers(3.0))
    torch.testing.assert_close(gaussian_w2(*one, *two), numbers(8.0)[0])
    torch.testing.assert_close(gaussian_kl(*one, *two), numbers(math.log(3) + 5 / 18 - 0.5)[0])
    masked = torch.tensor([0.5, 0.5, 0.0]).log(), torch.randn(3).requires_grad_()
    categorical_kl(masked[0], masked[1].masked_fill(torch.tensor([False, False, True]), -torch.inf)).backward()
    torch.testing.assert_close(masked[1].grad, torch.tensor([-0.5, -0.5, 0.0]))


def test_sinkhorn_divergence_is_pots() -> None:
    p, q = rows(2, 5, 6, seed=3).log_softmax(-1)
    p[0] = torch.tensor([0.5, 0, 0.5, 0, 0, 0]).log()  # nothing there
    cost = ordinal_cost(6, dtype=DOUBLE)
    found = sinkhorn_divergence(p, q, cost=cost, iterations=10_000, tolerance=1e-12)
    pot = import_pot()

    def entropic(x: Tensor, y: Tensor) -> float:
        ground = cost[x > -math.inf][:, y > -math.inf]  # POT divides by the masses
        x, y = (z[z > -math.inf].exp() for z in (x, y))
        plan = torch.as_tensor(
            pot.sinkhorn(x.numpy(), y.numpy(), ground.numpy(), 0.1, stopThr=1e-13, numItermax=10**5, warn=False)
        )
        return ((plan * ground).sum() + 0.1 * torch.xlogy(plan, plan / x.outer(y)).sum()).item()

    expected = [entropic(x, y) - entropic(x, x) / 2 - entropic(y, y) / 2 for x, y in zip(p, q, strict=True)]
    torch.testing.assert_close(found, numbers(*expected), atol=1e-9, rtol=0)
    torch.testing.assert_close(sinkhorn_divergence(q, q), torch.zeros(5, dtype=DOUBLE), atol=1e-12, rtol=0)


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps must be > 0"),
        ({"lam": -1.0}, "lam must be ≥ 0"),
        ({"lam": math.nan}, "lam must be ≥ 0"),
        ({"iterations": 0}, "at least one iteration"),
        ({"tolerance": -1.0}, "a tolerance > 0"),
        ({"cost": torch.zeros(3, 3)}, "cost must be"),
        ({"mask": torch.ones(6, 4)}, "mask must be bool"),
        ({"weights": torch.ones(6, 3)}, "expected a policy"),
        ({"total": torch.ones(5)}, "expected a policy"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    pi, nu, a, total = categoricals((6,), 5, 4, seed=3)
    inputs: dict[str, Any] = {"log_policy": pi, "log_neighbours": nu, "weights": a, "total": total, "lam": 1.0}
    with pytest.raises(ValueError, match=message):
        categorical_barycenter(**(inputs | change))


def test_more_bad_input() -> None:
    inputs = categoricals((6,), 5, 4, seed=3)
    with pytest.raises(RuntimeError, match="not within 1e-12 after 3 iterations"):
        categorical_barycenter(*inputs, 1.0, iterations=3, tolerance=1e-12)
    mean, std, means, stds, a, total = gaussians((6,), 5, 4, seed=3)
    with pytest.raises(ValueError, match="stds"):
        gaussian_barycenter(mean, std, means, stds[:, 1:], a, total, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        sinkhorn_divergence(mean, mean[1:])
