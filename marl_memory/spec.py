"""What a learner must know of a task: a frozen record, built by the environment, saved with every run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from marl_memory.keys import Keys


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Spaces, state and conventions of one task.  Only plain tuples and scalars, so it is JSON and hashable.

    Args:
        name: the task, as in ``smax/3m``.
        agents: the agents' names, in the order of the agent dimension A.
        observation_sizes: unpadded observation features of each agent.
        action_sizes: number of actions (discrete) or of action dimensions (continuous) of each agent, unpadded.
        continuous: whether actions are real vectors (else: one integer each).
        action_low, action_high: bounds of each agent's action, padded to the widest; continuous tasks only.
        state_size: features of ``state``.
        own_state: whether the task has a global state of its own; else ``state`` is all observations, concatenated.
        common_reward: whether all agents receive one reward (the reward then counts for an agent after its death too).
        has_success: whether ``("next", "success")`` tells that an episode was won.
        measures: names of the M numbers that ``("next", "measures")`` holds at an episode's end, as in ``dead_allies``.
        has_dropped: whether ``("next", "dropped")`` tells that an episode broke off because its simulator failed: it is
            truncated where it stood, and enters no statistic.
        max_episode_steps: the time limit in environment steps, where the task declares one.
        action_embedding: one vector per action (for structured transport costs), where the task offers it.
        picture: channels, height and width of each agent's observation where that is a picture: the observation's
            features, uint8, are then its numbers in this order, channel by channel and row by row.
        frame_stack: how many pictures, oldest first, make one observation: K; the channels are theirs, one after the
            other.  At the start of an episode the missing ones are the first repeated, or zeros.
        clip_rewards: learners read rewards clipped to ± this; what is reported is never clipped.  None: as they are.
        group: the name of the agents' group (see `Keys`).

    Raises:
        ValueError: for sizes that do not agree with the number of agents or with the picture, or bounds missing or out
            of place.
    """

    name: str
    agents: tuple[str, ...]
    observation_sizes: tuple[int, ...]
    action_sizes: tuple[int, ...]
    continuous: bool
    state_size: int
    own_state: bool
    common_reward: bool
    has_success: bool = False
    measures: tuple[str, ...] = ()
    has_dropped: bool = False
    max_episode_steps: int | None = None
    action_low: tuple[tuple[float, ...], ...] | None = None
    action_high: tuple[tuple[float, ...], ...] | None = None
    action_embedding: tuple[tuple[float, ...], ...] | None = None
    picture: tuple[int, int, int] | None = None
    frame_stack: int = 1
    clip_rewards: float | None = None
    group: str = "agents"

    def __post_init__(self) -> None:
        count = len(self.agents)
        for key in ("observation_sizes", "action_sizes"):
            if len(getattr(self, key)) != count:
                raise ValueError(f"{key}={getattr(self, key)} must name one size for each of the {count} agents")
        if count == 0:
            raise ValueError("agents=() must name at least one agent")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps={self.max_episode_steps} must be at least 1, or None")
        if self.continuous != (self.action_low is not None and self.action_high is not None):
            raise ValueError(
                f"continuous={self.continuous} needs action_low and action_high set exactly when it is True"
            )
        if self.clip_rewards is not None and not self.clip_rewards > 0:
            raise ValueError(f"clip_rewards={self.clip_rewards} must be positive, or None")
        channels, pixels = (self.picture[0], math.prod(self.picture)) if self.picture else (1, 0)
        if self.picture and (set(self.observation_sizes) != {pixels} or self.own_state):
            raise ValueError(
                f"picture={self.picture} needs observation_sizes of {pixels} for every agent and own_state=False; "
                f"they are {self.observation_sizes} and {self.own_state}"
            )
        if self.frame_stack < 1 or channels % self.frame_stack:
            raise ValueError(
                f"frame_stack={self.frame_stack} must divide the {channels} channels of picture={self.picture}"
            )

    @classmethod
    def of_sizes(
        cls,
        *,
        observation_size: int,
        n_actions: int | None = None,
        action_low: tuple[float, ...] | None = None,
        action_high: tuple[float, ...] | None = None,
        agents: int = 1,
        group: str = "agents",
    ) -> TaskSpec:
        """The task of one agent, or of several that are alike, by its sizes alone: for a loop of one's own.

        Args:
            observation_size: F.
            n_actions: P of a task with discrete actions.
            action_low, action_high: ``[P]`` bounds of an action, of a task with continuous ones.
            agents: A.
            group: the name of the agents' group.

        Raises:
            ValueError: unless either ``n_actions``, or both bounds (of one length) are given.
        """
        low, high = action_low or (), action_high or ()
        if (n_actions is None) != bool(low) or len(low) != len(high):
            raise ValueError(
                "give n_actions (discrete actions), or action_low and action_high with one bound for each dimension of "
                f"an action; got n_actions={n_actions}, action_low={action_low}, action_high={action_high}"
            )
        return cls(
            name="own loop",
            agents=tuple(f"{group}_{i}" for i in range(agents)),
            observation_sizes=(observation_size,) * agents,
            action_sizes=(len(low) if n_actions is None else n_actions,) * agents,
            continuous=n_actions is None,
            state_size=observation_size * agents,
            own_state=False,
            common_reward=False,
            action_low=(tuple(low),) * agents if low else None,
            action_high=(tuple(high),) * agents if high else None,
            group=group,
        )

    @property
    def n_agents(self) -> int:
        """A, the number of agents."""
        return len(self.agents)

    @property
    def observation_size(self) -> int:
        """F, the widest agent's observation features."""
        return max(self.observation_sizes)

    @property
    def action_size(self) -> int:
        """P, the widest agent's number of actions (discrete) or action dimensions (continuous)."""
        return max(self.action_sizes)

    @property
    def observation_valid(self) -> tuple[tuple[bool, ...], ...]:
        """``[A, F]``: False marks padding."""
        return _valid(self.observation_sizes)

    @property
    def action_valid(self) -> tuple[tuple[bool, ...], ...]:
        """``[A, P]``: False marks padding."""
        return _valid(self.action_sizes)

    @cached_property
    def keys(self) -> Keys:
        """The TensorDict entries of this task: asked for at every step, and made once."""
        return Keys(self.group)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskSpec:
        """The inverse of `to_dict`, also after a trip through JSON (which turns tuples into lists)."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ValueError(f"unknown task fields {sorted(unknown)}; known are {sorted(known)}")
        return cls(**{key: _tuples(value) for key, value in data.items()})


def _valid(sizes: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
    width = max(sizes)
    return tuple(tuple(i < size for i in range(width)) for size in sizes)


def _tuples(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    items: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
    return tuple(_tuples(item) for item in items)
