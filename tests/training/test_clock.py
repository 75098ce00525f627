"""The wall time of a run: booked once, under the section it was spent in, and all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marl_memory.training import clock as module
from marl_memory.training.clock import SECTIONS, Clock
from marl_memory.training.curve import summarise
from marl_memory.training.logging import Logger, MetricsFile


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_the_innermost_section_takes_the_time(hand: list[float]) -> None:
    clock = Clock()
    hand[0] += 1
    with clock.section("learn"):
        hand[0] += 2
        with clock.section("policy"):
            hand[0] += 4
            with clock.section("environment"):
                hand[0] += 8
            hand[0] += 16
        hand[0] += 32
        assert clock.take() == dict.fromkeys((f"time/{name}" for name in SECTIONS), 0.0) | {
            "time/other": 1, "time/learn": 34, "time/policy": 20, "time/environment": 8,
        }  # fmt: skip
        hand[0] += 64  # the section is still open
    hand[0] += 128
    seconds = clock.take()
    assert (seconds["time/learn"], seconds["time/other"], sum(seconds.values())) == (64, 128, 192)


def test_a_section_ends_where_an_error_leaves_it(hand: list[float]) -> None:
    def fail() -> None:
        hand[0] += 1
        raise ValueError("failed")

    clock = Clock()
    with pytest.raises(ValueError, match="failed"), clock.section("evaluate"):
        fail()
    hand[0] += 2
    assert (clock.seconds["evaluate"], clock.take()["time/other"]) == (1, 2)


def test_an_unknown_section_is_an_error() -> None:
    with pytest.raises(KeyError, match="lunch"), Clock().section("lunch"):
        pass


def shares(text: str) -> dict[str, float]:
    return {words: float(share) for words, share in re.findall(r"(\w+) (\d+\.\d)%", text)}


def test_the_summary_counts_the_rows_of_earlier_sessions(tmp_path: Path) -> None:
    nothing = dict.fromkeys((f"time/{name}" for name in SECTIONS), 0.0)
    for start, row in ((-1, {"time/environment": 30.0}), (64, {"time/learn": 90.0})):
        logger = Logger(tmp_path, total_frames=128, tensorboard=False, quiet=True)
        with logger.writing(start):
            logger.log({"frames": start + 64, **nothing, **row})
    logger.metrics.add_to_last({"time/checkpoint": 3600.0})
    text = summarise(tmp_path, finished=True)
    assert "1:02:00 in all" in text
    assert shares(text)["update"] == pytest.approx(100 * 90 / 3720, abs=0.05)
    assert shares(text)["environment"] == pytest.approx(100 * 30 / 3720, abs=0.05)


def test_what_became_known_after_the_last_row_is_added_to_it(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.append({"frames": 1, "time/logging": 1.0})
    metrics.append({"frames": 2, "time/logging": 0.5})
    metrics.add_to_last({"time/logging": 0.25, "time/other": 2.0})
    again = MetricsFile(tmp_path / "metrics.csv")
    assert again.column("time/logging") == ([1.0, 2.0], [1.0, 0.75])
    assert again.column("time/other") == ([2.0], [2.0])
