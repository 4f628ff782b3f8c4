"""Several hosts on one machine: network namespaces with addresses, process tables and shared memory of their own.

A host is one process tree. Its root keeps Ray running on it, as a service manager would, so
that a raylet that gives up after a cut network joins again. To kill that root is to pull the
plug. Everything is found again through `lab.json` in the lab's folder, and ended by process id.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

PORT = 6379
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A host that does not answer is given up after some four seconds; by default after a minute."""


@dataclass
class Host:
    """pid: of its root, in this machine's process table; link: the machine's end of its cable."""

    name: str
    address: str
    link: str
    pid: int


@dataclass
class Lab:
    """subnet: the first three bytes of all addresses; hosts[0] is the head."""

    folder: str
    subnet: str
    bridge: str
    cpus: int
    environment: dict[str, str]
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the cluster, for a driver on one of the hosts."""
        return f"{self.subnet}.1:{PORT}"

    def save(self) -> None:
        path = Path(self.folder) / "lab.json"
        new = path.with_suffix(".new")
        new.touch(mode=0o600)  # Ray's token is in it
        new.write_text(json.dumps(asdict(self), indent=2))
        new.replace(path)


class LabError(Exception):
    """Told in one line."""


def missing() -> str:
    """Why there can be no lab here; nothing if there can."""
    if os.geteuid() != 0:
        return "a lab needs root: network namespaces are made in it"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"a lab needs the command {tool} (iproute2, util-linux)"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"a lab needs namespaces: {made.stderr.decode().strip()}"


def up(folder: Path, hosts: int, cpus: int = 2, environment: Mapping[str, str] | None = None) -> Lab:
    """Bring up hosts, the first of them with Ray's head, and wait until all have joined."""
    reason = missing()
    if reason:
        raise LabError(reason)
    if (folder / "lab.json").exists():
        raise LabError(f"{folder}: holds a lab; `down` it first, or name another --folder")
    lab = new_lab(folder, cpus, environment or {})
    _ip("link", "add", lab.bridge, "type", "bridge")
    try:
        _ip("link", "set", lab.bridge, "up")
        for host in range(hosts):
            add(lab, f"host-{host}")
        wait_for(lab, hosts)
    except BaseException:
        down(lab)
        raise
    return lab


def new_lab(folder: Path, cpus: int, environment: Mapping[str, str]) -> Lab:
    """A lab without hosts, with a token of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    number = next(n for n in range(256) if not Path(f"/sys/class/net/mdlab{n}").exists())
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **QUICK, **environment}
    return Lab(str(folder), f"10.77.{number}", f"mdlab{number}", cpus, told)


def open_lab(folder: Path) -> Lab:
    """The lab that `up` left in a folder."""
    try:
        told = json.loads((folder / "lab.json").read_text())
    except FileNotFoundError:
        raise LabError(f"{folder}: holds no lab; `up` makes one") from None
    told["hosts"] = {name: Host(**host) for name, host in told["hosts"].items()}
    return Lab(**told)


def add(lab: Lab, name: str) -> Host:
    """One host more, or one that was killed again."""
    if name in lab.hosts and alive(lab.hosts[name].pid):
        raise LabError(f"{name}: is up already")
    number = int(name.rpartition("-")[2])
    address, link = f"{lab.subnet}.{number + 1}", f"{lab.bridge}h{number}"
    folder = Path(lab.folder) / name
    folder.mkdir(exist_ok=True)
    own = ("--net", "--mount", "--mount-proc", "--pid", "--uts")
    root = subprocess.Popen(
        ["unshare", *own, "--fork", "--kill-child", "sh", "-c", _life(lab, name, address, head=number == 0)],
        stdin=subprocess.DEVNULL,
        stdout=(folder / "log.txt").open("a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, **lab.environment},
        start_new_session=True,
    )
    lab.hosts[name] = Host(name, address, link, root.pid)
    lab.save()
    ours = os.readlink("/proc/self/ns/net")
    _until(lambda: os.readlink(f"/proc/{root.pid}/ns/net") != ours, 5, f"{name}: no namespace")
    if Path(f"/sys/class/net/{link}").exists():  # the kernel takes its time over the cable of a host that was killed
        with contextlib.suppress(LabError):
            _ip("link", "delete", link)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(root.pid))
    _ip("link", "set", link, "master", lab.bridge, "up")
    return lab.hosts[name]


def _life(lab: Lab, name: str, address: str, *, head: bool) -> str:
    """What a host's root does: its own mounts and address, then Ray, again and again."""
    join = ["--head", f"--port={PORT}", "--include-dashboard=false"] if head else [f"--address={lab.address}"]
    ray = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *join, f"--node-ip-address={address}",
        f"--num-cpus={lab.cpus}", "--num-gpus=0", f"--object-store-memory={256 * 2**20}", "--disable-usage-stats",
        f"--resources={json.dumps({name: 1})}",
    ]  # fmt: skip
    return "\n".join(
        [
            "set -e",
            "mount -t tmpfs lab /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs lab /tmp/ray",
            f"hostname {name}; ip link set lo up",
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done",
            f"ip address add {address}/24 dev eth0; ip link set eth0 up",
            f"while true; do {shlex.join(ray)} || true; sleep 1; done",
        ]
    )


def command(lab: Lab, name: str, words: Sequence[str]) -> list[str]:
    """What to start so that some words run on a host; its environment is `lab.environment`."""
    root = _up(lab, name)
    (inside,) = children(root.pid)
    return ["nsenter", "--target", str(inside), "--net", "--mount", "--pid", "--uts", "--wd=" + os.getcwd(), *words]


def run(lab: Lab, name: str, words: Sequence[str], **how: object) -> subprocess.CompletedProcess[str]:
    """Run some words on a host, to their end."""
    told = {**os.environ, **lab.environment}
    return subprocess.run(command(lab, name, words), env=told, text=True, check=False, **how)  # type: ignore[call-overload, no-any-return]


def wait_for(lab: Lab, hosts: int, seconds: float = 90) -> None:
    """Until so many hosts are members of the cluster."""
    asked = (
        "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False);"
        "print('members', sum(node['Alive'] for node in ray.nodes()))"
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        told = run(lab, "host-0", [sys.executable, "-c", asked], capture_output=True)
        if f"members {hosts}" in told.stdout:
            return
        time.sleep(0.5)
    raise LabError(f"not all of {hosts} hosts joined within {seconds:g} s; see {lab.folder}/host-*/log.txt")


def kill(lab: Lab, name: str) -> None:
    """Pull the plug: all processes of a host end at once, and its cable is gone."""
    root = _up(lab, name)
    os.kill(root.pid, signal.SIGKILL)
    _reap(root.pid)


def cut(lab: Lab, name: str) -> None:
    """Unplug the cable: nothing is refused, nothing answers."""
    _ip("link", "set", _up(lab, name).link, "down")


def heal(lab: Lab, name: str) -> None:
    """Plug it in again."""
    _ip("link", "set", _up(lab, name).link, "up")


def freeze(pid: int) -> None:
    """Stop a process without ending it."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let it go on."""
    os.kill(pid, signal.SIGCONT)


def down(lab: Lab) -> None:
    """End every host, by process id, and take the network away."""
    for host in lab.hosts.values():
        if alive(host.pid):
            os.kill(host.pid, signal.SIGKILL)
            _reap(host.pid)
    if Path(f"/sys/class/net/{lab.bridge}").exists():
        _ip("link", "delete", lab.bridge)
    for host in lab.hosts.values():
        if Path(f"/sys/class/net/{host.link}").exists():
            _ip("link", "delete", host.link)
    (Path(lab.folder) / "lab.json").unlink(missing_ok=True)


def processes(lab: Lab, name: str) -> dict[int, str]:
    """Process id, in this machine's table, to command line, of everything on a host."""
    found = {}
    for pid in _descendants(_up(lab, name).pid):
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except FileNotFoundError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from _descendants(child)


def _up(lab: Lab, name: str) -> Host:
    if name not in lab.hosts or not alive(lab.hosts[name].pid):
        here = [host.name for host in lab.hosts.values() if alive(host.pid)]
        raise LabError(f"{name}: is not up; up are {', '.join(here) or 'none'}")
    return lab.hosts[name]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"ip {shlex.join(words)}: {done.stderr.strip()}")


def _reap(pid: int) -> None:
    _until(lambda: not alive(pid), 10, f"process {pid} does not end")
    with contextlib.suppress(ChildProcessError):  # it may be another process's child
        os.waitpid(pid, os.WNOHANG)


def _until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise LabError(otherwise)
        time.sleep(0.02)
