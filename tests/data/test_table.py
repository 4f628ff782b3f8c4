"""The Arrow table: order, fingerprint, zero copy, damage."""

import errno
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from metadist.data.sheet import save_sheet
from metadist.data.table import ClassImages, fingerprint_of, open_table, write_table
from metadist.errors import DataError, StorageError

SHAPE = (1, 2, 3)


def some_classes() -> list[ClassImages]:
    def images(value: int, count: int) -> np.ndarray:
        return np.arange(value, value + count * 6, dtype=np.uint8).reshape(count, *SHAPE)

    return [
        ClassImages("test", "b", "b/2", images(70, 2)),
        ClassImages("train", "b", "b/1", images(0, 3)),
        ClassImages("train", "a", "a/2", images(20, 1)),
        ClassImages("train", "a", "a/1", images(40, 2)),
        ClassImages("val", "c", "c/1", images(90, 2)),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_table(tmp_path / "t.arrow", "toy", SHAPE, some_classes())
    return tmp_path / "t.arrow"


def test_rows_are_sorted_and_classes_found(path: Path) -> None:
    table = open_table(path)
    train = table.splits["train"]
    assert (table.name, table.path, table.images.shape) == ("toy", path, (10, 1, 2, 3))
    assert train.classes == ["a/1", "a/2", "b/1"]
    assert train.groups == [("a", 0, 2), ("b", 2, 1)]
    assert train.start.tolist() == [0, 2, 3] and train.count.tolist() == [2, 1, 3]
    assert train.start.dtype == train.count.dtype == torch.int64 and table.images.dtype == torch.uint8
    assert table.splits["val"].start.tolist() == [6] and table.splits["test"].start.tolist() == [8]
    for given in some_classes():
        split = table.splits[given.split]
        c = split.classes.index(given.name)
        rows = table.images[split.start[c] : split.start[c] + split.count[c]]
        assert np.array_equal(rows.numpy(), given.images)


def test_fingerprint_depends_on_content_and_not_on_the_order_of_writing(path: Path, tmp_path: Path) -> None:
    table = open_table(path)
    assert fingerprint_of(table) == table.fingerprint and len(table.fingerprint) == 64
    other = tmp_path / "other.arrow"
    assert write_table(other, "toy", SHAPE, reversed(some_classes())) == table.fingerprint
    assert other.read_bytes() == path.read_bytes()

    seen = {table.fingerprint, write_table(other, "another name", SHAPE, some_classes())}
    for field, value in {"split": "val", "group": "z", "name": "z"}.items():
        changed = some_classes()
        changed[0] = changed[0]._replace(**{field: value})
        seen.add(write_table(other, "toy", SHAPE, changed))
    changed = some_classes()
    changed[0].images[1, 0, 1, 2] ^= 1
    seen.add(write_table(other, "toy", SHAPE, changed))
    assert len(seen) == 6


def test_images_are_a_view_of_the_map_and_opening_warns_of_nothing(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = open_table(path)
    assert _backing_file(table.images.data_ptr()) == str(path)
    before = pa.total_allocated_bytes()
    again = open_table(path)
    assert _backing_file(again.images.data_ptr()) == str(path)
    assert pa.total_allocated_bytes() - before < 4096


def test_a_table_travels_as_its_path(path: Path) -> None:
    table = open_table(path)
    copy = pickle.loads(pickle.dumps(table))
    assert len(pickle.dumps(table)) < 500
    assert copy.fingerprint == table.fingerprint and torch.equal(copy.images, table.images)
    assert _backing_file(copy.images.data_ptr()) == str(path)


def _backing_file(address: int) -> str:
    """The file that the kernel maps at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else "memory"
    return "nothing"


@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_a_truncated_table_is_refused_in_one_line(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=str(path)) as error:
        open_table(path)
    assert "\n" not in str(error.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_text("hello" * 100)
    with pytest.raises(DataError, match="damaged or no table"):
        open_table(tmp_path / "x.arrow")
    with pa.ipc.new_file(tmp_path / "y.arrow", pa.schema({"a": pa.int64()})) as writer:
        writer.write_batch(pa.record_batch({"a": [1]}))
    with pytest.raises(DataError, match="damaged or no table"):
        open_table(tmp_path / "y.arrow")
    with pytest.raises(DataError, match="does not exist"):
        open_table(tmp_path / "z.arrow")


def test_a_class_stands_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="b/2 stands twice"):
        write_table(tmp_path / "t.arrow", "toy", SHAPE, some_classes() + some_classes()[:1])
    with pytest.raises(DataError, match="shape"):
        write_table(tmp_path / "t.arrow", "toy", (1, 3, 2), some_classes())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_table(path, "toy", SHAPE, some_classes()[:1])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_file_that_may_not_grow_is_a_storage_error(tmp_path: Path) -> None:
    # A limit on file size fails inside Arrow's writing, as a full disk does.
    code = (
        "import sys, numpy as np; from pathlib import Path; from metadist.data.table import *; "
        "write_table(Path(sys.argv[1]), 'big', (1, 100, 100), "
        "[ClassImages('train', 'g', 'c', np.zeros((100, 1, 100, 100), np.uint8))])"
    )
    limit = (2**18, 2**18)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.arrow")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "StorageError" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_sheet(path: Path, tmp_path: Path) -> None:
    from PIL import Image

    table = open_table(path)
    save_sheet(table, tmp_path / "s.png", classes=2, examples=3)
    digest = hashlib.sha256((tmp_path / "s.png").read_bytes()).hexdigest()
    with Image.open(tmp_path / "s.png") as sheet:
        assert 3 * 34 < sheet.width < 5 * 34 and sheet.height == 2 * 34 and len(set(sheet.convert("L").tobytes())) > 6
    save_sheet(table, tmp_path / "s.png", classes=2, examples=3)
    assert hashlib.sha256((tmp_path / "s.png").read_bytes()).hexdigest() == digest
    with pytest.raises(DataError, match="image file"):
        save_sheet(table, tmp_path / "s.txt")
    with pytest.raises(DataError, match="valid: train, val, test"):
        save_sheet(table, tmp_path / "s.png", split="trian")
    with pytest.raises(StorageError, match="No such file"):
        save_sheet(table, tmp_path / "no" / "s.png")
