"""The trials of a search as a table: live on a terminal, a line per event anywhere else."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table as Drawn

from metadist.measure import Measure
from metadist.search import rows
from metadist.search.answer import short, show_value
from metadist.search.job import SearchJob
from metadist.search.state import Trial

MOST_ROWS = 20
LINE_EVERY = 10.0
"""Seconds between two lines about trials that go on, where there is no terminal."""


class Table:
    """`show` takes all trials whenever something has happened; `close` leaves the last table on the screen."""

    def __init__(
        self, job: SearchJob, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.job, self.console, self._clock = job, console or Console(), clock
        self._live: Live | None = None
        self._trials: Sequence[Trial] = ()
        self._told: dict[str, tuple[int, bool]] = {}
        self._best: str | None = None
        self._line = -math.inf
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.is_jupyter:
            self._live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=2)
            self._live.start()

    def show(self, trials: Sequence[Trial]) -> None:
        """Tell what is new. Draws nothing itself on a terminal: rich's own thread does."""
        self._trials = list(trials)
        if self._live is None:
            self._lines()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _draw(self) -> Drawn:
        return drawn(self.job, self._trials, self.console, MOST_ROWS)

    def _lines(self) -> None:
        """Starts, ends and every new best at once; other validations every ten seconds."""
        found = rows.trial_rows(self.job, self._trials)
        measure = self.job.measure
        top = next((row["id"] for row in best_first(self.job, found) if row["score"] is not None), None)
        for row in found:
            now, before = (row["steps"], row["how"] is not None), self._told.get(row["id"])
            if now == before:
                continue
            begun, ended = before is None, row["how"] is not None
            best = row["id"] == top and top != self._best and row["score"] is not None
            if not (begun or ended or best) and self._clock() - self._line < LINE_EVERY:
                continue
            self._told[row["id"]], self._line = now, self._clock()
            values = "  ".join(f"{short(key, tuple(self.job.search.space))}={show_value(row[key])}"
                               for key in self.job.search.space)  # fmt: skip
            score = "" if row["score"] is None else measure.interval(row["score"], row["ci95"])
            words = [f"trial {row['id']}", values, f"{row['steps']:,}/{self.job.base.outer.steps:,}", score,
                     state(row), "best so far" if best else "", row["reason"] or ""]  # fmt: skip
            self.console.print("  ".join(filter(None, words)), highlight=False, markup=False, soft_wrap=True)
        self._best = top


def drawn(job: SearchJob, trials: Sequence[Trial], console: Console, most: int | None = None) -> Drawn:
    """The best on top; at most so many rows, those in training always among them. A line each: where the console is
    narrow, without intervals and with fewer digits."""
    whole = _drawn(job, trials, most, brief=False)
    fits = console.measure(whole, options=console.options.update(width=10_000)).maximum <= console.width
    return whole if fits else _drawn(job, trials, most, brief=True)


def _drawn(job: SearchJob, trials: Sequence[Trial], most: int | None, brief: bool) -> Drawn:
    keys, measure = tuple(job.search.space), job.measure
    found = best_first(job, rows.trial_rows(job, trials))
    left_out = 0
    if most is not None and len(found) > most:
        going = [row for row in found if row["how"] is None]
        kept = {row["id"] for row in going} | {row["id"] for row in found[: max(0, most - len(going))]}
        left_out = len(found) - len(kept)
        found = [row for row in found if row["id"] in kept]
    ended = sum(trial.end is not None for trial in trials)
    title = f"{ended} of {job.search.trials} trials"
    table = Drawn(
        title=title, title_justify="left", title_style="bold", caption_justify="left", pad_edge=False,
        box=None if brief else SIMPLE_HEAD, padding=(0, 1, 0, 0) if brief else (0, 1), collapse_padding=True,
    )  # fmt: skip
    if left_out:
        table.caption = f"and {left_out} more"
    table.add_column("trial", no_wrap=True)
    for key in keys:
        name = short(key, keys)
        table.add_column(name.replace("_", "_\n") if brief else name, justify="right", no_wrap=True)
    table.add_column("steps" if brief else "meta-steps", justify="right", no_wrap=True)
    table.add_column(measure.name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in found:
        cells = [f"{row['id']}{' job' if row['origin'] == 'baseline' else ''}"]
        cells += [_brief(row[key]) if brief else show_value(row[key]) for key in keys]
        steps = f"{row['steps']:,}" if brief else f"{row['steps']:,}/{job.base.outer.steps:,}"
        cells += [steps, _score(measure, row, brief), state(row)]
        table.add_row(*cells, style=STYLES.get(row["how"], "red"))
    return table


def _score(measure: Measure, row: Mapping[str, Any], brief: bool) -> str:
    if row["score"] is None:
        return "–"
    return measure.show(row["score"]) if brief else measure.interval(row["score"], row["ci95"])


def _brief(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


STYLES = {None: "bold", "finished": "", "stopped": "dim"}


def state(row: Mapping[str, Any]) -> str:
    """Of a trial, in a word."""
    return "training" if row["how"] is None else str(row["how"])


def best_first(job: SearchJob, found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows by their last score, the best first; those without one at the end."""
    sign = -1.0 if job.measure.higher_is_better else 1.0

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        score = row["score"]
        known = score is not None and math.isfinite(score)
        return (not known, sign * score if known else 0.0, row["index"])

    return sorted(found, key=place)
