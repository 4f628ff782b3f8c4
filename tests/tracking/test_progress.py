"""What a person sees, on a terminal and in a file."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metadist.measure import ACCURACY, MSE
from metadist.tracking.progress import LiveProgress, PlainProgress, Progress, Smoothed, duration, progress
from metadist.tracking.summary import print_result


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(**changes: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140, **changes)


def file() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=140)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drive(display: Progress, clock: Clock, steps: int = 100, start: int = 0) -> None:
    display.start(start)
    for step in range(start + 1, steps + 1):
        clock.now += 0.5
        display.step(step, 1.5 / step, 0.5 + step / 1000, 32.0, 2)
        if step == 30:
            display.validation(step, 0.871, 0.012, best=True)
        if step == 60:
            display.validation(step, 0.85, 0.012, best=False)
        if step == 40:
            display.note("worker 4711 died [signal 9] and was replaced")


def test_a_file_gets_plain_lines_now_and_then() -> None:
    console, clock = file(), Clock()
    with progress(200, 2, ACCURACY, console, clock) as display:
        assert isinstance(display, PlainProgress)
        drive(display, clock)
        display.done()
    lines = text(console).splitlines()
    assert "\x1b" not in text(console) and "\r" not in text(console)
    assert 7 <= len(lines) <= 10  # 50 s of training: its begin, a line in 10 s, validations, a note, the end
    assert any("validation 87.1 ± 1.2 % at 30  best so far" in line for line in lines)
    assert any("validation 85.0 ± 1.2 % at 60  best 87.1 %" in line for line in lines)
    assert "worker 4711 died [signal 9] and was replaced" in lines
    assert lines[-1] == (
        "meta-step 100/200  loss 0.015  accuracy 60.0 %  32 tasks/s  2 workers  00:50 elapsed  00:50 left"
    )


def test_a_regression_is_told_in_numbers() -> None:
    console, clock = file(), Clock()
    with progress(2, 1, MSE, console, clock) as display:
        display.start(0)
        display.validation(1, 0.5234567, 0.01234, best=True)
        display.validation(1, 0.6, 0.01234, best=False)
        clock.now += 20
        display.step(2, 3.25, 12.3456789, 8.0, 1)
    told = text(console)
    assert "validation 0.5235 ± 0.012 at 1  best so far" in told
    assert "validation 0.6 ± 0.012 at 1  best 0.5235" in told
    assert "loss 3.25  mse 12.35  " in told
    assert "%" not in told and "accuracy" not in told


def test_a_resumed_run_counts_on_and_its_pace_is_of_now() -> None:
    console, clock = file(), Clock()
    with progress(100, 0, ACCURACY, console, clock) as display:
        drive(display, clock, steps=92, start=90)
    assert text(console).splitlines()[0] == "meta-step 90/100  training begins"
    assert "meta-step 92/100" in text(console) and "00:04 left" in text(console)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress(10, 1, ACCURACY, terminal()), PlainProgress)


def test_a_pipe_whose_reader_is_gone_stops_no_training() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    clock = Clock()
    with progress(100, 2, ACCURACY, Console(file=Gone(), force_terminal=False), clock) as display:
        drive(display, clock)


def test_a_file_that_knows_ascii_only_stops_no_training() -> None:
    raw, clock = io.BytesIO(), Clock()
    with progress(
        100, 2, ACCURACY, Console(file=io.TextIOWrapper(raw, "ascii"), force_terminal=False), clock
    ) as display:
        drive(display, clock)
    assert b"87.1 ? 1.2 %" in raw.getvalue()


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console, clock = terminal(), Clock()
    with progress(200, 2, ACCURACY, console, clock) as display:
        assert isinstance(display, LiveProgress)
        drive(display, clock)
        display.done()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(console))
    assert "\x1b" in text(console)
    assert "meta-step 100/200" in plain and "━" in plain and "00:50 left" in plain
    assert "loss 0.015" in plain and "accuracy 60.0 %" in plain and "32 tasks/s  2 workers" in plain
    assert "validation 85.0 ± 1.2 %" in plain and "worker 4711 died [signal 9] and was replaced" in plain


def test_a_meta_step_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The display is drawn by its own thread: a thousand steps draw no more than none."""
    monkeypatch.setenv("TERM", "xterm-256color")
    drawn = []
    clock = Clock()
    display = progress(1000, 2, ACCURACY, terminal(), clock)
    assert isinstance(display, LiveProgress)
    monkeypatch.setattr(display._live, "refresh", lambda: drawn.append(1))
    display.start(0)
    for step in range(1, 1001):
        display.step(step, 1.0, 0.5, 10.0, 2)
    assert drawn == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1e30, 0.0])
def test_any_loss_can_be_shown(loss: float) -> None:
    for console in (file(), terminal()):
        clock = Clock()
        with progress(2, 1, ACCURACY, console, clock) as display:
            display.start(0)
            display.step(1, loss, 0.5, 0.0, 1)


def test_smoothing_follows_a_change_and_forgets_the_past() -> None:
    rate = Smoothed(window=10.0)
    assert rate.rate == 0.0
    for _ in range(100):
        rate.add(10.0, 1.0)
    assert rate.rate == pytest.approx(10.0)
    rate.add(1000.0, 1.0)
    assert 10.0 < rate.rate < 200.0
    for _ in range(200):
        rate.add(20.0, 1.0)
    assert rate.rate == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "00:00"), (71.2, "01:11"), (3725, "1:02:05"), (90061, "1 d 01:01:01")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_result_is_told_in_percent(result: dict[str, Any]) -> None:
    console = file()
    print_result(console, result, Path("runs/[a]"))
    told = text(console)
    for words in (
        "95.00 ± 0.40 %", "55.00 ± 1.00 %", "91.00 ± 0.20 %", "5-way 1-shot", "not transductive", "abababababab",
        "20, 1 recomputed", "2 × cpu", "123.4 tasks/s", "01:11", "96.00 ± 1.00 % at meta-step 15", "runs/[a]",
    ):  # fmt: skip
        assert words in told
    assert "ab" * 7 not in told and "not reproducible" not in told


def test_the_result_of_a_regression_is_told_in_numbers(result: dict[str, Any]) -> None:
    console = file()
    test = {"mse": 0.123456, "ci95": 0.0234, "episodes": 600, "ways": 1, "shots": 10, "queries": 10}
    regression = {
        "test": test | {"transductive": True, "inner_steps": 1}, "untrained": {"mse": 3.5, "ci95": 0.25},
        "also": [test | {"transductive": True, "inner_steps": 5, "mse": 0.0625}],
        "best": {"step": 15, "mse": 0.11, "ci95": 0.02},
    }  # fmt: skip
    print_result(console, result | regression, Path("runs/a"))
    told = text(console)
    for words in (
        "mse", "0.1235 ± 0.023", "3.5 ± 0.25", "0.0625 ± 0.023", "10-shot regression", "0.11 ± 0.02 at meta-step 15",
    ):  # fmt: skip
        assert words in told
    assert "%" not in told and "accuracy" not in told and "-way" not in told


def test_a_result_without_tests_is_told_too(result: dict[str, Any]) -> None:
    console = file()
    nothing = {"test": None, "untrained": None, "also": [], "best": None, "workers": 0, "reproducible": False}
    print_result(console, result | nothing, Path("runs/a"))
    assert "accuracy" not in text(console)
    assert "in process on cpu" in text(console) and "(not reproducible)" in text(console)
