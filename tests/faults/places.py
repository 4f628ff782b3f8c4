"""Where a run's processes are: under the driver on this machine, or on the hosts of a lab. Found from outside."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "cluster" / "lab"))

import hosts as lab_of  # noqa: E402

COMMAND = [sys.executable, "-c", "from metadist.cli import main; main()"]


def environment() -> dict[str, str]:
    """This process's own, without what it knows of other clusters, and with this checkout first."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))}


class Here:
    """A driver with a cluster of its own, which ends with it."""

    address = "local"

    def start(self, words: Sequence[object], output: Path) -> "Driver":
        return Driver([*COMMAND, *map(str, words)], environment(), output, inside=False)

    def find(self, driver: "Driver", name: str) -> list[int]:
        """Process ids of the run whose command lines begin with a name."""
        return [pid for pid, line in descendants(driver.process.pid).items() if line.startswith(name)]


class InLab:
    """A driver on one of a lab's hosts."""

    def __init__(self, lab: lab_of.Lab, host: str = "host-0") -> None:
        self.lab, self.host, self.address = lab, host, lab.address

    def start(self, words: Sequence[object], output: Path) -> "Driver":
        command = lab_of.command(self.lab, self.host, [*COMMAND, *map(str, words)])
        return Driver(command, {**environment(), **self.lab.environment}, output, inside=True)

    def find(self, driver: "Driver", name: str) -> list[int]:
        return [pid for host in self.up() for pid in self.on(host, name)]

    def on(self, host: str, name: str) -> list[int]:
        """Process ids, in this machine's table, on one host."""
        return [pid for pid, line in lab_of.processes(self.lab, host).items() if line.startswith(name)]

    def up(self) -> list[str]:
        return [name for name, host in self.lab.hosts.items() if lab_of.alive(host.pid)]


class OnNodes:
    """A driver on a cluster of several Ray nodes of this machine, which share its address."""

    def __init__(self, folder: Path, port: int, client_port: int) -> None:
        self.folder, self.address, self.outside = folder, f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}"
        self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.temporary = tempfile.mkdtemp(prefix="mdray")  # short: Ray makes sockets in it
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false",
            "--num-cpus=0", f"--temp-dir={self.temporary}",
        )  # fmt: skip

    def add(self, cpus: int, mark: str) -> "subprocess.Popen[bytes]":
        """One node more; its mark is a custom resource, one for each CPU."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}", f'--resources={{"{mark}": {cpus}}}')

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words, "--node-ip-address=127.0.0.1",
            "--num-gpus=0", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        log = self.folder / f"node-{len(self.nodes)}.txt"
        with log.open("w") as file:
            node = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment() | self.auth, start_new_session=True
            )
        self.nodes.append(node)
        until = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return node

    def remove(self, node: "subprocess.Popen[bytes]") -> None:
        """End a node as a power cut would."""
        if node in self.nodes:
            self.nodes.remove(node)
            end(node)

    def on(self, node: "subprocess.Popen[bytes]", name: str) -> list[int]:
        """Process ids on one node whose command lines begin with a name."""
        return [pid for pid, line in descendants(node.pid).items() if line.startswith(name)]

    def start(self, words: Sequence[object], output: Path) -> "Driver":
        return Driver([*COMMAND, *map(str, words)], environment() | self.auth, output, inside=False)

    def down(self) -> None:
        for node in reversed(self.nodes):
            end(node)
        shutil.rmtree(self.temporary, ignore_errors=True)


class Driver:
    """`metadist train` as a process; its output is in a file."""

    def __init__(self, command: Sequence[str], env: dict[str, str], output: Path, *, inside: bool) -> None:
        self.output, self._inside = output, inside
        with output.open("a") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
            )

    @property
    def pid(self) -> int | None:
        """Of the driver itself: in a lab it is a child of what entered the host."""
        if not self._inside:
            return self.process.pid
        return next(iter(lab_of.children(self.process.pid)), None)

    @property
    def said(self) -> str:
        return self.output.read_text()

    def signal(self, number: signal.Signals) -> None:
        # What entered the host stops when its child is stopped, and has to be continued with it.
        pids = {self.pid, self.process.pid} if number == signal.SIGCONT else {self.pid}
        for pid in pids - {None}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """SIGKILL to it and all that it started."""
        end(self.process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process and all that it started, by process id."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(20)


def descendants(pid: int) -> dict[int, str]:
    """Process id to command line of what a process started, and what that started."""
    found: dict[int, str] = {}
    for child in lab_of.children(pid):
        with contextlib.suppress(OSError):
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        found |= descendants(child)
    return found


def seconds_computed(pid: int) -> float:
    """CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
