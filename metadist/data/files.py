"""Where built tables and downloads live."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metadist import durable

ANOTHER_FOLDER = "; METADIST_CACHE names another cache folder"


def cache_folder() -> Path:
    """METADIST_CACHE, else XDG_CACHE_HOME/metadist, else ~/.cache/metadist."""
    if cache := os.environ.get("METADIST_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "metadist"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full, read-only or forbidden disk as a StorageError that names `path` and the way out."""
    with durable.storage_errors(path, ANOTHER_FOLDER):
        yield


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time builds what stands beside this file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with durable.lock(path):
        yield
