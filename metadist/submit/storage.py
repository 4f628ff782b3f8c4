"""Results that outlive the cluster: a copy of a run's folder in `STORAGE/ID/run`, on a disk or in a bucket.

A checkpoint is copied before the file that makes it one, results last, and what the run has removed is removed at the
end: whenever the copying is broken off, what is there can be resumed from.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from metadist.errors import RunError, StorageError
from metadist.filesystems import NotAFileSystem, copy, open_folder, why

SUBMISSION, RUN = "submission.json", "run"
LAST = ("result.json", "search.json")
LEDGER = "ledger.jsonl"
DECIDED = (5, LEDGER)
"""Behind all that a ledger names, and before what says that the whole is finished."""

PASSING = re.compile(r"\..+\.[0-9a-f]{8}")
"""What a file is called until it is whole."""

Status = tuple[int, int, int, int]
"""Of a file that was sent, or brought back, by this object. A search puts another member's checkpoint in the place of
one, with its name, its bytes and its time: so the inode and its own time count too, and nothing else says that what is
stored is what is here."""


class Storage:
    """The place of one run."""

    def __init__(self, place: str, id: str) -> None:
        self.place = place
        try:
            self.system, folder = open_folder(place)
        except NotAFileSystem as error:
            raise StorageError(f"storage: {place}: {error}") from error
        self.root = f"{folder}/{id}"
        self._sent: dict[str, Status] = {}
        self._there: dict[str, int] | None = None
        self._gone: set[str] = set()
        self._folders: set[str] = set()

    def submission(self) -> dict[str, Any] | None:
        """What was said when the run was begun, or None where there is none."""
        path = f"{self.root}/{SUBMISSION}"
        with self._told("cannot be read"):
            if self.system.get_file_info(path).type != fs.FileType.File:
                return None
            with self.system.open_input_stream(path) as read:
                content = read.read()
        try:
            found: Any = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RunError(f"{path}: is damaged; remove it, or choose another --id")
        return found

    def begin(self, told: dict[str, Any], passing: Path) -> None:
        """Write that down; passing: a file beside which nothing else is."""
        passing.write_text(json.dumps(told, indent=1))
        with self._told("cannot be written"):
            self._create(self.root)
            copy(fs.LocalFileSystem(), str(passing), self.system, f"{self.root}/{SUBMISSION}")
        passing.unlink()

    def mirror(self, folder: Path, final: bool = False) -> None:
        """Bring the copy up to date with a folder that others write meanwhile. Raises StorageError.

        What is gone is removed when it was gone the last time too, or nobody writes any more (final): a trial that
        another one's state is put into is away for a moment.
        """
        with self._told("cannot be written"):
            if self._there is None:
                self._sweep()
            there = self.files() if self._there is None else self._there
            ledger = folder / LEDGER
            decided = _status(ledger) if ledger.is_file() else None  # before what it names is listed
            here = sorted(files_of(folder), key=_order)
            whole = True
            for name in here:
                if _order(name) < DECIDED:
                    whole &= self._send(folder / name, name, there)
                elif whole and (name != LEDGER or decided is not None):
                    self._send(folder / name, name, there, decided if name == LEDGER else None)
            gone = there.keys() - {*here}
            for name in sorted(gone if final else gone & self._gone, key=_order, reverse=True):
                self._remove(name, folder)
                del there[name]
            self._there, self._gone = there, gone & there.keys()

    def add(self, folder: Path, part: str) -> None:
        """Copy what is new in a part of the folder, and remove nothing. Raises StorageError."""
        with self._told("cannot be written"):
            there = self.files() if self._there is None else self._there
            for name in sorted(files_of(folder)):
                if name.startswith(f"{part}/"):
                    self._send(folder / name, name, there)
            self._there = there

    def restore(self, folder: Path) -> bool:
        """Bring the copy back into a folder that is not there yet; whether there is a copy."""
        passing = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        with self._told("cannot be read"):
            names = self.files()
            try:
                for name in names:
                    (passing / name).parent.mkdir(parents=True, exist_ok=True)
                    copy(self.system, f"{self.root}/{RUN}/{name}", fs.LocalFileSystem(), str(passing / name))
                if names:
                    self._sent = {name: _status(passing / name) for name in names}
                    os.rename(passing, folder)
            finally:
                shutil.rmtree(passing, ignore_errors=True)
        return bool(names)

    def files(self) -> dict[str, int]:
        """Name in the run's folder → bytes, of what is stored; leftovers of a broken copy are passed over."""
        base = f"{self.root}/{RUN}"
        selector = fs.FileSelector(base, allow_not_found=True, recursive=True)
        with self._told("cannot be read"):
            found = self.system.get_file_info(selector)
        names = {str(PurePosixPath(info.path).relative_to(base)): info for info in found}
        return {
            name: info.size
            for name, info in names.items()
            if info.type == fs.FileType.File and not PurePosixPath(name).name.startswith(".")
        }

    def _send(self, path: Path, name: str, there: dict[str, int], upto: Status | None = None) -> bool:
        """Whether the file was there; upto: as it was when only so much of it could be sent."""
        try:
            now = upto or _status(path)
            if name not in there or self._sent.get(name) != now:
                to = f"{self.root}/{RUN}/{name}"
                self._create(to.rpartition("/")[0])
                copy(fs.LocalFileSystem(), str(path), self.system, to, now[0] if upto else None)
            self._sent[name] = now
            there[name] = now[0]
        except FileNotFoundError:
            if path.exists():  # it is not a checkpoint that was removed while we looked
                raise
            return False
        return True

    def _remove(self, name: str, folder: Path) -> None:
        path = f"{self.root}/{RUN}/{name}"
        if self.system.get_file_info(path).type == fs.FileType.File:
            self.system.delete_file(path)
        parent = PurePosixPath(name).parent
        if str(parent) != "." and not (folder / parent).is_dir():
            held = self.system.get_file_info(fs.FileSelector(f"{self.root}/{RUN}/{parent}", allow_not_found=True))
            if not held:
                self.system.delete_dir(f"{self.root}/{RUN}/{parent}")
                self._folders.discard(f"{self.root}/{RUN}/{parent}")

    def _sweep(self) -> None:
        """Remove what writers that were killed had not brought to its end."""
        for info in self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True)):
            if info.type == fs.FileType.File and PASSING.fullmatch(PurePosixPath(info.path).name):
                self.system.delete_file(info.path)

    def _create(self, folder: str) -> None:
        if folder not in self._folders:
            self.system.create_dir(folder, recursive=True)
            self._folders.add(folder)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"storage: {self.place} {what}: {why(error)}") from error


def _status(path: Path) -> Status:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder, without locks and files that are being written."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(place).relative_to(folder)
        found += [(base / name).as_posix() for name in names if not name.startswith(".")]
    return found


def _order(name: str) -> tuple[int, str]:
    """Metrics and config; then checkpoints, each with its JSON last; then what says that a run is finished: of a
    search's trials, its ledger, which names what they left, and its own."""
    path = PurePosixPath(name)
    if name == LEDGER:
        return DECIDED
    if path.name in LAST:
        return 6 if name in LAST else 4, name
    if path.parent.name.startswith("step-"):
        return 2 if path.name == "checkpoint.json" else 1, name
    return 3 if path.suffix == ".safetensors" else 0, name
