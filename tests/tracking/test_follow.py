"""The copying process, as a real process beside a real parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadist.tracking import delivery, follow

ROOT = Path(__file__).parents[2]
DEADLINE = 100.0  # far beyond what is needed: a test that waits this long has failed


def wait_until(happened: Callable[[], bool]) -> bool:
    until = time.monotonic() + DEADLINE
    while not happened() and time.monotonic() < until:
        time.sleep(0.1)
    return happened()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def delivered(run: Any) -> int:
    return delivery.read(run.folder).delivered.get("loss", -1)


def test_metrics_arrive_while_the_run_goes_on_and_the_result_at_its_end(run: Any) -> None:
    run.train(1, 5)
    follower = follow.start(run.folder, run.config)
    assert wait_until(lambda: delivered(run) == 5)
    run.train(6, 20)
    run.end()
    line = follower.finish(DEADLINE)
    assert line == f"MLflow: mlflow ui --backend-store-uri sqlite:///{run.folder.parent}/mlflow.db"
    assert delivered(run) == 20 and run.state["finished"]
    assert follower.pid is not None and not alive(follower.pid)
    assert "Traceback" not in (run.folder / "tracking.log").read_text()


def test_a_run_that_ends_at_once_is_delivered(run: Any) -> None:
    follower = follow.start(run.folder, run.config)
    run.train(1, 2)
    assert "mlflow ui" in follower.finish(DEADLINE)
    assert delivered(run) == 2 and not run.state["finished"]


def test_it_ends_when_its_parent_was_killed_and_delivers_what_is_there(run: Any) -> None:
    run.train(1, 7)
    code = (
        "import sys, time; from pathlib import Path; from metadist.config import load; "
        "from metadist.tracking.follow import start; folder = Path(sys.argv[1]); "
        "print(start(folder, load(folder / 'config.yaml')).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert wait_until(lambda: delivered(run) == 7)
    finally:
        parent.kill()
    run.train(8, 9)
    parent.wait()
    assert wait_until(lambda: not alive(pid))
    assert delivered(run) == 9


def test_a_server_that_never_answers_holds_nobody(run: Any, silent_server: str) -> None:
    run.configure(silent_server)
    run.train(1, 3)
    follower = follow.start(run.folder, run.config)
    line = follower.finish(timeout=1.0)
    assert "not delivered: not done after 1 s" in line and f"metadist track sync {run.folder}" in line
    assert follower.pid is not None and not alive(follower.pid)


def test_a_server_that_is_away_is_named(run: Any, closed_port: int) -> None:
    run.configure(f"http://127.0.0.1:{closed_port}")
    run.train(1, 3)
    follower = follow.start(run.folder, run.config)
    assert wait_until(lambda: delivery.read(run.folder).problem is not None)
    line = follower.finish(timeout=0.1)
    assert "refused" in line and "\n" not in line
    assert "refused" in (run.folder / "tracking.log").read_text()


def test_a_signal_to_the_terminal_does_not_reach_it(run: Any) -> None:
    """Ctrl-C goes to the process group of the terminal; the copying process has its own."""
    run.train(1, 2)
    follower = follow.start(run.folder, run.config)
    try:
        assert follower.pid is not None and os.getpgid(follower.pid) != os.getpgid(0)
    finally:
        os.kill(follower.pid or 0, signal.SIGKILL)
    assert "not delivered" in follower.finish(DEADLINE)


def test_off_starts_nothing(run: Any) -> None:
    run.configure("off")
    follower = follow.start(run.folder, run.config)
    assert follower.pid is None and follower.finish(1.0) == "MLflow: off"


def test_a_process_that_cannot_start_is_told_at_the_end(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "did not start" in follow.start(run.folder, run.config).finish(1.0)


def test_a_broken_file_ends_no_copy(run: Any) -> None:
    (run.folder / "metrics.parquet").write_bytes(b"not parquet")
    follower = follow.start(run.folder, run.config)
    assert wait_until(lambda: "not delivered" in (run.folder / "tracking.log").read_text())
    assert follower.pid is not None and alive(follower.pid)
    run.train(1, 2)
    assert "mlflow ui" in follower.finish(DEADLINE)
