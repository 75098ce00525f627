"""Which tasks there are, and which can run here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task's name as in ``env=…``, the extra that installs it (if it needs one), and whether it can run here."""

    name: str
    extra: str
    ready: bool
    hint: str


def list_tasks(folder: Path) -> list[Task]:
    """Every config under ``folder`` (the ``env`` group), in order of name."""
    from omegaconf import OmegaConf

    files = sorted(folder.rglob("*.yaml"))
    return [_task(str(f.relative_to(folder).with_suffix("")), OmegaConf.load(f)) for f in files]


def _task(name: str, config: Any) -> Task:
    """A task module's ``REQUIRES`` names the packages it needs and the extra that installs each."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config, "factory"):
        return Task(name, "", True, "ready, given env.factory=package.module:function")
    path: str = config.get("factory") or config["_target_"].rpartition(".")[0]
    requires: dict[str, str] = getattr(import_module(path.partition(":")[0]), "REQUIRES", {})
    extra = ",".join(sorted(set(requires.values())))
    if not all(find_spec(package) for package in requires):
        return Task(name, extra, False, f'missing: pip install "marl-memory[{extra}]"')
    kwargs = config.get("kwargs") or {}
    asked = [f"env.kwargs.{key}=…" for key in kwargs if OmegaConf.is_missing(kwargs, key)]
    return Task(name, extra, True, f"ready, given {' and '.join(asked)}" if asked else "ready")
