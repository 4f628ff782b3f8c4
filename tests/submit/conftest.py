"""A Ray head with its dashboard, started once for all tests that submit; an S3-compatible server; the entry point."""

import importlib.util
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_head import Head

from metadist.config import Source
from metadist.data.sources import prepare
from metadist.submit.package import stage


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
