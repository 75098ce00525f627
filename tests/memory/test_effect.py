"""That memory helps where neighbours carry information by construction, and that it is the neighbours that help.

Each test trains the host alone, with memory, and with a memory whose payloads lie at the keys of other rows, on ten
seeds; every arm sees the same states and the same noise.  Minutes each, so all are slow.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.barycenter_region import BarycenterRegion
from marl_memory.memory.gradient_field import GradientField
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from tests.memory.tasks import K, rows, task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Arm = Literal["host", "own", "shuffled"]
SEEDS = range(10)
BODY = partial(MLP, hidden=(32, 32))
GRID = torch.cartesian_prod(torch.linspace(-0.95, 0.95, 16), torch.linspace(-0.95, 0.95, 16))
"""``[256, 2]``, states to judge a policy at."""


def advantage(better: list[float], worse: list[float]) -> float:
    """Mean of the paired differences, in standard errors."""
    difference = torch.tensor(better) - torch.tensor(worse)
    return float(difference.mean() / (difference.std() / math.sqrt(len(difference))))


# --------------------------------------------------------------------------------- a noisy critic of a smooth problem

NOISE, ROWS, UPDATES = 6.0, 16, 400


def best_action(s: Tensor) -> Tensor:
    """``[*B, 2] → [*B, 2]``, in (−1, 1)."""
    return 0.7 * torch.stack([torch.sin(2 * s[..., 0] + s[..., 1]), torch.cos(2 * s[..., 1])], -1)


def loss_of_actor(seed: int, arm: Arm) -> tuple[float, dict[str, float]]:
    """Mean |μ(s) − a*(s)|² over the second half of a training in which a critic tells −2 (a − a*) and much noise."""
    spec = task(2)
    g = Generator().manual_seed(seed)
    host = DDPG(
        spec=spec, network=BODY, seed=seed, share_actor=True, agent_indicator=False,
        batch_size=ROWS, warmup_frames=ROWS, capacity=64,
    )  # fmt: skip
    memory = None
    if arm != "host":
        memory = GradientField(spec=spec, seed=seed, capacity=2048, fixed_point_gate=False, payloads=arm)
    entries = host.learn_entries if memory is None else host.learn_entries | memory.asks | memory.entries
    judge = rows(spec, GRID.unsqueeze(1).expand(-1, 2, -1))
    errors, acted = [], {"rows": 0.0, "strength": 0.0, "beta": 0.0}
    for step in range(UPDATES):
        td = rows(spec, 2 * torch.rand(ROWS, 2, 2, generator=g) - 1, entries)
        host.compute_action_gradient(td)
        assert host._chosen is not None
        true = -2 * (host._chosen.detach() - best_action(td.get(K.observation)))
        td.get(K.action_gradient).copy_(true + NOISE * torch.randn(true.shape, generator=g))
        if memory is not None:
            memory.set_progress(step * ROWS, step / UPDATES)
            memory(td)
        host.update_actor(td)
        if memory is not None:
            acted = {key: float(memory.metrics(td)[key]) for key in acted}
            memory.write(td)
        if step >= UPDATES // 2 and step % 10 == 0:
            with torch.no_grad():
                error = host.actor.output(judge) - best_action(judge.get(K.observation))
            errors.append(error.square().sum(-1).mean().item())
    return sum(errors) / len(errors), acted


def test_a_field_of_gradients_sees_through_a_critics_noise() -> None:
    found: dict[str, list[float]] = {"host": [], "own": [], "shuffled": []}
    for seed in SEEDS:
        for arm in found:
            loss, acted = loss_of_actor(seed, arm)  # type: ignore[arg-type]
            found[arm].append(-loss)
            assert arm == "host" or min(acted["rows"], acted["strength"]) > 0
            assert arm != "own" or acted["beta"] > 0.1
    report(found)
    assert advantage(found["own"], found["host"]) > 2
    assert advantage(found["own"], found["shuffled"]) > 2


# ------------------------------------------------------------------------------------- a bandit that was better before


def right_action(s: Tensor) -> Tensor:
    """The quadrant: ``[*B, 2] → [*B]``."""
    return 2 * (s[..., 0] > 0).long() + (s[..., 1] > 0).long()


def recalled_policy(s: Tensor) -> Tensor:
    """What was done before, ``[*B, 4]`` log-probabilities: the right action with 0.7."""
    return torch.where(torch.nn.functional.one_hot(right_action(s), 4) > 0, 0.7, 0.1).log()


def bandit(spec: TaskSpec, entries: Any, shape: tuple[int, int], g: Generator) -> TensorDict:
    """States ``[T, N]`` of episodes of one step."""
    td = rows(spec, 2 * torch.rand(shape[0] * shape[1], 2, 2, generator=g) - 1)
    td = TensorDict({}, batch_size=shape).update(td.exclude("learn").reshape(shape))
    td.set("next", td.clone())
    for name, value in ((K.done, True), (K.terminated, True), (K.truncated, False)):
        td.set(("next", name), torch.full((*shape, 1), value))
    td.set(("next", *K.discount), torch.zeros(*shape, 2, 1))
    for key, entry in entries.items():
        td.set(key, entry.zeros(shape, torch.float32))
    return td


def gain_of_policy(seed: int, arm: Arm) -> tuple[float, dict[str, float]]:
    """Mean probability of the right action over a training under noisy rewards."""
    spec = task(2, actions=4, continuous=False)
    g = Generator().manual_seed(seed)
    one_step = {"gamma": 0.0}  # what follows an action is nothing: targets have the scale of a reward
    host = PPO(
        spec=spec, network=BODY, seed=seed, share_parameters=True, agent_indicator=False, minibatches=4, **one_step
    )  # fmt: skip
    memory = None
    if arm != "host":
        memory = BarycenterRegion(spec=spec, seed=seed, capacity=2048, payloads=arm, **one_step)
    entries = host.learn_entries if memory is None else host.learn_entries | memory.asks | memory.entries
    past = bandit(spec, entries, (16, 32), g)
    if memory is not None:
        past.get(K.policy("log_probs")).copy_(recalled_policy(past.get(K.observation)))
        memory(past)
        memory.write(past)
    judge = rows(spec, GRID.unsqueeze(1).expand(-1, 2, -1))
    right = right_action(judge.get(K.observation)).unsqueeze(-1)
    gains, acted = [], {"rows": 0.0, "strength": 0.0, "omega": 0.0}
    for step in range(30):
        td = bandit(spec, entries, (8, 8), g)
        host.actor(td)
        paid = (td.get(K.action) == right_action(td.get(K.observation))).float()
        td.set(("next", *K.reward), (paid + 2.0 * torch.randn(paid.shape, generator=g)).unsqueeze(-1))
        host.derive_rewards(td)
        host.compute_advantages(td)
        if memory is not None:
            memory.set_progress(step * 64, step / 30)
            memory(td)
            acted = {key: float(memory.metrics(td)[key]) for key in acted}
        for minibatch in host.minibatches(td):
            host.update(minibatch)
        if memory is not None:
            memory.write(td)
        with torch.no_grad():
            gains.append(host.actor.distribution(judge).parameters["log_probs"].exp().gather(-1, right).mean().item())
    return sum(gains) / len(gains), acted


def test_a_region_around_better_policies_leads_back_to_them() -> None:
    found: dict[str, list[float]] = {"host": [], "own": [], "shuffled": []}
    for seed in SEEDS:
        for arm in found:
            gain, acted = gain_of_policy(seed, arm)  # type: ignore[arg-type]
            found[arm].append(gain)
            assert arm == "host" or min(acted.values()) > 0
    report(found)
    assert advantage(found["own"], found["host"]) > 2
    assert advantage(found["own"], found["shuffled"]) > 2


def report(found: dict[str, list[float]]) -> None:
    """For whoever reads the test's output: means, and differences with their standard errors."""
    for arm, values in found.items():
        difference = torch.tensor(found["own"]) - torch.tensor(values)
        error = difference.std() / math.sqrt(len(values))
        print(f"{arm}: {sum(values) / len(values):.4f}; own is better by {difference.mean():.4f} ± {error:.4f}")
