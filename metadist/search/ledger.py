"""What a search has decided, on disk before anybody acts on it.

`ledger.jsonl`, append-only. A line is one event as canonical JSON, a space, and eight hex digits: the CRC-32 of the
events of all lines up to this one, so that a missing or a swapped line is seen as a damaged one is. A line is fsynced
before `append` returns. A process that dies while it writes leaves an incomplete last line: nobody has acted on it, it
counts as never written and is cut off. Any other damage is refused, because what follows rests on it.
"""

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from metadist.durable import storage_errors, sync_folder
from metadist.errors import RunError

Event = dict[str, Any]


class Ledger:
    """The events of a search in their order; `append` adds one.

    Only one process has it open: the kernel drops the lock with the process, however that ends. Raises RunError where
    another has, or a line is damaged. say: is told in one line what was cut off.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path = path
        with storage_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._lock()
            with storage_errors(path):
                content = path.read_bytes()
            self.events, self._size, self._crc = _parse(path, content)
            with storage_errors(path):
                if self._size < len(content):
                    self._cut()
                    if say is not None:
                        say(f"{path}: the last event was not written to its end and is cut off")
                sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.path.parent}: another process searches in it; wait for it, or end it") from error

    def append(self, event: Event) -> Event:
        """Make an event durable; returns it as it will be read. Raises StorageError; then it is not in the ledger."""
        text = json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        crc = zlib.crc32(text, self._crc)
        line = b"%s %08x\n" % (text, crc)
        with storage_errors(self.path):
            try:
                if os.fstat(self._file).st_size > self._size:  # a cut that the disk refused
                    self._cut()
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except OSError:
                with suppress(OSError):  # then the next append cuts it off
                    self._cut()
                raise
        found: Event = json.loads(text)
        self.events.append(found)
        self._size, self._crc = self._size + len(line), crc
        return found

    def _cut(self) -> None:
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)

    def close(self) -> None:
        """Let another process have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_ledger(path: Path) -> list[Event]:
    """All events, of a search that may be going on. Raises RunError where there is none or one is damaged."""
    if not path.is_file():
        raise RunError(f"{path.parent}: is no search folder, it has no {path.name}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse(path, content)[0]


def _parse(path: Path, content: bytes) -> tuple[list[Event], int, int]:
    """The events, how many bytes of the file they are, and the checksum behind them."""
    events: list[Event] = []
    at, crc = 0, 0
    while at < len(content):
        end = content.find(b"\n", at) + 1
        text, _, told = content[at:end].rpartition(b" ")
        becomes = zlib.crc32(text, crc)
        if not end or told != b"%08x\n" % becomes:
            if end in (0, len(content)):  # the last one
                break
            raise RunError(
                f"{path} line {len(events) + 1}: is damaged; what follows rests on it, so the search cannot go on"
            )
        events.append(json.loads(text))
        at, crc = end, becomes
    return events, at, crc
