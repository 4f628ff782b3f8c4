"""Where a process's time goes: named stretches of it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

Phase = Literal["sampling", "adapting", "transfer", "sum", "outer step", "validation", "checkpoint", "waiting"]

MOST = 4096
"""Spans that are kept for whoever takes them; nobody has to."""

_EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Unix seconds that never jump; the same in all processes of a machine, as far as its clock was not set."""
    return _EPOCH + time.perf_counter()


class Span(NamedTuple):
    """begin, end: as of `now`."""

    phase: Phase
    begin: float
    end: float


class Spans:
    """Those of one process since they were last taken; the newest, where nobody takes them."""

    def __init__(self) -> None:
        self._found: deque[Span] = deque(maxlen=MOST)

    @contextmanager
    def of(self, phase: Phase) -> Iterator[None]:
        """What is inside belongs to this phase; of adapting, what lies in none within."""
        begin = now()
        yield
        self._found.append(Span(phase, begin, now()))

    def take(self) -> tuple[Span, ...]:
        """All of them, once."""
        found = tuple(self._found)
        self._found.clear()
        return found
