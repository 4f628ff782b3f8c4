"""A search of eight trials goes to an MLflow server whose database is a real PostgreSQL.

The server is started as infra/README.md says, and ended by process id.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from metadist.config import Config
from metadist.search.run import search

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "infra" / "local.py"

SEARCH: dict[str, Any] = {
    "space": {"algorithm.inner_lr": {"grid": [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8]}},
    "searcher": "grid",
    "scheduler": "fifo",
    "trials": 8,
    "selection": 20,
    "fresh": 20,
}
"""The baseline and seven more."""


class TrackingServer(NamedTuple):
    """Where it answers, and the folder that it keeps."""

    uri: str
    folder: Path


def missing() -> str:
    """What a tracking server with a database of its own lacks here; nothing where it can run."""
    local = importlib.util.spec_from_file_location("local", COMMAND)
    assert local is not None and local.loader is not None
    module = importlib.util.module_from_spec(local)
    local.loader.exec_module(module)
    if module.binaries() is None:
        return "needs postgresql (Debian's package)"
    return "" if importlib.util.find_spec("psycopg2") else "needs psycopg2-binary"


@pytest.fixture(scope="module")
def tracking_server(free_port: Callable[[], int]) -> Iterator[TrackingServer]:
    """`python infra/local.py FOLDER`: an MLflow server on a PostgreSQL of its own."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="metadist-tracking"))
    folder.chmod(0o755)  # PostgreSQL runs as another user than root
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with subprocess.Popen(
        [sys.executable, COMMAND, folder, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            assert "tracking.uri=" in said, said + server.stdout.read()
            yield TrackingServer(f"http://127.0.0.1:{port}", folder)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(45)
            shutil.rmtree(folder)


def rows(server: TrackingServer, query: str) -> list[tuple[Any, ...]]:
    """What the database itself says."""
    import psycopg2

    folder = server.folder / "postgresql"
    port = (folder / "data" / "postmaster.pid").read_text().splitlines()[3]
    password = (folder / "password").read_text()
    with (
        psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", password=password, dbname="postgres") as there,
        there.cursor() as cursor,
    ):
        cursor.execute(query)
        found: list[tuple[Any, ...]] = cursor.fetchall()
    there.close()
    return found


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_search_is_in_the_database(
    tiny: Callable[..., Config], tmp_path: Path, tracking_server: TrackingServer, cluster: Any
) -> None:
    from mlflow import MlflowClient

    base = tiny("outer.steps=9", "eval.every=3", f"tracking.uri={tracking_server.uri}").model_dump(mode="json")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"search": SEARCH, **base}))
    folder = search(tmp_path / "job.yaml", [f"cluster.address={cluster.address}"], tmp_path / "search")

    told = json.loads((folder / "tracking.json").read_text())
    client = MlflowClient(tracking_uri=tracking_server.uri)
    whole = client.get_run(told["run_id"])
    assert whole.info.status == "FINISHED"
    assert whole.data.metrics["trials"] == 8
    children = client.search_runs([told["experiment_id"]], f"tags.`mlflow.parentRunId` = '{told['run_id']}'")
    assert len(children) == 8
    assert {child.info.status for child in children} == {"FINISHED"}
    rates = {float(child.data.params["algorithm.inner_lr"]) for child in children}
    assert rates == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}
    for child in children:
        assert [point.step for point in client.get_metric_history(child.info.run_id, "val_accuracy")] == [3, 6, 9]
    winner = json.loads((folder / "search.json").read_text())["winner"]
    assert whole.data.tags["metadist.winner"] == winner

    # The files of the search came through the server.
    client.download_artifacts(told["run_id"], "best.yaml", str(tmp_path))
    assert (tmp_path / "best.yaml").read_text() == (folder / "best.yaml").read_text()

    # And what the server says is what PostgreSQL holds.
    assert rows(tracking_server, "select status, count(*) from runs group by status") == [("FINISHED", 9)]
    assert rows(tracking_server, "select count(*) from metrics where key = 'val_accuracy'") == [(24,)]
