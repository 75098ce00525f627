"""Which tasks there are, and which can run here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task's name as in ``env=…``, and what stands in its way, if anything."""

    name: str
    missing: str | None


def list_tasks(folder: Path) -> list[Task]:
    """Every config under ``folder`` (the ``env`` group), in order of name."""
    from omegaconf import OmegaConf

    files = sorted(folder.rglob("*.yaml"))
    return [Task(str(f.relative_to(folder).with_suffix("")), _missing(OmegaConf.load(f))) for f in files]


def _missing(config: Any) -> str | None:
    """A task module's ``REQUIRES`` names the packages it needs and the extra that installs each."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config, "factory"):
        return "ready, given env.factory=package.module:function"
    path: str = config.get("factory") or config["_target_"].rpartition(".")[0]
    requires: dict[str, str] = getattr(import_module(path.partition(":")[0]), "REQUIRES", {})
    extras = {extra for package, extra in requires.items() if find_spec(package) is None}
    return f'missing: pip install "marl-memory[{",".join(sorted(extras))}]"' if extras else None
