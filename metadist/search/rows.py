"""A search as plain rows: a line per trial and a line per validation, and both as Parquet files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metadist.config import flatten
from metadist.durable import write
from metadist.errors import ConfigError
from metadist.report.search_figures import Found
from metadist.search.job import SearchJob
from metadist.search.ledger import Event
from metadist.search.space import LogUniform
from metadist.search.state import Trial

Row = dict[str, Any]

FACTS = {
    "seconds": pa.float64(), "tasks_per_second": pa.float64(), "peak_memory": pa.float64(),
    "adaptation_mflop": pa.float64(), "reproducible": pa.bool_(), "theta_sha256": pa.string(),
}  # fmt: skip
"""Of a trial's end; of one that goes on, or was stopped without them, what its last validation measured."""

COLUMNS = {
    "id": pa.string(), "index": pa.int64(), "origin": pa.string(), "attempt": pa.int64(), "how": pa.string(),
    "reason": pa.string(), "steps": pa.int64(), "score": pa.float64(), "ci95": pa.float64(), "early": pa.float64(),
    "selection": pa.float64(), "selection_ci95": pa.float64(), **FACTS,
}  # fmt: skip
"""Of `trials.parquet`, beside a column for each searched key."""

CURVES = {"trial": pa.string(), "step": pa.int64(), "score": pa.float64(), "ci95": pa.float64()}


def trial_rows(job: SearchJob, trials: Sequence[Trial], events: Sequence[Event] = ()) -> list[Row]:
    """A row per trial, in their order.

    how: null while it trains; score, ci95: of the last validation; early: score at the first step at which a
    scheduler may stop trials, the same for all; selection: score as a finalist.
    """
    judged = {event["id"]: event for event in events if event.get("event") == "judged"}
    rung = job.search.first_rung(job.base)
    return [_row(job, trial, rung, judged.get(trial.id, {})) for trial in trials]


def _row(job: SearchJob, trial: Trial, rung: int, judged: Mapping[str, Any]) -> Row:
    last, end = (trial.reports[-1] if trial.reports else None), trial.end
    measured = last.values if last else {}
    facts = end.facts if end else {}
    return {
        "id": trial.id,
        "index": trial.index,
        "origin": trial.origin,
        "attempt": trial.attempt,
        **values_of(job, trial),
        "how": end.how if end else None,
        "reason": (end.reason or None) if end else None,
        "steps": max(end.step if end else 0, last.step if last else 0),
        "score": measured.get("score"),
        "ci95": measured.get("ci95"),
        "early": None if trial.drawn else trial.score_at(rung),  # under other values than these
        "selection": judged.get("score"),
        "selection_ci95": judged.get("ci95"),
        **{name: _fact(kind, facts.get(name, measured.get(name))) for name, kind in FACTS.items()},
    }


def _fact(kind: pa.DataType, value: Any) -> Any:
    """A number that is not finite is a word in a ledger."""
    return float(value) if value is not None and pa.types.is_floating(kind) else value


def values_of(job: SearchJob, trial: Trial) -> dict[str, Any]:
    """The searched keys with the values that the trial trains with; null where its method has no such key."""
    try:
        whole = flatten(job.config(trial.now))
    except ConfigError:  # a trial that was refused
        whole = flatten(job.base) | trial.now
    return {key: whole.get(key) for key in job.search.space}


def early_rows(job: SearchJob, trials: Sequence[Trial]) -> list[Row]:
    """A row per trial: the values that it began with, and `early`, its score at the first rung under them."""
    rung = job.search.first_rung(job.base)

    def began(trial: Trial) -> Trial:
        return replace(trial, values=trial.drawn or trial.values, stages=[])

    return [{**values_of(job, began(trial)), "early": trial.score_at(rung)} for trial in trials]


def curve_rows(trials: Sequence[Trial]) -> list[Row]:
    """A row per validation: trial, step, score, ci95."""
    return [
        {"trial": trial.id, "step": report.step, "score": report.values["score"], "ci95": report.values.get("ci95")}
        for trial in trials
        for report in trial.reports
    ]


def save(job: SearchJob, trials: Sequence[Trial], folder: Path, events: Sequence[Event] = ()) -> None:
    """`trials.parquet` and `curves.parquet`, replaced in one step each."""
    rows = trial_rows(job, trials, events)
    columns = {}
    for name in [*COLUMNS, *job.search.space]:
        values = [row[name] for row in rows]
        columns[name] = pa.array(values, COLUMNS[name]) if name in COLUMNS else _searched(values)
    order = ["id", "index", "origin", "attempt", *job.search.space]
    names = [*order, *(name for name in columns if name not in order)]
    write_parquet(folder / "trials.parquet", pa.table({name: columns[name] for name in names}))
    curves = curve_rows(trials)
    write_parquet(
        folder / "curves.parquet",
        pa.table({name: pa.array([row[name] for row in curves], kind) for name, kind in CURVES.items()}),
    )


def _searched(values: Sequence[Any]) -> pa.Array:
    """A column of what its values are; words where they are of several kinds."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Replace a Parquet file in one step. Raises StorageError."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write(path, sink.getvalue().to_pybytes())


def found(job: SearchJob, trials: Sequence[Trial], events: Sequence[Event] = ()) -> Found:
    """What the figures are drawn from."""
    chosen = next((event["id"] for event in reversed(events) if event.get("event") == "selected"), None)
    return Found(
        keys=tuple(job.search.space),
        logarithmic=frozenset(key for key, domain in job.search.space.items() if isinstance(domain, LogUniform)),
        measure=job.measure,
        trials=trial_rows(job, trials, events),
        early=early_rows(job, trials),
        curves=curve_rows(trials),
        rung=job.search.first_rung(job.base),
        last=job.base.outer.steps,
        winner=chosen,
    )
