"""Files that other processes may read or write at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from metadist.errors import StorageError

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}


def cache_folder() -> Path:
    """Where built tables and downloads live: METADIST_CACHE, else XDG_CACHE_HOME/metadist, else ~/.cache/metadist."""
    if cache := os.environ.get("METADIST_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "metadist"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full, read-only or forbidden disk as a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS and not isinstance(error, FileExistsError):
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"{path}: cannot be written: {reason}; METADIST_CACHE names another cache folder") from error


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` complete and on disk, or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private, a cache may be shared
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time gets past this; the kernel releases the lock of one that dies."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
