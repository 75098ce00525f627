"""Multi-agent particle tasks of mpe2."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from pettingzoo.utils.conversions import aec_to_parallel_wrapper

REQUIRES = {"mpe2": "mpe"}


class _Particles(aec_to_parallel_wrapper[str, Any, Any]):
    """mpe2's own conversion, without ``state()``.

    mpe2's state is all observations, computed once more: it adds nothing to the observations laid side by side, which
    is what a task without a state of its own is given.
    """

    @property
    def state_space(self) -> None:
        return None

    def state(self) -> np.ndarray:
        raise NotImplementedError("mpe2 has no state beyond the observations of all agents")


def _make(module: str, kwargs: dict[str, Any]) -> _Particles:
    return _Particles(import_module(f"mpe2.{module}").env(**kwargs))


def simple_spread(**kwargs: Any) -> _Particles:
    """N agents cover N landmarks.

    The reward is ``(1 − local_ratio)`` × the team's + ``local_ratio`` × the agent's own collisions, so it is common
    only with ``local_ratio=0``.
    """
    return _make("simple_spread_v3", kwargs)


def simple_speaker_listener(**kwargs: Any) -> _Particles:
    """One agent sees the goal and speaks, the other moves: unequal observations and actions, one common reward."""
    return _make("simple_speaker_listener_v4", kwargs)


def simple_reference(**kwargs: Any) -> _Particles:
    """Each of two agents knows the other's goal.

    The reward is ``(1 − local_ratio)`` × the mean of both + ``local_ratio`` × the agent's own, so it is common only
    with ``local_ratio=0``.
    """
    return _make("simple_reference_v3", kwargs)


def simple_tag(**kwargs: Any) -> _Particles:
    """Slow adversaries chase a faster agent: a competitive task with unequal observations."""
    return _make("simple_tag_v3", kwargs)
