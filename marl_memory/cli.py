"""The command line: ``marl-memory train | resume | evaluate | plot | study | report | tasks | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marl_memory.training.config import config_dir
from marl_memory.training.hydra_errors import BY_US

SHOW_TRACEBACKS = bool(os.environ.get("HYDRA_FULL_ERROR")) and BY_US not in os.environ
"""What the user asked for; while Hydra composes, the variable says something else."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if argv is None else argv
    if not {"", os.getcwd()} & set(sys.path):  # `env.factory=my_task:make` finds my_task.py where the command is given
        sys.path.append(os.getcwd())
    if arguments[:1] == ["train"]:
        _train(arguments[1:])
        return
    if arguments[:1] == ["study"]:
        _study(arguments[1:])
        return
    parser = argparse.ArgumentParser(prog="marl-memory", description="Memory in multi-agent reinforcement learning.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train; takes Hydra overrides, e.g. env=smax/3m algorithm=mappo seed=1")

    resume = commands.add_parser("resume", help="continue a run exactly where it stopped")
    resume.add_argument("run", type=Path)
    resume.add_argument("overrides", nargs="*", help="training.stop_at_frames=… or training.total_frames=…")
    resume.add_argument("--from-signal", action="store_true", help="from where a signal left it (not bit-equal)")
    resume.set_defaults(action=_resume)

    evaluate = commands.add_parser("evaluate", help="play greedy episodes with a run's policy")
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument("--episodes", type=int, help="how many, by default 128, and 3 with --video or --replay")
    evaluate.add_argument("--checkpoint", choices=("best", "last"), default="best")
    evaluate.add_argument(
        "--video", nargs="?", const="", metavar="FILE", help="film them to an .mp4 or .gif, by default RUN/video.mp4"
    )
    evaluate.add_argument(
        "--replay",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write the game's own replays, by default to RUN/replays",
    )
    evaluate.set_defaults(action=_evaluate)

    plot = commands.add_parser("plot", help="draw curves of several runs; those that differ only in seed are one line")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run, or a folder that holds runs")
    plot.add_argument("--metric", action="append", default=[], help="a column of metrics.csv; once for each panel")
    plot.add_argument("--out", type=Path, default=Path("curves.png"), help="ends in .png, .pdf or .svg")
    plot.set_defaults(action=_plot)

    commands.add_parser("study", help="run a study: arms × tasks × seeds, e.g. study=quick; run it again to go on")

    report = commands.add_parser("report", help="tables, curves and statistics of a study, as a page")
    report.add_argument("study", type=Path, metavar="STUDY", help="its folder")
    report.set_defaults(action=_report)

    tasks = commands.add_parser("tasks", help="list the tasks, and which can run here")
    tasks.set_defaults(action=_tasks)

    doctor = commands.add_parser("doctor", help="what is installed, what is missing, and how to get it")
    doctor.set_defaults(action=_doctor)
    options = parser.parse_args(arguments)
    with _one_clear_error():
        options.action(options)


@contextmanager
def _one_clear_error() -> Iterator[None]:
    """What a user can put right is said in one message; ``HYDRA_FULL_ERROR=1`` shows where it came from."""
    from marl_memory.training.checkpoint import CheckpointError
    from marl_memory.training.trainer import TrainingDivergedError

    try:
        yield
    except (ValueError, ImportError, OSError, CheckpointError, TrainingDivergedError) as error:
        if SHOW_TRACEBACKS:
            raise
        sys.exit("\n".join([f"marl-memory: {error}", *getattr(error, "__notes__", [])]))


def _train(words: list[str]) -> None:
    import hydra

    from marl_memory.training.hydra_errors import in_one_sentence, raised_by_hydra
    from marl_memory.training.sweep import sweeping

    # Overrides may stand before and after options; Hydra's parser wants them together.
    words = sorted(words, key=lambda word: word.startswith("-") or not ("=" in word or word.startswith("~")))
    with _one_clear_error(), in_one_sentence(words), raised_by_hydra(), sweeping(words) as words:
        sys.argv = ["marl-memory train", *words]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(_train_config)()


def _train_config(config: Any) -> None:
    from marl_memory.training.sweep import as_job

    as_job(lambda: _train_one(config))


@contextmanager
def _experiment_of_another_algorithm() -> Iterator[None]:
    """Say so where a key does not fit the algorithm because an experiment made for another one sets it."""
    from hydra.core.hydra_config import HydraConfig

    try:
        yield
    except ValueError as error:
        hydra = HydraConfig.get()
        experiment = hydra.runtime.choices.get("experiment")
        named = [word for word in hydra.overrides.task if word.startswith("algorithm=")]
        if experiment and named and str(error).startswith("algorithm.") and "is unknown" in str(error):
            raise ValueError(
                f"{error}. experiment={experiment} is made for another algorithm: leave {named[-1]} out"
            ) from error
        raise


def _train_one(config: Any) -> None:
    from omegaconf import OmegaConf

    from marl_memory.training.hydra_errors import in_one_sentence
    from marl_memory.training.run import release, start
    from marl_memory.training.sweep import in_a_sweep, own_folder, stop

    with _one_clear_error():
        with in_one_sentence():
            resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        folder = resolved.pop("run_folder", None)
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"run_folder={folder!r} must name a folder")
        folder = own_folder(folder)
        with _experiment_of_another_algorithm():
            trainer = start(resolved, folder)
        try:
            _finish(trainer, folder)
        finally:
            release(folder)
        if trainer.stop_requested and in_a_sweep():
            stop()


def _resume(options: argparse.Namespace) -> None:
    from marl_memory.training.run import resume

    overrides: dict[str, int] = {}
    for text in options.overrides:
        key, separator, value = text.partition("=")
        if not separator or not value.replace("_", "").isdigit():
            raise ValueError(f"override {text!r} must read key=integer")
        overrides[key] = int(value)
    _finish(resume(options.run, overrides, from_signal=options.from_signal), options.run)


def _finish(trainer: Any, folder: Path) -> None:
    """Run to the end, draw the curve, and say what can be done next."""
    import torch

    from marl_memory.training.curve import draw, summarise

    print(f"run folder  {folder}\ntorch threads  {torch.get_num_threads()}", flush=True)
    for warning in trainer.warnings():
        print(f"warning: {warning}", flush=True)
    try:
        trainer.run()
    finally:
        trainer.close()
    draw(folder)
    print(summarise(folder, finished=trainer.frames >= trainer.schedule.total_frames))


def _evaluate(options: argparse.Namespace) -> None:
    from marl_memory.training.run import evaluate_run, memory_acts

    video = None if options.video is None else Path(options.video or options.run / "video.mp4")
    replay = None if options.replay is None else Path(options.replay or options.run / "replays")
    count = options.episodes if options.episodes is not None else 128 if video is None and replay is None else 3
    if count < 1:
        raise ValueError(f"--episodes={count} must be at least 1")
    how = {"episodes": count, "checkpoint": options.checkpoint}
    columns = [evaluate_run(options.run, **how, video=video, replay=replay).metrics("greedy")]
    if memory_acts(options.run):
        columns.append(evaluate_run(options.run, **how, with_memory=True).metrics("greedy"))
        print(f"{'':>10}  {'alone':<10}  with memory")
    for key in columns[0]:
        print(f"{key.removeprefix('greedy/'):>10}  " + "  ".join(f"{column[key]:<10g}" for column in columns).rstrip())


def _plot(options: argparse.Namespace) -> None:
    from marl_memory.training.plot import plot

    print(plot(options.runs, options.out, metrics=options.metric))


def _study(words: list[str]) -> None:
    """Plan, ask where somebody is there to answer, run, report."""
    from marl_memory.study.command import study
    from marl_memory.training.hydra_errors import raised_by_hydra

    with _one_clear_error(), raised_by_hydra():
        sys.exit(study(words))


def _report(options: argparse.Namespace) -> None:
    from marl_memory.study.report.write import write_report

    print(write_report(options.study))


def _tasks(options: argparse.Namespace) -> None:
    from marl_memory.training.tasks import list_tasks

    for task in list_tasks(config_dir() / "env"):
        extra = f"[{task.extra}]" if task.extra else ""
        print(f"{task.name:<36}{extra:<12}{task.hint}")


def _doctor(options: argparse.Namespace) -> None:
    from marl_memory.doctor import examine, report

    sections = examine(Path.cwd())
    print(report(sections))
    if not all(row.there for row in sections["core"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
