"""Barycenters of full-covariance Gaussians against a numerical optimiser, POT and the diagonal closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from marl_memory.functional import bures
from marl_memory.functional.bures import full_gaussian_barycenter, full_gaussian_w2, square_root
from marl_memory.functional.pot import import_pot
from marl_memory.functional.transport import gaussian_barycenter, gaussian_w2

DOUBLE = torch.float64


def covariances(*batch: int, p: int, seed: int, decades: float) -> Tensor:
    """Random rotations of random variances whose logarithms span some decades."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(*batch, p, p, generator=generator, dtype=DOUBLE))[0]
    variances = 10 ** (decades * (torch.rand(*batch, p, generator=generator, dtype=DOUBLE) - 0.5))
    return turn @ torch.diag_embed(variances) @ turn.mT


def problem(batch: int, k: int, p: int, seed: int, decades: float = 2.0) -> tuple[Tensor, ...]:
    """mean, cov, means, covs, weights, total."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(batch, k + 1, p, generator=generator, dtype=DOUBLE)
    covs = covariances(batch, k + 1, p=p, seed=seed + 1, decades=decades)
    weights = torch.randn(batch, k, generator=generator, dtype=DOUBLE).softmax(-1)
    total = torch.rand(batch, generator=generator, dtype=DOUBLE).clamp(min=0.1)
    return means[:, 0], covs[:, 0], means[:, 1:], covs[:, 1:], weights, total


def objective(mean: Tensor, root: Tensor, inputs: tuple[Tensor, ...], lam: float) -> Tensor:
    """M ↦ Σ w_i W₂²(N(m, S), ν_i) + KL/λ of one row, S = root rootᵀ; differentiable."""
    mu, sigma, means, covs, a, total = inputs
    cov = root @ root.mT
    fidelity = torch.linalg.svdvals(root.mT @ torch.linalg.cholesky(covs)).sum(-1)
    distance = (mean - means).square().sum(-1) + cov.trace() + covs.diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * fidelity
    apart = torch.linalg.solve(sigma, torch.stack([mean - mu], -1))[:, 0] @ (mean - mu)
    kl = 0.5 * (torch.linalg.solve(sigma, cov).trace() - len(mu) + apart - torch.logdet(cov) + torch.logdet(sigma))
    return total * (a * distance).sum() + kl / lam


@pytest.mark.parametrize("lam", [1e-2, 1.0, 10.0])
def test_full_is_what_an_optimiser_finds(lam: float) -> None:
    p, inputs = 3, problem(3, 4, 3, seed=2)
    found = full_gaussian_barycenter(*inputs, lam)
    for b in range(3):
        row = tuple(x[b] for x in inputs)

        def value(x: np.ndarray, row: tuple[Tensor, ...] = row) -> tuple[float, np.ndarray]:
            x_ = torch.tensor(x, requires_grad=True)
            loss = min(lam, 1.0) * objective(x_[:p], x_[p:].reshape(p, p), row, lam)
            loss.backward()
            return loss.item(), x_.grad.numpy()

        start = torch.cat([row[0], torch.linalg.cholesky(row[1]).flatten()]).numpy()
        best = torch.as_tensor(minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x)
        root = best[p:].reshape(p, p)
        torch.testing.assert_close(found[0][b], best[:p], atol=1e-6, rtol=0)
        torch.testing.assert_close(found[1][b], root @ root.T, atol=1e-6, rtol=1e-6)


def test_full_without_anchor_is_pots() -> None:
    inputs = problem(4, 5, 4, seed=3)
    mean, cov = full_gaussian_barycenter(*inputs, math.inf)
    for b in range(4):
        m, s = import_pot().gaussian.bures_wasserstein_barycenter(
            inputs[2][b].numpy(), inputs[3][b].numpy(), inputs[4][b].numpy(), eps=1e-12
        )
        np.testing.assert_allclose(mean[b], m, atol=1e-12)
        np.testing.assert_allclose(cov[b], s, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.5, 1e6, math.inf])
def test_diagonal_covariances_give_the_closed_form(lam: float) -> None:
    mean, cov, means, covs, a, total = problem(6, 4, 3, seed=4)
    std, stds = (x.diagonal(dim1=-2, dim2=-1).sqrt() for x in (cov, covs))
    expected = gaussian_barycenter(mean, std, means, stds, a, total, lam)
    found = full_gaussian_barycenter(mean, std.square().diag_embed(), means, stds.square().diag_embed(), a, total, lam)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].square().diag_embed(), atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), lam=st.sampled_from([1e-3, 0.1, 1.0, 10.0]), decades=st.sampled_from([0.5, 2.0]))
def test_full_inequalities(seed: int, lam: float, decades: float) -> None:
    mu, sigma, means, covs, a, total = inputs = problem(5, 3, 3, seed, decades)
    mean, cov = full_gaussian_barycenter(*inputs, lam)

    def disagreement(m: Tensor, s: Tensor) -> Tensor:
        m, s = m.unsqueeze(1).expand_as(means), s.unsqueeze(1).expand_as(covs)
        return total * (a * full_gaussian_w2(m, s, means, covs)).sum(-1)

    before = disagreement(mu, sigma)  # T1
    assert (disagreement(mean, cov) <= before + 1e-9).all()
    normal = torch.distributions.MultivariateNormal
    moved = torch.distributions.kl_divergence(normal(mean, cov), normal(mu, sigma))
    assert (moved <= lam * before + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_full_ends_are_exact(dtype: torch.dtype) -> None:
    mean, cov, means, covs, a, total = (x.to(dtype) for x in problem(8, 4, 3, seed=5))
    total[:3], a[:3], covs[:3], means[1] = 0, 0, 0, 1e9
    for lam in (0.0, 1.0, math.inf):
        m, s = full_gaussian_barycenter(mean, cov, means, covs, a, total, lam)
        same = slice(0, 8 if lam == 0 else 3)
        assert torch.equal(m[same], mean[same]) and torch.equal(s[same], cov[same]) and s.dtype == dtype
        assert m.isfinite().all() and s.isfinite().all()


def test_full_of_one_opinion_stays() -> None:
    mean, cov, means, covs, a, total = problem(8, 4, 3, seed=6)
    same = mean.unsqueeze(1).expand_as(means), cov.unsqueeze(1).expand_as(covs)
    for lam in (0.1, math.inf):
        m, s = full_gaussian_barycenter(mean, cov, *same, a, total, lam)
        torch.testing.assert_close(m, mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(s, cov, atol=1e-9, rtol=0)


@pytest.mark.parametrize("lam", [1e-2, 1.0, math.inf])
def test_full_in_float32(lam: float) -> None:
    inputs = problem(100, 8, 6, seed=7)
    for single, exact in zip(
        full_gaussian_barycenter(*(x.float() for x in inputs), lam), full_gaussian_barycenter(*inputs, lam), strict=True
    ):
        assert (single - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_full_batches_chunks_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, cov, means, covs, a, total = inputs = problem(6, 4, 3, seed=8)
    whole = full_gaussian_barycenter(*inputs, 2.0)
    monkeypatch.setattr(bures, "CHUNK", 9 * 4 * 2)  # two rows at a time
    shaped = full_gaussian_barycenter(*(x.reshape(2, 3, *x.shape[1:]) for x in inputs), torch.full((2, 3), 2.0))
    order = torch.tensor([2, 0, 3, 1])
    turned = full_gaussian_barycenter(mean, cov, means[:, order], covs[:, order], a[:, order], total, 2.0)
    for x, y, z in zip(whole, shaped, turned, strict=True):
        torch.testing.assert_close(y.reshape(x.shape), x, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(z, x, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_square_root(dtype: torch.dtype, bound: float) -> None:
    x = covariances(200, p=5, seed=1, decades=2).to(dtype)
    root = square_root(x.permute(1, 2, 0)).permute(2, 0, 1)
    torch.testing.assert_close(root @ root, x, atol=bound, rtol=bound)
    assert (torch.linalg.eigvalsh(root) > 0).all()


def test_full_w2_by_hand() -> None:
    std, to_std = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    mean, to_mean = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    covs = (turn @ x.square().diag() @ turn.T for x in (std, to_std))
    found = full_gaussian_w2(mean, next(covs), to_mean, next(covs))
    torch.testing.assert_close(found, gaussian_w2(mean, std, to_mean, to_std), atol=1e-4, rtol=1e-4)
    assert found.item() == pytest.approx(4 + 4 + 1, abs=1e-4)


def test_bad_input_is_named() -> None:
    mean, cov, means, covs, a, total = inputs = problem(2, 3, 3, seed=9)
    with pytest.raises(ValueError, match="covs"):
        full_gaussian_barycenter(mean, cov, means, covs[:, 1:], a, total, 1.0)
    with pytest.raises(RuntimeError, match="after 1 iterations"):
        full_gaussian_barycenter(*inputs, 1.0, iterations=1)
    with pytest.raises(RuntimeError, match="relative error of"):
        full_gaussian_barycenter(mean, cov, means, -covs, a, total, 1.0)
    with pytest.raises(torch.linalg.LinAlgError):
        full_gaussian_barycenter(mean, -cov, means, covs, a, total, 1.0)
