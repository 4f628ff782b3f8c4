"""What is measured of a run beside its journal: metrics for Prometheus, and a profile where it is asked for.

The loop hands over what it knows and goes on; a thread works it off once a second. What goes wrong here ends the
metrics and nothing else.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from metadist.config import Config
from metadist.errors import Divergence, Interrupted, StorageError
from metadist.measure import MEASURES
from metadist.runtime.aggregator import Report
from metadist.runtime.metrics import Emit
from metadist.runtime.preemption import Preempted
from metadist.runtime.runtime import Counts, Runtime, Say
from metadist.runtime.timeline import Account, Taken
from metadist.spans import Span, now
from metadist.tracking.profile import Profile

EVERY = 1.0
"""Seconds between two times that metrics are set. Ray sends them on every ten."""


class Step(NamedTuple):
    """A meta-step that was taken. mark: by when its shards were computed; counts: now and then."""

    report: Report
    seconds: float
    mark: float
    taken: Taken
    workers: int
    counts: Counts | None


class Trained(NamedTuple):
    """The last step is behind us."""

    mark: float
    taken: Taken
    counts: Counts


class Validation(NamedTuple):
    """A validation's mean score."""

    score: float


class Checkpoint(NamedTuple):
    """A checkpoint that is durable, and when it was written."""

    written: Span


Event = Step | Trained | Validation | Checkpoint


class Meters:
    """Of one run, while it is entered; how it is left is told as the run's end.

    folder: where `profile.json` goes; emit: where metrics go, None: nowhere.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: Path, emit: Emit | None, say: Say) -> None:
        self.config, self.runtime, self.folder, self.say = config, runtime, folder, say
        self.profile = Profile() if config.tracking.profile else None
        self._emit = emit
        self._events: deque[Event] = deque()  # from any thread
        self._due = 0.0
        self._shards = self._recomputed = self._duplicates = 0
        self._working, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="meters", daemon=True)

    @property
    def _on(self) -> bool:
        return self._emit is not None or self.profile is not None

    # --- what the loop tells -------------------------------------------------

    def start(self, done: int) -> None:
        """Training begins after so many meta-steps."""
        self.runtime.timeline.take()
        self._account = Account(now())
        self._set("steps_planned", self.config.outer.steps)
        self._set("step", done)
        self._set("step_timestamp_seconds", time.time())
        self._set("checkpoint_timestamp_seconds", time.time())

    def step(self, report: Report, seconds: float, mark: float) -> None:
        """A report has come; mark: when the step's last shard was counted."""
        if self._on:
            counts = self.runtime.counts() if mark > self._due else None
            if counts is not None:
                self._due = mark + EVERY
            self._events.append(Step(report, seconds, mark, self.runtime.timeline.take(), self.runtime.workers, counts))

    def validation(self, score: float) -> None:
        """A validation's mean score has come."""
        if self._on:
            self._events.append(Validation(score))

    def checkpoint(self, written: Span) -> None:
        """One is durable; from any thread."""
        if self._on:
            self._events.append(Checkpoint(written))

    def trained(self) -> None:
        """The last step is taken."""
        if self._on:
            self._events.append(Trained(now(), self.runtime.timeline.take(), self.runtime.counts()))
            self._flush()

    # --- the thread ----------------------------------------------------------

    def __enter__(self) -> Self:
        if self._on:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is not None:
            self._ended.set()
            self._thread.join()
            self._flush()
            self._set("ended_timestamp_seconds", time.time(), how=ending(kind))
        if self.profile is not None:
            try:
                self.profile.write(self.folder / "profile.json")
            except StorageError as problem:
                self.say(f"no profile: {problem}")

    def _work(self) -> None:
        while True:
            self._flush()
            if self._ended.wait(EVERY):
                return

    def _flush(self) -> None:
        with self._working:
            try:
                self._work_off([self._events.popleft() for _ in range(len(self._events))])
            except Exception as error:  # noqa: BLE001, whatever it is, the run goes on
                self._give_up(error)

    def _work_off(self, events: Sequence[Event]) -> None:
        for event in events:
            self._tell(event)
        steps = [event for event in events if isinstance(event, Step)]
        if steps:
            self._tell_newest(steps)
        self._set("alive_timestamp_seconds", time.time())

    def _give_up(self, error: Exception) -> None:
        self._emit = self.profile = None
        self.say(f"no metrics from here on: {type(error).__name__}: {error}".splitlines()[0])

    def _tell(self, event: Event) -> None:
        match event:
            case Step():
                self._close(event.mark, event.taken)
                self._set("steps", 1)
                self._set("bytes", event.report.bytes)
                if event.counts is not None:
                    self._count(event.counts)
                if self.profile is not None:
                    self.profile.steps += 1
            case Trained():
                self._close(event.mark, event.taken)
                self._count(event.counts)
            case Validation():
                self._set("validation_score", event.score, measure=MEASURES[self.config.kind].name)
            case Checkpoint():
                self._set("checkpoint_timestamp_seconds", event.written.end)
                self._set("checkpoint_seconds", event.written.end - event.written.begin)
                if self.profile is not None:
                    self.profile.add({"writer": [event.written]})

    def _tell_newest(self, steps: list[Step]) -> None:
        newest = steps[-1]
        self._set("step", newest.report.step + 1)
        self._set("step_timestamp_seconds", newest.mark)
        self._set("loss", newest.report.loss)
        self._set("tasks_per_second", self.config.step_tasks / newest.seconds)
        self._set("workers", newest.workers)

    def _close(self, mark: float, taken: Taken) -> None:
        phases = self._account.close(mark, taken)
        for phase, seconds in phases.items():
            self._set("phase_seconds", seconds, phase=phase)
        if self.profile is not None:
            self.profile.add(taken.spans)
            self.profile.count(phases)

    def _count(self, counts: Counts) -> None:
        """Counters grow by what is new."""
        shards = sum(counts.shards.values())
        self._set("shards", shards - self._shards)
        self._set("shards_recomputed", counts.recomputed - self._recomputed)
        self._set("duplicates_dropped", counts.duplicates - self._duplicates)
        self._shards = max(self._shards, shards)  # one whose sum was lost counts again
        self._recomputed, self._duplicates = counts.recomputed, counts.duplicates
        if counts.staleness is not None:
            self._set("staleness", counts.staleness)

    def _set(self, name: str, value: float, **tags: str) -> None:
        """A gauge is set, a counter grows."""
        if self._emit is not None:
            try:
                self._emit(f"metadist_{name}", value, tags)
            except Exception as error:  # noqa: BLE001, whatever it is, the run goes on
                self._emit = None
                self.say(f"no metrics from here on: {type(error).__name__}: {error}".splitlines()[0])


def ending(kind: type[BaseException] | None) -> str:
    """How a run ended, by what it raised."""
    from metadist.runtime.train import Stopped

    if kind is None:
        return "finished"
    if issubclass(kind, Divergence):
        return "diverged"
    return "stopped" if issubclass(kind, Preempted | Interrupted | Stopped) else "failed"
