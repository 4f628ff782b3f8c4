"""A table: all examples of one data set in one Arrow IPC file, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metadist.data.files import ANOTHER_FOLDER, writing
from metadist.durable import appearing
from metadist.errors import DataError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
"""Meta-train, meta-val and meta-test classes, in the order of a table's rows."""


class ClassImages(NamedTuple):
    """All examples of one class on their way into a table."""

    split: str
    group: str
    name: str
    images: NDArray[np.uint8]
    """uint8 [examples, channels, height, width]"""


@dataclass(frozen=True)
class Split:
    """The classes of one split; class c owns the examples start[c] .. start[c] + count[c] - 1 of the table."""

    start: torch.Tensor
    """int64 [classes], row of the class's first example"""
    count: torch.Tensor
    """int64 [classes], examples of the class"""
    classes: list[str]
    """names, for example "Angelic/character01/rot090" """
    groups: list[tuple[str, int, int]]
    """(group, index of its first class, number of classes); the classes of a group are contiguous"""


@dataclass(frozen=True)
class Table:
    """An opened table. Pickling one sends its path: the other process maps the same file."""

    name: str
    images: torch.Tensor
    """uint8 [examples, channels, height, width], ink is 255 on 0. A view of the read-only map: never write to it."""
    splits: dict[str, Split]
    """meta-train, meta-val and meta-test classes under "train", "val" and "test" """
    fingerprint: str
    """sha256 hex over name, shape, and in row order split, group, class and image bytes"""
    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return open_table, (self.path,)


def write_table(path: Path, name: str, shape: tuple[int, int, int], classes: Iterable[ClassImages]) -> str:
    """Write a table atomically and return its fingerprint.

    `shape` is (channels, height, width). Rows are sorted by split, group, class; the
    examples of a class keep their order. Raises DataError when a class stands twice
    and StorageError when the disk does not take the file.
    """
    import pyarrow as pa

    ordered = sorted(classes, key=lambda c: (SPLITS.index(c.split), c.group, c.name))
    names = [c.name for c in ordered]
    if len(set(names)) < len(names):
        raise DataError(f"{name}: the class {next(n for n in names if names.count(n) > 1)} stands twice")
    for c in ordered:
        if c.images.shape[1:] != shape or c.images.dtype != np.uint8:
            raise DataError(f"{name}: class {c.name} has {c.images.dtype} images of shape {c.images.shape[1:]}")
    fingerprint = _fingerprint(name, shape, ordered)

    rows = [len(c.images) for c in ordered]
    images = np.concatenate([c.images for c in ordered]) if ordered else np.zeros((0, *shape), np.uint8)

    def column(values: list[str]) -> pa.DictionaryArray:
        words = list(dict.fromkeys(values))
        index = {word: i for i, word in enumerate(words)}
        codes = np.repeat(np.array([index[v] for v in values], np.int32), rows)
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.string()))

    size = int(np.prod(shape))
    batch = pa.record_batch(
        {
            "image": pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(images), [None, pa.py_buffer(images)]),
            "class": column(names),
            "group": column([c.group for c in ordered]),
            "split": column([c.split for c in ordered]),
        }
    )
    schema = batch.schema.with_metadata({"name": name, "shape": json.dumps(shape), "fingerprint": fingerprint})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # One record batch, so that the image column is one contiguous buffer.
    with appearing(path, ANOTHER_FOLDER) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return fingerprint


def open_table(path: Path) -> Table:
    """Map a table into memory without copying the images.

    Raises DataError when the file is missing, truncated or no table. Image bytes are
    not read here, so that opening costs the same for any size.
    """
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        metadata = file.schema.metadata or {}
        name, fingerprint = metadata[b"name"].decode(), metadata[b"fingerprint"].decode()
        shape = tuple(json.loads(metadata[b"shape"]))
        batch = file.get_batch(0)
        if file.num_record_batches != 1 or batch.column("image").type != pa.binary(int(np.prod(shape))):
            raise ValueError("the image column does not have the stated shape")
        batch.validate()
        images = _view(batch.column("image").buffers()[1], (batch.num_rows, *shape))
        splits = _splits(batch)
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist") from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: damaged or no table ({reason}); delete it and it is built again") from error
    return Table(name, images, splits, fingerprint, Path(path))


def fingerprint_of(table: Table) -> str:
    """The fingerprint computed from the table's content; equals `table.fingerprint` in an undamaged table."""
    _, *shape = table.images.shape

    def classes() -> Iterator[ClassImages]:
        for name in SPLITS:
            split = table.splits[name]
            for group, first, members in split.groups:
                for c in range(first, first + members):
                    start, count = int(split.start[c]), int(split.count[c])
                    yield ClassImages(name, group, split.classes[c], table.images[start : start + count].numpy())

    return _fingerprint(table.name, tuple(shape), classes())


def _fingerprint(name: str, shape: tuple[int, ...], classes: Iterable[ClassImages]) -> str:
    digest = hashlib.sha256(json.dumps([name, shape]).encode())
    for c in classes:
        digest.update(json.dumps([c.split, c.group, c.name, len(c.images)]).encode())
        digest.update(np.ascontiguousarray(c.images).data)
    return digest.hexdigest()


def _view(buffer: Any, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    array = np.frombuffer(buffer, np.uint8, count=int(np.prod(shape))).reshape(shape)
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; that nobody writes is this table's contract.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(array)


def _splits(batch: Any) -> dict[str, Split]:
    """The classes of each split, from where the class column changes."""
    import pyarrow as pa
    import torch

    codes = batch.column("class").indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    counts = np.diff(starts, append=len(codes))
    first = batch.select(["class", "group", "split"]).take(pa.array(starts))
    names, groups, labels = (column.to_pylist() for column in first.columns)
    if set(labels) - set(SPLITS) or len(set(names)) < len(names):
        raise ValueError("rows are not sorted by class, or a split is none of " + ", ".join(SPLITS))
    splits = {}
    for split in SPLITS:
        mine = [i for i, label in enumerate(labels) if label == split]
        spans: dict[str, list[int]] = {}
        for c, i in enumerate(mine):
            spans.setdefault(groups[i], []).append(c)
        splits[split] = Split(
            torch.from_numpy(starts[mine].astype(np.int64)),
            torch.from_numpy(counts[mine].astype(np.int64)),
            [names[i] for i in mine],
            [(group, members[0], len(members)) for group, members in spans.items()],
        )
    return splits
