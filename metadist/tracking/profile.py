"""Where a run's time went: a Chrome trace of its newest spans, and a table by phase."""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from metadist.durable import write
from metadist.spans import Span

TRACED = 100_000
"""Newest spans of a trace; as JSON some 10 MB. Phases are counted over the whole run."""

FIRST = ("driver", "aggregator", "writer")
"""Rows of a trace that stand above the workers'."""


class Profile:
    """What is kept of a run's spans, and their sum by phase."""

    def __init__(self) -> None:
        self.steps, self.phases = 0, dict[str, float]()
        self._spans: deque[tuple[str, Span]] = deque(maxlen=TRACED)

    def add(self, spans: Mapping[str, Iterable[Span]]) -> None:
        """By process."""
        for process, found in spans.items():
            self._spans.extend((process, span) for span in found if span.end > span.begin)

    def count(self, phases: Mapping[Any, float]) -> None:
        """Seconds by phase of a stretch of the run."""
        for phase, seconds in phases.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def told(self) -> dict[str, Any]:
        """For `result.json`: meta-steps, and seconds by phase, which add up to the time of training."""
        return {"steps": self.steps, "seconds": sum(self.phases.values()), "phases": dict(self.phases)}

    def write(self, path: Path) -> None:
        """The trace, as chrome://tracing and ui.perfetto.dev read it, in microseconds. Raises StorageError."""
        processes = {process for process, _ in self._spans}
        rows = [name for name in FIRST if name in processes] + sorted(processes.difference(FIRST))
        number = {process: place for place, process in enumerate(rows)}
        named: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": place, "args": {"name": process}}
            for process, place in number.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": span.phase,
                "cat": "metadist",
                "pid": 0,
                "tid": number[process],
                "ts": round(1e6 * span.begin, 1),
                "dur": round(1e6 * (span.end - span.begin), 1),
            }
            for process, span in sorted(self._spans, key=lambda one: one[1].begin)
        ]
        trace = {"traceEvents": named + spans, "displayTimeUnit": "ms", "otherData": self.told()}
        write(path, json.dumps(trace).encode())


def table(told: Mapping[str, Any]) -> Table:
    """Of what `Profile.told` says: seconds, milliseconds a step and share of each phase."""
    found = Table(title="where the time went", title_justify="left", title_style="bold")
    found.add_column("")
    for name in ("seconds", "ms a step", "share"):
        found.add_column(name, justify="right")
    seconds, steps = told["seconds"], max(1, told["steps"])
    for name, each in [*told["phases"].items(), ("in all", seconds)]:
        share = f"{100 * each / seconds:.1f} %" if seconds else ""
        found.add_row(
            name, f"{each:,.2f}", f"{1000 * each / steps:,.2f}", share, style="bold" if name == "in all" else ""
        )
    return found
