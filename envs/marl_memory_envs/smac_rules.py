"""What `Smac` asks of games, and what it is told when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class GameFailure(RuntimeError):
    """A game is gone, hangs, or does not do what it is asked: it must be started anew."""


class Battle(Protocol):
    """What is asked of a game: a part of smacv2's `StarCraft2Env`."""

    def get_env_info(self) -> dict[str, Any]:
        """``n_agents``, ``n_actions``, ``obs_shape``, ``state_shape`` and ``episode_limit``; also before `reset`."""
        ...

    def reset(self) -> Any:
        """Begin an episode.  Nothing returned, or GameFailure: it has not begun."""
        ...

    def step(self, actions: Sequence[int]) -> tuple[float, bool, dict[str, Any]]:
        """Reward, whether the episode is over, info.  An empty info, or GameFailure: the game broke off."""
        ...

    def get_obs(self) -> Sequence[Any]:
        """``[A][F]``."""
        ...

    def get_state(self) -> Any:
        """``[S]``."""
        ...

    def get_avail_actions(self) -> Sequence[Sequence[int]]:
        """``[A][P]``: 1 where allowed; of the dead, only action 0."""
        ...

    def render(self, mode: str) -> Any:
        """A picture ``[H, W, 3]``."""
        ...

    def replay(self) -> bytes:
        """All that was played since this game was made."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Games(Protocol):
    """Where games come from: one is played at a time."""

    def make(self, seed: int) -> Battle:
        """A new game that follows from ``seed`` alone."""
        ...

    def kill(self) -> list[str]:
        """End what the game at hand runs in, at once; the last lines of its output."""
        ...

    def close(self) -> None:
        """End everything."""
        ...
