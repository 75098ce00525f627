"""The scripts of examples/torchrl, beside what they are without the lines that add memory."""

from __future__ import annotations

import functools
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "torchrl"
MARK = "  # memory"
SIZES = {
    "ddpg": {"frames": 448, "updates": 16},
    "td3": {"frames": 448, "updates": 24},
    "ppo": {"frames": 1600, "steps": 400, "epochs": 2},
    "mappo": {"frames": 600, "steps": 150, "epochs": 2},
}
"""Enough for a memory to have the 1 000 rows at which it starts to act."""


def code(name: str, *, stock: bool) -> CodeType:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    return compile("\n".join(line for line in lines if not (stock and line.endswith(MARK))), f"{name}.py", "exec")


@functools.cache
def run(name: str, strength: float | None) -> dict[str, Any]:
    """What `train` had at its end; without its marked lines if ``strength`` is None."""
    if name == "mappo":
        pytest.importorskip("mpe2")
    module: dict[str, Any] = {"__name__": name}
    exec(code(name, stock=strength is None), module)
    return module["train"](strength=1.0 if strength is None else strength, **SIZES[name])


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the losses' parameters, those of target networks too, have the same bits."""
    ours, theirs = ([*x["loss"].parameters(), *x["loss"].buffers()] for x in (a, b))
    assert len(ours) == len(theirs) > 4
    return all(map(torch.equal, ours, theirs))


def test_each_script_is_tested_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_memory_is_a_handful_of_lines_and_without_them_nothing_is_ours(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith(MARK)]
    assert sum("import" in line for line in marked) == 2
    assert len(marked) <= 2 + 6
    assert "marl_memory" not in "\n".join(line for line in lines if line not in marked)


@pytest.mark.parametrize("name", SIZES)
def test_strength_0_gives_the_stock_script_bit_for_bit(name: str) -> None:
    zero = run(name, 0.0)
    assert len(zero["field"] if "field" in zero else zero["region"].region) >= 1000
    assert same(zero, run(name, None))


@pytest.mark.parametrize("name", SIZES)
def test_memory_is_used(name: str) -> None:
    there = run(name, 1.0)
    metrics = there["actor"][-1].metrics() if "field" in there else there["region"].metrics(there["batch"])
    assert metrics["rows"] >= 1000 and metrics["strength"] == 1 and metrics["mass"] > 0
    assert metrics["beta" if "field" in there else "omega"] > 0.01
    assert not same(there, run(name, None))
