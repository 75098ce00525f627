"""What memory does to the fixed point of a Bellman operator, on small Markov decision processes, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.functional.transport import categorical_barycenter
from marl_memory.memory.fixed_point import FixedPointGate, RunningMean
from marl_memory.memory.scope import Scope
from tests.memory.tasks import K, task

STATES, ACTIONS, GAMMA = 12, 3, 0.95
BETA = 0.5
"""β_max: what memory may have in a policy."""
DOUBLE = torch.float64

seeds = st.integers(0, 2**20)


@dataclass
class Process:
    """A Markov decision process.

    Args:
        reward: ``[S, A]``.
        move: ``[S, A, S]``.
    """

    reward: Tensor
    move: Tensor

    def backup(self, value: Tensor) -> Tensor:
        """r + γ P v: ``[S] → [S, A]``."""
        return self.reward + GAMMA * self.move @ value

    def best(self) -> Tensor:
        """Q* ``[S, A]``."""
        q = torch.zeros_like(self.reward)
        for _ in range(2000):
            q = self.backup(q.amax(-1))
        return q

    def value_of(self, policy: Tensor) -> Tensor:
        """Q^π ``[S, A]`` of ``policy`` ``[S, A]``, by a linear system."""
        move = torch.einsum("sa,sat->st", policy, self.move)
        v = torch.linalg.solve(torch.eye(STATES, dtype=DOUBLE) - GAMMA * move, (policy * self.reward).sum(-1))
        return self.backup(v)


def process(seed: int) -> Process:
    """From every state an action leads to a few others; one state in four pays."""
    g = Generator().manual_seed(seed)
    logits = torch.randn(STATES, ACTIONS, STATES, generator=g, dtype=DOUBLE) * 2
    reward = torch.rand(STATES, ACTIONS, generator=g, dtype=DOUBLE)
    reward[torch.arange(STATES) % 4 > 0] *= 0.1
    return Process(reward, logits.softmax(-1))


def worst(q: Tensor) -> Tensor:
    """A bad memory: it remembers the worst action of every state, ``[S, A]``."""
    return torch.nn.functional.one_hot(q.argmin(-1), ACTIONS).to(DOUBLE)


def remembering(mdp: Process, q: Tensor, memory: Tensor, beta: Tensor | float) -> Tensor:
    """T_M Q ``[S, A]``: a policy that is greedy with 1 − β and the memory's with β ``[S]``."""
    return mdp.backup((1 - beta) * q.amax(-1) + beta * (memory * q).sum(-1))


def gap_of(q: Tensor, memory: Tensor) -> float:
    """max (V* − ⟨p_M, Q*⟩)."""
    return float((q.amax(-1) - (memory * q).sum(-1)).max())


def error_of(q: Tensor, best: Tensor) -> float:
    return float((q - best).abs().max())


class Gated:
    """β of every state, by the library's gate.

    Args:
        slope: c.
        of_errors: the wrong one, whose S is the root mean square of δ.
    """

    def __init__(self, *, slope: float = 1.0, of_errors: bool = False) -> None:
        self.gate, self.of_errors = (
            FixedPointGate(Scope("shared", task()), slope=slope, gamma=GAMMA).double(),
            of_errors,
        )

    def look(self, target: Tensor, reward: Tensor) -> None:
        td = TensorDict(batch_size=(target.numel(),))
        td.set(K.alive, torch.ones(target.numel(), 1, dtype=torch.bool))
        td.set(K.value_target, target.reshape(-1, 1, 1))
        td.set(K.learn_reward, reward.reshape(-1, 1, 1))
        self.gate.update(td)

    def __call__(self, mdp: Process, q: Tensor, memory: Tensor, beta: Tensor) -> Tensor:
        """``[S]``, from δ = TQ − Q at the greedy action, of which ``target`` is what was learnt from (under β)."""
        target = remembering(mdp, q, memory, beta)
        if self.of_errors:
            self.gate.clear()  # S is that of now: a slower one would only hide that this gate does not close
            self.look(mdp.backup(q.amax(-1)) - q, torch.zeros_like(q))
        else:
            self.look(target, mdp.reward)
        greedy = q.argmax(-1, keepdim=True)
        delta = (mdp.backup(q.amax(-1)) - q).gather(-1, greedy).squeeze(-1)
        nothing = torch.zeros_like(delta)
        return BETA * self.gate(delta, nothing, nothing)


def iterated(mdp: Process, memory: Tensor, gate: Gated | None, start: Tensor, *, steps: int = 700) -> Tensor:
    """Q after ``steps`` of T_M, the strength constant or gated."""
    q, beta = start, torch.full((STATES,), BETA, dtype=DOUBLE)
    for _ in range(steps):
        if gate is not None:
            beta = gate(mdp, q, memory, beta)
        q = remembering(mdp, q, memory, beta)
    return q


# ------------------------------------------------------------------------------------------------------------- T3, T4


@settings(deadline=None, max_examples=15)
@given(seed=seeds, beta=st.floats(0.01, 1.0))
def test_a_frozen_memory_at_constant_strength_moves_the_fixed_point(seed: int, beta: float) -> None:
    """T3: a contraction, of another fixed point, at most γ β gap / (1 − γ) away."""
    mdp = process(seed)
    best = mdp.best()
    memory = worst(best)
    g = Generator().manual_seed(seed + 1)
    a, b = (10 * torch.randn(STATES, ACTIONS, generator=g, dtype=DOUBLE) for _ in range(2))
    apart = [remembering(mdp, x, memory, beta) for x in (a, b)]
    assert error_of(*apart) <= GAMMA * error_of(a, b) + 1e-12
    for _ in range(1000):
        a = remembering(mdp, a, memory, beta)
    moved = error_of(a, best)
    assert 0 < moved <= GAMMA * beta * gap_of(best, memory) / (1 - GAMMA) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_residual_gate_keeps_the_fixed_point_and_that_of_errors_does_not(seed: int) -> None:
    """T4 on T3's processes.  S by the value targets: Q*.  S by δ itself, or no gate: far from it."""
    mdp = process(seed)
    best = mdp.best()
    memory = worst(best)
    for start in (torch.zeros_like(best), 2 * best):
        errors = {
            name: error_of(iterated(mdp, memory, gate, start), best)
            for name, gate in (("none", None), ("of δ", Gated(of_errors=True)), ("ours", Gated()))
        }
        assert errors["none"] > 1
        assert errors["of δ"] > 0.25 * errors["none"]
        assert errors["ours"] < 1e-6


@settings(deadline=None, max_examples=50)
@given(seed=seeds, share=st.floats(0.01, 0.99), spread=st.floats(-3, 3))
def test_the_gate_makes_a_pseudo_contraction(seed: int, share: float, spread: float) -> None:
    """T4: ‖T_M Q − Q*‖ ≤ γ (1 + c (1 + γ) gap) ‖Q − Q*‖, less than ‖Q − Q*‖ for a c below (1 − γ)/(γ (1 + γ) gap).

    Here c is that of β = min(β_max, c |δ|): β_max · slope / S.
    """
    mdp = process(seed)
    best = mdp.best()
    memory = worst(best)
    gap = gap_of(best, memory)
    limit = (1 - GAMMA) / (GAMMA * (1 + GAMMA) * gap)
    g = Generator().manual_seed(seed + 1)
    q = best + 10.0**spread * torch.randn(STATES, ACTIONS, generator=g, dtype=DOUBLE)
    gated = Gated()
    gated.look(mdp.backup(q.amax(-1)), mdp.reward)
    gated.gate.slope = share * limit * float(gated.gate.scale) / BETA
    delta = (mdp.backup(q.amax(-1)) - q).abs().amax(-1)
    beta = BETA * gated.gate(delta, torch.zeros_like(delta), torch.zeros_like(delta))
    after, before = error_of(remembering(mdp, q, memory, beta), best), error_of(q, best)
    assert after <= GAMMA * (1 + share * limit * (1 + GAMMA) * gap) * before + 1e-9
    assert after < before


def test_between_other_points_it_may_expand() -> None:
    """Only distances to Q* shrink: a pseudo-contraction is less than a contraction.

    Here Q makes much of how bad the memory's action is, which no gap at Q* bounds.
    """
    mdp = process(0)
    best = mdp.best()
    memory = worst(best)
    slope = 0.9 * (1 - GAMMA) / (GAMMA * (1 + GAMMA) * gap_of(best, memory))

    def image(q: Tensor) -> Tensor:
        delta = (mdp.backup(q.amax(-1)) - q).gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)
        return remembering(mdp, q, memory, (slope * delta.abs()).clamp(max=BETA))

    q = best - 1000 * memory
    g = Generator().manual_seed(1)
    other = q + 1e-3 * torch.randn(STATES, ACTIONS, generator=g, dtype=DOUBLE)
    assert error_of(image(q), image(other)) > 2 * error_of(q, other)
    for x in (q, other):
        assert error_of(image(x), best) < error_of(x, best)


def test_the_scale_is_that_of_the_targets_and_not_below_the_rewards() -> None:
    gated = Gated()
    gated.look(torch.tensor([3.0, -4.0], dtype=DOUBLE), torch.tensor([0.1, 0.1], dtype=DOUBLE))
    assert gated.gate.scale.item() == pytest.approx(np.sqrt(12.5))
    gated.look(torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE))
    targets, rewards = 0.99 * 12.5 / 1.99, (0.99 * 0.01 + 1) / 1.99
    assert gated.gate.scale.item() == pytest.approx(max(targets**0.5, rewards**0.5 / (1 - GAMMA)))
    gate = gated.gate(torch.tensor([0.5]), torch.tensor([-1.5]), torch.tensor([3.0]))
    assert gate.item() == pytest.approx(0.25 / gated.gate.scale.item())


# ----------------------------------------------------------------------------------------------------------------- T5


def region_iteration(mdp: Process, memories: list[Tensor], *, refreshed: bool, decayed: bool) -> list[float]:
    """What the policy lacks after 100, 200 and 400 steps: max (Q* − Q^π) of policy iteration within a region.

    Each step π ← A_M(π e^{3 Q^π} / Z), exactly evaluated.  A refreshed memory is the last K policies themselves.  With
    ε = 1: at 0.1 the transport between actions is all but a distance of total variation, whose kink holds a policy
    fast at its own past for a long time (the way to the same fixed point is some hundred times as long).
    """
    best, lam, errors = mdp.best(), 10.0, []
    policy = torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=DOUBLE)
    weights = torch.full((STATES, len(memories)), 1 / len(memories), dtype=DOUBLE)
    total = torch.ones(STATES, dtype=DOUBLE)
    for step in range(1, 401):
        better = (policy.clamp(min=1e-30).log() + 3 * mdp.value_of(policy)).log_softmax(-1)
        past = torch.stack(memories, 1).clamp(min=1e-30).log()
        strength = lam / step if decayed else lam
        policy = categorical_barycenter(better, past, weights, total, strength, eps=1.0, iterations=30).exp()
        if refreshed:
            memories = [*memories[1:], policy]
        if step in (100, 200, 400):
            errors.append(error_of(mdp.value_of(policy), best))
    return errors


@pytest.mark.parametrize("seed", range(2))
def test_a_memory_of_the_last_policies_needs_no_gate_and_a_frozen_one_must_fade(seed: int) -> None:
    """T5."""
    mdp = process(seed)
    bad = [worst(mdp.best()) * 0.97 + 0.01] * 4
    frozen = region_iteration(mdp, bad, refreshed=False, decayed=False)
    refreshed = region_iteration(mdp, bad, refreshed=True, decayed=False)
    faded = region_iteration(mdp, bad, refreshed=False, decayed=True)
    assert frozen[-1] > 4 and frozen[-1] > 0.999 * frozen[-2]
    assert refreshed[-1] < 0.05 and refreshed[-1] < 0.6 * refreshed[-2]
    assert faded[-1] < 0.005 and faded[-1] < 0.6 * faded[-2]


def test_a_running_mean_leaves_out_what_is_not_finite_or_does_not_count() -> None:
    mean = RunningMean(4)
    everyone = torch.ones(4, dtype=torch.bool)
    mean.update(torch.tensor([1.0, 2.0, 3.0, 4.0]), everyone)
    mean.update(torch.tensor([5.0, math.nan, math.inf, 8.0]), torch.tensor([True, True, True, False]))
    first = (0.99 * 1 + 5) / 1.99  # each as old as the writes behind it
    torch.testing.assert_close(mean.value, torch.tensor([first, 2.0, 3.0, 4.0]))
