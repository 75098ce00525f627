"""metrics.csv: what is written is read back exactly, also after a kill, and rows can be cut."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marl_memory.training.logging import Logger, MetricsFile


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_values_are_read_back_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, -math.pi, 1e22, 5e-324, math.inf]
    written = MetricsFile(tmp_path / "metrics.csv")
    for i, value in enumerate(values):
        written.append({"frames": i, "x": value})
    for metrics in (written, MetricsFile(tmp_path / "metrics.csv")):
        frames, found = metrics.column("x")
        assert frames == list(range(len(values)))
        assert found == values


@given(value=st.floats())
def test_every_float_survives(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.csv"
    MetricsFile(path).append({"frames": 3, "x": value})
    ((found,),) = [MetricsFile(path).column("x")[1]]
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_new_columns_are_blank_in_rows_before(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.append({"frames": 1, "a": 1.0})
    metrics.append({"frames": 2, "b": 2.0, "a": 3.0})
    metrics.append({"frames": 3, "b": 4.0})
    expected = [
        {"frames": "1", "a": "1.0", "b": ""},
        {"frames": "2", "a": "3.0", "b": "2.0"},
        {"frames": "3", "a": "", "b": "4.0"},
    ]
    assert table(tmp_path / "metrics.csv") == expected
    again = MetricsFile(tmp_path / "metrics.csv")
    assert again.column("b") == ([2.0, 3.0], [2.0, 4.0])
    assert again.column("a") == ([1.0, 2.0], [1.0, 3.0])
    assert again.column("unheard of") == ([], [])


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.csv").append({"frames": 1, "a": 1.0})
    again = MetricsFile(tmp_path / "metrics.csv")
    again.append({"frames": 2, "a": 2.0})
    again.append({"frames": 3, "c": 2.0})
    assert [row["frames"] for row in table(tmp_path / "metrics.csv")] == ["1", "2", "3"]


def test_rows_after_a_checkpoint_are_cut(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for frames in (0, 100, 200, 1000):
        metrics.append({"frames": frames, "a": 1.0})
    metrics.cut_after(200)
    assert [row["frames"] for row in table(tmp_path / "metrics.csv")] == ["0", "100", "200"]
    metrics.append({"frames": 300, "a": 1.0})
    assert MetricsFile(tmp_path / "metrics.csv").column("a")[0] == [0.0, 100.0, 200.0, 300.0]


def written_whole(path: Path) -> bytes:
    metrics = MetricsFile(path)
    metrics.append({"frames": 1, "a": 1.0, "b": 2.0})
    metrics.append({"frames": 2, "a": 0.25, "b": 0.125})
    return path.read_bytes()


def test_a_half_written_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    whole = written_whole(path)
    header, first, _ = whole.splitlines(keepends=True)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        metrics = MetricsFile(path)
        metrics.cut_after(10)  # as every start of a logger does
        metrics.append({"frames": 3, "a": 3.0, "b": 4.0})
        found = MetricsFile(path).column("b")
        rows = (length >= len(header) + len(first) - 1) + (length >= len(whole) - 1)  # "\r" of "\r\n" is enough
        assert found[1] == [2.0, 0.125][:rows] + [4.0], whole[:length]


def test_a_half_written_last_line_does_not_spoil_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(written_whole(path)[:-5])
    torn = path.read_bytes()
    assert MetricsFile(path).column("a") == ([1.0], [1.0])
    assert path.read_bytes() == torn  # a reader changes nothing: the line may be a live run's, half way
    metrics = MetricsFile(path)
    metrics.cut_after(1)
    metrics.append({"frames": 3, "a": 3.0, "b": 4.0})
    assert MetricsFile(path).column("a") == ([1.0, 3.0], [1.0, 3.0])


def test_rewriting_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.append({"frames": 1, "a": 1.0})
    before = (tmp_path / "metrics.csv").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.append({"frames": 2, "new": 1.0})
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_logger_cuts_when_it_starts_again(tmp_path: Path) -> None:
    for start, rows in ((0, (10, 20, 30)), (20, (30,))):
        logger = Logger(tmp_path, total_frames=100, tensorboard=False, quiet=True)
        logger.start(start)
        for frames in rows:
            logger.log({"frames": frames, "a": float(start)})
        logger.close()
    assert MetricsFile(tmp_path / "metrics.csv").column("a") == ([10.0, 20.0, 30.0], [0.0, 0.0, 20.0])


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    logger = Logger(tmp_path, total_frames=100, quiet=True)
    logger.start(0)
    logger.log({"frames": 10, "a": 1.0})
    logger.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_quiet_logger_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(tmp_path, total_frames=100, tensorboard=False, quiet=True).writing(-1):
        pass
    logger = Logger(tmp_path, total_frames=100, tensorboard=False, quiet=True)
    with logger.writing(-1):
        logger.log({"frames": 100, "train/return": 1.0})
    assert capsys.readouterr() == ("", "")
