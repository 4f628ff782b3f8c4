"""A real Ray Train group on the test run's cluster: same bits, through the death of a rank and SIGTERM."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from metadist.config import Config
from metadist.errors import ClusterError
from metadist.run import resume, train
from metadist.runtime.preemption import Preempted

pytestmark = pytest.mark.cluster

Make = Callable[..., Config]


@pytest.fixture
def grouped(tiny: Make, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runs with allreduce; what Ray Train writes must not come into anybody's home."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return lambda *overrides: tiny(
        "cluster.workers=2", "cluster.strategy=allreduce", f"cluster.address={cluster.address}", *overrides
    )


def when(condition: Callable[[], Any], do: Callable[[], None]) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def work() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if condition():
                do()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.chaos
def test_a_rank_is_killed_and_then_the_run_is_ended(
    grouped: Make, tiny: Make, cluster: Any, find_processes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new group goes on from the newest checkpoint; SIGTERM halts it where it is, and one process ends the run.

    The group runs ahead of its driver: the checkpoint is of the step at which it halted, and
    no metric up to there is missing.
    """
    longer = ("outer.steps=200", "checkpoint.every=20", "eval.every=20")
    alone = train(tiny(*longer), "long", tmp_path / "alone").result
    run, ranks = tmp_path / "run", []

    def group() -> list[int]:
        return find_processes(cluster.pid, "ray::RayTrainWorker")

    def kill() -> None:
        ranks.extend(group())
        os.kill(ranks[-1], signal.SIGKILL)

    killer = when(lambda: (run / "checkpoints" / "step-20").exists(), kill)
    ender = when(
        lambda: (run / "checkpoints" / "step-80").exists() and not set(group()) & set(ranks),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    with pytest.raises(Preempted, match=r"step \d+ is kept") as told:
        train(grouped(*longer), "long", run)
    killer.join(1)
    ender.join(1)
    assert len(ranks) == 2
    assert re.search(r"the group of ranks was lost: rank [01] died", capsys.readouterr().out), "whichever it was"
    step = int(str(told.value).partition("; step ")[2].split()[0])
    assert 80 <= step < 200
    assert (run / "checkpoints" / f"step-{step}").is_dir()
    assert pq.read_table(run / "metrics.parquet").column("step").to_pylist() == list(range(1, step + 1))
    assert not {".ray", "ray_results"} & {path.name for path in (tmp_path / "home").iterdir()}
    result = resume(run, ["cluster.strategy=aggregator", "cluster.workers=0"]).result
    for key in ("theta_sha256", "test", "best", "numeric_fingerprint", "meta_steps"):
        assert result[key] == alone[key], key
    assert 0 <= result["steps_recomputed"] <= 200, "what the killed rank cost; SIGTERM cost none"


def test_more_ranks_than_the_cluster_can_hold(grouped: Make, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.workers: 9 workers.*at most 3 workers are valid"):
        train(grouped("cluster.workers=9"), "tiny", tmp_path / "run")


def test_no_group_stays_on_the_cluster(cluster: Any, find_processes: Any, wait_until: Any) -> None:
    for name in ("ray::RayTrainWorker", "ray::Mailbox", "ray::TrainController"):
        wait_until(lambda name=name: not find_processes(cluster.pid, name), 20, f"the end of every {name}")
