"""Where the time of a run went: the spans of its processes, and seconds by phase.

A worker's time is what a step is made of. What it does itself counts first; while it does nothing, the run may be
validating, or the aggregator adding or taking the outer step; what then lies between the driver's call and the
worker's begin, or between the worker's end and its answer, is transfer. The rest is waiting: for other workers, or
for the driver.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from metadist.spans import MOST, Phase, Span, Spans, now

DRIVER, AGGREGATOR, PROCESS = "driver", "aggregator", "process"
"""Processes with a name of their own; the last one is all of them in one."""

OWN: tuple[Phase, ...] = ("sampling", "sum", "adapting", "transfer")
"""What a worker's own spans say its time was: the first that is open."""

BEHIND: tuple[tuple[str, Phase], ...] = (
    (DRIVER, "validation"),
    (DRIVER, "checkpoint"),
    (AGGREGATOR, "sum"),
    (AGGREGATOR, "outer step"),
)
"""Whose spans say what goes on behind a worker that does nothing itself: the first that is open."""

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
        """What a worker tells of a call: when it was asked, and when its answer came, as of `now` here.

        What it did ahead, before it was asked, is no part of the call. By then its stretch is most often accounted for,
        as the waiting that it filled.
        """
        own = [span for span in spans if span.end > asked]
        if own:
            begin, end = max(asked, min(span.begin for span in own)), max(span.end for span in own)
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
        idle: dict[Phase, list[tuple[float, float]]] = {"transfer": [], "waiting": []}
        for worker in taken.workers:
            own = [(OWN.index(span.phase), span) for span in self._kept.get(worker, ()) if span.phase in OWN]
            for at, until, place in _stretches(own, begin, self.begin):
                phase: Phase = "waiting" if place is None else OWN[place]
                if phase in idle:
                    idle[phase].append((at, until))
                else:
                    total[phase] += until - at
        behind = self._behind(begin)
        for phase, stretches in idle.items():
            begins, ends = np.array(stretches).reshape(-1, 2).T
            total[phase] += float((ends - begins).sum())
            for place, (_, other) in enumerate(BEHIND):
                sofar = np.interp(ends, behind[:, 0], behind[:, 1 + place])
                spent = float((sofar - np.interp(begins, behind[:, 0], behind[:, 1 + place])).sum())
                total[other] += spent
                total[phase] -= spent
        later = {process: [span for span in spans if span.end > self.begin] for process, spans in self._kept.items()}
        self._kept = {process: spans for process, spans in later.items() if spans}
        return {phase: seconds / max(1, len(taken.workers)) for phase, seconds in total.items()}

    def _behind(self, begin: float) -> np.ndarray:
        """Rows of a time and, for each of `BEHIND`, how many seconds it had been from `begin` to then."""
        spans = [
            (place, span)
            for place, (process, phase) in enumerate(BEHIND)
            for span in self._kept.get(process, ())
            if span.phase == phase
        ]
        rows = [[begin, *(0.0 for _ in BEHIND)]]
        for at, until, place in _stretches(spans, begin, self.begin):
            row = [until, *rows[-1][1:]]
            if place is not None:
                row[1 + place] += until - at
            rows.append(row)
        return np.array(rows)


def _stretches(
    spans: Iterable[tuple[int, Span]], begin: float, end: float
) -> Iterator[tuple[float, float, int | None]]:
    """Begin to end in pieces, each with the first place that is open in it."""
    changes = [(end, 0, 0)]
    for place, span in spans:
        if begin < span.end and span.begin < end:
            changes += [(max(span.begin, begin), 1, place), (min(span.end, end), -1, place)]
    opened, at = [0] * max(len(OWN), len(BEHIND)), begin
    for time, change, place in sorted(changes):
        if time > at:
            yield at, time, next((first for first, number in enumerate(opened) if number), None)
            at = time
        opened[place] += change
