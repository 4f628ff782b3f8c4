"""Jobs on a Ray head with its dashboard: submitted, followed, killed, stopped, gone on with, fetched."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_head import Head

from metadist.config import Config, to_yaml
from metadist.submit.package import stage

pytestmark = pytest.mark.own_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address(head: Head, monkeypatch: pytest.MonkeyPatch) -> str:
    """The head's, as RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    return head.address


@pytest.fixture
def job(tmp_path: Path, tiny: Callable[..., Config]) -> Path:
    """The tiny run with a worker."""
    path = tmp_path / "job.yaml"
    path.write_text(to_yaml(tiny("cluster.workers=1")))
    return path


@pytest.fixture
def process_of(find_processes: Callable[[int, str], list[int]]) -> Callable[..., list[int]]:
    """Processes of a head's jobs: `main()` of training, `jobs.entry` of entry points."""

    def find(head: Head, what: str, id: str) -> list[int]:
        assert head.process is not None
        found = []
        for pid in find_processes(head.process.pid, sys.executable):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if any(what in word for word in words) and any(id in word for word in words):
                found.append(pid)
        return found

    return find


def stored(head: Head, id: str) -> Path:
    return head.home / "metadist-jobs" / id / "run"


def steps(run: Path) -> list[int]:
    return [int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/checkpoint.json")]


def hash_of(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text())["theta_sha256"])


def test_submitted_killed_followed_and_fetched(
    head: Head, address: str, job: Path, cli: Callable[..., Any], refused: Callable[..., Any], long_hash: str,
    long_overrides: tuple[str, ...], wait_until: Callable[..., Any], process_of: Callable[..., list[int]],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Its training process is killed: it is restarted and ends in the bits of a direct run. The same submit again is
    no second run: it follows, then shows. The folder comes back as it is stored."""
    words = ("submit", job, *long_overrides)
    sent = cli(*words)
    assert sent.code == 0, sent
    id = re.search(r"^submitted (job-[0-9a-f]{12})$", sent.out, re.MULTILINE)[1]  # type: ignore[index]
    assert f"results: ~/metadist-jobs/{id} on the disk of the cluster's head" in sent.out
    assert f"follow it: metadist jobs logs {id} --follow --address {address}" in sent.out
    run = stored(head, id)
    wait_until(lambda: steps(run), 90, "a stored checkpoint")
    (pid,) = process_of(head, "main()", id)
    os.kill(pid, signal.SIGKILL)
    full = ("jobs.queue: 1 jobs wait or run", "1 may", f"metadist jobs stop {id}")
    refused("submit", job, "seed=9", "jobs.queue=1", code=4, say=full)
    refused("submit", job, "seed=9", "--id", id, say=(id, "another config", "--id"))
    followed = cli(*words)
    assert followed.code == 0, followed
    assert followed.out.startswith(f"{id} exists, and is running: following it\n")
    assert "the process ended by signal 9; it goes on from what is kept (1 of 3)" in followed.out
    assert f"results: ~/metadist-jobs/{id}\n" in followed.out
    assert hash_of(run) == long_hash
    assert not (head.cache / "jobs" / id).exists(), "the head keeps one copy"
    again = cli(*words)
    assert again.code == 0, again
    assert again.out.startswith(f"{id} exists, and has finished\n")
    assert long_hash[:12] in again.out, "its result is shown"
    listed = cli("jobs", "list").out.splitlines()
    assert [line.split()[-2:] for line in listed if line.startswith(id)] == [["1", "succeeded"]]
    lines = [json.loads(line) for line in cli("jobs", "logs", id, "--json").out.splitlines()]
    assert {line["run"] for line in lines} == {id}
    assert any(line["step"] == 150 and line["message"].startswith("meta-step 150/150") for line in lines)
    assert cli("jobs", "fetch", id, "--to", tmp_path / "back").code == 0
    names = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert all((tmp_path / "back" / name).read_bytes() == (run / name).read_bytes() for name in names)


# --- refused in one line --------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a program that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_where_no_job_server_is(
    refused: Callable[..., Any], job: Path, free_port: Callable[[], int], silent: str, head: Head,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("metadist.submit.client.TIMEOUT", 1.0)
    nobody = f"http://127.0.0.1:{free_port()}"
    refused("submit", job, code=4, say=("--address", "RAY_ADDRESS", "http://HOST:8265"))
    refused("submit", job, "--address", "127.0.0.1:6379", code=4, say=("127.0.0.1:6379", "http://HOST:8265"))
    refused("submit", job, "--address", "http://127.0.0.1:x", code=4, say=("http://127.0.0.1:x",))
    refused("submit", job, "--address", nobody, code=4, say=(nobody, "Connection refused"))
    refused("jobs", "list", "--address", silent, code=4, say=(silent, "timed out"))
    refused("jobs", "list", "--address", f"http://127.0.0.1:{head.port}", code=4, say=("no job server",))
    refused("submit", job, "task.shotz=1", "--address", nobody, say=("task.shotz", "task.shots"))


def test_another_version(address: str, refused: Callable[..., Any], job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.55.1")
    refused("submit", job, code=4, say=(address, "runs Ray 2.", "this is Ray 2.55.1"))
    monkeypatch.undo()
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    refused("submit", job, "--address", address, code=4, say=("runs Python 3.", "this is Python 3.9.1"))


def test_what_is_not_there(address: str, refused: Callable[..., Any], tmp_path: Path) -> None:
    for verb in ("status", "logs", "stop"):
        refused("jobs", verb, "nothing", say=("nothing: no such job", "metadist jobs list"))
    refused("jobs", "fetch", "nothing", "--to", tmp_path / "back", say=("nothing: no such job",))
    refused("jobs", "fetch", "nothing", "--to", tmp_path, "--storage", "/a", say=(f"--to: {tmp_path} exists already",))
    nowhere = ("--storage", "/nowhere")
    refused("jobs", "fetch", "a", "--to", tmp_path / "b", *nowhere, say=("nothing of it is stored in /nowhere",))
    assert os.listdir(tmp_path) == []


def test_no_token_and_another_one(
    head: Head, start_cli: Callable[..., Any], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side: a process without any, and one with another cluster's."""
    words = ("submit", job, "--address", head.address)
    bare = start_cli(*words)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    other = start_cli(*words, joins=True)
    for process, say in ((bare, "asks for a token, and there is none"), (other, "takes another token than this one")):
        assert process.wait(60) == 4, process.said
        assert process.said.count("\n") == 1, process.said
        assert f"{say}; RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in process.said


# --- long forms -----------------------------------------------------------------------


@pytest.mark.chaos
def test_a_stopped_job_goes_on(
    head: Head, address: str, job: Path, cli: Callable[..., Any], long_hash: str, long_overrides: tuple[str, ...],
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    """`stop` keeps the very step; the same submit is a second attempt, and computes nothing again."""
    words = ("submit", job, *long_overrides, "checkpoint.every=100000", "--id", "stopped")
    assert cli(*words).code == 0
    wait_until(lambda: "training begins" in cli("jobs", "logs", "stopped").out, 90, "the first step")
    ended = cli("jobs", "stop", "stopped")
    assert ended.code == 0, ended
    (kept,) = steps(stored(head, "stopped"))
    assert f"step {kept} is kept" in ended.out
    assert "stopped; the same submit goes on with it" in ended.out
    assert "is over: stopped" in cli("jobs", "stop", "stopped").out
    assert cli("jobs", "logs", "stopped", "--follow").code == 143
    after = cli(*words, "--follow")
    assert after.code == 0, after
    assert "submitted stopped-2" in after.out
    assert hash_of(stored(head, "stopped")) == long_hash
    assert json.loads((stored(head, "stopped") / "result.json").read_text())["steps_recomputed"] == 0
    assert cli("jobs", "status", "stopped-2").out.startswith("stopped-2: succeeded")
    assert cli("jobs", "status", "stopped").out.startswith("stopped-2: succeeded")


@pytest.mark.chaos
def test_a_killed_entry_point(
    head: Head, address: str, job: Path, cli: Callable[..., Any], long_hash: str, long_overrides: tuple[str, ...],
    wait_until: Callable[..., Any], process_of: Callable[..., list[int]], is_alive: Callable[[int], bool],
) -> None:  # fmt: skip
    words = ("submit", job, *long_overrides, "--id", "orphaned")
    assert cli(*words).code == 0
    wait_until(lambda: steps(stored(head, "orphaned")), 90, "a stored checkpoint")
    (entry,), (training,) = (process_of(head, what, "orphaned") for what in ("metadist.jobs.entry", "main()"))
    os.kill(entry, signal.SIGKILL)
    wait_until(lambda: "failed" in cli("jobs", "status", "orphaned").out, 30, "the word of its death")
    after = cli(*words, "--follow")
    assert after.code == 0, after
    assert "orphaned exists, and failed: going on with it" in after.out
    assert not is_alive(training)
    assert hash_of(stored(head, "orphaned")) == long_hash


@pytest.mark.chaos
def test_a_killed_cluster(
    new_head: Callable[..., Head], job: Path, cli: Callable[..., Any], long_hash: str, tmp_path: Path,
    long_overrides: tuple[str, ...], wait_until: Callable[..., Any], find_processes: Callable[..., list[int]],
) -> None:  # fmt: skip
    """With the head's disk, but for the storage. The new cluster knows nothing of the job, and goes on with it."""
    head, storage = new_head(), tmp_path / "storage"
    words = ("submit", job, *long_overrides, f"storage={storage}", "--address", head.address, "--follow")
    sent = cli(*words[:-1])
    id = re.search(r"^submitted (\S+)$", sent.out, re.MULTILINE)[1]  # type: ignore[index]
    wait_until(lambda: steps(storage / id / "run"), 90, "a stored checkpoint")
    head.kill(find_processes)
    shutil.rmtree(head.cache / "jobs")
    head.start()
    after = cli(*words)
    assert after.code == 0, after
    assert f"submitted {id}\n" in after.out
    assert f"going on with what is stored in {storage}" in after.out
    assert hash_of(storage / id / "run") == long_hash
    head.kill(find_processes)


@pytest.mark.chaos
def test_a_bucket(
    new_head: Callable[..., Head], bucket: str, keys: dict[str, str], job: Path, cli: Callable[..., Any],
    tmp_path: Path, tiny_run: Any, monkeypatch: pytest.MonkeyPatch, find_processes: Callable[..., list[int]],
) -> None:  # fmt: skip
    """Keys are in the environment of the head and of whoever fetches, and nowhere else."""
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    head = new_head(**keys)
    sent = cli("submit", job, f"storage={bucket}", "--id", "far", "--address", head.address, "--follow")
    assert sent.code == 0, sent
    back = cli("jobs", "fetch", "far", "--to", tmp_path / "back", "--address", head.address)
    assert back.code == 0, back
    assert hash_of(tmp_path / "back") == tiny_run.result["theta_sha256"]
    evaluated = cli("submit", "evaluate", "far", "eval.episodes=30", "--address", head.address, "--follow")
    assert evaluated.code == 0, evaluated
    assert cli("jobs", "fetch", "far", "--to", tmp_path / "more", "--address", head.address).code == 0
    (judged,) = (tmp_path / "more" / "evaluations").glob("test-*.json")
    assert json.loads(judged.read_text())["test"]["episodes"] == 30
    head.kill(find_processes)


@pytest.mark.chaos
def test_an_error_of_a_worker_reaches_who_submitted(
    head: Head, address: str, job: Path, start_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Code with a defect, as somebody might send it: traceback, worker and host."""
    (tmp_path / "broken").mkdir()
    package, _ = stage(tmp_path / "broken", None)
    worker = package / "runtime" / "worker.py"
    text = worker.read_text()
    mark = "        pieces = cut(self.engine.blueprint"
    assert text.count(mark) == 1
    worker.write_text(text.replace(mark, f"        assert step < 3, 'a defect'\n{mark}"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(package.parent)
    try:
        words = ("--address", address, "--id", "broken")
        sent = start_cli("submit", job, "jobs.retries=0", "checkpoint.every=1", "--follow", *words, joins=True)
        assert sent.wait(120) == 1, sent.said
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    assert "AssertionError: a defect" in sent.said
    assert re.search(r"worker\.py\", line \d+, in compute", sent.said)
    assert re.search(rf"in worker \d+@{socket.gethostname()}", sent.said)
    assert re.search(r"pid=\d+, ip=[\d.]+", sent.said)
    lines = [json.loads(line) for line in (stored(head, "broken") / "log.jsonl").read_text().splitlines()]
    (failed,) = (line for line in lines if line["level"] == "error")
    assert failed["worker"].endswith(f"@{socket.gethostname()}")
    assert "a defect" in failed["message"]


@pytest.mark.chaos
def test_a_job_that_the_cluster_cannot_hold(address: str, job: Path, cli: Callable[..., Any]) -> None:
    """One clear line out of its log, and its exit code."""
    ended = cli("submit", job, "cluster.workers=50", "jobs.retries=0", "--follow")
    assert ended.code == 4, ended
    assert re.search(r"^error: cluster.workers: 50 workers .* at most 3 workers are valid$", ended.out, re.MULTILINE)
    assert "Traceback" not in ended.out


@pytest.mark.chaos
def test_a_search_and_a_table(
    head: Head, address: str, cli: Callable[..., Any], tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    """Stopped in between they go on; a search's folder comes back with its answer."""
    path = tmp_path / "search.yaml"
    section = (
        "search:\n  space:\n    algorithm.inner_lr: {loguniform: [0.1, 1]}\n"
        "  trials: 3\n  concurrent: 1\n  searcher: random\n  scheduler: fifo\n"
    )
    path.write_text(section + to_yaml(tiny("outer.steps=6", "eval.every=3")))
    ended = cli("submit", path, "--id", "searched", "--follow")
    assert ended.code == 0, ended
    assert cli("jobs", "fetch", "searched", "--to", tmp_path / "searched").code == 0
    assert (tmp_path / "searched" / "best.yaml").is_file()
    assert len(list((tmp_path / "searched" / "trials").iterdir())) == 3
    few = ("outer.steps=3", "eval.episodes=10", "checkpoint.every=3", "cluster.workers=1", "tracking.uri=off")
    ended = cli("submit", "reproduce", "sinusoid", "--methods", "maml", *few, "--id", "table", "--follow")
    assert ended.code == 0, ended
    assert cli("jobs", "fetch", "table", "--to", tmp_path / "table").code == 0
    assert (tmp_path / "table" / "short" / "table.md").is_file()


@pytest.mark.chaos
def test_the_commands_of_the_readme(
    tmp_path: Path, free_port: Callable[[], int], one_cache: Path, find_processes: Callable[[int, str], list[int]],
    is_alive: Callable[[int], bool], wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    """As they stand, but for the ports."""
    readme = (ROOT / "jobs" / "README.md").read_text()
    commands = readme.partition("```bash\n")[2].partition("```")[0]
    for port in ("6379", "8265"):
        commands = commands.replace(port, str(free_port()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path), "METADIST_CACHE": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        shell = subprocess.Popen(
            ["bash", "-e"], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment,
            cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    assert shell.stdin is not None
    shell.stdin.write(commands.encode())
    shell.stdin.close()
    seen: set[int] = set()
    try:
        wait_until(lambda: seen.update(find_processes(shell.pid, "")) or shell.poll() is not None, 240, "the end")
        said = output.read_text()
        assert shell.returncode == 0, said
        assert "first  " in said and "succeeded" in said
        assert "fetched runs/first" in said
        assert "5-way 5-shot" in said
        assert json.loads((tmp_path / "runs" / "first" / "result.json").read_text())["meta_steps"] == 100
        wait_until(lambda: not any(map(is_alive, seen)), 60, "the end of the head's processes")
    finally:
        for pid in filter(is_alive, seen):
            os.kill(pid, signal.SIGKILL)
