"""Folders that pyarrow reaches: on a disk, or in a bucket (`s3://…`, `gs://…`)."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

VALID = "a folder, or a URI that pyarrow reads such as s3://BUCKET/FOLDER"
PIECE = 2**23
"""Bytes of a file that are in memory at a time."""


class NotAFileSystem(ValueError):
    """What no file system is known for; says why."""


def open_folder(place: str) -> tuple[FileSystem, str]:
    """The file system of a folder or URI, and the folder in it. Raises NotAFileSystem."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        if "://" not in place:
            return fs.LocalFileSystem(), str(Path(place).expanduser().resolve())
        storage, folder = fs.FileSystem.from_uri(place)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotAFileSystem(f"{why(error)}; valid: {VALID}") from error
    return storage, folder.rstrip("/")


def copy(source: FileSystem, path: str, target: FileSystem, to: str, size: int | None = None) -> None:
    """One file from one file system to another, whose folder exists; appears whole or not at all. Raises OSError and
    ArrowException.

    size: bytes from its beginning, of a file that others append to.

    The stream of a bucket that is closed early leaves half a file: so another name comes first.
    """
    import pyarrow as pa

    folder, _, name = to.rpartition("/")
    passing = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}"
    try:
        with source.open_input_stream(path) as read, target.open_output_stream(passing) as written:
            left = size
            while piece := read.read(PIECE if left is None else min(PIECE, left)):
                written.write(piece)
                left = None if left is None else left - len(piece)
        target.move(passing, to)
    except (OSError, pa.ArrowException):
        with contextlib.suppress(OSError, pa.ArrowException):
            target.delete_file(passing)
        raise


def why(error: BaseException) -> str:
    """An error in a line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
