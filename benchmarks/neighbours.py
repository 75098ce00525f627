"""Nearest neighbours among real states of HalfCheetah: exact beside a product and topk, approximate beside exact.

faiss is measured too where it is installed; ``FAISS=/a/folder`` names one that holds it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row, ratio, seconds, turns
from marl_memory.functional.neighbours import assign, fit_centroids, invert, nearest, nearest_listed, recall

QUERIES, K = 256, 16
ROWS = 131_072


@cache
def states() -> tuple[Tensor, Tensor]:
    """Queries ``[1, 256, 17]`` and rows ``[1, 131072, 17]`` over their standard deviation, some 6 s to collect.

    A third from the policies of a short random search over linear ones, a third each from random actions and from the
    best policy found, with noise.
    """
    env, rng, total = gymnasium.make("HalfCheetah-v5"), np.random.default_rng(0), QUERIES + ROWS
    best, weights, seen = -np.inf, np.zeros((6, 18)), []

    def roll(weights: np.ndarray | None, steps: int, noise: float) -> float:
        observation, total_reward = env.reset(seed=int(rng.integers(2**31)))[0], 0.0
        for _ in range(steps):
            seen.append(observation)
            mean = 0.0 if weights is None else np.tanh(weights @ np.append(observation, 1.0))
            action = np.clip(mean + noise * rng.standard_normal(6), -1.0, 1.0)
            observation, reward, _, truncated, _ = env.step(action)
            total_reward += float(reward)
            if truncated:
                observation = env.reset()[0]
        return total_reward

    while len(seen) < total // 3:
        changed = weights + 0.2 * rng.standard_normal(weights.shape)
        if (reward := roll(changed, 250, 0.05)) > best:
            best, weights = reward, changed
    roll(None, total // 3, 1.0)
    roll(weights, total - len(seen), 0.2)
    env.close()
    keys = torch.from_numpy(np.asarray(seen, dtype=np.float32))
    keys /= keys.std(0)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return keys[drawn[:QUERIES]].unsqueeze(0), keys[drawn[QUERIES:].sort().values].unsqueeze(0)


def product_and_topk(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way, ``[G, Q, N]`` at once."""
    squared = torch.baddbmm(rows.square().sum(-1).unsqueeze(1), queries, rows.mT, alpha=-2)
    return squared.topk(K, largest=False)


def flat_faiss(queries: Tensor, rows: Tensor) -> Callable[[], Any] | None:
    """A search of faiss' flat index, where it can be imported."""
    if (folder := os.environ.get("FAISS")) and folder not in sys.path:
        sys.path.append(folder)
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(rows.shape[-1])
    index.add(rows[0].numpy())
    asked = queries[0].numpy()
    return lambda: index.search(asked, K)


def exact(repeats: int) -> Iterator[Row]:
    """Ours / the faster of a product with topk and faiss' flat index."""
    queries, bank = states()
    for n in (4096, 16_384, 100_000):
        rows = bank[:, torch.linspace(0, ROWS - 1, n).long()].contiguous()
        plain = lambda rows=rows: product_and_topk(queries, rows)  # noqa: E731
        others = {"product and topk": plain, "faiss flat": flat_faiss(queries, rows)}
        took = {name: min(seconds(work) for _ in range(4)) for name, work in others.items() if work}
        name = min(took, key=lambda name: took[name])
        calls = max(1, 100_000 // n)

        def ours(rows: Tensor = rows, calls: int = calls) -> None:
            for _ in range(calls):
                nearest(queries, rows, K)

        def beside(work: Callable[[], Any] = others[name] or plain, calls: int = calls) -> None:
            for _ in range(calls):
                work()

        timed = turns(ours, beside, repeats)
        agree = recall(nearest(queries, rows, K)[1], product_and_topk(queries, rows)[1]).item()
        yield ratio(f"exact search, {QUERIES} × {K}, {n} rows", timed, calls=calls, beside=name, agree=round(agree, 4))


def approximate(repeats: int) -> Iterator[Row]:
    """Inverted lists / exact, and the share of neighbours that they miss."""
    queries, rows = states()
    centroids = fit_centroids(rows, 2048, torch.Generator().manual_seed(0))
    assigned = assign(rows, centroids)
    lists = invert(rows, assigned, centroids)

    def listed() -> tuple[Tensor, Tensor]:
        return nearest_listed(queries, lists, K, probes=16)

    timed = turns(listed, lambda: nearest(queries, rows, K), repeats)
    found = recall(listed()[1], nearest(queries, rows, K)[1]).item()
    inverted = min(seconds(lambda: invert(rows, assigned, centroids)) for _ in range(3)) * 1e6
    details = {"lists": 2048, "probes": 16, "recall": round(found, 3), "µs to invert": round(inverted)}
    yield ratio(f"approximate search, {ROWS} rows", timed, **details)
    yield Row("approximate search, rows it misses", [1 - found], unit="", details={"recall": round(found, 3)})
