"""The data sets that a config can name, built once into tables in the cache folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from metadist.config import GENERATED, Source
from metadist.data import glyphs, omniglot
from metadist.data.files import cache_folder, lock
from metadist.data.raw import Raw, Say
from metadist.data.table import Table, fingerprint_of, open_table, write_table
from metadist.errors import DataError


@dataclass(frozen=True)
class Entry:
    """What is known of a data set without touching its files."""

    description: str
    splits: tuple[str, ...]
    """named splits; the first is the default"""
    downloads: bool
    """whether it has raw files, read from `root` or downloaded"""
    version: int
    """of the builder; another version builds another table"""
    shape: tuple[int, int, int]
    """channels, height, width"""
    locate: Callable[[Path | None, Path, Say], Raw]
    """(root, folder for downloads, progress) → raw material"""


NAMES: dict[str, Entry] = {
    "glyphs": Entry(glyphs.DESCRIPTION, glyphs.SPLITS, False, glyphs.VERSION, glyphs.SHAPE, glyphs.locate),
    "omniglot": Entry(
        omniglot.DESCRIPTION, omniglot.SPLITS, True, omniglot.VERSION, omniglot.SHAPE, omniglot.locate
    ),
}  # fmt: skip


def check(source: Source) -> None:
    """Refuse a data set or split that does not exist, or a root where none is read; touches no file."""
    entry = NAMES.get(source.name)
    if entry is None:
        raise DataError(f"data.name: {source.name!r} is no data set{_nearest(source.name, (*NAMES, *GENERATED))}")
    if source.split is not None and source.split not in entry.splits:
        raise DataError(
            f"data.split: {source.name} has no split {source.split!r}{_nearest(source.split, entry.splits)}"
        )
    if source.root is not None and not entry.downloads:
        raise DataError(f"data.root: {source.name} has no raw files and takes no root, not {source.root!r}")


def prepare(source: Source, say: Say = lambda line: None) -> Table:
    """The table of a data set: opened from the cache, or built into it.

    Any number of processes may ask at the same time; one builds, the others wait and
    open. Raises DataError for what `check` refuses and for raw files that are missing
    or damaged, also when an earlier build is in the cache; StorageError for a disk that
    does not take the table.
    """
    check(source)
    entry, cache = NAMES[source.name], cache_folder()
    split = source.split or entry.splits[0]
    root = None if source.root is None else Path(source.root).expanduser()
    raw = entry.locate(root, cache / "raw", say)
    path = cache / f"{source.name}-{split}-v{entry.version}-{raw.content[:32]}.arrow"
    if (table := _usable(path)) is not None:
        return table
    with lock(cache / f"{source.name}.lock"):
        if (table := _usable(path)) is not None:  # another process built it while this one waited
            return table
        say(f"{source.name}: building the table, once")
        write_table(path, source.name, entry.shape, raw.read(split, say))
        table = open_table(path)
        if fingerprint_of(table) != table.fingerprint:
            path.unlink(missing_ok=True)
            raise DataError(f"{path}: what was read back differs from what was written; the disk is not to be trusted")
    return table


def _usable(path: Path) -> Table | None:
    """A table from the cache; a damaged one is as good as none."""
    try:
        return open_table(path)
    except DataError:
        return None


def _nearest(word: str, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(valid)}"
