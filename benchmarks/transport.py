"""Batched barycenters beside a loop over POT's solvers, which stand in for 4 096 states by a few of them, scaled up.

POT solves the unanchored problem only, so λ = ∞.  The error is that of the slower figure's answer too: both sides are
held to one bound against a float64 solution at convergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row, ratio, turns
from marl_memory.functional.bures import full_gaussian_barycenter
from marl_memory.functional.pot import import_pot
from marl_memory.functional.transport import categorical_barycenter, gaussian_barycenter, one_hot_cost

STATES, NEIGHBOURS, DIMENSIONS, ALONE = 4096, 16, 6, 64


def normal(*size: int, seed: int) -> Tensor:
    """Made-up numbers in float64."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error_below(bound: float, **errors: float) -> dict[str, str]:
    """The errors as printed; raises if one exceeds ``bound``."""
    for name, error in errors.items():
        if not error <= bound:
            raise RuntimeError(f"{name} is {error:.1e}, above {bound:g}: the speeds do not compare")
    return {name: f"{error:.1e}" for name, error in errors.items()}


def beside_pot(name: str, ours: Callable[[], Any], theirs: Callable[[int], Any], repeats: int, **details: Any) -> Row:
    """A row with the time of POT for all states / ours."""

    def loop() -> None:
        for state in range(ALONE):
            theirs(state)

    timed = turns(ours, loop, repeats)
    timed.pairs = [(pots * STATES / ALONE, mine) for mine, pots in timed.pairs]
    size = f"{STATES} states × {NEIGHBOURS}"
    return ratio(name, timed, batch=size, **{"POT's states": f"{ALONE}, scaled"}, **details)


def gaussians(repeats: int) -> Iterator[Row]:
    """POT's fixed point for Gaussians / ours, diagonal and full."""
    pot = import_pot()
    weights, total = normal(STATES, NEIGHBOURS, seed=0).softmax(-1), torch.ones(STATES, dtype=torch.float64)
    means = normal(STATES, NEIGHBOURS + 1, DIMENSIONS, seed=1)
    stds = (0.5 * normal(STATES, NEIGHBOURS + 1, DIMENSIONS, seed=2)).exp()
    factor = normal(STATES, NEIGHBOURS + 1, DIMENSIONS, DIMENSIONS, seed=3)
    full = factor @ factor.mT / DIMENSIONS + 0.3 * torch.eye(DIMENSIONS)
    for kind, spreads, solve in (
        ("diagonal Gaussian", stds, gaussian_barycenter),
        ("full covariance", full, full_gaussian_barycenter),
    ):
        inputs = means[:, 0], spreads[:, 0], means[:, 1:], spreads[:, 1:], weights, total
        single = [x.float().contiguous() for x in inputs]
        covs = (spreads.square().diag_embed() if kind.startswith("diagonal") else spreads)[:ALONE, 1:]
        past, each, a = (x.float().numpy() for x in (means[:ALONE, 1:], covs, weights[:ALONE]))

        def ours(solve: Any = solve, single: list[Tensor] = single) -> tuple[Tensor, Tensor]:
            return solve(*single, math.inf)

        def theirs(state: int, past: Any = past, each: Any = each, a: Any = a) -> Any:
            return pot.gaussian.bures_wasserstein_barycenter(past[state], each[state], a[state], eps=1e-5)

        exact = solve(*inputs, math.inf)
        mine = max((x - y).abs().max().item() for x, y in zip(ours(), exact, strict=True))
        reached = error_below(1e-5, **{"error": mine})
        yield beside_pot(f"barycenter, {kind}, beside POT", ours, theirs, repeats, dimensions=DIMENSIONS, **reached)


def categoricals(repeats: int) -> Iterator[Row]:
    """POT's debiased barycenter / ours, one-hot cost, ε = 0.1."""
    pot = import_pot()
    for actions, rounds in ((9, 40), (18, 26)):
        policy = normal(STATES, actions, seed=4).log_softmax(-1)
        past = normal(STATES, NEIGHBOURS, actions, seed=5).log_softmax(-1)
        weights, total = normal(STATES, NEIGHBOURS, seed=6).softmax(-1), torch.ones(STATES, dtype=torch.float64)
        single = [x.float() for x in (policy, past, weights, total)]
        cost = one_hot_cost(actions, dtype=torch.float64).numpy()
        nu, a = past.exp().mT.numpy(), weights.numpy()

        def ours(single: list[Tensor] = single, rounds: int = rounds) -> Tensor:
            return categorical_barycenter(*single, math.inf, iterations=rounds)

        few = slice(0, 4 * ALONE)
        inputs = policy[few], past[few], weights[few], total[few]
        exact = categorical_barycenter(*inputs, math.inf, iterations=20_000, tolerance=1e-11).exp()

        def theirs(state: int, thr: float, nu: Any = nu, a: Any = a, cost: Any = cost) -> Any:
            return pot.bregman.barycenter_debiased(nu[state], cost, 0.1, a[state], stopThr=thr, warn=False)

        threshold, pots = 1e-3, math.inf
        while pots > 1e-3:  # the loosest with which POT is as good as it must be
            threshold /= 10
            found = np.stack([theirs(state, threshold) for state in range(ALONE)])
            pots = float(np.abs(found - exact[:ALONE].numpy()).max())
        mine = (ours()[few].exp() - exact).abs().max().item()
        reached = error_below(1e-3, **{"error": mine, "POT's error": pots})
        yield beside_pot(
            f"barycenter, categorical {actions} actions, beside POT",
            ours,
            lambda state, threshold=threshold, theirs=theirs: theirs(state, threshold),
            repeats,
            iterations=rounds,
            **{"POT's stopThr": f"{threshold:.0e}"},
            **reached,
        )
