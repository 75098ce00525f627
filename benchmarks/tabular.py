"""`Reflection` on tasks that are tables: its confidence everywhere, and where that is right, exactly.

python -m benchmarks.tabular runs/reflection 3    # Four Rooms with and without, on seeds 0 to 2, and what came of it
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from marl_memory.memory.reflection import Reflection

FOUR_ROOMS = [
    "env=toy/four_rooms",
    "algorithm=ppo",
    "training.n_envs=16",
    "training.steps=128",
    "training.total_frames=61_440",
    "training.checkpoint_every_frames=61_440",
    "training.evaluation_every_frames=20_480",
    "training.evaluation_episodes=16",
    "network.hidden=[64,64]",
    "logger.quiet=true",
    "logger.tensorboard=false",
]


UP, RIGHT, DOWN, LEFT = range(4)


class Reflected(NamedTuple):
    """What memory thinks of S states and P actions.

    Args:
        confidence: ``[S, P]``, see `confidence_logit`.
        mode: ``[S]``, the action that it would take.
    """

    confidence: np.ndarray
    mode: np.ndarray

    @property
    def of_mode(self) -> np.ndarray:
        """``[S]``: the confidence by which it acts or not."""
        return self.confidence[np.arange(len(self.mode)), self.mode]


@torch.no_grad()
def reflected(operator: Reflection, rules: Any) -> Reflected:
    """Memory's confidence in every state of a task that is its tables."""
    views = torch.from_numpy(rules.views)
    states, count = len(views), rules.spec.action_size
    net, mask = operator.networks, torch.ones(states, 1, count, dtype=torch.bool)
    seen = net.seen(views)
    each = [net.both(seen, mask, torch.full((states, 1), action)).logit for action in range(count)]
    mode = net.both(seen, mask).action
    return Reflected(torch.cat(each, 1).sigmoid().numpy(), mode.squeeze(1).numpy())


@torch.no_grad()
def probabilities(actor: Any, rules: Any) -> np.ndarray:
    """π ``[S, P]`` of a stochastic actor."""
    views = torch.from_numpy(rules.views)
    mask = torch.ones(len(views), 1, rules.spec.action_size, dtype=torch.bool)
    k = rules.spec.keys
    td = TensorDict({k.observation: views, k.action_mask: mask}, batch_size=(len(views),))
    return actor.distribution(td).log_probs.exp().squeeze(1).double().numpy()


def advantages(tables: Any, policy: np.ndarray, gamma: float) -> np.ndarray:
    """A^π ``[S, P]`` of a policy ``[S, P]``, by solving Bellman's linear equations (without a time limit)."""
    count = len(tables.terminal)
    goes_on = ~tables.terminal
    reward = (tables.rewards * tables.odds).sum(-1)
    moves = np.zeros((*reward.shape, count))
    for k, odds in enumerate(tables.odds):
        after = tables.successors[..., k]
        np.add.at(moves, (*np.indices(after.shape), after), odds * goes_on[after])
    mean_reward, mean_moves = (policy * reward).sum(1), (policy[..., None] * moves).sum(1)
    values = np.linalg.solve(np.eye(count) - gamma * mean_moves, mean_reward)
    return reward + gamma * moves @ values - values[:, None]


def inclusion(found: Reflected, advantage: np.ndarray, terminal: np.ndarray, kappa: float) -> tuple[float, float]:
    """Which share of the states memory would act in, and in which share of these that is no worse than the policy.

    Args:
        found: see `reflected`.
        advantage: ``[S, P]``, A^π.
        terminal: ``[S]``.
        kappa: κ.
    """
    acts = (found.of_mode > kappa) & ~terminal
    right = advantage[np.arange(len(acts)), found.mode] >= -1e-9
    return float(acts[~terminal].mean()), float(right[acts].mean()) if acts.any() else float("nan")


@cache
def walked(blame_decay: float, n_envs: int = 16, steps: int = 64) -> tuple[Reflection, Any]:
    """A memory of walks along the cliff's edge that stumble now and then, and fall to their end.

    Args:
        blame_decay: see `Reflection`.
        n_envs, steps: of each batch.
    """
    from marl_memory_envs.toy.cliff_walking import CliffWalking, vector_env

    rules = CliffWalking(cliff="terminate")
    env = vector_env(n_envs=n_envs, seed=0, cliff="terminate")
    k, generator = rules.spec.keys, torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"n_envs": n_envs, "batch_steps": steps, "hidden": (64, 64), "lr": 2e-3, "alike": 200}
    operator = Reflection(spec=rules.spec, **sizes, off_policy=True, blame_decay=blame_decay)
    td = env.reset()
    for _ in range(8):
        rows = []
        for _ in range(steps):
            place = td.get(k.observation)
            row, far = place[..., :3].sum(-1), place[..., 3:].sum(-1) >= 11
            edge = torch.where(far, DOWN, torch.where(row == 3, UP, torch.where(row < 2, DOWN, RIGHT)))
            stumbles = torch.rand(edge.shape, generator=generator) < 0.15
            td.set(k.action, torch.where(stumbles, torch.randint(4, edge.shape, generator=generator), edge))
            operator(td)
            stepped, td = env.step_and_maybe_reset(td)
            rows.append(stepped)
        collected: Any = torch.stack(rows)
        operator.write(collected)
        operator.learn()
    return operator, rules


def train(folder: Path, *overrides: str) -> None:
    """A run in ``folder``; one that is there already is left as it is."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from marl_memory.cli import config_dir
    from marl_memory.training.run import release, start

    if (folder / "run.json").exists():
        return
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [*overrides, f"run_folder={folder}"]), resolve=True)
    del config["run_folder"]
    trainer = start(config, folder)
    try:
        trainer.run()
    finally:
        trainer.close()
        release(folder)


def column(folder: Path, name: str) -> tuple[list[float], list[float]]:
    """Frames and values of a metric of a run."""
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(name)]
    return [float(row["frames"]) for row in rows], [float(row[name]) for row in rows]


def four_rooms(folder: Path, seeds: int) -> list[dict[str, float]]:
    """Train Four Rooms with and without memory; what each seed gave."""
    from marl_memory.training.run import load_acting
    from marl_memory_envs.toy.four_rooms import FourRooms

    found, rules = [], FourRooms()
    for seed in range(seeds):
        for arm, memory in (("host", "memory=[]"), ("reflection", "memory=[reflection]")):
            train(folder / f"{arm}_{seed}", *FOUR_ROOMS, memory, f"seed={seed}")
        host, mine = folder / f"host_{seed}", folder / f"reflection_{seed}"
        actor, operators = load_acting(mine, checkpoint="last")
        operator: Any = operators.operators["reflection"]
        advantage = advantages(rules.tables, probabilities(actor, rules), 0.99)
        acts, right = inclusion(reflected(operator, rules), advantage, rules.tables.terminal, operator.threshold.value)
        share = column(mine, "memory/reflection/share")[1]
        found.append(
            {
                "host": float(np.mean(column(host, "train/return")[1])),
                "reflection": float(np.mean(column(mine, "train/return")[1])),
                "host_end": column(host, "evaluation/return")[1][-1],
                "alone_end": column(mine, "evaluation/return")[1][-1],
                "with_memory_end": column(mine, "evaluation_with_memory/return")[1][-1],
                "host_length": column(host, "train/length")[1][-1],
                "reflection_length": column(mine, "train/length")[1][-1],
                "share_early": float(np.mean(share[: len(share) // 3])),
                "share_late": float(np.mean(share[-(len(share) // 3) :])),
                "states_acted_in": acts,
                "of_these_no_worse": right,
            }
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, row in enumerate(four_rooms(Path(sys.argv[1]), int(sys.argv[2]))):
        print(f"seed {number}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
