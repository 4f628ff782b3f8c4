"""SIGTERM: a machine that is taken away leaves some seconds. A run keeps its state in them and ends.

The signal itself only leaves a mark. A runtime looks at it where it waits for a training step,
nowhere else: a validation that was broken off would be missing behind the step that is kept, and
with it perhaps the best state. One that takes longer than the grace period is given up with the
steps since the last checkpoint.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from metadist.errors import MetadistError

_noticed = threading.Event()


class Preempted(MetadistError):
    """SIGTERM came; the run can go on from the checkpoint that it leaves."""

    exit_code = 128 + signal.SIGTERM


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _noticed.is_set()


def check() -> None:
    """Raise Preempted once SIGTERM has come."""
    if asked():
        raise Preempted("ended by SIGTERM")


@contextmanager
def noticed(grace: float) -> Iterator[None]:
    """Inside the block SIGTERM is noticed; `grace` seconds later the process ends, whatever it is doing.

    Outside of a process's main thread nothing changes: signals are the main thread's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(grace, _end, (grace,))
    timer.daemon = True

    def notice(*_: object) -> None:
        if not _noticed.is_set():
            _noticed.set()
            timer.start()

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        timer.cancel()
        _noticed.clear()


def _end(grace: float) -> None:
    print(f"error: no checkpoint within the {grace:g} s after SIGTERM; the one before it stands", file=sys.stderr)
    sys.stderr.flush()
    os._exit(Preempted.exit_code)
