"""What a memory operator is: past experience acting on learning at one of six stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import ClassVar, Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase  # pyright: ignore[reportMissingTypeStubs]


class Stage(Enum):
    """The six places in the way of the data where memory can act."""

    ACT = "act"
    REWARD = "reward"
    TARGET = "target"
    GRADIENT = "gradient"
    REGION = "region"
    REPLAY = "replay"


class MemoryOperator(TensorDictModuleBase):
    """A memory that reads entries of a TensorDict and acts on learning at one stage.

    ``forward`` recalls: it reads ``in_keys``, sets only ``out_keys`` and changes nothing, so that evaluation can not
    change a run.  ``write`` remembers: it reads ``write_keys`` and changes only the operator.  Everything an operator
    knows is a registered buffer whose shape is fixed at construction.  An empty memory leaves learning exactly
    unchanged.
    """

    stage: ClassVar[Stage]
    writes_on: ClassVar[Literal["collection", "update"]]
    write_keys: list[tuple[str, ...]]

    @abstractmethod
    def write(self, td: TensorDictBase) -> None:
        """Remember the rows of ``td``."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows held now."""


class Memory:
    """The operators of one run, in the order of ``memory=[a, b]``; without operators every call does nothing."""

    def __init__(self, operators: Iterable[tuple[str, MemoryOperator]] = ()) -> None:
        self.operators = dict(operators)
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        """Every call of an operator runs in such a context; a trainer puts its clock here."""

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
