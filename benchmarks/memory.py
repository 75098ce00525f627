"""What memory costs its hosts: an update with an operator beside the same update without."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.end_to_end import our_trainer
from benchmarks.measure import Row, calmest, ratio, seconds, turns
from benchmarks.neighbours import ROWS, states
from benchmarks.off_policy import BATCH, collected, task
from marl_memory.algorithms.ppo import PPO
from marl_memory.algorithms.td3 import TD3
from marl_memory.functional.neighbours import nearest, recall
from marl_memory.memory.barycenter_region import BarycenterRegion
from marl_memory.memory.gradient_field import GradientField
from marl_memory.memory.operator import Memory
from marl_memory.networks.mlp import MLP
from marl_memory.training.iteration import OffPolicyIteration
from marl_memory.training.replay import ReplayRing

UPDATES = 8
SIZES = ((4_096, "exact"), (16_384, "exact"), (131_072, "lists"))


class Updates:
    """TD3 on rows whose observations are HalfCheetah's, with or without a memory.

    Args:
        field: the memory; None for none.
    """

    def __init__(self, field: GradientField | None) -> None:
        spec = task(1, 17, 6)
        self.host = TD3(spec=spec, network=partial(MLP, hidden=(256, 256)), seed=0)
        self.memory = Memory() if field is None else Memory([("field", field)])
        self.replay = ReplayRing(
            capacity=ROWS,
            n_envs=8,
            batch_size=BATCH,
            entries=self.host.replay_keys,
            learn_entries=self.host.learn_entries | self.memory.entries,
            keys=self.host.keys,
            seed=0,
        )
        batch = collected(spec, ROWS // 8, 8)
        observation = states()[1].view(ROWS // 8, 8, 1, 17)
        batch.get(spec.keys.observation).copy_(observation)
        batch.get(("next", *spec.keys.observation)).copy_(observation.roll(-1, 0))
        self.replay.extend(batch)

    algorithm = property(lambda self: self.host)

    def step(self) -> TensorDictBase:
        """One update, as `OffPolicyIteration` makes it."""
        rows = self.replay.draw()
        OffPolicyIteration.update(self, rows)  # type: ignore[arg-type]
        return rows

    def steps(self) -> None:
        for _ in range(UPDATES):
            self.step()


def filled(rows: int, search: str, **options: Any) -> tuple[Updates, GradientField]:
    """A host whose memory is full."""
    spec = task(1, 17, 6)
    field = GradientField(spec=spec, capacity=rows, search=search, **options)
    with_memory = Updates(field)
    store, keys = field.trace.store, states()[1]
    payload = torch.randn(1, 4096, 1, 21, generator=torch.Generator().manual_seed(0))
    for first in range(0, rows, 4096):
        store.write(keys[:, first : first + 4096], payload, torch.ones(1, 4096, 1, dtype=torch.bool))
    for _ in range(2 * UPDATES):
        with_memory.step()
    return with_memory, field


def gradient_field(repeats: int) -> Iterator[Row]:
    """TD3 updates (mean over the policy delay) with / without; and a write of 256 rows / an update."""
    for rows, search in SIZES:
        (ours, field), plain = filled(rows, search), Updates(None)
        timed = turns(ours.steps, plain.steps, repeats)
        used = field.metrics(ours.step())
        details = {"rows": len(field), "strength": round(float(used["beta"]), 4)}
        if search == "lists":
            queries, store = states()[0], field.trace.store
            exact = nearest(queries * store.scale, store.scaled, 16)[1]
            details["recall@16"] = round(float(recall(store.nearest(queries).rows, exact)), 3)
        yield ratio(f"TD3 update with GradientField, {rows} rows", timed, calls=UPDATES, batch=BATCH, **details)
        if rows == SIZES[0][0]:
            td = ours.step()
            writes = turns(lambda field=field, td=td: written(field, td), plain.steps, repeats)
            yield ratio("write of 256 rows, share of an update", writes, calls=UPDATES, batch=BATCH)
    for rows, search in SIZES:
        (ours, field), plain = filled(rows, search, keep_neighbours=10_000), Updates(None)
        for _ in range(3 * ROWS // (BATCH * UPDATES)):  # until most rows of the replay were drawn by an actor's update
            ours.steps()
        timed = turns(ours.steps, plain.steps, repeats)
        name = f"TD3 update with GradientField, {rows} rows, neighbours kept"
        yield ratio(name, timed, calls=UPDATES, batch=BATCH, rows=len(field))


def written(field: GradientField, td: TensorDictBase) -> None:
    """The writes of as many updates as are timed beside them: one with every update of the actor."""
    for _ in range(UPDATES // 2):
        field.write(td)


def barycenter_region(repeats: int) -> Iterator[Row]:
    """An iteration of PPO with / without."""
    from marl_memory_envs.vector import vector_env

    make = partial(vector_env, factory="marl_memory_envs.box2d:lunar_lander")
    body = partial(MLP, hidden=(64, 64), activation="tanh")
    learner = partial(PPO, network=body, epochs=10, minibatches=32, lr=3e-4)
    yield from _iterations("PPO on LunarLander", make, learner, {"n_envs": 8, "steps": 256}, repeats)


def barycenter_region_smax(repeats: int) -> Iterator[Row]:
    """An iteration of MAPPO on SMAX 3m with / without."""
    from marl_memory_envs.smax import vector_env

    learner = partial(PPO, network=partial(MLP, hidden=(128, 128)), centralised_critic=True, share_parameters=True)
    yield from _iterations("MAPPO on SMAX 3m", partial(vector_env, map="3m"), learner, {"n_envs": 64, "steps": 128}, 3)


def _iterations(name: str, make: Any, learner: Any, sizes: dict[str, int], repeats: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        plain = our_trainer(make, learner, Path(folder) / "plain", 0, **sizes)
        region = BarycenterRegion(spec=plain.algorithm.spec)
        ours = our_trainer(make, learner, Path(folder) / "memory", 0, memory=Memory([("region", region)]), **sizes)
        for _ in range(2):
            plain.step(), ours.step()
        pairs, kept = calmest(lambda: (seconds(ours.step), seconds(plain.step)), sum, repeats)
        frames = sizes["n_envs"] * sizes["steps"]
        details = {"rows": len(region), "calm turns": kept}
        details["frames/s"] = round(frames / statistics.median(mine for mine, _ in pairs))
        yield Row(f"{name} with BarycenterRegion", [a / b for a, b in pairs], details=details)
        plain.close(), ours.close()
