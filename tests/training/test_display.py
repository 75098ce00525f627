"""The display: what it says, at every width, on a terminal and off it."""

from __future__ import annotations

import io
import re
import sys

import pytest

from marl_memory.training import display as module
from marl_memory.training.clock import SECTIONS
from marl_memory.training.display import Display, Pace

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What the test prints goes to a terminal from now on (a fixture would come before pytest's own capture)."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120"), ("LINES", "30")):
        monkeypatch.setenv(name, value)
    return stream


def row(frames: int, **seconds: float) -> dict[str, float]:
    """A row as a trainer logs it, with the greedy results of the last evaluation."""
    spent = dict.fromkeys(SECTIONS, 0.0) | seconds
    return {
        "frames": frames,
        "train/return": -1234.5,
        "train/success": 0.25,
        "evaluation/episodes": 10,
        "evaluation/length": 30.0,
        "evaluation/return": -987.65,
        "evaluation/success": 0.5,
        **{f"time/{name}": x for name, x in spent.items()},
    }


def running(hand: list[float]) -> Display:
    """41 % of 3 M frames, 100 s after the start."""
    display = Display(3_000_000)
    display.pace = Pace(3_000_000, 0)
    parts = {"environment": 3.0, "policy": 1.0, "learn": 5.0, "memory": 0.5, "evaluate": 0.25, "other": 0.25}
    for frames in range(0, 1_230_001, 123_000):
        display.pace.take(row(frames, **parts))
        display.known = row(frames, **parts)
        hand[0] += 10
    hand[0] -= 10
    return display


def test_eta_is_the_sessions_wall_time_per_frame(hand: list[float]) -> None:
    pace = Pace(total_frames=1000, frames=200)  # resumed at 200
    hand[0] += 60  # the first iteration compiles
    pace.take({"frames": 300})
    assert pace.remaining() is None
    hand[0] += 10
    pace.take({"frames": 400, "time/frames_per_second": 1e9})
    assert pace.remaining() == pytest.approx(60.0)  # 100 frames in 10 s, whatever an iteration says of itself
    hand[0] += 30  # an evaluation and a checkpoint, which no iteration's speed knows of
    pace.take({"frames": 500})
    assert pace.remaining() == pytest.approx(500 * 40 / 200)
    hand[0] += 20  # a long iteration: time goes on
    assert pace.remaining() == pytest.approx(80.0)
    hand[0] += 1000
    assert pace.remaining() == 0.0
    pace.take({"frames": 1024})
    assert pace.remaining() == 0.0


def test_the_row_before_the_first_step_is_no_iteration(hand: list[float]) -> None:
    pace = Pace(total_frames=1000, frames=0)
    for frames, seconds in ((0, 50.0), (100, 30.0), (200, 10.0)):  # an evaluation, then one that compiles
        hand[0] += seconds
        pace.take({"frames": frames})
    assert pace.remaining() == pytest.approx(80.0)


def test_speeds_are_frames_by_the_seconds_of_each_part(hand: list[float]) -> None:
    speeds = dict(running(hand)._speeds())
    assert speeds == {
        "frames/s": "12,300",  # 123,000 frames in 10 s, everything counted
        "collect": "30,750",  # environment and policy, 4 s
        "learn": "24,600",
        "memory": "246,000",
        "evaluate": "1,200",  # 10 episodes of 30 frames in 0.25 s
    }


def test_speeds_follow_the_newest_rows() -> None:
    pace = Pace(10_000, 0)
    for i in range(1, 2 * Pace.RECENT + 1):
        pace.take(row(100 * i, learn=1.0 if i > Pace.RECENT else 9.0))
    assert pace.speed("learn") == pytest.approx(100.0)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 160, 200])
def test_no_line_is_longer_than_the_terminal_and_nothing_is_missing(width: int, hand: list[float]) -> None:
    lines = [line.plain for line in running(hand).view(width)]
    assert max(map(len, lines)) <= min(width, module.WIDEST)
    assert len(lines) <= {20: 15, 40: 8, 60: 6}.get(width, 3)
    text = " ".join(" ".join(lines).split())
    fields = [
        "1,230,000 / 3,000,000", "41%", "0:01:40", "ETA 0:02:23", "frames/s 12,300", "collect 30,750", "learn 24,600",
        "memory 246,000", "evaluate 1,200", "return -1234.50", "win 0.25", "greedy return -987.65", "greedy win 0.50",
    ]  # fmt: skip
    for field in fields:
        if len(field) <= width:
            assert field in text, field
    assert "━" in text and "─" in text


def test_what_is_not_known_yet_is_a_dash_or_absent() -> None:
    text = " ".join(line.plain for line in Display(1000).view(120))
    for field in ("0 / 1,000 frames", "ETA -", "frames/s -", "memory -", "evaluate -"):
        assert field in text
    assert "win" not in text and "nan" not in text and "None" not in text


def shown(stream: Terminal) -> str:
    return ESCAPE.sub("", stream.getvalue())


def test_a_terminal_keeps_the_last_state_and_other_output(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    display = Display(1000)
    display.start(0)
    display.show(row(0))
    print("a warning from somewhere")
    display.show(row(500, learn=1.0))
    display.show(row(1000, learn=1.0))
    display.stop()
    print("afterwards")
    assert sys.stdout is terminal
    assert "a warning from somewhere\n" in shown(terminal)
    lines = shown(terminal).splitlines()
    assert lines[-1] == "afterwards"
    assert lines[-2].startswith("return -1234.50")
    assert "1,000 / 1,000 frames" in lines[-4]
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_short_iterations_are_not_drawn_each(monkeypatch: pytest.MonkeyPatch, hand: list[float]) -> None:
    terminal = make_terminal(monkeypatch)
    display = Display(1000)
    display.start(0)
    for frames in range(100):
        display.show(row(frames))
    display.stop()
    assert 2 <= shown(terminal).count("/ 1,000 frames") <= 3
    assert "99 / 1,000 frames" in shown(terminal)


def test_a_narrower_terminal_is_cleared_of_wrapped_lines(hand: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    display = Display(1000)
    display.start(0)
    hand[0] += 1
    display.show(row(500, learn=1.0))
    before = display.view(120)
    terminal.seek(0)
    terminal.truncate()
    display.live.console.width = 30  # what COLUMNS says is read once; a true terminal is asked each time
    hand[0] += 1
    display.show(row(600, learn=1.0))
    display.stop()
    up = terminal.getvalue().split("/ 1,000")[0].count("\x1b[1A")
    rows = sum(-(-line.cell_len // 30) for line in before)  # on the narrow terminal
    assert rows > len(before)
    assert up == rows - 1
    assert max(map(len, shown(terminal).replace("\r", "\n").splitlines())) <= 30


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    display = Display(1000)
    display.start(0)
    display.show(row(1000))
    display.stop()
    assert terminal.getvalue().startswith("       1,000 / 1,000 frames  return -1234.50  win 0.25")
    assert "\x1b" not in terminal.getvalue()


def test_without_a_terminal_a_plain_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], hand: list[float]
) -> None:
    display = Display(1000)
    display.start(0)
    for frames in (10, 20, 500, 1000):
        hand[0] += 1
        display.show({"frames": frames, "train/return": 2.0, "time/frames_per_second": 100.0})
    display.stop()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # 20 is within 5 % of 10
    assert lines[0] == "          10 / 1,000 frames  100 frames/s  return 2.00  ETA -"
    assert lines[1].endswith("ETA 0:00:02")  # 490 frames in 2 s, 500 to go
    assert lines[2].endswith("1,000 / 1,000 frames  100 frames/s  return 2.00  ETA 0:00:00")
