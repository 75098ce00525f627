"""What the trainer asks of every learner, and how a learner's whole state is saved by name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from marl_memory.algorithms.exploration import EpsilonGreedy, Explorer
from marl_memory.functional.returns import mean_over_living, team_value
from marl_memory.keys import Entries, Keys
from marl_memory.networks.optimiser import FlatAdam
from marl_memory.networks.policy import Policy
from marl_memory.spec import TaskSpec


def check_indicator(spec: TaskSpec, agent_indicator: bool, *, shared: bool) -> None:
    """Raise ValueError if agents are not to be told apart where no network has to: the switch would do nothing."""
    if not agent_indicator and not (shared and spec.n_agents > 1):
        raise ValueError(
            "algorithm.agent_indicator=False has no effect where agents share no network of their own observations: "
            "leave it true"
        )


def check_range(**values: tuple[float, float, float]) -> None:
    """Raise ValueError for an option ``name=(value, low, high)`` that does not lie in [low, high]."""
    for name, (value, low, high) in values.items():
        if not low <= value <= high:
            raise ValueError(f"algorithm.{name}={value!r} must lie in [{low}, {high}]")


def check_positive(**values: float | None) -> None:
    """Raise ValueError for an option that is neither positive nor None."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"algorithm.{name}={value!r} must be positive")


def derive_seed(run_seed: int, *names: str | int) -> int:
    """A 63-bit seed for one component of a run: adding a component changes nobody else's draws."""
    text = "/".join(map(str, (run_seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Algorithm(nn.Module, ABC):
    """A learner: networks, targets, optimisers, schedules and generators behind one ``state_dict``.

    The trainer calls the steps of an update in the paper's order; between them memory operators may act on the batch.
    Learners derive from `OnPolicyAlgorithm` or `OffPolicyAlgorithm`.
    """

    spec: TaskSpec
    gamma: float
    """The discount factor of its returns."""
    actor: Policy
    rescales_rewards: bool = False
    """Whether the unit of ``learn_reward`` changes as a run goes on."""
    stages: ClassVar[frozenset[str]]
    """Where memory can act on this learner: values of `marl_memory.memory.operator.Stage`."""
    actions: ClassVar[frozenset[str]]
    """The kinds of actions it can learn: ``discrete``, ``continuous`` or both."""

    @property
    @abstractmethod
    def learn_entries(self) -> Entries:
        """The ``learn`` entries this learner writes, with the shape that follows the batch dimensions."""

    @property
    def offers(self) -> set[tuple[str, ...]]:
        """Keys of what it writes besides, where a memory asks for it; nothing, unless a learner says so."""
        return set()

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Follow the schedules; ``progress`` in [0, 1] is the share of the run's frames already collected."""

    @abstractmethod
    def derive_rewards(self, batch: TensorDictBase) -> None:
        """Write ``learn_reward`` ``[*B, A, 1]``: the rewards learning uses, before REWARD operators add to them."""

    def clipped_rewards(self, batch: TensorDictBase) -> Tensor:
        """The environment's rewards ``[*B, A, 1]``, clipped where the task says so: what ``learn_reward`` begins as."""
        reward: Tensor = batch.get(("next", *self.spec.keys.reward))
        limit = self.spec.clip_rewards
        return reward if limit is None else reward.clamp(-limit, limit)

    @abstractmethod
    def cut_episodes(self) -> None:
        """Drop what is carried over of running episodes: the environments are about to be reset."""

    @abstractmethod
    def bootstrap_values(self, td: TensorDictBase, generator: Generator | None = None) -> Tensor:
        """Values ``[*B, A, C]`` in units of ``learn_reward``, of the states in ``td``.

        Nothing is drawn, but from a ``generator`` that is lent: a learner that randomises its targets' actions does so
        with it.
        """

    @torch.no_grad()
    def estimate(self, td: TensorDictBase) -> Tensor:
        """What critics expect of greedy play from the states in ``td``: discounted returns ``[*B, A]``, in the units of
        the environment's reward.  The mean over critics; nothing is drawn.
        """
        return self.bootstrap_values(td).mean(-1)

    @property
    def reach(self) -> str:
        """What its critic reads of a team: ``centralized``, else whether agents share it or have one each."""
        critic: Any = self.critic
        if critic.centralised:
            return "centralized"
        return "shared" if critic.banks < self.spec.n_agents else "per_agent"


class OnPolicyAlgorithm(Algorithm):
    """A learner of whole batches ``[T, N]`` that its present policy collected."""

    @abstractmethod
    def check_batch(self, rows: int) -> None:
        """Raise ValueError, before any work starts, if batches of ``rows`` team rows do not fit this learner."""

    @abstractmethod
    def compute_advantages(self, batch: TensorDictBase) -> dict[str, float]:
        """Write advantages and value targets of a batch ``[T, N]``; returns metrics."""

    @abstractmethod
    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """The rows ``[R]`` of each gradient step of this update, in order."""

    @abstractmethod
    def update(self, minibatch: TensorDictBase) -> dict[str, Tensor]:
        """One gradient step; returns scalars, still as tensors (so that nothing waits for them).

        Keys under ``loss/`` and ``grad_norm/`` must be finite: the trainer looks at them once an iteration, and stops.
        """

    @abstractmethod
    def finish_update(self, batch: TensorDictBase) -> None:
        """What follows the last gradient step, such as the running statistics of observations."""


class OffPolicyAlgorithm(Algorithm):
    """A learner of rows ``[B]`` drawn from a replay; the trainer calls the steps of an update in the paper's order."""

    keys: Keys
    behaviour: Explorer | EpsilonGreedy
    """What collects: the actor, and exploration around it."""
    replay: ReplaySettings
    gamma: float
    max_grad_norm: float | None
    updates: int
    """Critic updates since the run began."""

    def set_progress(self, progress: float) -> None:
        """Follow the schedule of exploration."""
        self.behaviour.set_progress(progress)

    def derive_rewards(self, batch: TensorDictBase) -> None:
        """Write ``learn_reward``: the environment's reward."""
        batch.get(self.keys.learn_reward).copy_(self.clipped_rewards(batch))

    def cut_episodes(self) -> None:
        """Start exploration anew."""
        self.behaviour.cut_episodes()

    @property
    @abstractmethod
    def replay_keys(self) -> list[NestedKey]:
        """The entries of a collected batch that it learns from; those under ``next`` included."""

    @property
    @abstractmethod
    def actor_is_due(self) -> bool:
        """Whether the update that began with the last `update_critic` also moves the actor and the targets."""

    @abstractmethod
    def compute_targets(self, rows: TensorDictBase) -> None:
        """Write ``value_target`` ``[B, A, C]``, one for each critic, and ``under_weight`` 1."""

    @abstractmethod
    def update_critic(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """One gradient step of the critics; returns scalars, still as tensors (see `OnPolicyAlgorithm.update`)."""

    @abstractmethod
    def compute_action_gradient(self, rows: TensorDictBase) -> None:
        """Write ``action_gradient`` ``[B, A, P]`` at the actor's present choice, which `update_actor` then moves."""

    @abstractmethod
    def update_actor(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """One gradient step of the actor along ``action_gradient``."""

    @abstractmethod
    def update_targets(self) -> None:
        """Move the target networks towards the present ones."""

    # ------------------------------------------------------------------------------------------ what all of them share

    def write_targets(self, rows: TensorDictBase, next_value: Tensor) -> None:
        r"""$y = r + \gamma\, d\, Q'$ from ``next_value`` ``[B, A, C]`` (under a common reward, the living agents' mean
        for the dead), and ``under_weight`` 1.
        """
        k = self.keys
        if self.spec.common_reward:
            next_value = team_value(next_value, rows.get(("next", *k.alive)))
        discount = rows.get(("next", *k.discount))
        target = torch.addcmul(rows.get(k.learn_reward), discount, next_value, value=self.gamma)
        rows.get(k.value_target).copy_(target)
        rows.get(k.under_weight).fill_(1.0)

    def critic_loss(self, rows: TensorDictBase, value: Tensor, *, apart: bool, huber: bool = False) -> Tensor:
        r"""How far ``value`` ``[B, A, C]`` lies from ``value_target``; writes ``td_error`` where a memory asks for it.

        $$
        L = \sum_c \mathbb{E}\, w\, \ell(\delta_c), \qquad \delta_c = Q_c - y_c, \qquad
        w = \texttt{under\_weight} \text{ where } \delta_c < 0, \text{ else } 1
        $$

        Args:
            rows: of the update.
            value: of the actions taken, with a gradient.
            apart: see `mean_over_living`.
            huber: ℓ is Huber's, δ²/2 up to 1 and |δ| − 1/2 beyond, instead of δ².
        """
        k, alive = self.keys, rows.get(self.keys.alive)
        error = torch.where(alive.unsqueeze(-1), value - rows.get(k.value_target), 0.0)
        if (asked := rows.get(k.td_error, None)) is not None:
            torch.neg(error.detach()[..., : asked.shape[-1]], out=asked)
        weight = torch.where(error < 0, rows.get(k.under_weight), 1.0)
        each = F.huber_loss(error, torch.zeros_like(error), reduction="none") if huber else error.square()
        return mean_over_living(weight * each, alive, apart=apart)

    def descend(self, loss: Tensor, optimiser: FlatAdam, name: str) -> dict[str, Tensor]:
        """One step; the gradient norm before clipping, where there is a limit."""
        optimiser.zero_grad()
        loss.backward()
        optimiser.gather()
        norm = {}
        if self.max_grad_norm is not None:
            (norm[f"grad_norm/{name}"],) = optimiser.clip(self.max_grad_norm)
        optimiser.step()
        return norm


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What an off-policy learner asks of its replay, in rows (a row: one step of one environment, all its agents).

    Args:
        capacity: rows kept; the oldest are overwritten.
        batch_size: rows of each update.
        warmup_frames: frames collected by uniformly random actions before the first update.
        updates_per_frame: gradient steps per collected frame after the warm-up, whatever the number of environments.
        train_every: vector steps between updates.
        storage: ``ram`` or ``memmap`` (files in the run's folder, read as memory).

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    capacity: int
    batch_size: int
    warmup_frames: int
    updates_per_frame: float
    train_every: int
    storage: str

    def __post_init__(self) -> None:
        for name in ("capacity", "batch_size", "train_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be at least 1")
        if self.capacity < self.batch_size:
            raise ValueError(
                f"algorithm.capacity={self.capacity} must hold at least a batch, algorithm.batch_size={self.batch_size}"
            )
        if not self.batch_size <= self.warmup_frames <= self.capacity:
            raise ValueError(
                f"algorithm.warmup_frames={self.warmup_frames} must lie between algorithm.batch_size={self.batch_size} "
                f"and algorithm.capacity={self.capacity}"
            )
        if not self.updates_per_frame > 0:
            raise ValueError(f"algorithm.updates_per_frame={self.updates_per_frame} must be positive")
        if self.storage not in ("ram", "memmap"):
            raise ValueError(f"algorithm.storage={self.storage!r} must be 'ram' or 'memmap'")


def optimiser_state(optimiser: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimiser's slots keyed by parameter *name*: an order of construction can not mix them up."""
    return {name: dict(optimiser.state[p]) for name, p in named.items() if p in optimiser.state}


def load_optimiser_state(
    optimiser: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: Mapping[str, Any]
) -> None:
    """The inverse of `optimiser_state`.

    Raises:
        KeyError: if ``state`` names a parameter that does not exist.
    """
    if unknown := set(state) - set(named):
        raise KeyError(f"optimiser state for unknown parameters {sorted(unknown)}; known are {sorted(named)}")
    optimiser.state.clear()
    for name, slots in state.items():
        optimiser.state[named[name]] = {
            key: slot.clone() if isinstance(slot, Tensor) else slot for key, slot in slots.items()
        }
