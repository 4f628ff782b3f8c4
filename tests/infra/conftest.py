"""The servers that stand beside a run, started as infra/README.md says, ended by process id."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "infra" / "local.py"


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


@pytest.fixture(scope="session")
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
