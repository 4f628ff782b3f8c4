"""Files written off the training path: one thread takes them in order.

The training loop hands over what is to be written and goes on. A write that failed is
raised in the loop at its next call, in one line.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metadist.durable import write
from metadist.runtime.aggregator import Report

FLUSH_SECONDS = 2.0
"""Between two writings of the metrics; longer once a writing takes a twentieth of that."""

COLUMNS = ("time", "seconds", "loss", "grad_norm", "lr", "tasks_per_second", "bytes")
"""Of every run; the score of its kind, in training and validation, joins them."""


class Journal:
    """The writer of a run folder: checkpoints as they come, metrics every few seconds."""

    def __init__(self, folder: Path, rows: list[dict[str, float | int]]) -> None:
        self.folder, self.rows = folder, rows
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._written, self._due = len(rows), 0.0
        self._final, self._cuts, self._lock = table_of([]), 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def row(self, step: int, **measured: float) -> None:
        """One line of metrics; a step that has one already gets further columns."""
        self.check()
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(measured)
        else:
            self.rows.append({"step": step, "time": time.time(), **measured})

    def catch_up(self, reports: Sequence[Report], score: str) -> None:
        """Rows of steps that an earlier driver took and did not write; its times are not known."""
        last = self.rows[-1]["step"] if self.rows else 0
        for told in reports:
            if told.step + 1 > last:
                measured = {"loss": told.loss, score: told.score, "grad_norm": told.grad_norm, "lr": told.lr}
                self.row(told.step + 1, **measured)

    def later(self, job: Callable[[], None]) -> None:
        """Run a write in the thread, the metrics so far before it; waits only when two are waiting already."""
        self.check()
        self._jobs.put(job)

    def cut(self, step: int) -> None:
        """Forget the rows after `step`: they are computed again."""
        with self._lock:
            self.rows[:] = [row for row in self.rows if row["step"] <= step]
            self._written = min(self._written, len(self.rows))
            self._final, self._cuts = table_of([]), self._cuts + 1

    def flush(self) -> None:
        """Wait until every write handed over is done."""
        self._jobs.join()
        self.check()

    def check(self) -> None:
        """Raise what a write raised."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Write all that is left, then raise what a write raised."""
        self._jobs.put(None)
        self._thread.join()
        if self._failure is None:
            self._write_metrics()
        self.check()

    def abandon(self) -> None:
        """End without raising: the run fails for another reason, which must be the one told."""
        try:
            self.close()
        except Exception:  # noqa: BLE001
            self._failure = None

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=0.5)
            except queue.Empty:
                job = self._metrics_if_due
            else:
                if job is None:
                    self._jobs.task_done()
                    return
                if self.rows:  # a run that resumes from what the job writes has the metrics up to there
                    self._try(self._write_metrics)
                self._try(job)
                self._jobs.task_done()
                job = self._metrics_if_due
            self._try(job)

    def _try(self, job: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001, raised again in the training loop
                self._failure = error

    def _metrics_if_due(self) -> None:
        if time.monotonic() > self._due and len(self.rows) > self._written:
            self._write_metrics()

    def _write_metrics(self) -> None:
        started = time.monotonic()
        count = len(self.rows)
        with self._lock:
            final, cuts = self._final, self._cuts
        # The last row may get further columns; those before it are put together once.
        final = joined(final, table_of([dict(row) for row in self.rows[final.num_rows : count - 1]]))
        with self._lock:
            if self._cuts == cuts:
                self._final = final
        last = table_of([dict(row) for row in self.rows[count - 1 : count]])
        write_metrics(self.folder / "metrics.parquet", joined(final, last))
        self._written = count
        spent = time.monotonic() - started
        self._due = time.monotonic() + max(FLUSH_SECONDS, 20 * spent)


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`step` int64, the rest float64, null where not measured."""
    columns: dict[str, pa.Array] = {"step": pa.array([row["step"] for row in rows], pa.int64())}
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    for name in names:
        if name != "step":
            columns[name] = pa.array([row.get(name) for row in rows], pa.float64())
    return pa.table(columns)


def joined(table: pa.Table, further: pa.Table) -> pa.Table:
    """Both, one behind the other, with the columns of either."""
    return pa.concat_tables([table, further], promote_options="default").combine_chunks()


def write_metrics(path: Path, table: pa.Table) -> None:
    """As one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write(path, sink.getvalue().to_pybytes())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier process; none where the file is not there or damaged."""
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError):
        return []
    return [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
