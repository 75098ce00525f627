"""Memory in multi-agent reinforcement learning: past experience acting on learning as an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Keys", "TaskSpec", "load_policy"]

if TYPE_CHECKING:
    from marl_memory.keys import Keys
    from marl_memory.spec import TaskSpec
    from marl_memory.training.run import load_policy

_HOMES = {"Keys": "marl_memory.keys", "TaskSpec": "marl_memory.spec", "load_policy": "marl_memory.training.run"}


def __getattr__(name: str) -> Any:
    """Load public names when they are first asked for, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
