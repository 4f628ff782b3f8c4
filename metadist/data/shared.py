"""Tables that all hosts of a cluster share: a folder, or a bucket that pyarrow reads (`s3://…`, `gs://…`).

A table's file name holds the hash of what it was built from, so a file that is there is the right
one; its fingerprint is computed before it is used all the same.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from metadist.data.files import cache_folder, lock
from metadist.data.table import Table, fingerprint_of, open_table
from metadist.errors import DataError

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
        passing = f"{folder}/.{table.path.name}.{uuid.uuid4().hex[:8]}"
        _copy(fs.LocalFileSystem(), str(table.path), storage, passing)
        storage.move(passing, path)
    except OSError as error:
        raise DataError(f"data.shared: {shared} does not take {table.path.name}: {_why(error)}") from error


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
            _copy(storage, f"{folder}/{name}", fs.LocalFileSystem(), str(passing))
            table = open_table(passing)
            if fingerprint_of(table) != table.fingerprint:
                raise DataError(f"data.shared: {name} in {shared} is damaged; remove it and start again")
            passing.rename(path)
        except OSError as error:
            raise DataError(f"data.shared: {name} cannot be read from {shared}: {_why(error)}") from error
        finally:
            passing.unlink(missing_ok=True)
    return open_table(path)


def check_shared(shared: str) -> None:
    """Refuse in one line what no file system is known for."""
    _storage(shared)


def _storage(shared: str) -> tuple[FileSystem, str]:
    """The file system of a folder or URI, and the folder in it."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        if "://" not in shared:
            return fs.LocalFileSystem(), str(Path(shared).expanduser().resolve())
        storage, folder = fs.FileSystem.from_uri(shared)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"data.shared: {shared}: {_why(error)}; valid: a folder, or a URI that pyarrow reads such as s3://BUCKET/FOLDER"
        ) from error
    return storage, folder.rstrip("/")


def _copy(source: FileSystem, path: str, target: FileSystem, to: str) -> None:
    """One file from one file system to another, in pieces."""
    with source.open_input_stream(path) as read, target.open_output_stream(to) as written:
        while piece := read.read(2**23):
            written.write(piece)


def _why(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
