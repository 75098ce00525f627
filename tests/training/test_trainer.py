"""The trainer's step: each stage at its place, memory absent where there is none, the batch locked, state complete."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDictBase

from marl_memory.algorithms.ppo import PPO
from marl_memory.memory.operator import Bootstrap, Memory, MemoryOperator, Stage
from marl_memory.networks.mlp import MLP
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.clock import SECTIONS
from marl_memory.training.curve import summarise
from marl_memory.training.logging import Logger, MetricsFile
from marl_memory.training.trainer import Schedule, Trainer
from marl_memory_envs.vector import vector_env

SCHEDULE = Schedule(
    total_frames=128, steps=8, checkpoint_every_frames=64, evaluation_every_frames=64, evaluation_episodes=4
)


class Spy(MemoryOperator):
    """Notes when it is called; its state is one counter."""

    stage: ClassVar[Stage]
    writes_on = "update"

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes, self.in_keys, self.out_keys, self.write_keys = notes, [], [], []
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        self.notes.append(self.stage.value)
        return td

    def write(self, td: TensorDictBase) -> None:
        self.notes.append(f"write on {self.writes_on}")
        self.written += 1

    def refresh(self, bootstrap: Bootstrap) -> None:
        self.notes.append("refresh")

    def learn(self) -> dict[str, torch.Tensor]:
        self.notes.append("learn")
        return {"loss/own": torch.tensor(0.5)}

    def clear(self) -> None:
        self.written.zero_()

    def __len__(self) -> int:
        return int(self.written)


def spies(notes: list[str]) -> Memory:
    operators = []
    for stage in [stage for stage in Stage if stage is not Stage.GRADIENT]:  # a deterministic host's
        moment = "collection" if stage is Stage.REWARD else "update"
        kind = type(f"Spy{stage.name}", (Spy,), {"stage": stage, "writes_on": moment})
        operators.append((stage.value, kind(notes)))
    return Memory(operators)


def make(folder: Path, memory: Memory | None = None, seed: int = 0, schedule: Schedule = SCHEDULE) -> Trainer:
    env = vector_env("marl_memory_envs.toy:MaskedDuel", n_envs=4, seed=1, common_reward=True, success="won")
    spec = env.task_spec
    algorithm = PPO(
        spec=spec, network=partial(MLP, hidden=(8,)), seed=seed, centralised_critic=True, share_parameters=True,
        epochs=2, minibatches=2,
    )  # fmt: skip
    return Trainer(
        algorithm=algorithm,
        memory=memory or Memory(),
        env=env,
        evaluation_env=vector_env(
            "marl_memory_envs.toy:MaskedDuel", n_envs=2, seed=2, common_reward=True, success="won"
        ),
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints"),
        logger=Logger(folder, total_frames=schedule.total_frames, tensorboard=False, quiet=True),
        seed=seed,
    )


def test_every_stage_acts_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    trainer = make(tmp_path, spies(notes))
    for name in ("derive_rewards", "compute_advantages", "update", "finish_update"):
        step = getattr(trainer.algorithm, name)
        monkeypatch.setattr(trainer.algorithm, name, lambda *a, _s=step, _n=name: notes.append(_n) or _s(*a))
    row = trainer.step()
    assert row["memory/reward/loss/own"] == 0.5
    assert notes[:8] == ["act"] * 8  # once per vector step, between policy and environment
    on_policy_step = [
        "write on collection", "derive_rewards", "reward", "compute_advantages", "target", "region", "replay",
        *["update"] * 4, "finish_update", *["write on update"] * 4, *["refresh"] * 5,
        *["learn"] * 5,
    ]  # fmt: skip
    assert notes[8:] == on_policy_step


def test_operators_that_change_nothing_equal_no_memory_bit_for_bit(tmp_path: Path) -> None:
    plain, spied = make(tmp_path / "plain"), make(tmp_path / "spied", spies([]))
    for _ in range(3):
        rows = [trainer.step() for trainer in (plain, spied)]
        untimed = [{key: x for key, x in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]
        assert untimed[0] == untimed[1]
    for key, x in plain.algorithm.state_dict().items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, spied.algorithm.state_dict()[key]), key


def test_a_stage_the_host_does_not_have_is_an_error(tmp_path: Path) -> None:
    memory = Memory([("field", type("Field", (Spy,), {"stage": Stage.GRADIENT})([]))])
    with pytest.raises(ValueError, match=r"memory=field acts at the stage 'gradient', which PPO does not have"):
        make(tmp_path, memory)


def test_a_memory_is_part_of_the_state(tmp_path: Path) -> None:
    trainer = make(tmp_path / "a", spies([]))
    trainer.step()
    state = trainer.state_dict()
    again = make(tmp_path / "b", spies([]))
    again.load_state_dict(state)
    assert [len(operator) for operator in again.memory.operators.values()] == [1] * 5
    with pytest.raises(ValueError, match=r"this run has memory=\[\]"):
        make(tmp_path / "c").load_state_dict(state)


def test_the_batch_is_locked_and_collected_leaves_stay_what_they_were(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batch, _ = trainer.collector.collect()
    with pytest.raises(RuntimeError, match=r"[Ll]ock"):
        batch.set("new", torch.zeros(batch.batch_size))
    collected = {key: batch.get(key).clone() for key in batch.keys(True, True) if "learn" not in key}
    trainer.algorithm.derive_rewards(batch)
    trainer.algorithm.compute_advantages(batch)
    for minibatch in trainer.algorithm.minibatches(batch):
        trainer.algorithm.update(minibatch)
    assert all(torch.equal(batch.get(key), x) for key, x in collected.items())


def test_a_run_evaluates_checkpoints_and_keeps_the_best(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.run()
    metrics = MetricsFile(tmp_path / "metrics.csv")
    assert metrics.column("evaluation/return")[0] == [0.0, 64.0, 128.0]
    assert metrics.column("evaluation/episodes")[1] == [4.0, 4.0, 4.0]
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert [c.meta["frames"] for c in folder.scheduled()] == [128, 64, 0]
    best = folder.named("best")
    assert best is not None
    scores = list(zip(metrics.column("evaluation/success")[1], metrics.column("evaluation/return")[1], strict=True))
    assert (best.meta["evaluation/success"], best.meta["evaluation/return"]) == max(scores)


def test_evaluation_leaves_the_run_untouched(tmp_path: Path) -> None:
    quiet, evaluated = make(tmp_path / "a"), make(tmp_path / "b")
    for _ in range(2):
        quiet.step()
        evaluated.step()
        assert evaluated.evaluate()["evaluation/episodes"] == 4
    for key, x in quiet.algorithm.state_dict().items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, evaluated.algorithm.state_dict()[key]), key
    assert quiet.collector.batch is not None
    assert evaluated.collector.batch is not None
    assert torch.equal(quiet.collector.batch["next", "state"], evaluated.collector.batch["next", "state"])


def test_a_shorter_stop_changes_no_schedule(tmp_path: Path) -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "stop_at_frames": 64})
    trainer = make(tmp_path, schedule=schedule)
    trainer.run()
    assert trainer.frames == 64
    (group,) = trainer.algorithm.optimiser.param_groups
    assert group["lr"] == pytest.approx(1e-3 * (1 - 32 / 128))


@pytest.mark.parametrize("key", ["total_frames", "steps", "checkpoint_every_frames", "stop_at_frames"])
def test_a_schedule_needs_positive_numbers(key: str) -> None:
    with pytest.raises(ValueError, match=rf"training\.{key}=0 must be a whole number of at least 1"):
        Schedule(**{**vars(SCHEDULE), key: 0})


SLEEP = 0.02


class Slow(Spy):
    """An operator that takes its time."""

    stage = Stage.ACT

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        time.sleep(SLEEP)
        return td

    def write(self, td: TensorDictBase) -> None:
        time.sleep(5 * SLEEP)


def slowed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every part that has a section sleep a different while."""
    for owner, name, seconds in (
        (trainer.collector.env, "step_and_maybe_reset", SLEEP),  # 8 times an iteration
        (trainer.algorithm, "finish_update", 10 * SLEEP),
        (trainer.evaluation_env, "reset", 15 * SLEEP),
        (trainer.checkpoints, "save", 3 * SLEEP),
        (trainer.logger, "log", 20 * SLEEP),
    ):
        then = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _t=then, _s=seconds, **k: (time.sleep(_s), _t(*a, **k))[1])


def test_every_row_tells_where_the_time_went_and_a_run_forgets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, Memory([("slow", Slow([]))]))
    slowed(trainer, monkeypatch)
    started = time.perf_counter()
    trainer.run()
    elapsed = time.perf_counter() - started
    metrics = MetricsFile(tmp_path / "metrics.csv")
    spent = {name: metrics.column(f"time/{name}") for name in SECTIONS}
    assert all(frames == [0.0, 32.0, 64.0, 96.0, 128.0] for frames, _ in spent.values())  # every row, every section
    total = {name: sum(seconds) for name, (_, seconds) in spent.items()}
    assert sum(total.values()) == pytest.approx(elapsed, rel=0.01)
    saves = len(metrics.column("evaluation/return")[0]) - 1 + 2  # scheduled ones at 0, 64, 128, and at least one best
    least = {
        "environment": 4 * 8 * SLEEP, "memory": 4 * (8 + 5) * SLEEP, "learn": 4 * 10 * SLEEP,
        "evaluate": 3 * 15 * SLEEP, "logging": 5 * 20 * SLEEP, "checkpoint": saves * 3 * SLEEP,
    }  # fmt: skip
    for name, seconds in least.items():
        assert seconds < total[name] < seconds + 0.4 * sum(least.values()), name
    row = metrics.rows[2]
    iteration = sum(float(row[f"time/{name}"]) for name in ("environment", "policy", "memory", "learn"))
    assert float(row["time/frames_per_second"]) == pytest.approx(32 / iteration)


def test_no_operator_costs_no_time(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.run()
    assert set(MetricsFile(tmp_path / "metrics.csv").column("time/memory")[1]) == {0.0}


def test_the_summary_shares_out_the_whole_time(tmp_path: Path) -> None:
    make(tmp_path).run()
    found = dict(re.findall(r"(\w+) (\d+\.\d)%", summarise(tmp_path, finished=True)))
    names = ["environment", "policy", "update", "memory", "evaluation", "checkpoints", "logging", "other"]
    assert list(found) == names
    assert sum(map(float, found.values())) == pytest.approx(100, abs=0.5)
    assert float(found["update"]) > 0 and found["memory"] == "0.0"
