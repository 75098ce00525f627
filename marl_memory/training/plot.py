"""Curves of several runs.  Those that differ only in their seed are one line: their mean, in a band of all values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from marl_memory.training.checkpoint import naming
from marl_memory.training.config import differences
from marl_memory.training.curve import Line, draw_panel
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import RunFolderError, read_config, read_run

NOT_COMPARED = ("seed", "logger.", "training.stop_at_frames", "training.threads", "training.keep_checkpoints")
"""Keys that make no other experiment of a run."""

FORMATS = (".png", ".pdf", ".svg")


def plot(paths: Iterable[Path], out: Path, *, metrics: Sequence[str] = (), say: Callable[[str], None] = print) -> Path:
    """Draw one panel per metric and one line per group of runs to ``out``.

    Args:
        paths: runs, and folders that hold runs.
        out: the picture's file.
        metrics: columns of ``metrics.csv``; none for ``evaluation/success``, or for ``evaluation/return`` where a run
            does not have that.
        say: takes notes on what is not in the picture.

    Raises:
        RunFolderError: if a path holds no run, or no run has numbers yet.
        ValueError: for a metric that a run does not have, or another format.
        NotWrittenError: if ``out`` can not be written.
    """
    from matplotlib.figure import Figure

    if out.suffix not in FORMATS:
        raise ValueError(f"--out={out} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    files = _with_numbers(find_runs(paths), say)
    metrics = metrics or [_default(files.values())]
    for run, file in files.items():
        for metric in metrics:
            _check_metric(run, file, metric)
    groups = group_runs(list(files), say)
    legend = {label: fill(label, 70 * len(metrics), break_long_words=False) for label in groups}
    height = 3.4 + 0.2 * sum(text.count("\n") + 1 for text in legend.values())
    figure = Figure(figsize=(5.4 * len(metrics), height), layout="constrained")
    for i, metric in enumerate(metrics):
        lines = [
            mean_line(f"{legend[label]} (n = {len(runs)})", {run: files[run].column(metric) for run in runs}, say)
            for label, runs in groups.items()
        ]
        draw_panel(figure.add_subplot(1, len(metrics), i + 1), metric, lines)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle(" · ".join(dict.fromkeys(read_run(run)["task"]["name"] for run in files)), fontsize=9)
    with naming(out):
        figure.savefig(out, dpi=140)
    return out


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Each path that is a run, and the runs below each that is none, once each.

    Raises:
        RunFolderError: if there is none at a path.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        here = [path] if (path / "run.json").exists() else [file.parent for file in sorted(path.rglob("run.json"))]
        if not here:
            raise RunFolderError(f"{path} holds no run (no run.json there or below)")
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def group_runs(runs: Sequence[Path], say: Callable[[str], None]) -> dict[str, list[Path]]:
    """The runs of each experiment, by what tells it from the others, as in ``algorithm.lr=0.001``."""
    experiments: list[tuple[dict[str, Any], list[Path]]] = []
    seeds: dict[tuple[int, Any], Path] = {}
    for run in runs:
        config = read_config(run)
        same = (i for i, (other, _) in enumerate(experiments) if not _compare(config, other))
        i = next(same, len(experiments))
        if i == len(experiments):
            experiments.append((config, []))
        experiments[i][1].append(run)
        if (first := seeds.setdefault((i, config["seed"]), run)) != run:
            say(f"note: {run} is the same experiment and seed as {first}; both are counted")
    differing: dict[str, dict[int, str]] = {}  # of each key that is not the same in all, the values
    for (i, (a, _)), (j, (b, _)) in combinations(enumerate(experiments), 2):
        for key, (x, y) in _compare(a, b).items():
            differing.setdefault(key, {}).update({i: x, j: y})
    values = [{key: found[i] for key, found in differing.items() if i in found} for i in range(len(experiments))]
    tasks = [read_run(members[0])["task"]["name"] for _, members in experiments]
    labels = [_label(task, texts) for task, texts in zip(tasks, values, strict=True)]
    if len(set(labels)) < len(labels):  # the same task in several forms: its name does not tell them apart
        labels = [_label("", texts) for texts in values]
    return dict(zip(labels, (members for _, members in experiments), strict=True))


def mean_line(
    label: str, curves: Mapping[Path, tuple[list[float], list[float]]], say: Callable[[str], None] = print
) -> Line:
    """Mean, least and greatest of several curves at every frame where one of them has a value and all have begun.

    Between its own values a curve is interpolated; where one of them ends, the line ends.
    """
    end = min(frames[-1] for frames, _ in curves.values())
    begin = max(frames[0] for frames, _ in curves.values())
    for run, (frames, _) in curves.items():
        if frames[-1] > end:
            shortest = next(other for other, (x, _) in curves.items() if x[-1] == end)
            say(f"note: {label} is drawn to {end:,.0f} frames, where {shortest} ends; {run} has {frames[-1]:,.0f}")
    grid = np.unique([x for frames, _ in curves.values() for x in frames if begin <= x <= end])
    table = np.stack([np.interp(grid, frames, values) for frames, values in curves.values()])  # [runs, points]
    band = (table.min(0), table.max(0)) if len(curves) > 1 else None
    return Line(label=label, x=grid, y=table.mean(0), band=band)


def _compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The values in ``a`` and ``b`` of each key that makes them different experiments.

    Of operators that only one of them has, ``memory`` with their names stands for all keys.
    """
    found = {key: (x, y) for key, x, y in differences(a, b) if not key.startswith(NOT_COMPARED)}
    ours, theirs = (list(config.get("memory") or ()) for config in (a, b))
    apart = ["memory", *(f"memory.{name}" for name in {*ours} ^ {*theirs})]
    if len(apart) == 1:
        return found
    names = f"[{','.join(ours)}]", f"[{','.join(theirs)}]"
    return {"memory": names} | {key: x for key, x in found.items() if ".".join(key.split(".")[:2]) not in apart}


def _label(task: str, values: Mapping[str, str]) -> str:
    """What differs; the name of the task, if given, stands for the keys of ``env``, and alone where nothing differs."""
    texts = [f"{key}={value.strip(chr(39))}" for key, value in values.items() if not (task and key.startswith("env."))]
    return ", ".join([task, *texts] if task and (len(texts) < len(values) or not texts) else texts)


def _with_numbers(runs: Sequence[Path], say: Callable[[str], None]) -> dict[Path, MetricsFile]:
    files = {run: MetricsFile(run / "metrics.csv") for run in runs}
    for run in [run for run, file in files.items() if not file.rows]:
        say(f"note: {run} has no numbers yet and is left out")
        del files[run]
    if not files:
        raise RunFolderError(f"{', '.join(map(str, runs))}: no run has numbers yet")
    return files


def _default(files: Iterable[MetricsFile]) -> str:
    has_success = all(file.column("evaluation/success")[0] for file in files)
    return "evaluation/success" if has_success else "evaluation/return"


def _check_metric(run: Path, file: MetricsFile, metric: str) -> None:
    """Raise ValueError, with the metrics that there are, if ``run`` does not have this one."""
    if metric == "frames" or not file.column(metric)[0]:
        known = [name for name in file.columns if name != "frames" and file.column(name)[0]]
        known.sort(key=lambda name: SequenceMatcher(None, metric, name).ratio(), reverse=True)
        raise ValueError(f"{run} has no metric {metric!r}; it has, nearest first: {', '.join(known)}")
