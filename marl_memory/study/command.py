"""``marl-memory study``: what is planned is shown before it starts, and how it ended afterwards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from marl_memory.study.plan import Plan, Run, check_builds, frames_of, make_plan
from marl_memory.study.results import failure_file, run_folder
from marl_memory.study.runner import Outcome, check_folder, estimate, finished_runs, run_study, slots
from marl_memory.training.clock import duration


def study(words: Sequence[str]) -> int:
    """Plan the study that ``words`` ask for, run what is not finished, and write the report; the exit status.

    Raises:
        ConfigError, StudyError: for what does not fit; before anything has been written.
    """
    parser = argparse.ArgumentParser(
        prog="marl-memory study", description="Run a study: study=NAME study.KEY=VALUE and overrides of all runs."
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--plan", action="store_true", help="show the plan, with an estimate, and leave")
    parser.add_argument("--config-dir", "-cd", help="a folder with more studies and configurations")
    options, overrides = parser.parse_known_args(words)
    if unknown := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    plan = make_plan(words)
    check_folder(plan)
    check_builds(plan)
    asked = sys.stdin.isatty() and sys.stdout.isatty() and not options.yes
    print(describe(plan, left := _left(plan), probed=asked or options.plan), flush=True)
    if options.plan or (asked and left and input("start? [Y/n] ").strip().lower() not in ("", "y", "yes")):
        return 0
    outcome = run_study(plan, words=[word for word in words if word != "--yes"])
    print(conclude(plan, outcome), flush=True)
    return 1 if outcome.failed or outcome.left else 0


def _left(plan: Plan) -> list[Run]:
    """The runs that have no record."""
    if not plan.folder.is_dir():
        return list(plan.configs)
    finished = set(finished_runs(plan))
    return [run for run in plan.configs if run not in finished]


def describe(plan: Plan, left: Sequence[Run], *, probed: bool) -> str:
    """What is going to be run, and what it may take."""
    study = plan.study
    parts = (("arm", study.arms), ("task", study.tasks), ("seed", study.seeds))
    count = " × ".join(f"{len(those)} {what}{'s' * (len(those) != 1)}" for what, those in parts)
    lines = [
        f"study      {study.name}: {study.question}",
        f"runs       {len(plan.configs)} = {count}, {len(plan.configs) - len(left)} of them finished",
        *(f"task       {task}, {frames:,} frames a run" for task, frames in frames_of(plan).items()),
        f"arms       {', '.join(study.arms)}",
        f"executor   {plan.file.executor}, {slots(plan)} runs at a time",
        f"folder     {plan.folder}",
    ]
    if probed and (guess := estimate(plan, list(left))) is not None:
        lines.append(
            f"estimate   {duration(guess.seconds)}, {guess.bytes / 1e9:.1f} GB at a time (tried out for some seconds: "
            f"{', '.join(guess.arms)})"
        )
    return "\n".join(lines)


def conclude(plan: Plan, outcome: Outcome) -> str:
    """How the runs ended, and what can be done next."""
    from marl_memory.study.report.write import write_report

    lines = [f"finished   {len(outcome.finished)} of {len(plan.configs)} runs"]
    for run, why in outcome.failed.items():
        task, arm, seed = run
        lines += [f"failed     {task} {arm} seed {seed}: {why}"]
        lines += [f"           {failure_file(run_folder(plan.folder, *run))}"]
    if outcome.failed or outcome.left:
        lines.append("next       give the same command again: only what is not finished is run")
    if outcome.finished:
        lines.append(f"report     {write_report(plan.folder)}")
    return "\n".join(lines)
