"""Tables that all hosts of a cluster share: a folder, or a bucket that pyarrow reads (`s3://…`, `gs://…`).

A table's file name holds the hash of what it was built from, so a file that is there is the right
one; its fingerprint is computed before it is used all the same.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from metadist.data.files import cache_folder, lock
from metadist.data.table import Table, fingerprint_of, open_table
from metadist.errors import DataError
from metadist.filesystems import NotAFileSystem, copy, open_folder, why

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def offer(table: Table, shared: str) -> None:
    """Put a table where other hosts find it, unless it is there; appears whole or not at all."""
    from pyarrow import fs

    storage, folder = _storage(shared)
    path = f"{folder}/{table.path.name}"
    try:
        if storage.get_file_info(path).type == fs.FileType.File:
            return
        storage.create_dir(folder, recursive=True)
        copy(fs.LocalFileSystem(), str(table.path), storage, path)
    except OSError as error:
        raise DataError(f"data.shared: {shared} does not take {table.path.name}: {why(error)}") from error


def fetch(name: str, shared: str) -> Table:
    """The table of that file name: from the cache of this host, or brought there, once for all its processes."""
    from pyarrow import fs

    cache = cache_folder()
    path = cache / name
    with lock(cache / f"{name}.lock"):
        if path.exists():
            return open_table(path)
        storage, folder = _storage(shared)
        passing = path.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
        try:
            copy(storage, f"{folder}/{name}", fs.LocalFileSystem(), str(passing))
            table = open_table(passing)
            if fingerprint_of(table) != table.fingerprint:
                raise DataError(f"data.shared: {name} in {shared} is damaged; remove it and start again")
            passing.rename(path)
        except OSError as error:
            raise DataError(f"data.shared: {name} cannot be read from {shared}: {why(error)}") from error
        finally:
            passing.unlink(missing_ok=True)
    return open_table(path)


def check_shared(shared: str) -> None:
    """Refuse in one line what no file system is known for."""
    _storage(shared)


def _storage(shared: str) -> tuple[FileSystem, str]:
    """The file system of a folder or URI, and the folder in it."""
    try:
        return open_folder(shared)
    except NotAFileSystem as error:
        raise DataError(f"data.shared: {shared}: {error}") from error
