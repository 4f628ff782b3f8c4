"""SIGTERM: a machine that is taken away leaves some seconds. A run keeps its state in them and ends.

The signal itself only leaves a mark, and starts the clock. A runtime looks at it where it waits for a training step,
nowhere else: a validation that was broken off would be missing behind the step that is kept, and
with it perhaps the best state. One that takes longer than the grace period is given up with the
steps since the last checkpoint.

Python runs its handlers in the main thread, between two of its instructions: not while that thread computes or waits
in other code, nor, where the signal comes just before a sleep begins, until the sleep is over. So a thread reads the
byte that Python leaves on a socket when the signal comes, and keeps the clock.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from metadist.errors import MetadistError

_noticed = False


class Preempted(MetadistError):
    """SIGTERM came; the run can go on from the checkpoint that it leaves."""

    exit_code = 128 + signal.SIGTERM
    level = "warning"


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _noticed


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
    reads, written = socket.socketpair()
    written.setblocking(False)
    over = threading.Event()
    clock = threading.Thread(target=_keep_time, args=(reads, over, grace), name="preemption", daemon=True)
    clock.start()
    wakes = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakes)
        over.set()
        written.shutdown(socket.SHUT_RDWR)  # also where a child has the other end
        written.close()
        clock.join()
        reads.close()
        _forget()


def _keep_time(signals: socket.socket, over: threading.Event, grace: float) -> None:
    """End the process `grace` seconds after SIGTERM, unless it is over before."""
    while told := signals.recv(64):  # a byte for every signal; nothing when the other end is closed
        if signal.SIGTERM in told:
            _notice()
            if not over.wait(grace):
                _end(grace)
            return


def _notice(*_: object) -> None:
    global _noticed
    _noticed = True


def _forget() -> None:
    global _noticed
    _noticed = False


def _end(grace: float) -> None:
    print(f"error: no checkpoint within the {grace:g} s after SIGTERM; the one before it stands", file=sys.stderr)
    sys.stderr.flush()
    os._exit(Preempted.exit_code)
