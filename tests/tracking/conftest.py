"""Run folders as the training process writes them, and the MLflow they are copied to."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from metadist.config import Config, resolve, to_yaml

RESULT: dict[str, Any] = {
    "theta_sha256": "ab" * 32,
    "meta_steps": 20,
    "steps_recomputed": 1,
    "workers": 2,
    "shards_by_worker": {"11": 20, "12": 20},
    "device": "cpu",
    "tasks_per_second": 123.4,
    "wall_seconds": 71.2,
    "test": {
        "accuracy": 0.95, "ci95": 0.004, "episodes": 1000, "ways": 5, "shots": 1, "queries": 1, "transductive": True,
    },
    "untrained": {"accuracy": 0.55, "ci95": 0.01},
    "also": [
        {
            "accuracy": 0.91, "ci95": 0.002, "episodes": 500, "ways": 5, "shots": 1, "queries": 15,
            "transductive": False,
        }
    ],
    "reproducible": True,
    "best": {"step": 15, "accuracy": 0.96, "ci95": 0.01},
}  # fmt: skip


class Run:
    """A run folder under the hands of a test."""

    def __init__(self, folder: Path, uri: str = "auto", workers: int = 2) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.configure(uri, workers)

    def configure(self, uri: str, workers: int = 2) -> None:
        self.config: Config = resolve(
            Config().with_values(tracking={"uri": uri}, cluster={"workers": workers}, engine={"device": "cpu"})
        )
        (self.folder / "config.yaml").write_text(to_yaml(self.config))

    def train(self, first: int, last: int, seed: int = 0) -> None:
        """Rows `first` to `last` on top of those before `first`; every fifth one has a validation."""
        steps = list(range(first, last + 1))
        noise = np.random.default_rng(seed)
        columns = {
            "step": pa.array(steps, pa.int64()),
            "time": [1.7e9 + step + seed / 7 for step in steps],
            "loss": [1.0 / step for step in steps],
            "tasks_per_second": noise.random(len(steps)),
            "val_accuracy": pa.array([step / 100 if step % 5 == 0 else None for step in steps], pa.float64()),
            "something_new": pa.array([float("nan") if step == 2 else 2.0 * step for step in steps], pa.float64()),
        }
        table = pa.table(columns)
        if first > 1:
            table = pa.concat_tables([self.table().slice(0, first - 1), table])
        pq.write_table(table, self.folder / ".metrics.parquet")
        (self.folder / ".metrics.parquet").replace(self.folder / "metrics.parquet")

    def table(self) -> pa.Table:
        return pq.read_table(self.folder / "metrics.parquet")

    def end(self, **changes: Any) -> None:
        save_file({"weight": np.arange(3, dtype=np.float32)}, self.folder / "theta.safetensors")
        (self.folder / "result.json").write_text(json.dumps(RESULT | changes))

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "tracking.json").read_text())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that share one database, because creating one takes seconds."""
    return tmp_path_factory.mktemp("tracking") / "runs"


@pytest.fixture
def result() -> dict[str, Any]:
    return RESULT


@pytest.fixture
def make_run() -> type[Run]:
    return Run


@pytest.fixture
def run(runs: Path, request: pytest.FixtureRequest) -> Run:
    return Run(runs / request.node.name)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded MLflow model puts its code on the import path; a test gives it back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
