"""What a person sees while a run trains: a live display on a terminal, plain lines anywhere else."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metadist.measure import ACCURACY, Measure
from metadist.tracking.log import Log

LINE_EVERY = 10.0
Clock = Callable[[], float]


class Progress(Protocol):
    """A context manager that is told what happens. Every call is cheap; `step` draws nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, step: int) -> None:
        """Training begins after meta-step `step`: 0, or where a resumed run goes on."""

    def step(self, step: int, loss: float, score: float, tasks_per_second: float, workers: int) -> None:
        """Meta-step `step` is done."""

    def validation(self, step: int, score: float, ci95: float, best: bool) -> None:
        """The state after `step` has this score on meta-validation."""

    def note(self, line: str) -> None:
        """Something a person should know, such as a worker that died and was replaced."""

    def done(self) -> None:
        """Training is over; what stands is final."""


def progress(
    total_steps: int,
    workers: int,
    measure: Measure = ACCURACY,
    console: Console | None = None,
    clock: Clock = time.monotonic,
    log: Log | None = None,
) -> Progress:
    """The display that fits the console; the log has its plain lines, and may stand in its place."""
    console = console or Console()
    displays: list[Progress] = []
    if log is not None:
        state, shown = State(total_steps, workers, clock, measure), log.shown
        displays.append(PlainProgress(state, shown))
    if log is None or not log.structured:
        state = State(total_steps, workers, clock, measure)
        live = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
        displays.append(LiveProgress(state, console) if live else PlainProgress(state, Printed(console)))
    return displays[0] if len(displays) == 1 else Together(displays)


@dataclass
class Smoothed:
    """A rate over about the last `window` seconds: older amounts and times fade together."""

    window: float
    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """`amount` happened within the last `seconds`."""
        fade = math.exp(-seconds / self.window)
        self.amount, self.seconds = self.amount * fade + amount, self.seconds * fade + seconds

    @property
    def rate(self) -> float:
        """Per second; 0 before anything happened."""
        return self.amount / self.seconds if self.seconds > 0 else 0.0


@dataclass
class State:
    """What is known of the run, and the words for it that both displays share."""

    total: int
    workers: int
    clock: Clock
    measure: Measure = ACCURACY
    step: int = 0
    loss: float | None = None
    score: float | None = None
    val: tuple[int, float, float, bool] | None = None
    best: float | None = None
    began: float | None = None
    last: float = 0.0
    tasks: Smoothed = field(default_factory=lambda: Smoothed(window=5.0))
    steps: Smoothed = field(default_factory=lambda: Smoothed(window=60.0))

    def start(self, step: int) -> None:
        self.step = step
        self.began = self.last = self.clock()

    def advance(self, step: int, loss: float, score: float, tasks_per_second: float, workers: int) -> None:
        if self.began is None:
            self.start(step - 1)
        now = self.clock()
        seconds = max(now - self.last, 1e-9)
        self.steps.add(step - self.step, seconds)
        self.tasks.add(tasks_per_second * seconds, seconds)
        self.step, self.loss, self.score, self.workers, self.last = step, loss, score, workers, now

    def validated(self, step: int, score: float, ci95: float, best: bool) -> None:
        self.val = (step, score, ci95, best)
        if best:
            self.best = score

    @property
    def elapsed(self) -> float:
        return 0.0 if self.began is None else self.clock() - self.began

    @property
    def left(self) -> float | None:
        """Seconds to the last meta-step, by the recent pace; validations are part of the pace."""
        rate = self.steps.rate
        return (self.total - self.step) / rate if rate > 0 else None

    def count(self) -> str:
        return f"{self.step:,}/{self.total:,}"

    def training(self) -> str:
        if self.loss is None or self.score is None:
            return "waiting for the first meta-step"
        return f"loss {self.loss:.4g}  {self.measure.name} {self.measure.show(self.score)}"

    def validation(self) -> str:
        if self.val is None:
            return ""
        step, score, ci95, best = self.val
        rank = "  best so far" if best else f"  best {self.measure.show(self.best)}" if self.best is not None else ""
        return f"validation {self.measure.interval(score, ci95)} at {step:,}{rank}"

    def pace(self) -> str:
        noun = "worker" if self.workers == 1 else "workers"
        who = f"{self.workers} {noun}" if self.workers else "in process"
        return f"{self.tasks.rate:,.0f} tasks/s  {who}"

    def times(self) -> str:
        left = self.left
        return f"{duration(self.elapsed)} elapsed  {'–' if left is None else duration(left)} left"


class LiveProgress:
    """A few lines at the bottom of a terminal, redrawn four times a second by rich's own thread."""

    def __init__(self, state: State, console: Console) -> None:
        self._state = state
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start(self, step: int) -> None:
        self._state.start(step)

    def step(self, step: int, loss: float, score: float, tasks_per_second: float, workers: int) -> None:
        self._state.advance(step, loss, score, tasks_per_second, workers)

    def validation(self, step: int, score: float, ci95: float, best: bool) -> None:
        self._state.validated(step, score, ci95, best)

    def note(self, line: str) -> None:
        self._live.console.print(Text(line, style="yellow"))

    def done(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        state = self._state
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text(f"meta-step {state.count()}", style="bold"),
            ProgressBar(total=state.total, completed=state.step),
            Text(state.times(), style="dim"),
        )
        display = Table.grid(expand=True)
        display.add_row(bar)
        below = "   ".join(filter(None, [state.training(), state.validation(), state.pace()]))
        display.add_row(Text(below))
        return display


class PlainProgress:
    """A line every ten seconds, at each validation and at the end, without control characters."""

    def __init__(self, state: State, write: Callable[[str, int], None]) -> None:
        self._state, self._write = state, write
        self._written = -math.inf
        self._written_step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def start(self, step: int) -> None:
        self._state.start(step)
        self._written = self._state.clock()
        self._print(f"meta-step {self._state.count()}  training begins")

    def step(self, step: int, loss: float, score: float, tasks_per_second: float, workers: int) -> None:
        self._state.advance(step, loss, score, tasks_per_second, workers)
        if self._state.last - self._written >= LINE_EVERY:
            self._print_step()

    def validation(self, step: int, score: float, ci95: float, best: bool) -> None:
        self._state.validated(step, score, ci95, best)
        self._print_step(self._state.validation())

    def note(self, line: str) -> None:
        self._print(line)

    def done(self) -> None:
        if self._written_step != self._state.step:
            self._print_step()

    def _print_step(self, more: str = "") -> None:
        state = self._state
        self._written, self._written_step = state.clock(), state.step
        words = [f"meta-step {state.count()}", state.training(), more, state.pace(), state.times()]
        self._print("  ".join(filter(None, words)))

    def _print(self, line: str) -> None:
        self._write(line, self._state.step)


class Printed:
    """Lines of a display on a console that is no terminal."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._silent = False

    def __call__(self, line: str, step: int) -> None:
        if self._silent:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        try:
            # A log file in a national encoding may lack a sign such as ±.
            print(line.encode(encoding, "replace").decode(encoding), file=self._file, flush=True)
        except OSError:  # the reader of the pipe is gone, or the disk of the log file is full: no reason to stop
            self._silent = True


class Together:
    """Several displays of one run."""

    def __init__(self, displays: Sequence[Progress]) -> None:
        self._displays = displays

    def __enter__(self) -> Self:
        for display in self._displays:
            display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for display in self._displays:
            display.__exit__(kind, error, trace)

    def start(self, step: int) -> None:
        for display in self._displays:
            display.start(step)

    def step(self, step: int, loss: float, score: float, tasks_per_second: float, workers: int) -> None:
        for display in self._displays:
            display.step(step, loss, score, tasks_per_second, workers)

    def validation(self, step: int, score: float, ci95: float, best: bool) -> None:
        for display in self._displays:
            display.validation(step, score, ci95, best)

    def note(self, line: str) -> None:
        for display in self._displays:
            display.note(line)

    def done(self) -> None:
        for display in self._displays:
            display.done()


def duration(seconds: float) -> str:
    """`mm:ss`, or with hours and days where there are some."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"
