"""A study as a frame of pandas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from marl_memory.study import load
from marl_memory.study.results import StudyError
from tests.study.synthetic import make_record, make_study, write_run, write_study

CURVE = [0.0, 1.0, 3.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study = make_study(["b_first", "a_second"], ["duel", "dance"], seeds=[7, 3])
    return write_study(tmp_path / "s", study, lambda task, arm, seed: None if (task, seed) == ("dance", 3) else CURVE)


def test_a_study_is_a_tidy_frame_in_its_own_order(folder: Path) -> None:
    frame = load(folder)
    assert list(frame.columns) == ["study", "task", "arm", "seed", "frames", "metric", "value"]
    assert len(frame) == 6 * 3
    assert list(frame["task"].unique()) == ["duel", "dance"] and list(frame["arm"].unique()) == ["b_first", "a_second"]
    one = frame[(frame["task"] == "duel") & (frame["arm"] == "a_second") & (frame["seed"] == 3)]
    assert list(one["frames"]) == [0, 1000, 2000] and list(one["value"]) == CURVE
    assert set(frame["metric"]) == {"evaluation/return"} and set(frame["study"]) == {"scope"}
    assert [str(frame[name].dtype) for name in ("seed", "frames", "value")] == ["int64", "int64", "float64"]
    assert frame.equals(load(str(folder)))


def test_every_evaluation_metric_is_there(tmp_path: Path) -> None:
    folder = write_study(tmp_path, make_study(["a"], seeds=[0]), lambda *_: None)
    curves = {"evaluation/return": ([0, 10], [1, 2]), "evaluation/success": ([0, 10], [0.0, 0.5])}
    write_run(folder, make_record("duel", "a", 0, CURVE, curves=curves))
    frame = load(folder)
    assert list(zip(frame["metric"], frame["frames"], frame["value"], strict=True)) == [
        ("evaluation/return", 0, 1.0),
        ("evaluation/return", 10, 2.0),
        ("evaluation/success", 0, 0.0),
        ("evaluation/success", 10, 0.5),
    ]


def test_absolute_metrics_and_costs_on_demand(tmp_path: Path) -> None:
    folder = write_study(tmp_path, make_study(["a"], seeds=[0]), lambda *_: CURVE, absolute=[1.0, 2.0, 6.0])
    frame = load(folder, absolute=True, costs=True)
    found = frame[~frame["metric"].str.startswith("evaluation/")].set_index("metric")
    assert found.loc["absolute/return", "value"] == 3.0 and found.loc["absolute/return", "frames"] == 2000
    assert found.loc["cost/rows", "value"] == 4096.0
    assert set(load(folder, absolute=True)["metric"]) == {"evaluation/return", "absolute/return"}


def test_a_study_without_a_finished_run_is_an_empty_frame(tmp_path: Path) -> None:
    frame = load(write_study(tmp_path, make_study(), lambda *_: None))
    assert frame.empty and list(frame.columns)[:3] == ["study", "task", "arm"]


def test_a_folder_without_a_study_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no study"):
        load(tmp_path)


def test_only_load_needs_pandas(folder: Path) -> None:
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "from pathlib import Path\n"
        "from marl_memory.study import load\n"
        "from marl_memory.study.report.write import write_report\n"
        f"write_report(Path({str(folder)!r}))\n"
        "try: load('.')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'pip install "marl-memory[study]"' in done.stdout
    assert (folder / "report/index.html").exists()
