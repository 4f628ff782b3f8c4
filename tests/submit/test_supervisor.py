"""The entry point without a cluster: real processes that are killed, and a storage that outlives them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadist.errors import RunError, StorageError
from metadist.submit.submission import submission
from metadist.submit.supervisor import Supervisor

ENDLESS = ("outer.steps=1000000", "checkpoint.every=10", "eval.every=0")


class Entry(subprocess.Popen):
    """The entry point, as Ray starts it: at the head of a group of its own. Its output is in a file."""

    output: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it has said: every line is one JSON object."""
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    @property
    def said(self) -> str:
        return "\n".join(line["message"] for line in self.lines)


@pytest.fixture
def cache(tmp_path: Path, one_cache: Path) -> Path:
    """Of a host: the data set is built there."""
    return Path(
        shutil.copytree(one_cache, tmp_path / "cache", ignore=lambda _, names: {n for n in names if "arrow" not in n})
    )


@pytest.fixture
def enter(
    packaged: Path, tmp_path: Path, cache: Path, is_alive: Callable[[int], bool]
) -> Iterator[Callable[..., Entry]]:
    """Starts the entry point; what is left of its group is ended by process id."""
    started: list[Entry] = []

    def start(*words: object, cache: Path = cache) -> Entry:
        output = tmp_path / f"entry-{len(started)}.txt"
        environment = {**os.environ, "PYTHONPATH": str(packaged), "METADIST_CACHE": str(cache)}
        with output.open("w") as file:
            entry = Entry(
                [sys.executable, "-m", "metadist.jobs.entry", *map(str, words)],
                stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path, start_new_session=True,
            )  # fmt: skip
        entry.output = output
        started.append(entry)
        return entry

    yield start
    for entry in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(entry.pid, signal.SIGKILL)
        entry.wait(20)


@pytest.fixture
def result(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Of a stored run."""

    def read(id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "storage" / id / "run" / "result.json").read_text())
        return found

    return read


@pytest.fixture
def process_of(find_processes: Callable[[int, str], list[int]], wait_until: Callable[..., Any]) -> Callable[..., int]:
    """The training process of an entry point, another one than `before`."""

    def find(entry: Entry, before: int = 0) -> int:
        def others() -> list[int]:
            return [pid for pid in find_processes(entry.pid, sys.executable) if pid != before]

        return int(wait_until(others, 30, "a training process")[0])

    return find


def stored_step(tmp_path: Path, id: str, least: int) -> Callable[[], bool]:
    folder = tmp_path / "storage" / id / "run" / "checkpoints"
    return lambda: any(int(path.parent.name[5:]) >= least for path in folder.glob("step-*/checkpoint.json"))


@pytest.fixture
def supervisor(tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Supervisor]:
    """Of a job `a` on a host with an empty disk; another one is another attempt."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "host"))

    def make(*words: str, host: str = "host") -> Supervisor:
        monkeypatch.setenv("METADIST_CACHE", str(tmp_path / host))
        found = Supervisor(submission([str(tiny_job), f"storage={tmp_path / 'storage'}", *words], id="a"))
        found.folder.parent.mkdir(parents=True, exist_ok=True)
        return found

    return make


def left(supervisor: Supervisor, text: str) -> Path:
    """A file in its folder."""
    supervisor.folder.mkdir(exist_ok=True)
    path = supervisor.folder / "left.txt"
    path.write_text(text)
    return path


def test_a_folder_whose_storage_was_cleared_is_not_gone_on_with(
    supervisor: Callable[..., Supervisor], tmp_path: Path
) -> None:
    """Nothing says any more what it is of."""
    first = supervisor()
    first._bring()
    left(first, "seed 1")
    shutil.rmtree(tmp_path / "storage")
    after = supervisor("seed=7")
    after._bring()
    assert not after.folder.exists()


def test_undelivered_results_outlive_an_attempt_that_could_not_begin(
    supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = supervisor()
    first._bring()
    kept = left(first, "undelivered")

    def begin(*_: object) -> None:
        raise StorageError("storage: full")

    second = supervisor()
    monkeypatch.setattr(second.storage, "begin", begin)
    with pytest.raises(StorageError, match="full"):
        second._bring()
    third = supervisor()
    third._bring()
    assert kept.read_text() == "undelivered"
    assert third.writer == first.writer, "nobody has taken over"
    other = supervisor(host="other")
    other._bring()
    assert other.writer != first.writer
    supervisor()._bring()
    assert not kept.exists(), "another host has"


def test_a_host_that_another_has_taken_over_from_writes_no_more(
    supervisor: Callable[..., Supervisor], tmp_path: Path
) -> None:
    first, other = supervisor(), supervisor(host="other")
    first._bring()
    left(first, "first")
    first._mirror()
    other._bring()
    left(other, "other")
    other._mirror()
    with pytest.raises(RunError, match=f"a: {socket.gethostname()} has gone on with it; this attempt .* ends"):
        first._mirror()
    stored = tmp_path / "storage" / "a" / "run" / "left.txt"
    assert stored.read_text() == "other"
    shutil.rmtree(tmp_path / "storage")
    other._mirror()
    assert stored.read_text() == "other"
    assert other.storage.submission() is not None, "cleared and begun again"


def test_the_process_of_a_host_that_was_taken_over_from_is_ended(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path, wait_until: Callable[..., Any],
    process_of: Callable[..., int], is_alive: Callable[[int], bool],
) -> None:  # fmt: skip
    entry = enter(tiny_job, *ENDLESS, f"storage={tmp_path / 'storage'}", "--id=a")
    wait_until(stored_step(tmp_path, "a", 10), 60, "a stored checkpoint")
    pid = process_of(entry)
    path = tmp_path / "storage" / "a" / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "writer": "another", "host": "over-there"}))
    assert entry.wait(60) == RunError.exit_code, entry.said
    assert "error: a: over-there has gone on with it" in entry.said
    assert "Traceback" not in entry.said
    assert not is_alive(pid)


@pytest.mark.chaos
def test_a_killed_process_is_started_again_at_most_so_often(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path, long_overrides: tuple[str, ...], long_hash: str,
    wait_until: Callable[..., Any], process_of: Callable[..., int], result: Callable[[str], dict[str, Any]],
) -> None:  # fmt: skip
    """Killed with a retry left: the bits of an undisturbed run. Without: its signal is the exit code, and the same
    words go on with what is stored, after the host's own disk is gone too."""
    words = (tiny_job, *long_overrides, f"storage={tmp_path / 'storage'}", "--id=a")
    entry = enter(*words, "outer.steps=100000", "jobs.retries=0", "--id=b")
    again = enter(*words)
    wait_until(stored_step(tmp_path, "a", 10), 60, "a stored checkpoint")
    first = process_of(again)
    os.kill(first, signal.SIGKILL)
    assert again.wait(90) == 0, again.said
    assert f"the process ended by signal {signal.SIGKILL.value}; it goes on from what is kept (1 of 3)" in again.said
    assert result("a")["theta_sha256"] == long_hash
    wait_until(stored_step(tmp_path, "b", 10), 60, "a stored checkpoint")
    os.kill(process_of(entry), signal.SIGKILL)
    assert entry.wait(60) == 128 + signal.SIGKILL
    assert "jobs.retries=0 are used up" in entry.said
    assert not (tmp_path / "storage" / "b" / "run" / "result.json").exists()
    assert not (tmp_path / "cache" / "jobs" / "b").exists(), "it is stored; the host keeps no second copy"


@pytest.mark.chaos
def test_sigterm_keeps_the_step_and_another_host_goes_on(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path, wait_until: Callable[..., Any], cache: Path,
    result: Callable[[str], dict[str, Any]], long_overrides: tuple[str, ...], long_hash: str,
) -> None:  # fmt: skip
    """To the whole group as Ray sends it. What is stored is the step it was at; another host, another cache."""
    words = (tiny_job, *long_overrides, f"storage={tmp_path / 'storage'}", "--id=a", "checkpoint.every=100000")
    entry = enter(*words)
    wait_until(lambda: "training begins" in entry.output.read_text(), 60, "the first step")
    os.killpg(entry.pid, signal.SIGTERM)
    assert entry.wait(60) == 143, entry.said
    (kept,) = (tmp_path / "storage" / "a" / "run" / "checkpoints").glob("step-*")
    assert f"ended by SIGTERM; step {kept.name[5:]} is kept" in entry.said
    other = Path(shutil.copytree(cache, tmp_path / "other", ignore=shutil.ignore_patterns("jobs")))
    after = enter(*words, cache=other)
    assert after.wait(90) == 0, after.said
    assert f"going on with what is stored in {tmp_path / 'storage'}" in after.said
    assert result("a")["theta_sha256"] == long_hash
    assert result("a")["steps_recomputed"] == 0


@pytest.mark.chaos
def test_a_killed_entry_point(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path, wait_until: Callable[..., Any],
    process_of: Callable[..., int], long_overrides: tuple[str, ...], long_hash: str, is_alive: Callable[[int], bool],
    result: Callable[[str], dict[str, Any]],
) -> None:  # fmt: skip
    """Its process lives on for a moment, as it does on Ray; the next entry point waits for its end, and goes on from
    this host's own disk."""
    words = (tiny_job, *long_overrides, f"storage={tmp_path / 'storage'}", "--id=a")
    entry = enter(*words)
    wait_until(stored_step(tmp_path, "a", 10), 60, "a stored checkpoint")
    pid = process_of(entry)
    os.kill(pid, signal.SIGSTOP)
    entry.kill()
    entry.wait()
    after = enter(*words)
    wait_until(lambda: len(list(Path("/proc").glob(f"{after.pid}/task/*"))) > 0, 10)
    assert is_alive(pid)
    with pytest.raises(subprocess.TimeoutExpired):
        after.wait(8)
    assert after.lines == [], "it waits"
    os.kill(pid, signal.SIGKILL)
    assert after.wait(90) == 0, after.said
    assert "going on with what is stored" not in after.said
    assert result("a")["theta_sha256"] == long_hash


def test_its_lines_say_run_and_step(enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path) -> None:
    """The log of the job and that of the run; a finished run is shown again, not trained again."""
    words = (tiny_job, f"storage={tmp_path / 'storage'}", "--id=a")
    entry = enter(*words)
    assert entry.wait(60) == 0, entry.said
    for line in entry.lines:
        assert {"time", "level", "run", "step", "worker", "message"} <= line.keys()
        assert line["run"] == "a"
    validation = next(line for line in entry.lines if "validation" in line["message"])
    assert validation["step"] == 6
    kept = [json.loads(line) for line in (tmp_path / "storage" / "a" / "run" / "log.jsonl").read_text().splitlines()]
    assert validation["message"] in [line["message"] for line in kept]
    assert {line["run"] for line in kept} == {"a"}
    again = enter(*words)
    assert again.wait(60) == 0
    assert "is finished: 12 meta-steps; nothing to do" in again.said


@pytest.mark.parametrize(
    ("words", "code", "say"),
    [
        (("task.shots=0",), 2, "error: "),
        (("algorithm.inner_lr=1.0e+30", "jobs.retries=3"), 5, "diverged at"),
        (("storage=nfs://a/b",), 2, "error: storage: no file system is known for nfs://"),
    ],
)
def test_ends_that_come_again_are_not_tried_again(
    words: tuple[str, ...], code: int, say: str, enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path
) -> None:
    entry = enter(tiny_job, f"storage={tmp_path / 'storage'}", *words, "--id=a")
    assert entry.wait(60) == code, entry.said
    assert say in entry.said
    assert "it goes on" not in entry.said
    assert "Traceback" not in entry.said


@pytest.mark.chaos
def test_another_config_under_the_same_id_is_refused(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path
) -> None:
    words = (tiny_job, f"storage={tmp_path / 'storage'}", "--id=a")
    assert enter(*words).wait(60) == 0
    entry = enter(*words, "seed=7")
    assert entry.wait(60) == 2
    assert "with another config or other code; choose another --id" in entry.said


@pytest.mark.chaos
def test_a_storage_that_is_away_ends_the_job_but_not_the_run(
    enter: Callable[..., Entry], tiny_job: Path, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """It goes away after the beginning: what was computed is named, and stays on the host."""
    storage = tmp_path / "storage"
    entry = enter(tiny_job, *ENDLESS[1:], "outer.steps=500", f"storage={storage}", "--id=a")
    wait_until(stored_step(tmp_path, "a", 10), 60, "a stored checkpoint")
    shutil.move(storage, tmp_path / "away")
    storage.write_text("")
    assert entry.wait(120) == 3, entry.said
    folder = tmp_path / "cache" / "jobs" / "a"
    assert "tried again with the next checkpoint" in entry.said
    assert f"the results are in {folder}" in entry.said
    assert json.loads((folder / "result.json").read_text())["meta_steps"] == 500
