"""That returns along stored trajectories speed up a critic where rewards are sparse, and that twins keep them honest.

A chain of 20 steps whose end alone pays; all arms see the same scripted steps (TD3: beside the actor's own, which its
critics need).  How many updates until the value of the start is that of the goal?  And, where the critics' estimates
are noisy because observations hold noise, by how much do they end up too high?  Minutes each, so all are slow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from marl_memory.algorithms.dqn import DQN
from marl_memory.algorithms.td3 import TD3
from marl_memory.keys import Keys
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.collection import Collector
from marl_memory.training.iteration import LentSteps, OffPolicyIteration
from marl_memory.training.replay import ReplayRing
from marl_memory_envs.toy.chain import vector_env

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

K, SEEDS = Keys(), range(10)
LENGTH, GAMMA, ENVS, ROWS, CAPACITY, EVERY = 20, 0.97, 4, 64, 20_000, 25
GOAL = GAMMA ** (LENGTH - 1)
"""The value of the start."""
ENOUGH = 0.9 * GOAL
ARMS: dict[str, dict[str, Any] | None] = {
    "host": None,
    "gem": {"max_rollout": None},
    "no twins": {"max_rollout": None, "estimator": "max"},
    "alpha 1": {"max_rollout": None, "under_weight": 1.0},
}


class NoisyChain:
    """The chain with ``noise`` features of noise beside the position, drawn anew at every step."""

    def __init__(self, seed: int, *, continuous: bool, noise: int) -> None:
        self.env = vector_env(n_envs=ENVS, seed=seed, length=LENGTH, continuous=continuous)
        size = LENGTH + noise
        self.task_spec = replace(self.env.task_spec, observation_sizes=(size,), state_size=size)
        self.n_envs, self.resumable, self.noise = ENVS, False, noise
        self.generator, self.set_seed = Generator().manual_seed(seed), self.env.set_seed

    def seen(self, td: TensorDictBase) -> TensorDictBase:
        here = td.get(K.observation)
        noise = torch.randn(*here.shape[:-1], self.noise, generator=self.generator)
        td = td.copy().set(K.observation, torch.cat([here, noise], -1))
        return td.set(K.state, td.get(K.observation).flatten(-2))

    def reset(self) -> TensorDictBase:
        return self.seen(self.env.reset())

    def step_and_maybe_reset(self, td: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        step, following = self.env.step_and_maybe_reset(td)
        after, following = self.seen(step.get("next")), self.seen(following)
        goes_on = ~after.get(K.done).unsqueeze(-1)
        after.set(K.observation, torch.where(goes_on, following.get(K.observation), after.get(K.observation)))
        after.set(K.state, after.get(K.observation).flatten(-2))
        return step.copy().set("next", after), following

    def close(self) -> None:
        self.env.close()


def made(kind: str, spec: Any, seed: int) -> TD3 | DQN:
    sizes: dict[str, Any] = {"batch_size": ROWS, "warmup_frames": ROWS, "capacity": CAPACITY, "gamma": GAMMA}
    network = partial(MLP, hidden=(64, 64))
    if kind == "td3":
        return TD3(spec=spec, network=network, seed=seed, **sizes)
    return DQN(spec=spec, network=network, seed=seed, critics=2, loss="mse", target_every=100, **sizes)


def scripted(host: TD3 | DQN, seed: int) -> Any:
    """Mostly to the right; half of TD3's environments are its actor's, with noise."""
    g = Generator().manual_seed(seed)

    def act(td: TensorDictBase) -> TensorDictBase:
        if isinstance(host, DQN):
            return td.set(K.action, (torch.rand(ENVS, 1, generator=g) < 0.8).long())
        script = (0.6 + 0.6 * torch.randn(ENVS, 1, 1, generator=g)).clamp(-1, 1)
        with torch.no_grad():
            own = (host.actor.output(td) + 0.3 * torch.randn(ENVS, 1, 1, generator=g)).clamp(-1, 1)
        return td.set(K.action, torch.where((torch.arange(ENVS) < 2).view(ENVS, 1, 1), own, script))

    return act


class Run:
    """What `OffPolicyIteration.update` reads of an iteration."""

    def __init__(self, algorithm: Any, memory: Memory) -> None:
        self.algorithm, self.memory = algorithm, memory


@torch.no_grad()
def value_of_start(host: TD3 | DQN, start: TensorDict) -> float:
    """Of the step to the right, by all critics."""
    if isinstance(host, DQN):
        return float(host.actor.values(start)[:, :, 1].mean())
    return float(host.critic(start, torch.ones(*start.batch_size, 1, 1)).mean())


def values_over_updates(
    kind: str, seed: int, options: dict[str, Any] | None, updates: int, *, noise: int = 0, until: float = math.inf
) -> Tensor:
    """The value of the start ``[U / 25]``, while one update is made for every step, at most until it is ``until``."""
    env = NoisyChain(seed, continuous=kind == "td3", noise=noise)
    host, spec = made(kind, env.task_spec, seed), env.task_spec
    operators = []
    if options is not None:
        given = {"capacity": CAPACITY, "n_envs": ENVS, "gamma": GAMMA, "off_policy": True, "n_critics": 2, **options}
        operators = [("gem", EpisodicReturn(spec=spec, seed=seed, **given))]
    memory = Memory(operators)
    collector = Collector(env, scripted(host, seed), lambda td: None, steps=10, learn_entries={}, seed=seed)
    sizes: dict[str, Any] = {"capacity": CAPACITY, "n_envs": ENVS, "batch_size": ROWS, "keys": K, "seed": seed}
    entries = list(dict.fromkeys([*host.replay_keys, *memory.reads]))
    replay = ReplayRing(entries=entries, learn_entries=host.learn_entries | memory.entries, **sizes)
    lent, run, found, used = LentSteps(replay, host, memory), Run(host, memory), [], 0.0
    start = torch.stack([env.seen(env.env.reset())[0] for _ in range(64 if noise else 1)])
    collector.reset(seed)
    while host.updates < updates and max(found, default=0.0) < until:
        batch, _ = collector.collect()
        replay.extend(batch)
        memory.refresh(host.bootstrap_values, lent)
        if len(replay) < 2_000:
            continue
        for _ in range(batch.numel()):
            report = OffPolicyIteration.update(run, replay.draw())  # type: ignore[arg-type]
            if host.updates % EVERY == 0:
                found.append(value_of_start(host, start))
                used = float(report.get("memory/gem/used", 0.0))
    env.close()
    assert (used == 1.0) == (options is not None)
    return torch.tensor(found)


def updates_needed(values: Tensor) -> int:
    """Until nine tenths of the goal's value are there; at least as many as there were."""
    there = (values >= ENOUGH).nonzero()
    return EVERY * (int(there[0]) + 1 if len(there) else len(values))


@pytest.mark.parametrize(("kind", "updates"), [("td3", 10_000), ("dqn", 4_000)])
def test_the_goals_value_is_known_in_half_of_the_hosts_updates(kind: str, updates: int) -> None:
    needed, last = {}, {}
    for arm, options in ARMS.items():
        until = math.inf if arm == "gem" else ENOUGH  # how it ends is asked of GEM only
        values = [values_over_updates(kind, seed, options, updates, until=until) for seed in SEEDS]
        needed[arm] = sum(map(updates_needed, values)) / len(values)
        last[arm] = sum(float(x[-20:].mean()) for x in values) / len(values)
        print(f"{kind}, {arm}: {needed[arm]:.0f} updates, {last[arm]:.3f} at the end; the goal's value is {GOAL:.3f}")
    assert needed["gem"] <= needed["host"] / 2
    assert abs(last["gem"] - GOAL) <= 0.1 * GOAL
    # It is the way back along trajectories that does it, neither the twins nor α.
    assert max(needed["no twins"], needed["alpha 1"]) <= needed["host"] / 2


def test_noisy_estimates_make_the_single_maximum_too_high_and_not_the_twins() -> None:
    """In their plain form, α = 1; with α = 1/4 the twins err to the safe side."""
    too_high = {}
    for estimator in ("twin", "max"):
        for alpha in (1.0, 0.25):
            options = {"max_rollout": None, "estimator": estimator, "under_weight": alpha}
            values = [values_over_updates("dqn", seed, options, 4_000, noise=8) for seed in SEEDS]
            too_high[estimator, alpha] = sum(float(x[-20:].mean()) - GOAL for x in values) / len(values)
            print(f"{estimator}, α = {alpha}: {too_high[estimator, alpha]:+.3f} above {GOAL:.3f}")
    assert too_high["max", 1.0] > 0.5 * GOAL
    assert abs(too_high["twin", 1.0]) < 0.15 * GOAL
    assert too_high["max", 0.25] > 0.1 * GOAL > too_high["twin", 0.25]
