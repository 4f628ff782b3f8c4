"""Files that are either there and whole, or not there."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metadist.errors import StorageError

REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
    errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip
"""What a disk or a folder says that does not take our files."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Tell a disk that does not take our files in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: temporary name, fsync, rename. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Make a folder with these files appear in one step. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with storage_errors(path):
        try:
            temporary.mkdir()
            for name, content in files.items():
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(temporary)
            aside = temporary.with_name(f"{temporary.name}.old")
            if path.exists():  # a resumed run comes by the same step again
                os.rename(path, aside)
            os.rename(temporary, path)
            _sync_folder(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
