"""What a search has decided, on disk before anybody acts on it.

`ledger.jsonl`, append-only: each line is a CRC-32 of what follows, a space, and one JSON object. A line is fsynced
before `append` returns. A process that dies while it writes leaves an incomplete last line, which counts as never
written and is cut off; any other damage is refused, because decisions behind it rest on it.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metadist.durable import storage_errors
from metadist.errors import RunError

Event = dict[str, Any]


class Ledger:
    """The events of a search in their order; `append` adds one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self.events, whole = _read(path)
            self._file: BinaryIO = path.open("ab")
            if self._file.tell() > whole:
                self._file.truncate(whole)
                os.fsync(self._file.fileno())

    def append(self, event: Event) -> Event:
        """Make an event durable. Raises StorageError; then it is not in the ledger."""
        line = json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        before = self._file.tell()
        with storage_errors(self.path):
            try:
                self._file.write(b"%08x %s\n" % (zlib.crc32(line), line))
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), before)
                raise
        found: Event = json.loads(line)
        self.events.append(found)
        return found

    def close(self) -> None:
        self._file.close()


def read_ledger(path: Path) -> list[Event]:
    """All events. Raises RunError where there is none or one is damaged."""
    if not path.is_file():
        raise RunError(f"{path.parent}: is no search folder, it has no {path.name}")
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Event], int]:
    """The events, and how many bytes of the file they are."""
    content = path.read_bytes() if path.exists() else b""
    events, at = [], 0
    for number, line in _lines(content):
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        whole = line.endswith(b"\n") and crc == b"%08x" % zlib.crc32(text)
        if not whole:
            if at + len(line) == len(content):  # the last one
                break
            raise RunError(f"{path} line {number}: is damaged; what follows rests on it, so the search cannot go on")
        events.append(json.loads(text))
        at += len(line)
    return events, at


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    yield from enumerate(content.splitlines(keepends=True), 1)
