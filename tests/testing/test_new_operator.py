"""A new operator is one file and one config: it trains by the command line, and the contract holds it."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import pytest

from marl_memory import cli
from marl_memory.testing import check_memory_operator
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.logging import MetricsFile

MODULE = '''
import torch
from marl_memory.keys import Entry
from marl_memory.memory.operator import MemoryOperator, Stage, put


class MeanGradient(MemoryOperator):
    """Mixes the action gradient with each agent's running mean."""

    stage, writes_on = Stage.GRADIENT, "update"
    fresh = ("learn", "mean_gradient", "fresh")

    def __init__(self, *, spec, seed, share=0.1, strength=1.0, strength_final=None):
        super().__init__(strength=strength, strength_final=strength_final)
        k = self.keys = spec.keys
        self.spec, self.share = spec, share
        self.in_keys = [k.action_gradient, k.alive] + ([] if spec.continuous else [k.action_mask])
        self.out_keys, self.write_keys = [k.action_gradient, self.fresh], [*self.in_keys, self.fresh]
        self.register_buffer("valid", torch.tensor(spec.action_valid), persistent=False)
        self.register_buffer("mean", torch.zeros(spec.n_agents, spec.action_size))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64))

    @property
    def entries(self):
        return {self.fresh: Entry((self.spec.n_agents, self.spec.action_size))}

    def allowed(self, td):
        valid = self.valid if self.spec.continuous else td.get(self.keys.action_mask)
        return valid & td.get(self.keys.alive).unsqueeze(-1)

    def forward(self, td):
        gradient = td.get(self.keys.action_gradient)
        put(td, self.fresh, gradient)
        share = self.strength * self.share * (self.allowed(td) & (self.writes > 0))
        put(td, self.keys.action_gradient, torch.where(share > 0, gradient.lerp(self.mean, share), gradient))
        return td

    def write(self, td):
        allowed = self.allowed(td)
        gradient = torch.where(allowed, td.get(self.fresh), 0.0).reshape(-1, *self.mean.shape).sum(0)
        self.mean.lerp_(gradient / allowed.reshape(-1, *self.mean.shape).sum(0).clamp(min=1), 0.1)
        self.writes += 1

    def clear(self):
        self.mean.zero_()
        self.writes.zero_()

    def __len__(self):
        return min(int(self.writes), 1)

    def metrics(self, td):
        return {"rows": torch.tensor(float(len(self))), "size": self.mean.norm()}
'''
CONFIG = """# @package memory.mine
_target_: my_operator.MeanGradient
share: 0.5
strength: 1.0
strength_final: null
"""
ARGUMENTS = (
    "env=toy/rendezvous algorithm=maddpg memory=[mine] algorithm.warmup_frames=64 algorithm.batch_size=32 "
    "algorithm.capacity=1000 algorithm.updates_per_frame=0.25 training.n_envs=4 training.steps=16 "
    "training.total_frames=256 training.checkpoint_every_frames=256 training.evaluation_every_frames=256 "
    "training.evaluation_episodes=4 network.hidden=[16,16] logger.tensorboard=false logger.quiet=true run_folder=run"
).split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One file and one config, in the current folder."""
    (tmp_path / "my_operator.py").write_text(MODULE)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "mine.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_it_trains_acts_and_is_saved(folder: Path) -> None:
    cli.main(["train", "--config-dir", ".", *ARGUMENTS])
    state = CheckpointFolder(folder / "run" / "checkpoints").scheduled()[0].load()["memory"]["mine"]
    assert set(state) == {"mean", "writes"}
    assert int(state["writes"]) == 48  # updates of the 192 frames behind the warm-up
    assert state["mean"].any()
    assert MetricsFile(folder / "run" / "metrics.csv").column("memory/mine/size")[1][-1] > 0


def test_it_keeps_the_contract(folder: Path) -> None:
    module = importlib.import_module("my_operator")
    check_memory_operator(partial(module.MeanGradient, share=0.5), capacity=1)
    sys.modules.pop("my_operator")
