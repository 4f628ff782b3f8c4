"""Files that are either there and whole, or not there; and locks that die with their process."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from metadist.errors import StorageError

REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.ENODEV, errno.ESTALE, errno.ENOTCONN,
    errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN,
}  # fmt: skip
"""What a disk or a folder says that does not take our files, or is not there any more."""


@contextmanager
def storage_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Tell a disk that does not take our files in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS:
            raise StorageError(f"{path}: cannot be written: {error.strerror}{advice}") from error
        raise


@contextmanager
def appearing(path: Path, advice: str = "") -> Iterator[BinaryIO]:
    """A file to write that replaces `path` in one step: temporary name, fsync, rename. Raises StorageError."""
    temporary = _temporary(path)
    with storage_errors(path, advice):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step. Raises StorageError."""
    with appearing(path) as file:
        file.write(content)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Make a folder with these files appear in one step. Raises StorageError."""
    temporary = _temporary(path)
    with storage_errors(path):
        try:
            temporary.mkdir()
            for name, content in files.items():
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(temporary)
            aside = temporary.with_name(f"{temporary.name}.old")
            if path.exists():  # a resumed run comes by the same step again
                os.rename(path, aside)
            os.rename(temporary, path)
            sync_folder(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Only one process at a time; yields whether that is this one. The kernel releases the lock of one that dies."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def sync_folder(path: Path) -> None:
    """Make durable which files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
