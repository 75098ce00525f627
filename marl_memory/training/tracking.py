"""Weights & Biases, where a run asks for it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marl_memory.training.checkpoint import naming, write_atomically

MODES = ("offline", "online")


def check_mode(mode: str | None) -> None:
    """Make sure that ``logger.wandb`` can be had; nothing is imported for None.

    Raises:
        ValueError: for another mode than None, ``offline`` and ``online``.
        ImportError: if W&B is not installed.
    """
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(f"logger.wandb={mode!r} must be null, offline or online")
    if not hasattr(_import(mode), "init"):
        raise ImportError(_missing(mode))  # a folder called wandb lies where Python looks


def begin(folder: Path, mode: str, config: Mapping[str, Any]) -> Any:
    """Begin W&B's run of ``folder``, or go on with it under the id that is kept there.

    Args:
        folder: the run's folder; W&B writes to its ``wandb``.
        mode: ``offline`` or ``online``.
        config: the run's resolved configuration.

    Raises:
        ValueError: if W&B does not let it begin, as without a login.
        NotWrittenError: if the folder can not be written.
    """
    wandb, file = _import(mode), folder / "wandb" / "run_id"
    with naming(file):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, uuid.uuid4().hex[:8])
        run_id = file.read_text().strip()
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "marl_memory"),
            name="/".join(folder.resolve().parts[-3:]),
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(config),
            allow_val_change=True,  # training.total_frames may, when a run is resumed
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is the display's
        )
    except wandb.Error as error:
        raise ValueError(f"logger.wandb={mode}: W&B did not begin: {' '.join(str(error).split())}") from error


def log(run: Any, row: Mapping[str, float]) -> None:
    """Send one row, unless W&B has it already: rows since the last checkpoint come again, bit-equal, after a resume."""
    if row["frames"] >= run.step:
        run.log(dict(row), step=int(row["frames"]))


def _import(mode: str) -> Any:
    if mode == "offline":  # W&B's reports of its own errors ask for a host as soon as it is imported
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ImportError(_missing(mode)) from error
    return wandb


def _missing(mode: str) -> str:
    return f'logger.wandb={mode} needs Weights & Biases: pip install "marl-memory[wandb]"'
