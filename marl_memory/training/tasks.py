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
    names = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    return [_task(name, load_task(folder, name)) for name in names]


def load_task(folder: Path, name: str) -> Any:
    """A task's config; what it shares with its family, by ``OTHER@_here_`` among its ``defaults``, comes first."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(folder / f"{name}.yaml")
    listed = [other for other in config.pop("defaults", []) if isinstance(other, str)]  # others are of other groups
    shared = [other.removesuffix("@_here_") for other in listed if other.endswith("@_here_")]
    return OmegaConf.merge(*(load_task(folder, other) for other in shared), config)


def _task(name: str, config: Any) -> Task:
    """A task module's ``REQUIRES`` names the packages it needs and the extra that installs each; its
    ``lacking()``, where it has one, says what is missing beside.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config, "factory"):
        return Task(name, "", True, "ready, given env.factory=package.module:function")
    path: str = config.get("factory") or config["_target_"].rpartition(".")[0]
    module = import_module(path.partition(":")[0])
    requires: dict[str, str] = getattr(module, "REQUIRES", {})
    extra = ",".join(sorted(set(requires.values())))
    there = all(find_spec(package) for package in requires)
    lacking = module.lacking() if hasattr(module, "lacking") else ""
    if lacking or not there:
        return Task(name, extra, False, "missing: " + (lacking or f'pip install "marl-memory[{extra}]"'))
    kwargs = config.get("kwargs") or {}
    asked = [f"env.kwargs.{key}=…" for key in kwargs if OmegaConf.is_missing(kwargs, key)]
    asked += [f"env.{key}=…" for key in config if OmegaConf.is_missing(config, key)]
    return Task(name, extra, True, f"ready, given {' and '.join(asked)}" if asked else "ready")
