"""Dynamic programming on the tables of toy tasks: written from their definition, with none of the tasks' code."""

from __future__ import annotations

import numpy as np


def backup(tables, values: np.ndarray, gamma: float) -> np.ndarray:
    """``[S, P]``: Σₖ oddsₖ (rewardₖ + γ · value of the successor, 0 if terminal)."""
    ahead = np.where(tables.terminal, 0.0, values)[tables.successors]
    return ((tables.rewards + gamma * ahead) * tables.odds).sum(-1)


def optimal_values(tables, gamma: float, tolerance: float = 1e-12) -> np.ndarray:
    """``[S, P]``: Q* by value iteration, without a time limit."""
    q = np.zeros(tables.successors.shape[:2])
    while np.abs((new := backup(tables, q.max(1), gamma)) - q).max() > tolerance:
        q = new
    return new


def best_return(tables, steps: int) -> float:
    """The highest expected sum of rewards within a time limit, from the starts; policies may depend on the time."""
    values = np.zeros(len(tables.terminal))
    for _ in range(steps):
        values = backup(tables, values, 1.0).max(1)
    return float(values[tables.starts].mean())
