"""A Ray head with a dashboard, as jobs are submitted to."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


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
