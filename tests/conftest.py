"""One cache and at most one Ray cluster for all tests; a tiny run that many of them look at."""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from metadist.config import Config, apply_overrides, to_yaml, validate
from metadist.engine import cores

TINY: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "glyphs"},
    "task": {"ways": 3, "shots": 1, "queries": 1, "meta_batch": 8, "shard": 2},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "algorithm": {"name": "maml", "inner_lr": 0.4, "inner_steps": 1},
    "outer": {"steps": 12, "lr": 1e-3},
    "engine": {"device": "cpu"},
    "cluster": {"workers": 0},
    "checkpoint": {"every": 4},
    "eval": {"every": 6, "val_episodes": 20, "episodes": 20},
    "tracking": {"uri": "off"},
}
"""Four shards a step, half a second in one process; checkpoints 4, 6, 8 and 12 are left."""

LONG = ("outer.steps=150", "checkpoint.every=10", "eval.every=0", "eval.test=false")
"""Long enough to be killed in the middle."""

CLUSTER_CPUS, CLUSTER_GPUS = 3, 2

COMMAND = [sys.executable, "-c", "from metadist.cli import main; main()"]


CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Of both sides of the test run's cluster."""


def pytest_configure() -> None:
    """Ray reads its token once, when a test imports it; that may be long before one needs the cluster."""
    os.environ.update(CLUSTER_ENVIRONMENT)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast first: tests without a cluster, then those that share one, then those that start their own."""
    items.sort(key=lambda i: 2 if i.get_closest_marker("own_cluster") else bool(i.get_closest_marker("cluster")))


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where built data sets live, for this process and all that it starts."""
    if "METADIST_CACHE" in os.environ:
        yield Path(os.environ["METADIST_CACHE"])
        return
    base = tmp_path_factory.getbasetemp()
    # The processes of a test run have a folder each below that of the run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "metadist-cache"
    os.environ["METADIST_CACHE"] = str(folder)
    yield folder
    del os.environ["METADIST_CACHE"]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


# --- runs ----------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large buffers begin at 65 elements. A multiple of the widest vectors, as `BLOCK` is."""
    for module in ("layout", "exact", "outer"):
        monkeypatch.setattr(f"metadist.engine.{module}.BLOCK", 64)
    # Blocks in threads, also where there is one core.
    monkeypatch.setattr(cores, "_cores", lambda: 3)
    monkeypatch.setattr(cores, "_threads", functools.cache(lambda: ThreadPoolExecutor(2)))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """The config of a tiny run with overrides."""

    def make(*overrides: str) -> Config:
        return validate(apply_overrides(TINY, overrides), "tiny")

    return make


@pytest.fixture(scope="session")
def long_overrides() -> tuple[str, ...]:
    return LONG


@pytest.fixture
def tiny_job(tmp_path: Path, tiny: Callable[..., Config]) -> Path:
    """The tiny run as a job file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny()))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Config]) -> Any:
    """The finished tiny run, computed in this process. Look only; `tiny_copy` is for changing."""
    from metadist.run import train

    return train(tiny(), "tiny", tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def long_hash(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Config]) -> str:
    """θ of the long run that nobody disturbed."""
    from metadist.run import train

    return train(tiny(*LONG), "long", tmp_path_factory.mktemp("long") / "run").result["theta_sha256"]


@pytest.fixture
def tiny_copy(tiny_run: Any, tmp_path: Path) -> Path:
    """A finished run to change."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "copy"))


@pytest.fixture
def half_run(tiny_copy: Path) -> Path:
    """The tiny run as a kill behind step 8 would have left it."""
    for name in ("result.json", "theta.safetensors", "best.safetensors"):
        (tiny_copy / name).unlink()
    shutil.rmtree(tiny_copy / "checkpoints" / "step-12")
    return tiny_copy


# --- the command line ------------------------------------------------------------


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs the console script's entry point in this process; what is not an exit code escapes as it would there."""
    from metadist.cli import main

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["metadist", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Ended]) -> Callable[..., Ended]:
    """Runs a command that must end in one line that has all of `say`."""

    def run(*words: object, say: tuple[str, ...] = (), code: int = 2) -> Ended:
        ended = cli(*words)
        told = ended.err.strip().splitlines()
        assert ended.code == code, ended
        assert len(told) == 1, ended.err
        assert told[0].startswith("error: ")
        for word in say:
            assert word in told[0]
        return ended

    return run


class Process(subprocess.Popen):
    """A command in a process of its own, its output in a file."""

    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture
def start_cli(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts the real command in a folder of its own, without this process's cluster or, where it `joins`, with the
    token for it; ended by process id."""
    started: list[Process] = []
    home = tmp_path / "home"
    home.mkdir()

    def start(*words: object, joins: bool = False) -> Process:
        kept = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN") if joins else ()
        environment = {n: value for n, value in os.environ.items() if n in kept or not n.startswith("RAY_")}
        output = tmp_path / f"output-{len(started)}.txt"
        with output.open("w") as file:
            process = Process(
                [*COMMAND, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env={**environment, "HOME": str(home)},
                start_new_session=True,
            )
        process.output = output
        started.append(process)
        return process

    yield start
    for process in started:
        end_with_descendants(process)


# --- processes -------------------------------------------------------------------


def descendants(pid: int) -> dict[int, str]:
    """Process id → command line of all that `pid` started and that they started."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            with contextlib.suppress(OSError):
                found[child] = (Path("/proc") / str(child) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            waiting.append(child)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_with_descendants(process: "subprocess.Popen[bytes]") -> None:
    """End a process and everything that it started, by process id."""
    started = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for pid in [process.pid, *started] if process.poll() is None else started:
        if alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="session")
def end_process() -> Callable[["subprocess.Popen[bytes]"], None]:
    """Ends a process and everything that it started."""
    return end_with_descendants


@pytest.fixture(scope="session")
def find_processes() -> Callable[[int, str], list[int]]:
    """Process ids below a process whose command line begins with a name, such as an actor's."""

    def find(pid: int, name: str) -> list[int]:
        return sorted(child for child, command in descendants(pid).items() if command.startswith(name))

    return find


@pytest.fixture(scope="session")
def is_alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits until a condition holds, and returns its value."""

    def wait(condition: Callable[[], Any], seconds: float = 60.0, what: str = "the condition") -> Any:
        until = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < until, f"{what} did not come within {seconds:g} s"
            time.sleep(0.02)
        return found

    return wait


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port on which nothing listens."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return find


# --- the cluster -----------------------------------------------------------------


class SharedCluster(NamedTuple):
    """The test run's Ray cluster."""

    address: str
    pid: int


@pytest.fixture(scope="session")
def cluster_process(free_port: Callable[[], int]) -> Iterator[SharedCluster]:
    """A Ray head of the test run's own, three logical CPUs and two logical GPUs, with a token."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="mdray")  # short: Ray makes sockets in it, and their paths are limited
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", f"--num-cpus={CLUSTER_CPUS}", f"--num-gpus={CLUSTER_GPUS}",
        "--include-dashboard=false", f"--object-store-memory={256 * 2**20}", f"--temp-dir={folder}",
        "--disable-usage-stats", "--dashboard-agent-listen-port=0",  # whose default is that of a head on this machine
    ]  # fmt: skip
    log = Path(folder) / "head.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield SharedCluster(f"127.0.0.1:{port}", process.pid)
    finally:
        end_with_descendants(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def connected(cluster_process: SharedCluster) -> Iterator[SharedCluster]:
    """The test run's cluster with this process connected, as `connect` does it, health check included."""
    from metadist.config import Cluster
    from metadist.runtime.cluster import connect, disconnect

    connect(Cluster(address=cluster_process.address))
    yield cluster_process
    disconnect()


@pytest.fixture
def cluster(connected: SharedCluster, monkeypatch: pytest.MonkeyPatch) -> SharedCluster:
    """The same; that it answers was asked once, and is not asked again before every run."""
    import metadist.runtime.cluster

    monkeypatch.setattr(metadist.runtime.cluster, "_expect_answer", lambda cluster: None)
    return connected
