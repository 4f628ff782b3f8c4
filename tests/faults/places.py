"""Where a run's processes are: under the driver on this machine, or on the hosts of a lab. Found from outside."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """A driver on a cluster of several nodes of this machine, by Ray's own means for tests."""

    def __init__(self, token: str) -> None:
        from ray.cluster_utils import Cluster

        self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._before = {name: os.environ.get(name) for name in self.auth}
        os.environ.update(self.auth)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self.cluster.address
        self.added: list[Any] = []

    def add(self, cpus: int, mark: str) -> Any:
        """One node more; its mark is a custom resource, one for each CPU."""
        self.added.append(self.cluster.add_node(num_cpus=cpus, num_gpus=0, resources={mark: cpus}))
        return self.added[-1]

    def remove(self, node: Any) -> None:
        """End a node as a power cut would."""
        if node in self.added:
            self.added.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)

    def on(self, node: Any, name: str) -> list[int]:
        """Process ids on one node whose command lines begin with a name."""
        (raylet,) = node.all_processes["raylet"]
        return [pid for pid, line in descendants(raylet.process.pid).items() if line.startswith(name)]

    def start(self, words: Sequence[object], output: Path) -> "Driver":
        return Driver([*COMMAND, *map(str, words)], environment() | self.auth, output, inside=False)

    def down(self) -> None:
        self.cluster.shutdown()
        for name, value in self._before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


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
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self) -> None:
        """SIGKILL to it and all that it started."""
        started = [self.process.pid, *descendants(self.process.pid)]
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


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
