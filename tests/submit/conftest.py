"""A Ray head with its dashboard, started once for all tests that submit; an S3-compatible server; the entry point."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadist.config import Source
from metadist.data.sources import prepare
from metadist.submit.package import stage


class Head:
    """A Ray head with a dashboard, and what it writes. It can be killed and started again on the same disk."""

    def __init__(self, disk: Path, port: int, dashboard: int, environment: dict[str, str]) -> None:
        self.disk, self.port, self.address = disk, port, f"http://127.0.0.1:{dashboard}"
        self.cache, self.home = disk / "cache", disk / "home"
        self.home.mkdir(parents=True)
        self.environment = {**os.environ, "HOME": str(self.home), "METADIST_CACHE": str(self.cache), **environment}
        self.process: subprocess.Popen[bytes] | None = None
        self.temporary = ""

    def start(self) -> None:
        self.temporary = tempfile.mkdtemp(prefix="mdray")  # short: Ray makes sockets in it
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={self.port}",
            "--node-ip-address=127.0.0.1", "--num-cpus=3", "--num-gpus=0", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.address.rpartition(':')[2]}",
            f"--object-store-memory={200 * 2**20}", f"--temp-dir={self.temporary}", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        log = Path(self.temporary) / "head.txt"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        until = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)

    def kill(self, find_processes: Callable[[int, str], list[int]]) -> None:
        """All of its processes at once, and what they had in memory."""
        if self.process is not None:
            for pid in [self.process.pid, *find_processes(self.process.pid, "")]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(20)
            self.process = None
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def new_head(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], one_cache: Path,
    find_processes: Callable[[int, str], list[int]],
) -> Iterator[Callable[..., Head]]:  # fmt: skip
    """Starts heads with a disk each; the data set is built there already."""
    heads: list[Head] = []

    def start(**environment: str) -> Head:
        prepare(Source(name="glyphs"))
        head = Head(tmp_path_factory.mktemp("head"), free_port(), free_port(), environment)
        shutil.copytree(one_cache, head.cache, ignore=lambda _, names: [n for n in names if not n.endswith(".arrow")])
        heads.append(head)
        head.start()
        return head

    yield start
    for head in heads:
        head.kill(find_processes)


@pytest.fixture(scope="session")
def head(new_head: Callable[..., Head]) -> Head:
    """The one of all tests that leave it as it is."""
    return new_head()


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """A folder with the package as it travels, on whose path `metadist.jobs` can be imported."""
    (tmp_path / "sent").mkdir()
    package, _ = stage(tmp_path / "sent", None)
    return package.parent


@pytest.fixture(scope="session")
def bucket(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a folder in a bucket of an S3-compatible server on loopback."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("needs moto, an S3-compatible server")
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{port}/results", method="PUT"), timeout=5
                )
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield f"s3://results/runs?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def keys() -> dict[str, str]:
    """What whoever reads or writes the bucket has in his environment."""
    return {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
