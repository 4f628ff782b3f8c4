"""On a cluster that is not its own a run's aggregator outlives the driver, and the next driver goes on with it."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import metadist
from metadist.run import resume
from metadist.runtime.run_folder import RunFolder, run_name

pytestmark = pytest.mark.cluster


@pytest.fixture
def killed(
    start_cli: Callable[..., Any], tiny_job: Path, long_overrides: tuple[str, ...], cluster: Any, tmp_path: Path,
    wait_until: Callable[..., Any],
) -> Callable[..., Path]:  # fmt: skip
    """A run on the cluster whose driver was killed behind its first metrics."""

    def make(*overrides: str) -> Path:
        run = tmp_path / "run"
        driver = start_cli(
            "train", tiny_job, *long_overrides, "cluster.workers=2", f"cluster.address={cluster.address}",
            "checkpoint.every=1000", *overrides, "--run-dir", run, joins=True,
        )  # fmt: skip
        wait_until(lambda: (run / "metrics.parquet").exists() or driver.poll() is not None, 90, "the first metrics")
        assert driver.poll() is None, driver.said
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        return run

    return make


def gone_on(run: Path, capfd: pytest.CaptureFixture[str], **changed: Any) -> tuple[dict[str, Any], str]:
    result = resume(run, [f"cluster.{key}={value}" for key, value in changed.items()]).result
    table = pq.read_table(run / "metrics.parquet")
    assert table.column("step").to_pylist() == list(range(1, 151)), "a row for every step, once"
    assert table.column("loss").null_count == 0
    assert json.loads((run / "result.json").read_text()) == result
    return result, capfd.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [pytest.param((), id="one"), pytest.param(("cluster.aggregators=2",), id="pieces", marks=pytest.mark.chaos)],
)
def test_the_next_driver_goes_on_where_the_last_one_died(
    keys: tuple[str, ...], killed: Callable[..., Path], long_hash: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without any checkpoint; not a step is taken again."""
    run = killed(*keys)
    assert not list((run / "checkpoints").glob("step-*"))
    result, said = gone_on(run, capfd)
    assert "the aggregator outlived its driver; going on from step" in said
    assert result["theta_sha256"] == long_hash
    assert result["steps_recomputed"] == 0
    assert sum(result["shards_by_worker"].values()) < 150 * 4, "those of the first driver are not among them"


@pytest.mark.chaos
def test_in_other_pieces_than_before_it_begins_at_the_checkpoint(
    killed: Callable[..., Path], long_hash: str, capfd: pytest.CaptureFixture[str], cluster: Any, find_processes: Any,
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    result, said = gone_on(killed(), capfd, aggregators=3)
    assert "outlived" not in said
    assert result["theta_sha256"] == long_hash
    assert result["steps_recomputed"] > 0
    wait_until(lambda: not find_processes(cluster.pid, "ray::Aggregator"), 30, "the end of the old one too")


@pytest.mark.chaos
def test_auto_goes_on_in_as_many_pieces_as_there_are(
    killed: Callable[..., Path], long_hash: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the last driver was, the rule may have been another."""
    result, said = gone_on(killed("cluster.aggregators=2"), capfd, aggregators="auto")
    assert "the aggregator outlived its driver; going on from step" in said
    assert result["theta_sha256"] == long_hash
    assert result["steps_recomputed"] == 0


@pytest.mark.chaos
def test_a_validation_that_died_with_the_driver_is_made_again(
    killed: Callable[..., Path], tiny: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """What a validation found is in a checkpoint or nowhere: the run goes back to before it."""
    run = killed("eval.every=2", "eval.val_episodes=2")
    kept = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
    steps = pq.read_table(run / "metrics.parquet").num_rows
    result, said = gone_on(run, capfd)
    assert ("outlived" in said) <= (steps - kept < 2)
    validated = pq.read_table(run / "metrics.parquet", columns=["step", "val_accuracy"]).to_pylist()
    assert [row["step"] for row in validated if row["val_accuracy"] is not None] == list(range(2, 151, 2))
    assert result["best"]


@pytest.mark.chaos
def test_nobody_comes(
    killed: Callable[..., Path], cluster: Any, find_processes: Any, wait_until: Callable[..., Any]
) -> None:
    killed("cluster.linger=3")
    wait_until(lambda: not find_processes(cluster.pid, "ray::Aggregator"), 30, "the end of the aggregator")


@pytest.mark.chaos
def test_the_code_goes_to_the_workers(
    start_cli: Callable[..., Any], tiny_job: Path, cluster: Any, tmp_path: Path, find_processes: Any,
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    """The package of the one who starts the run, whatever the hosts have; not where `cluster.ship` is off."""

    def modules(*overrides: str) -> list[str]:
        driver = start_cli(
            "train", tiny_job, "outer.steps=100000", "cluster.workers=1", f"cluster.address={cluster.address}",
            "cluster.linger=2", *overrides, "--run-dir", tmp_path / f"run{len(overrides)}", joins=True,
        )  # fmt: skip
        (pid,) = wait_until(lambda: find_processes(cluster.pid, "ray::Worker"), 90, "a worker")
        places = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        for name in ("ray::Worker", "ray::Aggregator"):
            wait_until(lambda name=name: not find_processes(cluster.pid, name), 30, f"the end of the {name}")
        found = next((place for place in places if place.startswith("PYTHONPATH=")), "=")
        return [path for path in found.partition("=")[2].split(":") if "py_modules" in path]

    (shipped,) = modules()
    there, here = Path(shipped) / "metadist", Path(metadist.__file__).parent
    assert {path.relative_to(there) for path in there.rglob("*.py")} == {
        path.relative_to(here) for path in here.rglob("*.py")
    }
    assert modules("cluster.ship=false") == []


def test_a_copied_folder_is_no_heir(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    """The original may be running: a run's name is that of its place as well."""
    name = run_name(tmp_path / "run")
    assert name != run_name(tmp_path / "run"), "a later run at the same place is another one"
    RunFolder.create(tmp_path / "run", tiny(), name).unlock()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    original, copy = RunFolder.open(tmp_path / "run"), RunFolder.open(tmp_path / "copy")
    assert original.name == name
    assert copy.name is None
    original.unlock()
    copy.unlock()
