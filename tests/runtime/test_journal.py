"""What is written off the training path."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist import durable
from metadist.errors import StorageError
from metadist.runtime import journal
from metadist.runtime.journal import COLUMNS, Journal, read_metrics, table_of, write_metrics


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metrics_can_be_read_at_any_time(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "metrics.parquet", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if path.exists():
                try:  # one opening: by its name, pyarrow opens a file twice, and may meet two versions of it
                    with path.open("rb") as file:
                        seen.append(pq.read_table(file).column("step").to_pylist())
                except (OSError, ValueError) as error:
                    seen.append(error)
                    return

    reader = threading.Thread(target=read)
    reader.start()
    writer = Journal(tmp_path, [])
    for step in range(1, 200):
        writer.row(step, loss=1.0 / step)
        time.sleep(0.005)
        if step % 20 == 0:
            writer.later(lambda: None)
    writer.close()
    stop.set()
    reader.join()
    assert not [found for found in seen if isinstance(found, Exception)]
    assert all(steps == list(range(1, len(steps) + 1)) for steps in seen)
    assert len({len(steps) for steps in seen}) > 1, "it grew while it was read"
    table = pq.read_table(path)
    assert table.column("step").to_pylist() == list(range(1, 200))
    assert os.listdir(tmp_path) == ["metrics.parquet"]


def test_columns_and_nulls(tmp_path: Path) -> None:
    writer = Journal(tmp_path, [])
    writer.row(1, loss=0.5)
    writer.row(1, val_accuracy=0.75, something_new=2.0)
    writer.row(2, loss=0.25)
    writer.close()
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.column_names[0] == "step"
    assert set(COLUMNS) <= set(table.column_names)
    assert str(table.schema.field("step").type) == "int64"
    assert {str(table.schema.field(name).type) for name in table.column_names[1:]} == {"double"}
    assert table.column("val_accuracy").to_pylist() == [0.75, None]
    assert table.column("something_new").to_pylist() == [2.0, None]
    assert table.column("loss").to_pylist() == [0.5, 0.25]


def test_a_checkpoint_has_its_metrics_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed behind a checkpoint resumes there: the rows up to it must not be lost with the process."""
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 1000.0)
    writer = Journal(tmp_path, [])
    writer.row(1, loss=1.0)
    writer.later(lambda: None)
    writer.flush()
    found = []
    for step in (2, 3, 4):
        writer.row(step, loss=1.0)
    writer.later(lambda: found.extend(read_metrics(tmp_path / "metrics.parquet")))
    writer.flush()
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    writer.close()


def test_rows_behind_the_resumed_step_are_cut(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.parquet", table_of([{"step": n, "loss": float(n)} for n in range(1, 10)]))
    rows = read_metrics(tmp_path / "metrics.parquet")
    assert rows == [{"step": step, "loss": float(step)} for step in range(1, 10)]
    writer = Journal(tmp_path, rows)
    writer.cut(4)
    writer.row(5, loss=50.0)
    writer.close()
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.column("loss").to_pylist() == [1.0, 2.0, 3.0, 4.0, 50.0]


def test_cut_in_the_middle_of_a_run(tmp_path: Path) -> None:
    writer = Journal(tmp_path, [])
    for step in range(1, 8):
        writer.row(step, loss=1.0)
    writer.flush()
    writer.cut(4)
    writer.row(5, loss=2.0)
    writer.close()
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.column("loss").to_pylist() == [1.0] * 4 + [2.0]


acts = st.lists(st.sampled_from(["row", "validation", "write", "cut"]), max_size=40)


@given(acts)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_written_in_between_the_rows_are_all_there(tmp_path: Path, acts: list[str]) -> None:
    """Those that were put together once and those that came later, with columns that begin late, or behind a cut."""
    writer = Journal(tmp_path, [])
    expected: list[dict[str, float]] = []
    for number, act in enumerate([*acts, "row"]):
        if act == "cut":
            writer.cut(len(expected) // 2)
            del expected[len(expected) // 2 :]
        elif act == "write" and expected:
            writer.later(lambda: None)
            writer.flush()
        elif act == "row":
            expected.append({"step": len(expected) + 1, "loss": float(number)})
            writer.row(len(expected), loss=float(number))
        elif act == "validation" and expected:
            expected[-1]["val_accuracy"] = float(number)
            writer.row(len(expected), val_accuracy=float(number))
    writer.close()
    found = read_metrics(tmp_path / "metrics.parquet")
    assert [{key: row[key] for key in row if key != "time"} for row in found] == expected


def test_rows_are_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(journal, "table_of", lambda some: rows.append(len(some)) or table_of(some))
    writer = Journal(tmp_path, [])
    for step in range(1, 31):
        writer.row(step, loss=1.0)
        if step % 10 == 0:
            writer.later(lambda: None)
            writer.flush()
    writer.close()
    assert len(read_metrics(tmp_path / "metrics.parquet")) == 30
    assert sum(rows) <= 30 + len(rows), "all of them once, and the last one at every writing"


@pytest.mark.parametrize("content", [b"", b"PAR1 half a file"])
def test_damaged_metrics_do_not_stop_a_resume(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.parquet").write_bytes(content)
    assert read_metrics(tmp_path / "metrics.parquet") == []


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.parquet") == []


@pytest.mark.parametrize("call", ["row", "later", "flush", "close"])
def test_a_full_disk_is_raised_in_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    writer = Journal(tmp_path, [])
    monkeypatch.setattr(durable.os, "fsync", full)
    writer.later(lambda: durable.write_folder(tmp_path / "step-1", {"a": b"1"}))
    calls = {"row": lambda: writer.row(1), "later": lambda: writer.later(lambda: None)}
    calls |= {"flush": writer.flush, "close": writer.close}
    writer._jobs.join()
    with pytest.raises(StorageError, match="step-1: cannot be written: No space left on device"):
        calls[call]()
    writer.abandon()
    assert not (tmp_path / "step-1").exists()
    assert os.listdir(tmp_path) == []


def test_full_disk_for_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable.os, "fsync", full)
    writer = Journal(tmp_path, [])
    writer.row(1, loss=1.0)
    with pytest.raises(StorageError, match=r"metrics\.parquet"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_later_keeps_the_order(tmp_path: Path) -> None:
    writer, seen = Journal(tmp_path, []), []
    for number in range(10):
        writer.later(lambda number=number: (time.sleep(0.002), seen.append(number)))
    writer.close()
    assert seen == list(range(10))


def test_a_write_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.write(tmp_path / "file", b"before")
    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError):
        durable.write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_that_is_no_storage_error_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        durable.write(tmp_path / "folder", b"")
