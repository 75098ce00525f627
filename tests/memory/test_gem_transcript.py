"""TD3 with EpisodicReturn against a transcript in plain PyTorch: lists of steps, the definition, single networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from benchmarks import plain_ddpg as plain
from marl_memory.algorithms.td3 import TD3
from marl_memory.memory.episodic_return import EpisodicReturn
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.iteration import LentSteps, OffPolicyIteration
from tests.algorithms.test_deterministic import as_plain, parameters_of
from tests.functional.test_rollouts import by_definition
from tests.memory.replayed import K, ring, trajectories
from tests.memory.tasks import task

torch.set_num_threads(1)

ENVS, EVERY, CHUNK, ROWS, SEED, ALPHA, GAMMA = 2, 16, 4, 8, 5, 0.25, 0.95


class PlainTable:
    """Returns of single steps in a dictionary, computed anew by the definition; noise as TD3 smooths with it."""

    def __init__(self, agents: int) -> None:
        self.steps: list[dict[str, Tensor]] = []  # one a vector step, [N, …]
        self.returns: dict[int, Tensor] = {}  # by the row's number, [A, 2]
        self.generator, self.clock, self.agents = Generator().manual_seed(SEED), None, agents

    def take(self, rows: list[dict[str, Tensor]], learner: plain.Learner) -> None:
        first = len(self.steps)
        self.steps += rows
        if self.clock is None or (len(self.steps) - self.clock) * ENVS >= EVERY:
            first, self.clock = 0, len(self.steps)
        self.compute(first, learner)

    @torch.no_grad()
    def compute(self, first: int, learner: plain.Learner) -> None:
        new = self.steps[first:]
        data = {name: torch.stack([step[name] for step in new]).flatten(0, 1) for name in new[0]}  # [T' N, …]
        size = (len(new), ENVS, self.agents, data["action"].shape[-1])
        noise = torch.randn(size, generator=self.generator, dtype=torch.float64).flatten(0, 1)
        agents = range(self.agents)
        following = [learner.target_choice(data, i, noise) for i in agents]
        values = [learner.values(learner.target_critics[i], data, following, i, "next_") for i in agents]
        if learner.settings.common_reward:
            pairs = [learner.team_mean([v[:, c : c + 1] for v in values], data["next_alive"]) for c in range(2)]
            values = [torch.cat([pairs[0][i], pairs[1][i]], -1) for i in agents]
        for env in range(ENVS):
            for i in agents:
                one = tuple(
                    x[env::ENVS] for x in (data["reward"][:, i], values[i], data["discount"][:, i], data["done"])
                )
                found = by_definition(one, GAMMA, twin=True)  # type: ignore[arg-type]
                for t in range(len(new)):
                    self.returns.setdefault((first + t) * ENVS + env, torch.zeros(self.agents, 2).double())[i] = found[
                        t
                    ]


def as_lists(host: TD3, td: TensorDict) -> list[dict[str, Tensor]]:
    """Collected steps ``[T, N]`` as the plain learner reads them."""
    found = []
    for step in td:
        data = as_plain(host, step)
        found.append({**data, "done": step["next", "done"].squeeze(-1)})
    return found


class Run:
    """What `OffPolicyIteration.update` reads of an iteration."""

    def __init__(self, algorithm: TD3, memory: Memory) -> None:
        self.algorithm, self.memory = algorithm, memory


@pytest.mark.parametrize(
    ("agents", "options"), [(1, {}), (2, {"centralised_critic": True})], ids=["td3", "matd3, a common reward"]
)
def test_a_hundred_updates_equal_the_plain_transcript(agents: int, options: dict[str, Any]) -> None:
    spec = TaskSpec(**{**vars(task(agents, features=3)), "common_reward": agents > 1})
    host = TD3(
        spec=spec, network=partial(MLP, hidden=(16, 16)), seed=1, actor_lr=1e-2, critic_lr=1e-2, tau=0.05, gamma=GAMMA,
        batch_size=ROWS, warmup_frames=ROWS, capacity=400, **options,
    ).double()  # fmt: skip
    gem = EpisodicReturn(
        spec=spec, seed=SEED, off_policy=True, n_critics=2, reach=host.reach, n_envs=ENVS, capacity=400, gamma=GAMMA,
        refresh_every=EVERY, max_rollout=None,
    ).double()  # fmt: skip
    memory = Memory([("gem", gem)])
    settings = plain.Settings(centralised=agents > 1, common_reward=agents > 1, gamma=GAMMA, tau=0.05, policy_delay=2)
    other, table = plain.like(host, settings), PlainTable(agents)
    entries = list(dict.fromkeys([*host.replay_keys, *memory.reads, K.state, ("next", K.state)]))
    replay = ring(spec, steps=200, n_envs=ENVS, entries=entries, learn=host.learn_entries | memory.entries)
    lent, run, led = LentSteps(replay, host, memory), Run(host, memory), 0.0
    whole = trajectories(spec, 50 * CHUNK, ENVS, 0)
    for turn in range(50):
        steps = whole[turn * CHUNK : (turn + 1) * CHUNK]
        replay.extend(steps)
        memory.refresh(host.bootstrap_values, lent)
        table.take(as_lists(host, steps), other)
        for _ in range(2):
            rows, noise = replay.draw(), host.generator.clone_state()
            report = OffPolicyIteration.update(run, rows)  # type: ignore[arg-type]
            led += abs(float(report["memory/gem/lead"]))
            target_noise = torch.randn(ROWS, agents, 2, generator=noise, dtype=torch.float64)
            targets = torch.stack([table.returns[number] for number in rows[K.row].tolist()])
            torch.testing.assert_close(
                rows[K.value_target][rows[K.alive]], targets[rows[K.alive]], rtol=1e-6, atol=1e-6
            )
            other.update(as_plain(host, rows), target_noise=target_noise, targets=targets, under_weight=ALPHA)
    assert led > 1
    for name, nets in (("actor", other.actors), ("critic", other.critics), ("target_critic", other.target_critics)):
        for mine, net in zip(parameters_of(host, name), nets, strict=True):
            torch.testing.assert_close(mine, torch.nn.utils.parameters_to_vector(net.parameters()), rtol=0, atol=1e-6)
