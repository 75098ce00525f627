"""Whole training on simple_spread with BenchMARL's default hyper-parameters: MAPPO and MADDPG.

Beside a plain PyTorch loop, and, where the variable ``BENCHMARL_PYTHON`` names the Python of an environment that has
it, beside BenchMARL itself (`benchmarl_peer.py`).  How sides take turns is in `end_to_end`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from benchmarks import plain_ddpg, plain_mappo
from benchmarks.end_to_end import Parts, in_turns, median_of, our_iteration, our_trainer, peer, row_of
from benchmarks.measure import Row
from benchmarks.plain_mappo import Batch
from marl_memory.algorithms.ddpg import DDPG
from marl_memory.algorithms.ppo import PPO
from marl_memory.networks.mlp import MLP
from marl_memory.training.trainer import Trainer

SIZES = {"n_envs": 10, "steps": 600}
FRAMES = SIZES["n_envs"] * SIZES["steps"]
TASK = {
    "factory": "marl_memory_envs.mpe:simple_spread",
    "kwargs": {"N": 3, "local_ratio": 0.5, "max_cycles": 100, "continuous_actions": True},
}
UPDATES, UPDATE_ROWS = 1000, 128
NETWORK = partial(MLP, hidden=(256, 256), activation="tanh")


def mappo_trainer(folder: Path, seed: int) -> Trainer:
    """Ours, with BenchMARL's default hyper-parameters as far as they exist here.

    BenchMARL's policy also has a deviation that depends on the observation, which is a wider last layer.
    """
    settings = {
        "epochs": 45, "minibatches": 15, "entropy_coef": 0.0, "lr": 5e-5, "lr_final": 5e-5, "adam_eps": 1e-6,
        "max_grad_norm": 5.0, "gae_lambda": 0.9, "value_norm": False, "normalise_advantages": False,
    }  # fmt: skip
    learner = partial(PPO, network=NETWORK, centralised_critic=True, share_parameters=True, **settings)
    return _trainer(learner, folder, seed)


def maddpg_trainer(folder: Path, seed: int, **options: Any) -> Trainer:
    """Ours, with BenchMARL's default hyper-parameters: 1 000 updates of 128 rows after every 6 000 frames.

    Beside the plain loop with a network per agent and Lowe et al.'s gradient; ``SHARING`` is what BenchMARL does.
    """
    learner = partial(
        DDPG,
        network=NETWORK,
        centralised_critic=True,
        actor_lr=5e-5,
        critic_lr=5e-5,
        batch_size=UPDATE_ROWS,
        capacity=60_000,
        warmup_frames=UPDATE_ROWS,
        updates_per_frame=UPDATES / FRAMES,
        train_every=SIZES["steps"],
        **options,
    )
    return _trainer(learner, folder, seed)


SHARING = {"share_actor": True, "share_critic": True, "actor_gradient": "joint"}
"""One actor and one critic for all agents, and the gradient of all values through the joint action."""


def _trainer(learner: Callable[..., Any], folder: Path, seed: int) -> Trainer:
    from marl_memory_envs.vector import vector_env

    return our_trainer(partial(vector_env, **TASK), learner, folder, seed, **SIZES)


class PlainLoop:
    """The raw environments one by one, one batched policy call a step; a subclass chooses and learns."""

    def __init__(self, seed: int) -> None:
        from marl_memory_envs.mpe import simple_spread

        self.envs: list[Any] = [simple_spread(**TASK["kwargs"]) for _ in range(SIZES["n_envs"])]
        self.seen = [list(env.reset(seed=seed + i)[0].values()) for i, env in enumerate(self.envs)]

    def choose(self, row: Batch) -> None:
        """Add what the policy does at ``row["observation"]``."""
        raise NotImplementedError

    def learn(self, data: Batch) -> None:
        """Learn from a collected batch."""
        raise NotImplementedError

    @torch.no_grad()
    def collect(self) -> Batch:
        columns: dict[str, list[Any]] = {}
        for _ in range(SIZES["steps"]):
            row: Batch = {"observation": torch.tensor(self.seen, dtype=torch.float32)}
            row["state"] = row["observation"].flatten(1)
            self.choose(row)
            self.step(row)
            for key, x in row.items():
                columns.setdefault(key, []).append(x)
        return {key: torch.stack(rows) for key, rows in columns.items()}

    def step(self, row: Batch) -> None:
        """Step every environment; adds rewards, ends and what followed to ``row``."""
        rewards, ends, last = [], [], []
        for i, (env, actions) in enumerate(zip(self.envs, row["action"].numpy(), strict=True)):
            observations, reward, _, truncated, _ = env.step(dict(zip(env.agents, actions, strict=True)))
            rewards.append(list(reward.values()))
            ends.append(any(truncated.values()))
            last.append(list(observations.values()))
            self.seen[i] = last[-1] if not ends[-1] else list(env.reset()[0].values())
        living = torch.ones(row["action"].shape[:-1], dtype=torch.bool)
        following = torch.tensor(last, dtype=torch.float32)
        row |= {"reward": torch.tensor(rewards, dtype=torch.float32), "done": torch.tensor(ends), "alive": living}
        row |= {"discount": torch.ones_like(row["reward"]), "next_alive": living}  # time limits only
        row |= {"next_observation": following, "next_state": following.flatten(1)}

    def iterate(self) -> Parts:
        started = time.perf_counter()
        data = self.collect()
        collected = time.perf_counter()
        self.learn(data)
        return {"collect": collected - started, "learn": time.perf_counter() - collected}


class PlainMAPPO(PlainLoop):
    """MAPPO on simple_spread in plain PyTorch."""

    def __init__(self, ours: PPO, seed: int) -> None:
        super().__init__(seed)
        low, high = (torch.tensor(bound) for bound in (ours.spec.action_low, ours.spec.action_high))
        settings = plain_mappo.Settings(
            common_reward=False, gae_lambda=0.9, value_clip=None, entropy_coef=0.0, max_grad_norm=5.0,
            normalise_advantages=False, low=low, high=high,
        )  # fmt: skip
        self.learner = plain_mappo.like(ours, settings, fused=True)

    def choose(self, row: Batch) -> None:
        s = self.learner.settings
        mean = self.learner.actor(row["observation"])
        normal = Normal(mean, self.learner.log_std.exp().expand_as(mean), validate_args=False)  # type: ignore[union-attr]
        squash = [TanhTransform(cache_size=1), AffineTransform((s.high + s.low) / 2, (s.high - s.low) / 2)]  # type: ignore[operator]
        policy = TransformedDistribution(normal, squash, validate_args=False)
        row["action"] = torch.minimum(torch.maximum(policy.sample(), s.low), s.high)  # type: ignore[arg-type]
        row["log_prob"] = policy.log_prob(row["action"]).sum(-1)

    def learn(self, data: Batch) -> None:
        orders = (torch.randperm(FRAMES).tensor_split(15) for _ in range(45))
        plain_mappo.learn(self.learner, data, orders, lambda n: torch.zeros(n, 3, data["action"].shape[-1]))


class PlainMADDPG(PlainLoop):
    """MADDPG on simple_spread in plain PyTorch, a network per agent; the replay is one tensor per entry."""

    CAPACITY = 60_000

    def __init__(self, ours: DDPG, seed: int) -> None:
        super().__init__(seed)
        self.low, self.high = (torch.tensor(bound) for bound in (ours.spec.action_low, ours.spec.action_high))
        self.learner = plain_ddpg.like(ours, plain_ddpg.Settings(), fused=True)
        self.kept: Batch = {}
        self.written = 0

    def choose(self, row: Batch) -> None:
        means = [self.learner.output(actor, row, i) for i, actor in enumerate(self.learner.actors)]
        vectors = torch.stack(means, 1)
        row["vector"] = (vectors + 0.1 * torch.randn_like(vectors)).clamp(-1, 1)
        row["action"] = self.low + (self.high - self.low) * (row["vector"] + 1) / 2

    def learn(self, data: Batch) -> None:
        data["action"] = data.pop("vector")
        start = self.written % self.CAPACITY
        for key in ("observation", "state", "action", "reward", "discount", "next_observation", "next_state"):
            rows = data[key].flatten(0, 1)
            self.kept.setdefault(key, torch.zeros(self.CAPACITY, *rows.shape[1:]))[start : start + FRAMES] = rows
        self.written += FRAMES
        for _ in range(UPDATES):
            drawn = torch.randint(min(self.written, self.CAPACITY), (UPDATE_ROWS,))
            self.learner.update({key: x[drawn] for key, x in self.kept.items()})


def rows(repeats: int) -> Iterator[Row]:
    """Ours beside the plain loops, and beside BenchMARL where it is."""
    sharing = partial(maddpg_trainer, **SHARING)
    for name, make, plain, like_theirs in (
        ("MAPPO", mappo_trainer, PlainMAPPO, mappo_trainer),
        ("MADDPG", maddpg_trainer, PlainMADDPG, sharing),
    ):
        found, other = [], []
        for seed in range(2):
            with trained(make, seed) as trainer:
                beside = plain(trainer.algorithm, seed)  # type: ignore[arg-type]
                found.append(in_turns(partial(our_iteration, trainer), beside.iterate, warm_up=1, iterations=3))
            if theirs := peer("BENCHMARL_PYTHON", "benchmarl_peer.py", name.lower()):
                with trained(like_theirs, seed) as trainer:
                    ours = median_of([our_iteration(trainer) for _ in range(4)][1:])
                other.append({"ours": ours, "beside it": theirs})
        sizes = {"batch": "10 × 600", "width": "2×256"}
        yield row_of(f"{name} on simple_spread, beside a plain loop", found, FRAMES, **sizes)
        if other:
            yield row_of(f"{name} on simple_spread, beside BenchMARL", other, FRAMES, **sizes)


@contextmanager
def trained(make: Callable[[Path, int], Trainer], seed: int) -> Iterator[Trainer]:
    """A trainer that writes its log somewhere, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder), seed)
        with trainer.logger.writing(-1):
            yield trainer
        trainer.close()
