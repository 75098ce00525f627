"""What a study asks: arms × tasks × seeds, the budget and the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the runs that are to answer it; every arm plays every task with every seed.

    Args:
        name: of the study.
        question: one sentence, the title of the report.
        arms: overrides of the configuration by arm, in the order of tables.
        tasks: overrides by task.
        seeds: of the runs; arms are paired by them.
        baseline: the arm that others are compared with.
        metric: column of metrics.csv that answers the question; greater is better.
        budget: frames of every run; None: as each task's overrides say.
        equal: arms that must end in the same bits, in groups.
        levels: where arms are crossed with something else, as ARM+LEVEL: what with.
    """

    name: str
    question: str
    arms: Mapping[str, Sequence[str]]
    tasks: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    baseline: str
    metric: str = "evaluation/return"
    budget: int | None = None
    equal: Sequence[Sequence[str]] = ()
    levels: Sequence[str] = ()

    def baseline_of(self, arm: str) -> str:
        """What ``arm`` is compared with: the baseline, of the same level where arms have one."""
        level = next((level for level in self.levels if arm.endswith(f"+{level}")), None)
        return self.baseline if level is None else f"{self.baseline}+{level}"

    def to_dict(self) -> dict[str, Any]:
        """Made of what JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """The inverse of `to_dict`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})
