"""Memory that processes of one machine share: what is large goes from one to the other without being sent.

A space is an anonymous file that its owner maps and others open through /proc by its handle. Nothing of it has a
name that could be left behind: it is gone with the last process that maps it.
"""

import mmap
import os
import stat
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
    """What a worker needs for the shards of one step (`Broadcast`): the values' head is the step."""

    step: int
    attempt: int
    values: Shared
    exponents: np.ndarray


class Gone(Exception):
    """Its owner has ended, or is not to be seen from here."""


class Space:
    """Some bytes of this process that others may open."""

    def __init__(self, size: int) -> None:
        self.file, self.bytes = os.memfd_create("metadist"), HEAD + size
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
            # The memory of the dead is given back when nobody has it open.
            for dead in [one for one in self._open if not os.path.exists(f"/proc/{one[0]}")]:
                del self._open[dead]
            self._open[key] = _mapped(shared)
            if len(self._open) > KEPT:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        there = self._open[key]
        return np.frombuffer(there, np.int64, 1), np.frombuffer(there, shared.dtype, shared.length, HEAD)


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

    def put(self, step: int, numbers: np.ndarray) -> Shared:
        """A copy of one-dimensional numbers, for this step."""
        space = self._place(step, numbers.nbytes)
        space.array(numbers.dtype.str, len(numbers))[:] = numbers
        space.head[0] = self.WAITING
        return space.shared(numbers.dtype.str, len(numbers))

    def _place(self, step: int, size: int) -> Space:
        for number, (space, used) in enumerate(self._places):
            if (used != step or space.head[0] == self.READ) and space.bytes >= HEAD + size:
                self._places[number] = space, step
                return space
        self._places.append((Space(size), step))
        return self._places[-1][0]


class Board:
    """Parameters for whoever reads them: those of step t stay until those of t + 2 are written over them."""

    def __init__(self) -> None:
        self._spaces: list[Space] = []

    def publish(self, step: int, values: np.ndarray) -> Shared:
        """Flat values [total] of a step; written once."""
        if not self._spaces:
            self._spaces = [Space(values.nbytes) for _ in range(2)]
            for space in self._spaces:
                space.head[0] = -1
        space = self._spaces[step % 2]
        if space.head[0] != step:
            space.head[0] = -1
            space.array(values.dtype.str, len(values))[:] = values
            space.head[0] = step
        return space.shared(values.dtype.str, len(values))
