"""An asynchronous run on the test run's cluster: one worker slowed from outside, one killed, SIGTERM, a replay."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from metadist.config import Config
from metadist.run import resume, train
from metadist.runtime.preemption import Preempted

pytestmark = pytest.mark.cluster

Make = Callable[..., Config]


@pytest.mark.chaos
def test_one_worker_is_slow_and_one_is_killed(
    tiny: Make, cluster: Any, find_processes: Any, tmp_path: Path, cli: Any, refused: Any
) -> None:
    """The quick one goes on, nothing is older than the bound, and the ledger makes the same bits again.

    Signals let one worker run for a tenth of the time; the quick one is killed; SIGTERM ends
    the run, and another process goes on with it.
    """
    run = tmp_path / "run"
    config = tiny(
        "cluster.strategy=async", "cluster.workers=2", "cluster.staleness=1", f"cluster.address={cluster.address}",
        "outer.steps=200", "checkpoint.every=20", "eval.every=100",
    )  # fmt: skip
    pids: list[int] = []

    def wait(step: int) -> None:
        until = time.monotonic() + 120
        while not (run / "checkpoints" / f"step-{step}").exists() and time.monotonic() < until:
            time.sleep(0.02)
            if len(pids) == 2:
                os.kill(pids[0], signal.SIGSTOP)
                time.sleep(0.18)
                os.kill(pids[0], signal.SIGCONT)

    def disturb() -> None:
        wait(20)
        pids.extend(find_processes(cluster.pid, "ray::Worker"))
        wait(100)
        os.kill(pids[1], signal.SIGKILL)
        wait(140)
        os.kill(os.getpid(), signal.SIGTERM)

    disturber = threading.Thread(target=disturb, daemon=True)
    disturber.start()
    with pytest.raises(Preempted, match=r"step \d+ is kept"):
        train(config, "late", run)
    disturber.join(5)
    refused("train", "--resume", run, "cluster.strategy=aggregator", say=("cluster.staleness: is read by",))
    result = resume(run, []).result
    assert result["reproducible"] is False
    assert result["meta_steps"] == 200
    assert result["steps_recomputed"] == 0
    assert result["staleness"]["max"] <= result["staleness"]["bound"] == 1
    ledger = pq.read_table(run / "ledger.parquet").to_pylist()
    assert sorted(entry["number"] for entry in ledger) == list(range(200 * 4))
    slow, quick = pids
    by = [entry["worker"] for entry in ledger if 40 <= entry["step"] < 90]
    assert by.count(quick) > 0
    assert by.count(slow) < by.count(quick) / 2, "the slow one has a smaller part"
    assert pq.read_table(run / "metrics.parquet").column("step").to_pylist() == list(range(1, 201))
    ended = cli("replay", run)
    assert ended.code == 0, ended
    assert f"θ {result['theta_sha256'][:16]}, the run's bits" in ended.out
