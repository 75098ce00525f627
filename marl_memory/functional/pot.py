"""The barycenter of ``transport.categorical_barycenter`` by another way: slow, exact, for tests and unusual costs."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl_memory.functional.transport import (
    SCALING_LIMIT,
    check_shapes,
    check_sinkhorn,
    floored,
    give_up,
    one_hot_cost,
    pull,
)

Array = NDArray[np.float64]


def import_pot() -> Any:
    """POT without its JAX backend, whose import takes seconds and which is not used here."""
    os.environ.setdefault("POT_BACKEND_DISABLE_JAX", "1")
    return importlib.import_module("ot")


@torch.no_grad()
def pot_barycenter(
    log_policy: Tensor,
    log_neighbours: Tensor,
    weights: Tensor,
    total: Tensor,
    lam: float | Tensor,
    *,
    cost: Tensor | None = None,
    eps: float = 0.1,
    iterations: int = 5000,
    tolerance: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Anchored Sinkhorn barycenter by mirror descent, with POT's dual potentials as the gradient.

    The objective and arguments are those of ``categorical_barycenter``; rows are solved one after the other, in float64
    on the CPU, at some seconds each.  A step of size η is

    $$
    p \leftarrow \arg\min_q\; \langle g, q \rangle + \tfrac1{\lambda W} \mathrm{KL}(q \| \pi)
    + \tfrac1\eta \mathrm{KL}(q \| p), \qquad g = \sum_i a_i (f_i - f_0)
    $$

    with f_i the potential of p in $OT_\varepsilon(p, \nu_i)$ and f_0 its potential in $OT_\varepsilon(p, p)$; η halves
    until the transport stays below its model and grows after each step.

    Args:
        log_policy: ``[*B, P]``.
        log_neighbours: ``[*B, K, P]``.
        weights: ``[*B, K]``.
        total: ``[*B]``.
        lam: a number or ``[*B]``.
        cost: ``[P, P]`` or ``[*B, P, P]``, symmetric, of any size; None is 1 between any two actions.
        eps: entropic smoothing ε > 0.
        iterations: the most steps that are done.
        tolerance: largest part of the objective's gradient, weighed by p, that is not constant over actions.
        mask: ``[*B, P]`` bool, which actions are allowed.

    Returns:
        ``[*B, P]``, log p*.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.
        RuntimeError: the tolerance was not reached.

    Reference: Flamary et al., "POT: Python Optimal Transport" (2021).
    """
    check_shapes(log_policy, log_neighbours, weights, total)
    check_sinkhorn(log_policy.shape, cost, eps, iterations, tolerance, mask)
    shape, actions, neighbours = log_policy.shape, log_policy.shape[-1], weights.shape[-1]
    strength = [float(x) for x in pull(total, lam).reshape(-1)]
    ground = one_hot_cost(actions) if cost is None else cost
    grounds = ground.double().expand(*shape, actions).reshape(-1, actions, actions)
    allowed = (torch.ones_like(log_policy, dtype=torch.bool) if mask is None else mask).reshape(-1, actions)
    policy = log_policy.reshape(-1, actions)
    past, a = log_neighbours.reshape(-1, neighbours, actions), weights.double().reshape(-1, neighbours)
    solved = torch.where(allowed, policy, -math.inf)
    for row, force in enumerate(strength):
        here = allowed[row]
        if force > 0:
            pi, nu = (floored(x[..., here].double().T, None).T.cpu().numpy() for x in (policy[row, None], past[row]))
            matrix = grounds[row][here][:, here].cpu().numpy()
            p = descend(pi[0], nu, a[row].cpu().numpy(), 1 / force, matrix, eps, iterations, tolerance)
            solved[row, here] = torch.as_tensor(p).to(solved)
    return solved.reshape(shape)


def descend(
    log_pi: Array, log_nu: Array, a: Array, anchor: float, cost: Array, eps: float, iterations: int, tolerance: float
) -> Array:
    """log p ``[P]`` that minimises Σ a_i S_ε(p, ν_i) + anchor · KL(p‖π); ``log_pi`` ``[P]``, ``log_nu`` ``[K, P]``."""
    transport = potentials(log_nu, a, cost, eps)
    log_p, eta = log_pi, 1 / eps
    value, g = transport(log_p)
    for _ in range(iterations):
        p = np.exp(log_p)
        slope = g + anchor * (log_p - log_pi)
        if np.abs(p * (slope - p @ slope)).max() <= tolerance:
            return log_p
        while True:
            logits = (log_p / eta + anchor * log_pi - g) / (1 / eta + anchor)
            trial = logits - np.logaddexp.reduce(logits)
            q = np.exp(trial)
            new_value, new_g = transport(trial)
            model = value + g @ (q - p) + q @ (trial - log_p) / eta
            if new_value <= model + 1e-11 or eta < 1e-9:  # 1e-11: what the values themselves are uncertain by
                break
            eta /= 2
        log_p, value, g, eta = trial, new_value, new_g, 1.5 * eta
    give_up(iterations, tolerance)
    return log_p


def potentials(log_nu: Array, a: Array, cost: Array, eps: float) -> Callable[[Array], tuple[float, Array]]:
    """log p ``[P]`` ↦ Σ a_i OT_ε(p, ν_i) − ½ OT_ε(p, p), and its gradient ``[P]`` up to a constant.

    Every solve begins at the potentials of the last one.
    """
    ot = import_pot()
    by_logarithms = cost.max() / eps > SCALING_LIMIT  # some ten times slower
    method = "sinkhorn_log" if by_logarithms else "sinkhorn"
    warm: dict[int, tuple[Array, Array]] = {}

    def solve(number: int, log_p: Array, log_q: Array) -> tuple[float, Array, Array]:
        p, q = np.exp(log_p), np.exp(log_q)
        p, q = p / p.sum(), q / q.sum()
        settings = {"numItermax": 3000, "stopThr": 1e-10, "warn": False, "log": True}
        found = ot.sinkhorn(p, q, cost, eps, method=method, warmstart=warm.get(number), **settings)[1]
        u, v = (found["log_u"], found["log_v"]) if by_logarithms else (np.log(found["u"]), np.log(found["v"]))
        warm[number] = u, v
        return eps * float(p @ (u - log_p) + q @ (v - log_q)), u, v

    def transport(log_p: Array) -> tuple[float, Array]:
        value, u, v = solve(-1, log_p, log_p)
        value, g = -value / 2, -eps * (u + v) / 2
        for i, weight in enumerate(a):
            if weight > 0:
                one, u, _ = solve(i, log_p, log_nu[i])
                value, g = value + weight * one, g + weight * eps * u
        return value, g

    return transport
