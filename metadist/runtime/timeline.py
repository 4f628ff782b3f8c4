"""Where the time of a run went: the spans of its processes, and seconds by phase.

A worker's time is what a step is made of. What it does itself counts first; while it does nothing, the run may be
validating, or the aggregator adding or taking the outer step; what then lies between the driver's call and the
worker's begin, or between the worker's end and its answer, is transfer. The rest is waiting: for other workers, or
for the driver.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from metadist.spans import MOST, Phase, Span, Spans, now

DRIVER, AGGREGATOR, PROCESS = "driver", "aggregator", "process"
"""Processes with a name of their own; the last one is all of them in one."""

ORDER: tuple[tuple[str, Phase], ...] = (
    ("", "sampling"),
    ("", "sum"),
    ("", "adapting"),
    (DRIVER, "validation"),
    (DRIVER, "checkpoint"),
    (AGGREGATOR, "sum"),
    (AGGREGATOR, "outer step"),
    ("", "transfer"),
)
"""Whose spans, a worker's own without a name, say what its time was: the first that has one."""

PLACE = {whose: place for place, whose in enumerate(ORDER)}

PHASES: tuple[Phase, ...] = (
    "sampling", "adapting", "transfer", "sum", "outer step", "waiting", "validation", "checkpoint",
)  # fmt: skip


class Taken(NamedTuple):
    """The workers at the time, and all spans that had come in, by process."""

    workers: frozenset[str]
    spans: Mapping[str, Iterable[Span]]


class Timeline:
    """Spans as they come in, for the one who takes them; where nobody does, the newest are kept.

    driver: what the driver's own time goes to; mark: a time up to which all spans of workers have come in.
    """

    def __init__(self, mark: Callable[[], float] = now) -> None:
        self.driver, self.mark = Spans(), mark
        self._workers: set[str] = set()
        self._found: defaultdict[str, deque[Span]] = defaultdict(lambda: deque(maxlen=MOST))

    def join(self, worker: str) -> None:
        """Its time counts from now on."""
        self._workers.add(worker)

    def leave(self, worker: str) -> None:
        """It does no longer."""
        self._workers.discard(worker)

    def add(self, process: str, spans: Iterable[Span]) -> None:
        """What a process tells of itself."""
        self._found[process].extend(spans)

    def call(self, worker: str, asked: float, spans: tuple[Span, ...], came: float) -> None:
        """What a worker tells of a call: when it was asked, and when its answer came, as of `now` here."""
        if spans:
            begin, end = min(span.begin for span in spans), max(span.end for span in spans)
            there, back = Span("transfer", asked, begin), Span("transfer", end, came)
            self._found[worker].extend((there, *spans, back))

    def take(self) -> Taken:
        """All there is, once."""
        self.add(DRIVER, self.driver.take())
        found = dict(self._found)
        self._found.clear()
        return Taken(frozenset(self._workers), found)


class Account:
    """Seconds by phase, of one stretch of time after the other; each is the mean over the workers."""

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self._kept: dict[str, list[Span]] = {}

    def close(self, end: float, taken: Taken) -> dict[Phase, float]:
        """Of the stretch from the last end to this one, of which all spans have been taken by now."""
        begin, self.begin = self.begin, max(self.begin, end)
        for process, spans in taken.spans.items():
            self._kept.setdefault(process, []).extend(spans)
        total = dict.fromkeys(PHASES, 0.0)
        for worker in taken.workers:
            for phase, seconds in self._of(worker, begin, self.begin).items():
                total[phase] += seconds / len(taken.workers)
        later = {process: [span for span in spans if span.end > self.begin] for process, spans in self._kept.items()}
        self._kept = {process: spans for process, spans in later.items() if spans}
        return total

    def _of(self, worker: str, begin: float, end: float) -> dict[Phase, float]:
        """One worker's: at any time the open span that comes first in `ORDER`."""
        changes: list[tuple[float, int, int]] = []
        for whose, process in (("", worker), (DRIVER, DRIVER), (AGGREGATOR, AGGREGATOR)):
            for span in self._kept.get(process, ()):
                place = PLACE.get((whose, span.phase))
                if place is not None and span.begin < end and span.end > begin and span.begin < span.end:
                    changes += [(max(span.begin, begin), 1, place), (min(span.end, end), -1, place)]
        changes.sort()
        found, opened, at = dict.fromkeys(PHASES, 0.0), [0] * len(ORDER), begin
        for time, change, place in changes:
            if time > at:
                first = next((phase for (_, phase), n in zip(ORDER, opened, strict=True) if n), None)
                found[first or "waiting"] += time - at
                at = time
            opened[place] += change
        found["waiting"] += end - at
        return found
