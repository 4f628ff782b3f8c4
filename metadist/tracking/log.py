"""What happens in a run, one JSON object a line: `log.jsonl` in its folder, behind what a person sees.

Every line has `time` (Unix seconds), `level`, `run`, `step`, `worker` (`PID@HOST`, null where it is about none) and
`message`. With METADIST_LOG=json the same lines stand on the standard output in the place of the display: the log of a
submitted job is made of them, and `metadist jobs logs` shows their messages.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from metadist.errors import MetadistError

FORMAT, NAME = "METADIST_LOG", "log.jsonl"

_about: ContextVar[str | None] = ContextVar("worker", default=None)


@contextlib.contextmanager
def concerning(worker: str) -> Iterator[None]:
    """What is said inside is about this worker; an error that leaves the block says so."""
    token = _about.set(worker)
    try:
        yield
    except Exception as error:
        error.add_note(f"in worker {worker}")
        error.__dict__.setdefault("worker", worker)
        raise
    finally:
        _about.reset(token)


def line(message: str, run: str | None, step: int | None, worker: str | None, level: str = "info") -> str:
    """One line of a log, without its end."""
    told: dict[str, Any] = {
        "time": round(time.time(), 3), "level": level, "run": run, "step": step, "worker": worker, "message": message,
    }  # fmt: skip
    return json.dumps(told, ensure_ascii=False)


class Log:
    """The log of one run. What is told before its folder is there comes into it all the same.

    As a context manager it takes down the error that ends the run.
    """

    def __init__(self) -> None:
        self.structured = os.environ.get(FORMAT) == "json"
        self._early: list[tuple[Any, ...]] = []
        self._file: IO[str] | None = None
        self._run: str | None = None
        self._step: int | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        worker = getattr(error, "worker", None)
        if isinstance(error, MetadistError):  # the command line tells it
            self._record(str(error), worker, error.level)
        elif isinstance(error, Exception):
            told = "".join(traceback.format_exception(error))
            self._record(told, worker, "error")
            if self.structured:
                self._print(line(told, self._run, self._step, worker, "error"))
                sys.excepthook = lambda *_: None  # it is told
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def keep(self, folder: Path) -> None:
        """Write into a run folder from now on."""
        with self._lock:
            with contextlib.suppress(OSError):  # the run itself will meet a disk that is full, and tell it
                self._file = (folder / NAME).open("a", encoding="utf-8", buffering=1)
            self._run = folder.name
            for told in self._early:
                self._write(*told)
            self._early.clear()

    def say(self, message: str) -> None:
        """A note for the person."""
        level = "warning" if message.startswith("warning") else "info"
        if self.structured:
            self._print(line(message, self._run, self._step, _about.get(), level))
        else:
            print(message, file=sys.stderr, flush=True)
        self._record(message, _about.get(), level)

    def shown(self, message: str, step: int) -> None:
        """A line of the display, which shows it itself unless the standard output is structured."""
        self._step = step
        if self.structured:
            self._print(line(message, self._run, step, None))
        self._record(message, None, "info")

    def _record(self, message: str, worker: str | None, level: str) -> None:
        with self._lock:
            if self._run is None:
                self._early.append((message, worker, level))
            else:
                self._write(message, worker, level)

    def _write(self, message: str, worker: str | None, level: str) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(line(message, self._run, self._step, worker, level) + "\n")

    def _print(self, told: str) -> None:
        with self._lock, contextlib.suppress(OSError):
            sys.stdout.write(told + "\n")
            sys.stdout.flush()
