"""The numbers of a study: a score for every run, and estimates for arms and pairs of arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from marl_memory.study.definition import Study
from marl_memory.study.statistics import LEAST_RUNS, Array, Estimate

Key = tuple[str, str, int]
"""Task, arm and seed of a run."""

QUANTITIES = ("final", "absolute", "area")
"""What a run scores: the metric at its end, the absolute metric of its best policy, the area under its curve."""


@dataclass(frozen=True)
class Run:
    """What the metric of a study says of one run.

    Args:
        frames: ``[P]`` where it was evaluated.
        values: ``[P]`` of the metric.
        scores: by `QUANTITIES`; ``absolute`` only where the record has it.
    """

    frames: Array
    values: Array
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """One arm beside another.

    Args:
        seeds: that both have, for each task.
        difference: of their interquartile means over these seeds, paired by them; None if there are none.
        area: the same difference, of areas under their curves.
        improvement: probability that a run of the first scores higher; None if no task has runs of both.
        same: whether they score the same at every seed that both have.
    """

    seeds: Mapping[str, int]
    difference: Estimate | None
    area: Estimate | None
    improvement: Estimate | None
    same: bool = False

    def mirrored(self) -> Pair:
        """The second beside the first."""
        return Pair(
            self.seeds,
            None if self.difference is None else self.difference.mirrored(0.0),
            None if self.area is None else self.area.mirrored(0.0),
            None if self.improvement is None else self.improvement.mirrored(1.0),
            self.same,
        )


@dataclass(frozen=True)
class Panel:
    """Estimates over one task in its own unit, or over all tasks on a common scale.

    Args:
        task: None for all.
        runs: how many each arm has, for each task of the panel.
        arms: estimates of every arm with runs, by `QUANTITIES`.
        pairs: of arms; `pair` finds them in both directions.
        samples: final scores of each arm by task, for what draws them.
    """

    task: str | None
    runs: Mapping[str, Mapping[str, int]]
    arms: Mapping[str, Mapping[str, Estimate]]
    pairs: Mapping[tuple[str, str], Pair]
    samples: Mapping[str, Mapping[str, Array]]

    def pair(self, arm: str, against: str) -> Pair | None:
        """``arm`` beside ``against``; None if it was not asked for."""
        if (arm, against) in self.pairs:
            return self.pairs[arm, against]
        back = self.pairs.get((against, arm))
        return None if back is None else back.mirrored()


@dataclass(frozen=True)
class Summary:
    """The numbers of a study.

    Args:
        study: its definition.
        runs: those that have a score, in the study's order.
        left_out: why there is none, for every other run.
        ranges: least and greatest value of the metric in any evaluation, by task.
        overall: over all tasks; the task's own panel if there is one only.
        tasks: a panel for each task with runs.
    """

    study: Study
    runs: Mapping[Key, Run]
    left_out: Mapping[Key, str]
    ranges: Mapping[str, tuple[float, float]]
    overall: Panel
    tasks: Mapping[str, Panel]

    @property
    def several(self) -> bool:
        """Whether scores are on a common scale."""
        return len(self.tasks) > 1

    @property
    def arms(self) -> list[str]:
        """Arms with runs, in the study's order."""
        return list(self.overall.arms)

    @property
    def families(self) -> dict[str, list[str]]:
        """For each baseline, the arms with runs that are compared with it; a study without levels has one baseline."""
        found: dict[str, list[str]] = {}
        for arm in self.study.arms:
            others = found.setdefault(self.study.baseline_of(arm), [])
            if arm in self.overall.arms and arm != self.study.baseline_of(arm):
                others.append(arm)
        return found

    @property
    def others(self) -> list[str]:
        """Arms with runs but for baselines."""
        return [arm for arm in self.arms if arm != self.study.baseline_of(arm)]

    def beside_baseline(self, panel: Panel, arm: str) -> Pair | None:
        """An arm beside its baseline; None for a baseline, and where that has no runs."""
        baseline = self.study.baseline_of(arm)
        return None if arm == baseline else panel.pair(arm, baseline)


def too_few(summary: Summary) -> list[str]:
    """Arms that get no interval, because a task of theirs has too few runs."""
    return [arm for arm in summary.arms if min(n for n in summary.overall.runs[arm].values() if n) < LEAST_RUNS]
