"""What the entry point does on the cluster: it runs one job to its end, whatever happens to the process that computes.

Ray runs a job once. So this process, which computes nothing, starts the one that does, starts it again with `--resume`
where it dies, and brings the folder that it writes into the storage, whenever a checkpoint is complete and at the end.
All that it and its process print is one JSON object a line.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from metadist.data.files import cache_folder
from metadist.durable import storage_errors, write
from metadist.errors import ConfigError, Divergence, MetadistError, RunError, StorageError
from metadist.submit.storage import Storage, files_of
from metadist.submit.submission import Options, Submission, submission
from metadist.tracking import log

POLL, LOOK = 0.2, 1.0
"""Seconds between two looks at the process, and at what it has written."""

OTHERS_SECONDS = 60.0
"""How long a job waits for the process of the one before, which may still be ending."""

FORWARD_SECONDS = 1.0
"""After which a SIGTERM is passed on. Ray sends it to all processes of a job; others, to this one."""

FINAL = (ConfigError.exit_code, Divergence.exit_code)
"""Ends that come again, however often it is started."""

MARKS = ("checkpoint.json", "result.json", "ledger.jsonl", "table.md")
"""Files that a checkpoint, a run, a trial or a row ends with."""

WIDTH = "120"
"""Of tables in a log."""

STOPPED = 128 + signal.SIGTERM


class Supervisor:
    """One job, and the folder on this host's disk that its process writes."""

    def __init__(self, job: Submission) -> None:
        self.job = job
        self.storage = Storage(job.config.storage, job.run)
        self.folder = cache_folder() / "jobs" / job.id
        self.writer = ""
        self.stopped = False
        self.step: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._seen: object = None

    def run(self) -> int:
        """Its exit code. Raises MetadistError where nothing could be begun."""
        with storage_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self._alone() as lock:
            signal.signal(signal.SIGTERM, self._stop)
            self._bring()
            code = self._supervise(lock)
            self._wait_for_group()
            self._deliver()
        return code

    # --- the process ---------------------------------------------------------

    def _supervise(self, lock: int) -> int:
        deaths, most = 0, self.job.config.jobs.retries
        while True:
            code = STOPPED if self.stopped else self._once(lock)
            if code in (0, *FINAL):
                return code
            if self.stopped:
                return STOPPED
            told = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
            if deaths == most:
                self.say(f"the process {told}; jobs.retries={most} are used up", "error")
                return code if code > 0 else 128 - code
            deaths += 1
            self.say(f"the process {told}; it goes on from what is kept ({deaths} of {most})", "warning")

    def _once(self, lock: int) -> int:
        """Start the process, look after it, return its exit code."""
        words = self._words()
        environment = {**os.environ, "COLUMNS": WIDTH, **({log.FORMAT: "json"} if words[0] == "train" else {})}
        command = [sys.executable, "-c", "from metadist.cli import main; main()", *words]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
            pass_fds=(lock,),
        )  # fmt: skip
        if self.stopped:  # since we looked: it was not there to be told
            self._forward()
        assert self._process.stdout is not None
        relay = threading.Thread(target=self._relay, args=(self._process.stdout,), daemon=True)
        relay.start()
        try:
            looked = time.monotonic()
            while (code := self._process.poll()) is None:
                time.sleep(POLL)
                if time.monotonic() > looked + LOOK:
                    self._mirror_if_due()
                    looked = time.monotonic()
        except BaseException:
            self._end(self._process)
            raise
        relay.join(5)
        return code

    def _end(self, process: "subprocess.Popen[str]") -> None:
        """It has its time for a last checkpoint."""
        process.terminate()
        try:
            process.wait(self.job.config.checkpoint.grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _words(self) -> list[str]:
        """The verb's command line, of a folder that is new or was begun."""
        job, folder = self.job, str(self.folder)
        if job.verb in ("train", "search"):
            begun = (self.folder / {"train": "config.yaml", "search": "search.yaml"}[job.verb]).is_file()
            return [job.verb, *(["--resume", folder] if begun else [str(self._job_file()), "--run-dir", folder])]
        _, name, *rest = job.words
        rest = [word for word in rest if not word.startswith(("jobs.", "storage="))]
        if job.verb == "evaluate":
            return [job.verb, folder, *rest]
        return [job.verb, name, "cluster.address=auto", *rest, f"--out={folder}"]

    def _job_file(self) -> Path:
        """The resolved job, where this host's process reads it."""
        assert self.job.job is not None
        path = self.folder.with_name(f"{self.job.id}.yaml")
        write(path, self.job.job.encode())
        return path

    def _stop(self, *_: object) -> None:
        self.stopped = True
        timer = threading.Timer(FORWARD_SECONDS, self._forward)
        timer.daemon = True
        timer.start()

    def _forward(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    # --- what it says --------------------------------------------------------

    def say(self, message: str, level: str = "info") -> None:
        """A line of the job's log."""
        print(log.line(message, self.job.id, self.step, None, level), flush=True)

    def _relay(self, output: IO[str]) -> None:
        """Lines of the process into the log, with run and step where it has not said them."""
        for text in output:
            told = _structured(text)
            if told is None:
                self.say(text.rstrip("\n"), "error" if text.startswith("error: ") else "info")
                continue
            self.step = told["step"] if told["step"] is not None else self.step
            print(json.dumps({**told, "run": self.job.id}, ensure_ascii=False), flush=True)

    # --- its folder ----------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The lock of the job on this host. Its process holds it too, for as long as it lives."""
        path = self.folder.with_name(f"{self.job.id}.lock")
        with storage_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            until = time.monotonic() + OTHERS_SECONDS
            while not _locked(handle):
                if time.monotonic() > until:
                    raise RunError(f"{self.job.id}: another process on this host is still at it")
                time.sleep(POLL)
            yield handle
        finally:
            os.close(handle)

    def _bring(self) -> None:
        """The folder as it was left: on this host, where it wrote the stored one last, else the stored one."""
        before = self.storage.submission()
        if self.job.verb == "evaluate":
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.storage.restore(self.folder):
                raise RunError(f"{self.job.run}: no run of this id is stored in {self.storage.place}")
            return
        if before is not None and before.get("identity") != self.job.identity:
            raise RunError(
                f"{self.job.id}: stands in {self.storage.place} with another config or other code; choose another --id"
            )
        mine = self.folder.with_name(f"{self.job.id}.writer")
        last = mine.read_text() if mine.is_file() else ""
        if before is not None and before.get("writer") == last:  # what is here may be more than what is stored
            self.writer = last
        else:
            self.writer = uuid.uuid4().hex
            shutil.rmtree(self.folder, ignore_errors=True)
        if before is not None and not self.folder.exists() and self.storage.restore(self.folder):
            self.say(f"going on with what is stored in {self.storage.place}")
        with storage_errors(mine):
            mine.write_text(self.writer)
        self._begin()

    def _begin(self) -> None:
        """Say in the storage who writes it."""
        told: dict[str, Any] = {
            "id": self.job.id, "verb": self.job.verb, "words": self.job.words, "identity": self.job.identity,
            "writer": self.writer, "host": socket.gethostname(), "time": time.time(),
        }  # fmt: skip
        self.storage.begin(told, self.folder.with_name(f".{self.job.id}.json"))

    def _mirror_if_due(self) -> None:
        """Where a checkpoint, a trial or a row has come since the last time."""
        now = self._marks()
        if now == self._seen:
            return
        try:
            self._mirror()
            self._seen = now
        except StorageError as error:
            self.say(f"{error}; tried again with the next checkpoint", "warning")
            self._seen = now

    def _marks(self) -> list[tuple[str, int]]:
        """What says that something is complete, and since when."""
        found = []
        for name in files_of(self.folder):
            if name.rpartition("/")[2] in MARKS:
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, (self.folder / name).stat().st_mtime_ns))
        return sorted(found)

    def _mirror(self, final: bool = False) -> None:
        if self.job.verb == "evaluate":
            self.storage.add(self.folder, "evaluations")
            return
        stored = self.storage.submission()
        if stored is None:  # it was cleared meanwhile: all of it is sent again
            self.storage = Storage(self.job.config.storage, self.job.run)
            self._begin()
        elif stored.get("writer") != self.writer:
            raise RunError(
                f"{self.job.id}: {stored.get('host')} has gone on with it; this attempt on {socket.gethostname()} ends"
            )
        self.storage.mirror(self.folder, final)

    def _deliver(self) -> None:
        """All of it, at the end; what is stored needs no second copy here."""
        if not self.folder.is_dir():
            return
        for pause in (2.0, 8.0, 0.0):
            try:
                self._mirror(final=True)
                break
            except StorageError as error:
                if not pause:
                    raise StorageError(
                        f"{error}; the results are in {self.folder} on {socket.gethostname()}"
                    ) from error
                self.say(f"{error}; tried again in {pause:g} s", "warning")
                time.sleep(pause)
        self.say(f"results: {self.storage.place}/{self.job.run}")
        shutil.rmtree(self.folder, ignore_errors=True)
        for suffix in (".writer", ".yaml"):
            self.folder.with_name(f"{self.job.id}{suffix}").unlink(missing_ok=True)

    def _wait_for_group(self) -> None:
        """Until all that the process has started has ended too: a row of a table keeps its own checkpoint."""
        until = time.monotonic() + self.job.config.checkpoint.grace
        while _others() and time.monotonic() < until:
            time.sleep(POLL)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _others() -> bool:
    """Whether another process of this one's group is alive."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == os.getpgid(0) and int(folder.name) != os.getpid() and state not in "ZX":
                return True
    return False


def _structured(text: str) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) and {"message", "step", "level"} <= told.keys() else None


def main() -> int:
    """The entry point: `[VERB] JOB [KEY=VALUE]… [--id ID]`, as of `metadist submit`."""
    parser = argparse.ArgumentParser(prog="metadist.jobs.entry", description=main.__doc__)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--id")
    parser.add_argument("--best", action="store_true")
    for name, default in Options._field_defaults.items():
        if name != "best":
            parser.add_argument(f"--{name}", default=default)
    given = vars(parser.parse_intermixed_args())
    try:
        job = submission(given["words"], Options(**{name: given[name] for name in Options._fields}), given["id"])
        return Supervisor(job).run()
    except MetadistError as error:
        told = "error: " + " ".join(str(error).split())
        print(log.line(told, given["id"], None, None, "error"), flush=True)
        return error.exit_code
