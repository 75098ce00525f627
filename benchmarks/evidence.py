"""What the studies under docs/results say of every operator: one table and one figure.

python -m benchmarks.evidence                             # the table of the README
python -m benchmarks.evidence docs/images/evidence.svg    # and its figure
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from marl_memory.study.report.wording import common_decimals, write
from marl_memory.study.statistics import Estimate, difference_estimate, improvement_estimate

RESULTS = Path(__file__).parents[1] / "docs/results"

END, WHOLE = "final", "area"
"""Columns of ``runs.csv``: the metric at the end of a run, and the area under its curve."""

SIDES = {END: "at the end", WHOLE: "area under the curve"}
COLOURS = {END: "#12476b", WHOLE: "#b5541c"}


@dataclass(frozen=True)
class Comparison:
    """An arm of a study beside another one, on one task.

    Args:
        operator: as the table calls it.
        where: host and task, as the table calls them.
        study: a folder of docs/results.
        task, arm, baseline: of the study.
    """

    operator: str
    where: str
    study: str
    task: str
    arm: str
    baseline: str = "no_memory"

    @property
    def seeds(self) -> list[int]:
        """That both have."""
        ours, theirs = (self.scores(arm, END) for arm in (self.arm, self.baseline))
        return [seed for seed in ours if seed in theirs]

    @property
    def frames(self) -> int:
        """Of every run."""
        return max(int(row["frames"]) for row in self.rows("runs", self.arm))

    def rows(self, table: str, arm: str) -> Sequence[Mapping[str, str]]:
        """Of ``table`` of the study: those of ``arm`` on this task.

        Raises:
            ValueError: if there are none.
        """
        with (RESULTS / self.study / f"{table}.csv").open(newline="") as file:
            found = [row for row in csv.DictReader(file) if (row["task"], row["arm"]) == (self.task, arm)]
        if not found:
            raise ValueError(f"docs/results/{self.study}/{table}.csv has no task={self.task} with arm={arm}")
        return found

    def scores(self, arm: str, quantity: str) -> dict[int, float]:
        """By seed."""
        return {int(row["seed"]): float(row[quantity]) for row in self.rows("runs", arm) if row[quantity]}

    def both(self, quantity: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Scores ``[S]`` of the arm and of the baseline, at the same seeds."""
        ours, theirs = (self.scores(arm, quantity) for arm in (self.arm, self.baseline))
        return [np.array([ours[seed] for seed in self.seeds])], [np.array([theirs[seed] for seed in self.seeds])]

    def difference(self, quantity: str) -> Estimate:
        """Of interquartile means, paired by seed."""
        return difference_estimate(*self.both(quantity))

    def improvement(self, quantity: str) -> Estimate:
        """The probability that a run of the arm scores higher than one of the baseline."""
        return improvement_estimate(*self.both(quantity))

    def slower(self) -> float:
        """Wall time of the arm over that of the baseline, medians."""
        ours, theirs = (
            [float(row["wall_seconds"]) for row in self.rows("costs", arm)] for arm in (self.arm, self.baseline)
        )
        return statistics.median(ours) / statistics.median(theirs)


COMPARED = (
    Comparison("Mnemo, region", "PPO, LunarLander", "mnemo_region", "lunar_lander_ppo", "gated"),
    Comparison("Mnemo, region, no gate", "PPO, LunarLander", "mnemo_region", "lunar_lander_ppo", "ungated"),
    Comparison("Mnemo, region", "MAPPO, SMAX 3m", "mnemo_region_smax", "smax_3m_mappo", "gated"),
    Comparison("Mnemo, region, no gate", "MAPPO, SMAX 3m", "mnemo_region_smax", "smax_3m_mappo", "ungated"),
    Comparison("Mnemo, field, gated", "DDPG, continuous LunarLander", "mnemo_gradient", "lunar_lander_ddpg", "gated"),
    Comparison(
        "Mnemo, field, `beta=0.9`", "DDPG, continuous LunarLander", "mnemo_gradient", "lunar_lander_ddpg", "ungated"
    ),
    Comparison("Mnemo, field, `beta=0.9`", "DDPG, Pendulum", "capacity_gradient", "pendulum", "4096"),
    *(
        Comparison("Mnemo, field, shared", where, "scopes_gradient", task, "shared")
        for task, where in (
            ("redundant_observations", "MADDPG, redundant observations"),
            ("hidden_coupling", "MADDPG, hidden coupling"),
            ("homogeneous_team", "IDDPG, homogeneous team of 8"),
            ("smax_3m", "MADDPG, SMAX 3m"),
        )
    ),
    *(
        Comparison(operator, f"PPO, {where}", "operators_ppo", task, arm)
        for operator, arm in (
            ("SelfImitation", "sil"),
            ("ReturnMemory", "return_memory"),
            ("Mnemo, region", "mnemo_region"),
            ("GEM, no limit", "gem"),
            ("AdaMemento", "adamemento"),
        )
        for task, where in (
            ("chain_40", "chain of 40, slips"),
            ("lunar_lander", "LunarLander, early"),
            ("hopper", "Hopper"),
        )
    ),
    Comparison("GEM, no limit", "TD3, InvertedDoublePendulum", "gem", "inverted_double_pendulum", "gem"),
    Comparison("Mnemo, field, `beta=0.9`", "TD3, HalfCheetah", "half_cheetah_memory", "half_cheetah", "mnemo"),
    Comparison("GEM, no limit", "TD3, HalfCheetah", "half_cheetah_memory", "half_cheetah", "gem"),
    Comparison("GEM", "TD3, HalfCheetah", "half_cheetah_memory", "half_cheetah", "gem_short"),
    *(
        Comparison(operator, f"DQN, {where}", "gem_discrete", task, arm)
        for task, where in (("chain_20", "chain"), ("chain_noisy_20", "chain with slips"))
        for operator, arm in (("GEM, no limit", "gem"), ("GEM", "gem_short"))
    ),
    *(
        Comparison(operator, f"MATD3, {where}", "teammates", task, f"{arm}+central_critic", "no_memory+central_critic")
        for task, where in (("coupling", "hidden coupling"), ("coupling_noisy", "the same, noisy"))
        for operator, arm in (("GEM, no limit", "gem"), ("GEM", "gem_short"))
    ),
    Comparison("AdaMemento", "PPO, four rooms", "adamemento", "four_rooms", "adamemento"),
    Comparison("AdaMemento", "PPO, dark chamber", "adamemento", "dark_chamber", "adamemento"),
)


def table(compared: Iterable[Comparison] = COMPARED) -> str:
    """Markdown: differences to the host alone, with their 95 % intervals."""
    lines = [
        "| operator | host, task | frames | seeds | at the end | area under the curve | wall time |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        cells = [_told(one.difference(quantity)) for quantity in SIDES]
        frames = f"{one.frames:,}".replace(",", " ")
        lines.append(
            f"| {one.operator} | [{one.where}](docs/results/{one.study}/report.md) | {frames} | {len(one.seeds)} | "
            f"{cells[0]} | {cells[1]} | × {one.slower():.2f} |"
        )
    return "\n".join(lines) + "\n"


def _told(estimate: Estimate) -> str:
    """Bold where the interval excludes 0."""
    text = write(estimate, sign=True, decimals=common_decimals([estimate])).replace("\u00a0", " ")
    return f"**{text}**" if estimate.excludes(0.0) else text


def figure(file: Path, compared: Iterable[Comparison] = COMPARED) -> None:
    """For each comparison the probability that a run with memory scores higher, with its 95 % interval."""
    compared = list(compared)
    drawn = Figure(figsize=(7.2, 1.0 + 0.27 * len(compared)), layout="constrained")
    axes = drawn.add_subplot()
    axes.axvline(0.5, color="#555555", linewidth=0.8, linestyle="--")
    for offset, quantity in ((-0.14, END), (0.14, WHOLE)):
        found = [one.improvement(quantity) for one in compared]
        at = np.arange(len(compared)) + offset
        ends = np.array([one.interval or (one.value, one.value) for one in found])
        axes.hlines(at, ends[:, 0], ends[:, 1], color=COLOURS[quantity], linewidth=1.5)
        axes.plot([one.value for one in found], at, "o", color=COLOURS[quantity], markersize=4, label=SIDES[quantity])
    axes.set_yticks(range(len(compared)), [f"{one.operator} · {one.where}" for one in compared], fontsize=7)
    axes.set(
        xlim=(-0.03, 1.03), ylim=(len(compared) - 0.4, -0.6), xlabel="probability that a run with memory scores higher"
    )
    drawn.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    drawn.savefig(file)


if __name__ == "__main__":
    sys.stdout.write(table())
    if len(sys.argv) > 1:
        figure(Path(sys.argv[1]))
