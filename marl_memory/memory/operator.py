"""What a memory operator is: past experience acting on learning at one of six stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase  # pyright: ignore[reportMissingTypeStubs]
from torch import Generator, Tensor

from marl_memory.keys import Entries, Keys


class Bootstrap(Protocol):
    """What an algorithm lends: values ``[*B, A, C]`` of the states in a TensorDict ``[*B]``; units: the rewards'."""

    def __call__(self, td: TensorDictBase, generator: Generator | None = None, /) -> Tensor:
        """Nothing is drawn, unless a generator is lent in return: then TD3 smooths its targets' actions with it."""
        ...


class Steps(Protocol):
    """The vector steps of N environments that a replay holds, numbered since the run began: lent, not to be kept."""

    n_envs: int

    @property
    def written(self) -> int:
        """The number after the newest step's."""
        ...

    @property
    def oldest(self) -> int:
        """The number of the oldest step."""
        ...

    def block(self, first: int, last: int) -> TensorDictBase:
        """Steps ``first`` to ``last`` − 1 as rows ``[S, N]``, with the ``learn_reward`` that the host learns from."""
        ...

    def ends_between(self, first: int, last: int) -> Tensor:
        """``[S, N]`` bool: no episode goes on from the row to the next one of its environment."""
        ...


class Stage(Enum):
    """The six places in the way of the data where memory can act."""

    ACT = "act"
    REWARD = "reward"
    TARGET = "target"
    GRADIENT = "gradient"
    REGION = "region"
    REPLAY = "replay"

    @property
    def hosts(self) -> str:
        """Which of the library's hosts have it."""
        deterministic, stochastic = "ddpg, td3 and their team forms", "ppo, ippo and mappo"
        return {"gradient": deterministic, "region": stochastic, "replay": stochastic}.get(self.value, "all")


class Payloads(NamedTuple):
    """What single agents gave to a memory: held now, and the most that there is room for."""

    held: int
    most: int


class MemoryOperator(TensorDictModuleBase):
    """A memory that reads entries of a TensorDict and acts on learning at one stage.

    ``forward`` recalls: it reads ``in_keys``, sets only ``out_keys`` and changes nothing, so that evaluation can not
    change a run.  ``write`` remembers: it reads ``write_keys`` and changes only the operator.  Everything an operator
    knows is a registered buffer whose shape is fixed at construction.  An empty memory, and one of strength 0, leave
    learning exactly unchanged.

    Args:
        strength: how much memory acts, in [0, 1]; what it multiplies, each operator says.
        strength_final: what it changes to, linearly in a run's frames; None: it stays.

    Raises:
        ValueError: for a strength out of range.
    """

    stage: ClassVar[Stage]
    writes_on: Literal["collection", "update"]
    """After collection, or after the update: of a class, or of an instance where the kind of host decides."""
    companion: ClassVar[bool] = False
    """Part of another operator's method, on hosts that have its stage: a run with another host leaves it out."""
    keeps_rewards: ClassVar[bool] = False
    """Whether learning rewards are remembered: a host that goes on changing their unit is no host for it."""
    greedy: bool = False
    """At the stage ACT, in evaluation: take the likeliest action, and draw nothing."""
    in_keys: list[Any]
    out_keys: list[Any]
    write_keys: list[Any]

    def __init__(self, *, strength: float = 1.0, strength_final: float | None = None) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("strength_final", strength_final)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must lie in [0, 1]")
        self.strength_first = strength
        self.strength_final = strength if strength_final is None else strength_final
        self.strength = strength
        """Now."""

    @property
    def entries(self) -> Entries:
        """What ``forward`` sets, and the room that it needs in a TensorDict that takes no new keys."""
        return {}

    @property
    def asks(self) -> Entries:
        """What the host is to write besides, and what room it needs."""
        return {}

    def set_progress(self, frames: int, progress: float) -> None:
        """Follow the schedules.

        Args:
            frames: environment steps of the run so far, by which rows age.
            progress: the share of the run that is over.
        """
        self.strength = self.strength_first + (self.strength_final - self.strength_first) * min(progress, 1.0)

    @abstractmethod
    def write(self, td: TensorDictBase) -> None:
        """Remember the rows of ``td``."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows held now."""

    def refresh(self, bootstrap: Bootstrap) -> None:
        """Follow the critic: called after every write of the run, with a function that is not to be kept."""
        return

    def learn(self) -> dict[str, Tensor]:
        """Train networks of its own, if it has any: called at the end of every iteration of the run.

        Optimisers are saved by `get_extra_state`, slots by parameter name.

        Returns:
            scalars, as in ``loss/…``; they must be finite.
        """
        return {}

    def sweep(self, bootstrap: Bootstrap, steps: Steps) -> None:
        """As `refresh`, and called after it on hosts with a replay, whose rows are lent too."""
        return

    def cut_episodes(self) -> None:
        """The environments were reset: no episode goes on."""
        return

    def remarks(self) -> list[str]:
        """What the user should know by now and was not told yet: asked for before a run begins, and at the end of every
        iteration.
        """
        return []

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """What the last ``forward`` on ``td`` did: rows used, neighbours found, effective strength, and more."""
        return {}

    @property
    def payloads(self) -> Payloads | None:
        """How much is held, in a unit that is the same for every scope; None where there is none."""
        return None

    @property
    def bytes(self) -> int:
        """Of everything it knows; constant."""
        return sum(x.numel() * x.element_size() for x in (*self.buffers(), *self.parameters()))


def put(td: TensorDictBase, key: Any, value: Tensor) -> None:
    """Set an entry to a copy of ``value``; where ``td`` is locked, in the room that was made for it.

    A copy, and never into a tensor that is somebody else's: an entry shares its memory with no other.  Nor is it an
    inference tensor, that a loss may be made of it.
    """
    if td.is_locked:
        td.get(key).copy_(value)
        return
    with torch.inference_mode(False), torch.no_grad():
        td.set(key, value.clone())


def check_positive(**values: float | None) -> None:
    """Raise ValueError for a value that is neither positive nor None."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")


class Memory:
    """The operators of one run, in the order of ``memory=[a, b]``; without operators every call does nothing."""

    def __init__(self, operators: Iterable[tuple[str, MemoryOperator]] = ()) -> None:
        self.operators = dict(operators)
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        """Every call of an operator runs in such a context; a trainer puts its clock here."""

    @property
    def entries(self) -> Entries:
        """What the operators need room for."""
        entries: Entries = {}
        for operator in self.operators.values():
            # What is set at ACT is there before the batch is, and comes into it with all that was collected.
            entries |= operator.asks | ({} if operator.stage is Stage.ACT else operator.entries)
        return entries

    @property
    def acts(self) -> bool:
        """Whether an operator takes actions in the policy's place."""
        return any(operator.stage is Stage.ACT for operator in self.operators.values())

    @contextmanager
    def greedily(self) -> Iterator[Callable[[TensorDictBase], None]]:
        """The stage ACT as evaluation has it: nothing is drawn, and nothing changes."""
        before = {name: operator.greedy for name, operator in self.operators.items()}
        for operator in self.operators.values():
            operator.greedy = True
        try:
            yield lambda td: self.act(Stage.ACT, td)
        finally:
            for name, operator in self.operators.items():
                operator.greedy = before[name]

    @property
    def reads(self) -> list[Any]:
        """Entries of environments and policies that the operators read: a replay has to keep them."""
        keys = (key for operator in self.operators.values() for key in _read_of_replays(operator))
        roots = {key: key if isinstance(key, str) else key[0] for key in keys}
        return [key for key, root in roots.items() if root not in (Keys.learn, Keys.row)]

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        for operator in self.operators.values():
            operator.set_progress(frames, progress)

    def metrics(self, stage: Stage, td: TensorDictBase) -> dict[str, Tensor]:
        """What the operators of ``stage`` did to ``td``, as ``memory/NAME/…``."""
        return {
            f"memory/{name}/{key}": value
            for name, operator in self.operators.items()
            if operator.stage is stage
            for key, value in operator.metrics(td).items()
        }

    def act(self, stage: Stage, td: TensorDictBase) -> None:
        """Let every operator of ``stage`` act on ``td``, one after the other."""
        for operator in self.operators.values():
            if operator.stage is stage:
                with self.timed():
                    operator(td)

    def write(self, moment: Literal["collection", "update"], td: TensorDictBase) -> None:
        """Let the operators that write at this moment remember ``td``."""
        for operator in self.operators.values():
            if operator.writes_on == moment:
                with self.timed():
                    operator.write(td)

    def refresh(self, bootstrap: Bootstrap, steps: Steps | None = None) -> None:
        """See `MemoryOperator.refresh` and, where there is a replay, `MemoryOperator.sweep`."""
        for operator in self.operators.values():
            with self.timed():
                operator.refresh(bootstrap)
                if steps is not None:
                    operator.sweep(bootstrap, steps)

    def learn(self) -> dict[str, float]:
        """See `MemoryOperator.learn`; as ``memory/NAME/…``."""
        reports: dict[str, float] = {}
        for name, operator in self.operators.items():
            with self.timed():
                reports |= {f"memory/{name}/{key}": value.item() for key, value in operator.learn().items()}
        return reports

    def remarks(self) -> list[str]:
        """See `MemoryOperator.remarks`."""
        return [f"memory={name}: {text}" for name, operator in self.operators.items() for text in operator.remarks()]

    def cut_episodes(self) -> None:
        """See `MemoryOperator.cut_episodes`."""
        for operator in self.operators.values():
            operator.cut_episodes()

    def state_dict(self) -> dict[str, dict[str, object]]:
        """The operators' state, by name."""
        return {name: dict(operator.state_dict()) for name, operator in self.operators.items()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: if the names differ from this memory's.
        """
        if set(state) != set(self.operators):
            raise ValueError(
                f"the checkpoint holds memory {sorted(state)}, this run has memory={sorted(self.operators)}"
            )
        for name, operator in self.operators.items():
            operator.load_state_dict(state[name])


def _read_of_replays(operator: MemoryOperator) -> list[Any]:
    """What is read of an update's rows; who acts reads vector steps, what is written on collection reads that batch."""
    recalled = [] if operator.stage is Stage.ACT else operator.in_keys
    return [*recalled, *(operator.write_keys if operator.writes_on == "update" else [])]
