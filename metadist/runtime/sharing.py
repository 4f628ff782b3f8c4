"""Memory that processes of one machine share: what is large goes from one to the other without being sent.

A space is an anonymous file that its owner maps and others open through /proc by its handle. Nothing of it has a
name that could be left behind: it is gone with the last process that maps it.
"""

import mmap
import os
import stat
import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

HEAD = 64
"""Bytes in front of the numbers: one int64 that says what is there; the numbers lie on a cache line."""

KEPT = 256
"""Spaces of others that a process has open; beyond them it closes the one it has not used for longest."""


class Shared(NamedTuple):
    """Numbers in the space of a process: what another one needs to find them. inode: an id may be another process's."""

    pid: int
    file: int
    inode: int
    bytes: int
    dtype: str
    length: int


class Published(NamedTuple):
    """What a worker needs for the shards of one step (`Broadcast`): the values' head is the step.

    exponents: int64, as bytes: to pickle an array takes twice as long as all the rest.
    """

    step: int
    attempt: int
    values: Shared
    exponents: bytes


class Gone(Exception):
    """Its owner has ended, or is not to be seen from here."""


class Space:
    """Some bytes of this process that others may open."""

    def __init__(self, size: int) -> None:
        self.file, self.bytes = os.memfd_create("metadist"), HEAD + size
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, self.bytes)
        self._map = mmap.mmap(self.file, self.bytes)
        self.head = np.frombuffer(self._map, np.int64, 1)
        self._inode = os.fstat(self.file).st_ino

    def array(self, dtype: str, length: int) -> np.ndarray:
        """Its numbers, to be written."""
        return np.frombuffer(self._map, dtype, length, HEAD)

    def shared(self, dtype: str, length: int) -> Shared:
        """For another process."""
        return Shared(os.getpid(), self.file, self._inode, self.bytes, dtype, length)


class Spaces:
    """Those of other processes, opened once."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, int, int], mmap.mmap] = OrderedDict()

    def read(self, shared: Shared) -> tuple[np.ndarray, np.ndarray]:
        """Its head, int64 [1], and its numbers. Raises Gone."""
        key = shared[:3]
        if key not in self._open:
            self._open[key] = _mapped(shared)
            if len(self._open) > KEPT:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        there = self._open[key]
        return np.frombuffer(there, np.int64, 1), np.frombuffer(there, shared.dtype, shared.length, HEAD)

    def prune(self) -> None:
        """Give back the memory of the dead."""
        for dead in [one for one in self._open if not os.path.exists(f"/proc/{one[0]}")]:
            del self._open[dead]


def _mapped(shared: Shared) -> mmap.mmap:
    try:
        file = os.open(f"/proc/{shared.pid}/fd/{shared.file}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Gone(str(error)) from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or (found.st_ino, found.st_size) != (shared.inode, shared.bytes):
            raise Gone(f"process {shared.pid} has another file there")
        return mmap.mmap(file, shared.bytes)
    finally:
        os.close(file)


class Outbox:
    """What a process hands to another one, who says in the head when it has read it.

    A place is used again when its contents were read, or belong to another step than this: nobody will read those.
    """

    WAITING, READ = 1, 0

    def __init__(self) -> None:
        self._places: list[tuple[Space, int]] = []

    def place(self, step: int, size: int) -> Space:
        """Where so many bytes of this step may be written."""
        free = (space for space, used in self._places if used != step or space.head[0] == self.READ)
        found = next((space for space in free if space.bytes >= HEAD + size), None) or Space(size)
        self._places = [(space, used) for space, used in self._places if space is not found] + [(found, step)]
        found.head[0] = self.WAITING
        return found


class Board:
    """Parameters for whoever reads them: those of step t stay until those of t + 2 are written over them."""

    def __init__(self, dtype: str, length: int) -> None:
        self._dtype, self._length = dtype, length
        self._spaces = [Space(np.dtype(dtype).itemsize * length) for _ in range(2)]
        for space in self._spaces:
            space.head[0] = -1

    def place(self, step: int) -> np.ndarray:
        """Where the flat values [total] of a step are to be written; nobody reads them before they are published."""
        space = self._spaces[step % 2]
        space.head[0] = -1
        return space.array(self._dtype, self._length)

    def publish(self, step: int) -> Shared:
        """What was written there."""
        space = self._spaces[step % 2]
        space.head[0] = step
        return space.shared(self._dtype, self._length)

    def has(self, step: int) -> bool:
        """Whether they are published."""
        return bool(self._spaces[step % 2].head[0] == step)
