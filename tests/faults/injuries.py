"""What is done to a run's processes, and what its metrics show of it."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metadist.runtime.journal import read_metrics


def kill(*pids: int) -> None:
    """SIGKILL, one right after the other."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def living_workers(runtime: Any) -> list[int]:
    """Process ids of the workers that take part, the oldest first."""
    return [runtime.pool.pids[name] for name in runtime.pool.dispatcher.held]


@contextlib.contextmanager
def slowed(pid: int, share: float, period: float = 0.05) -> Iterator[None]:
    """Inside the block a process runs for a share of the time, stopped and continued by another one."""
    loop = (
        "import os, signal, time\n"
        "while True:\n"
        f"    os.kill({pid}, signal.SIGSTOP); time.sleep({period * (1 - share)})\n"
        f"    os.kill({pid}, signal.SIGCONT); time.sleep({period * share})\n"
    )
    other = subprocess.Popen([sys.executable, "-S", "-c", loop])
    try:
        yield
    finally:
        other.kill()
        other.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def longest_gap(run: Path, since: float, until: float = float("inf")) -> float:
    """Seconds between two steps of the surviving history: the longest that a span of unix time touches."""
    times = [row["time"] for row in read_metrics(run / "metrics.parquet")]
    gaps = [later - before for before, later in itertools.pairwise(times) if later > since and before < until]
    return max(gaps, default=0.0)
