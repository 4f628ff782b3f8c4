"""SIGKILL of the driver at the points of its protocol: gone on with, it ends in the same bits."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadist.runtime.journal import read_metrics

HARNESS = Path(__file__).with_name("killed_driver.py")


@pytest.fixture
def killed(tiny_job: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a job that is killed before these acts, one process each; what they said, one line each."""

    def run(folders: dict[Path, list[int]], *overrides: str) -> list[str]:
        from metadist.config import load, to_yaml

        job = tmp_path / "killed.yaml"
        job.write_text(to_yaml(load(tiny_job, overrides)))
        environment = {name: value for name, value in os.environ.items() if name != "RAY_max_direct_call_object_size"}
        runs = [f"{run}:{','.join(map(str, numbers))}" for run, numbers in folders.items()]
        done = subprocess.run(
            [sys.executable, HARNESS, job, *runs],
            capture_output=True, text=True, env=environment, check=False, timeout=600,
        )  # fmt: skip
        said = [line for line in done.stdout.splitlines() if line.startswith(("killed", "ended"))]
        assert done.returncode == 0, (said, done.stdout[-2000:], done.stderr[-2000:])
        return said

    return run


def assert_same(run: Path, said: list[str], undisturbed: Any) -> None:
    """Bits, best state and history are those of the run that nobody killed."""
    assert said[-1] == f"ended {undisturbed.result['theta_sha256']}"
    names = ("step", "loss", "accuracy", "grad_norm", "val_accuracy")
    ours, theirs = (
        [[row.get(name) for name in names] for row in read_metrics(folder / "metrics.parquet")]
        for folder in (run, undisturbed.folder)
    )
    assert ours == theirs
    for name in ("theta.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert not [path for path in run.rglob(".*") if path.name != ".lock"], "nothing half written is left"


def test_killed_again_and_again(killed: Any, tiny_run: Any, tmp_path: Path) -> None:
    """Each process comes some acts further, until one reaches the end."""
    drawn = random.Random(0)
    numbers = [drawn.randint(15, 50) for _ in range(30)] + [10**6]
    said = killed({tmp_path / "run": numbers})
    assert len(said) >= 4
    assert_same(tmp_path / "run", said, tiny_run)


@pytest.mark.chaos
@pytest.mark.parametrize("tens", range(0, 160, 10))
def test_killed_before_each_act(tens: int, killed: Any, tiny_run: Any, tmp_path: Path) -> None:
    """One run for each act: killed before it, and then gone on with to the end."""
    runs = {tmp_path / f"run-{act}": [act, 10**6] for act in range(tens + 1, tens + 11)}
    said = killed(runs)
    assert said.count(f"ended {tiny_run.result['theta_sha256']}") == len(runs)
    if tens == 0:
        assert len(said) == 2 * len(runs), "each one was killed"
    for run in runs:
        assert_same(run, said, tiny_run)


@pytest.mark.cluster
@pytest.mark.chaos
def test_killed_with_workers(killed: Any, cluster: Any, tiny_run: Any, tmp_path: Path) -> None:
    """The same, with the acts of a driver whose workers and aggregator are other processes."""
    drawn = random.Random(1)
    numbers = [drawn.randint(5, 40) for _ in range(7)] + [10**6]
    said = killed({tmp_path / "run": numbers}, "cluster.workers=2", f"cluster.address={cluster.address}")
    assert len(said) >= 4
    assert_same(tmp_path / "run", said, tiny_run)
