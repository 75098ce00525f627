"""A study as one tidy table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_memory.study.results import Record, read_results

if TYPE_CHECKING:
    import pandas

COLUMNS = ("study", "task", "arm", "seed", "frames", "metric", "value")


def load(folder: str | Path, *, absolute: bool = False, costs: bool = False) -> pandas.DataFrame:
    """The finished runs of a study as a frame of pandas, one row for each number.

    Args:
        folder: the study.
        absolute: also the mean of each absolute metric, as ``absolute/return``, at the end of the run.
        costs: also what the run cost, as ``cost/wall_seconds``, at its end.

    Returns:
        Columns ``study``, ``task``, ``arm``, ``seed``, ``frames``, ``metric`` and ``value``; the metrics are all of
        ``evaluation/…``.  Runs are in the order of the study, the frames of a curve ascend.

    Raises:
        StudyError: if there is no study.
        ImportError: without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            'load needs pandas: pip install "marl-memory[study]"; report and its CSV files do without'
        ) from error
    results = read_results(Path(folder))
    rows = [
        (results.study.name, task, arm, seed, *number)
        for (task, arm, seed), record in results.records.items()
        for number in _numbers(record, absolute=absolute, costs=costs)
    ]
    frame = pandas.DataFrame.from_records(rows, columns=list(COLUMNS))
    return frame.astype({"seed": "int64", "frames": "int64", "value": "float64"})


def _numbers(record: Record, *, absolute: bool, costs: bool) -> list[tuple[int, str, float]]:
    found: list[tuple[int, str, Any]] = [
        (int(frames), metric, value)
        for metric, (where, values) in record.curves.items()
        for frames, value in zip(where, values, strict=True)
    ]
    if absolute:
        found += [
            (record.frames, f"absolute/{name}", sum(values) / len(values))
            for name, values in record.absolute.items()
            if len(values)
        ]
    if costs:
        found += [(record.frames, f"cost/{name}", value) for name, value in record.costs.items()]
    return found
