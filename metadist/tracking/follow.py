"""The process that copies a run to MLflow while it trains: `python -m metadist.tracking.follow RUN --parent PID`.

A search is copied by one process too, with all its trials: RUN is its folder then.

A process of its own, so that a tracking server that is slow or away costs no training
step. Its standard input is a pipe from the training process: the end of that pipe says
that the run is over, whether it was closed by `Follower.finish` or by death.
"""

import argparse
import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from metadist.config import Config
from metadist.errors import MetadistError
from metadist.tracking import delivery, destination
from metadist.tracking.mlflow_copy import QUIET_AND_BRIEF, SyncReport
from metadist.tracking.search_copy import is_search, sync_folder

POLL, SEARCH_POLL = 2.0, 5.0
LONGEST_PAUSE = 30.0
LAST_ATTEMPT = 20.0
"""Seconds that the process outlives a training process that died."""

_log = logging.getLogger(__name__)


class Follower:
    """The training process's hold on the copying process."""

    def __init__(self, run_dir: Path, uri: str | None, process: "subprocess.Popen[bytes] | None", problem: str) -> None:
        self._run_dir, self._uri, self._process, self._problem = run_dir, uri, process, problem

    @property
    def pid(self) -> int | None:
        """The process id of the copying process, where there is one."""
        return self._process.pid if self._process else None

    def finish(self, timeout: float) -> str:
        """Say that the run is over and wait, at most `timeout` seconds, for the rest to be delivered.

        Returns one line for the person: where to look, or why not everything is there.
        """
        if self._uri is None:
            return SyncReport(delivered=True).line(self._run_dir)
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]  # it was opened as a pipe
            try:
                delivered = self._process.wait(timeout) == 0
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                delivered, self._problem = False, f"not done after {timeout:.0f} s"
            state = delivery.read(self._run_dir)
            if delivered and state.run_id:
                where = destination.look_here(self._uri, state.experiment_id, state.run_id)
                return SyncReport(delivered=True, where=where).line(self._run_dir)
            self._problem = state.problem or self._problem or f"see {self._run_dir / 'tracking.log'}"
        return SyncReport(delivered=False, problem=self._problem).line(self._run_dir)


def start(run_dir: Path, config: Config) -> Follower:
    """Start copying the run to `tracking.uri`. What goes wrong is told by `Follower.finish`, never raised.

    Only `config.yaml`, or of a search `search.yaml`, is read by the copying process, so it must be written before.
    A `result.json` that an earlier, shorter training left behind must be removed before.
    """
    uri = destination.resolve_uri(config.tracking.uri, run_dir)
    if uri is None:
        return Follower(run_dir, None, None, "")
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    environment = {**QUIET_AND_BRIEF, "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "metadist.tracking.follow", str(run_dir), "--parent", str(os.getpid())]
    try:
        with (run_dir / "tracking.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C ends the training; the copy then ends by itself
            )
    except OSError as error:
        return Follower(run_dir, uri, None, f"the copying process did not start: {error}")
    return Follower(run_dir, uri, process, "")


def follow(run_dir: Path, parent: int) -> bool:
    """Copy until the result is delivered or the run is over. Returns whether all was delivered."""
    seen: object = None
    problem: str | None = None
    rest = pause = SEARCH_POLL if is_search(run_dir) else POLL
    over = False
    while True:
        over = over or _ended(parent)
        if over and os.getppid() != parent:
            # Nobody waits for this attempt: it ends the process when it takes long. Every piece
            # that was confirmed is recorded, so nothing is lost by ending anywhere.
            last = threading.Timer(LAST_ATTEMPT, os._exit, [1])
            last.daemon = True
            last.start()
        now = _signature(run_dir)
        if over or now != seen:
            report = _attempt(run_dir, final=over)
            if report.problem != problem:
                _log.warning("not delivered: %s", report.problem) if report.problem else _log.info("delivered")
                problem = report.problem
            if report.finished or (over and (report.delivered or os.getppid() != parent)):
                return report.delivered
            if report.delivered:
                seen, pause = now, rest
            else:
                pause = min(LONGEST_PAUSE, 2 * pause)
        if over:
            time.sleep(min(pause, POLL))  # `Follower.finish` waits, and bounds how often this is tried
        else:
            _sleep(pause, parent)


def _attempt(run_dir: Path, final: bool) -> SyncReport:
    try:
        return sync_folder(run_dir, final)
    except MetadistError as error:
        return SyncReport(delivered=False, problem=str(error))
    except Exception as error:  # noqa: BLE001, whatever it is, a copy does not end because of one attempt
        _log.exception("an attempt to deliver failed")
        return SyncReport(delivered=False, problem=f"{type(error).__name__}: {error}".splitlines()[0])


def _ended(parent: int) -> bool:
    """The pipe from the training process was closed, or the process is gone."""
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(readable) or os.getppid() != parent


def _sleep(seconds: float, parent: int) -> None:
    """Sleep, but not past the end of the run."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not _ended(parent):
        select.select([sys.stdin], [], [], min(left, POLL))


def _signature(run_dir: Path) -> tuple[object, ...]:
    """Changes whenever one of the files that are copied was replaced."""
    found = []
    names = ("config.yaml", "metrics.parquet", "result.json", "search.yaml", "search.json", "trials.parquet")
    for folder in (run_dir, *sorted(run_dir.glob("trials/*"))):
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = (folder / name).stat()
                found.append((folder.name, name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def main() -> int:
    """The process: its exit status is 0 when everything was delivered."""
    parser = argparse.ArgumentParser(prog="metadist.tracking.follow", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    _log.setLevel(logging.INFO)
    os.nice(10)  # no core is taken from the workers
    return 0 if follow(arguments.run_dir, arguments.parent) else 1


if __name__ == "__main__":
    sys.exit(main())
