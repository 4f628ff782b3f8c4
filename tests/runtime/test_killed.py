"""Real processes, real signals: `kill -9` of the driver and of its workers, each in a cluster of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from metadist.run import resume, train


@pytest.fixture
def long_job(tiny_job: Path, long_overrides: tuple[str, ...], cli: Callable[..., Any]) -> Path:
    path = tiny_job.with_name("long.yaml")
    path.write_text(cli("train", tiny_job, *long_overrides, "--dry-run").out)
    return path


ENDLESS = ("outer.steps=1000000", "checkpoint.every=1000000")
"""However long a signal takes to come, the run is not over."""


def calm_hash(cli: Callable[..., Any], job: Path, steps: int, run: Path) -> str:
    """θ after so many steps, undisturbed."""
    ended = cli("train", job, f"outer.steps={steps}", "--run-dir", run)
    assert ended.code == 0, ended
    return str(json.loads((run / "result.json").read_text())["theta_sha256"])


def has_checkpoint(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step-*"))


def assert_metrics_are_complete(run: Path, steps: int) -> None:
    table = pq.read_table(run / "metrics.parquet")
    assert table.column("step").to_pylist() == list(range(1, steps + 1))
    assert table.column("loss").null_count == 0


@pytest.mark.chaos
def test_a_killed_driver_without_a_cluster(
    start_cli: Callable[..., Any], long_job: Path, long_hash: str, tmp_path: Path, wait_until: Callable[..., Any],
    refused: Callable[..., Any], cli: Callable[..., Any],
) -> None:  # fmt: skip
    """Begun and killed, gone on with in a second process, killed again, ended here."""
    run = tmp_path / "run"
    first = start_cli("train", long_job, "--run-dir", run)
    wait_until(has_checkpoint(run, 10), 60, "a checkpoint")
    refused("train", "--resume", run, say=(f"process {first.pid} is training in it",))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (run / "result.json").exists()
    second = start_cli("train", "--resume", run)
    wait_until(has_checkpoint(run, 60), 60, "a later checkpoint")
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL, "it was killed before its end"
    ended = cli("train", "--resume", run)
    assert ended.code == 0, ended
    result = json.loads((run / "result.json").read_text())
    assert result["theta_sha256"] == long_hash
    assert result["meta_steps"] == 150
    assert_metrics_are_complete(run, 150)
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.chaos
@pytest.mark.own_cluster
def test_a_killed_driver_with_workers(
    start_cli: Callable[..., Any], long_job: Path, long_hash: str, tmp_path: Path, wait_until: Callable[..., Any],
    is_alive: Callable[[int], bool], find_processes: Callable[..., list[int]],
) -> None:  # fmt: skip
    """Two workers, then none; the cluster of a killed driver ends with it, and Ray's token is in nobody's home."""
    run = tmp_path / "run"
    driver = start_cli("train", long_job, "--run-dir", run, "cluster.workers=2", "cluster.address=local")
    wait_until(has_checkpoint(run, 10), 90, "a checkpoint")
    started = find_processes(driver.pid, "")
    # Ray's own agents try for two minutes to tell a cluster that is gone; they hold nothing.
    agents = find_processes(driver.pid, "ray::DashboardAgent") + find_processes(driver.pid, "ray::RuntimeEnvAgent")
    assert len(find_processes(driver.pid, "ray::Worker")) == 2
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    left = set(started) - set(agents)
    wait_until(lambda: not any(map(is_alive, left)), 60, "the end of all that the driver started")
    for pid in filter(is_alive, agents):
        os.kill(pid, signal.SIGKILL)
    result = resume(run, ["cluster.workers=0"]).result
    assert result["theta_sha256"] == long_hash
    assert result["workers"] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["cluster"]["workers"] == 0
    assert_metrics_are_complete(run, 150)
    assert not (tmp_path / "home" / ".ray").exists()


@pytest.mark.own_cluster
@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["one", "both"])
def test_killed_workers(
    both: bool, start_cli: Callable[..., Any], long_job: Path, long_hash: str, tmp_path: Path,
    wait_until: Callable[..., Any], find_processes: Callable[..., list[int]],
) -> None:  # fmt: skip
    """One: the other ends the run, with or without who comes instead. In the long form both: those who come do.

    The aggregator is in the driver's process.
    """
    run = tmp_path / "run"
    driver = start_cli("train", long_job, "--run-dir", run, "cluster.workers=2", "cluster.address=local")
    wait_until(has_checkpoint(run, 10), 90, "a checkpoint")
    assert not find_processes(driver.pid, "ray::Aggregator")
    first, second = find_processes(driver.pid, "ray::Worker")
    os.kill(first, signal.SIGKILL)
    if both:
        wait_until(lambda: f"worker {first} died" in driver.said, 30, "the word of the death")
        os.kill(second, signal.SIGKILL)
    assert driver.wait(120) == 0, driver.said
    assert all(f"worker {killed} died" in driver.said for killed in (first, second)[: 1 + both])
    assert "Traceback" not in driver.said
    result = json.loads((run / "result.json").read_text())
    assert result["theta_sha256"] == long_hash
    assert result["steps_recomputed"] == 0, "no step is lost with a worker"
    shards = result["shards_by_worker"]
    assert {str(first), str(second)} <= set(shards)
    assert len(shards) > 2 or not both, "nobody of those who began was left to end it"
    assert sum(shards.values()) == 150 * 4, "each shard is counted once"
    assert result["transport"]["by"] == "lines"
    assert_metrics_are_complete(run, 150)


def test_a_preempted_run_keeps_the_step_it_was_at(
    start_cli: Callable[..., Any], long_job: Path, tmp_path: Path, wait_until: Callable[..., Any],
    cli: Callable[..., Any],
) -> None:  # fmt: skip
    """SIGTERM in training: a checkpoint between those of the schedule, and nothing computed twice."""
    run = tmp_path / "run"
    began = start_cli("train", long_job, "--run-dir", run, *ENDLESS)
    wait_until(lambda: (run / "metrics.parquet").exists(), 60, "the first metrics")
    began.send_signal(signal.SIGTERM)
    assert began.wait(60) == 143
    said = began.output.read_text()
    (kept,) = (run / "checkpoints").glob("step-*")
    step = int(kept.name.removeprefix("step-"))
    assert step > 0
    assert f"error: ended by SIGTERM; step {step} is kept; go on with `metadist train --resume {run}`" in said
    ended = cli("train", "--resume", run, f"outer.steps={step + 20}")
    assert ended.code == 0, ended
    result = json.loads((run / "result.json").read_text())
    assert result["theta_sha256"] == calm_hash(cli, long_job, step + 20, tmp_path / "calm")
    assert result["steps_recomputed"] == 0
    assert_metrics_are_complete(run, step + 20)


def test_a_validation_is_not_broken_off(
    tiny: Callable[..., Any], tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of one: the run ends behind it, and gone on with it has the same best state."""
    from metadist.runtime.in_process import InProcess
    from metadist.runtime.preemption import Preempted

    real = InProcess.judge

    def judge(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    run = tmp_path / "run"
    monkeypatch.setattr(InProcess, "judge", judge)
    with pytest.raises(Preempted, match="step 6 is kept"):
        train(tiny(), "tiny", run)
    monkeypatch.undo()
    result = resume(run, []).result
    assert result["best"] == tiny_run.result["best"]
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    told = pq.read_table(run / "metrics.parquet").column("val_accuracy").to_pylist()
    assert [step + 1 for step, value in enumerate(told) if value is not None] == [6, 12]


@pytest.mark.chaos
@pytest.mark.own_cluster
def test_a_preempted_driver_with_workers(
    start_cli: Callable[..., Any], long_job: Path, tmp_path: Path, wait_until: Callable[..., Any],
    cli: Callable[..., Any],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    on_ray = ("cluster.workers=2", "cluster.address=local")
    began = start_cli("train", long_job, "--run-dir", run, *ENDLESS, *on_ray)
    wait_until(lambda: (run / "metrics.parquet").exists(), 90, "the first metrics")
    began.send_signal(signal.SIGTERM)
    assert began.wait(60) == 143
    said = began.output.read_text()
    (kept,) = (run / "checkpoints").glob("step-*")
    assert f"{kept.name.replace('-', ' ')} is kept" in said
    steps = int(kept.name.removeprefix("step-")) + 20
    result = resume(run, ["cluster.workers=0", f"outer.steps={steps}"]).result
    assert result["theta_sha256"] == calm_hash(cli, long_job, steps, tmp_path / "calm")
    assert_metrics_are_complete(run, steps)


@pytest.mark.parametrize(
    "busy",
    [
        pytest.param("while True: time.sleep(60)", id="waiting"),
        pytest.param("hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)", id="in-code-that-no-handler-interrupts"),
    ],
)
def test_a_process_that_cannot_keep_its_state_ends_all_the_same(busy: str) -> None:
    """After the grace period, with what it is doing undone, whatever that is."""
    told = (
        "import hashlib, time\nfrom metadist.runtime.preemption import noticed\n"
        f"with noticed(0.5):\n    print('ready', flush=True)\n    {busy}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "no checkpoint within the 0.5 s after SIGTERM" in said


def test_the_clock_of_the_grace_period_stops_with_its_block() -> None:
    """A run that kept its state in time is not ended behind it; the next one has a clock of its own."""
    from metadist.runtime.preemption import Preempted, asked, check, noticed

    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    for _ in range(2):
        with noticed(0.2):
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted):
                check()
        assert not asked()
    time.sleep(0.3)
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
    assert "preemption" not in [thread.name for thread in threading.enumerate()]
