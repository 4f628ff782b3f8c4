"""What is done to a run's processes, and what its metrics show of it."""

import itertools
import os
import signal
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


def longest_gap(run: Path, since: float, until: float = float("inf")) -> float:
    """Seconds between two steps of the surviving history: the longest that a span of unix time touches."""
    times = [row["time"] for row in read_metrics(run / "metrics.parquet")]
    gaps = [later - before for before, later in itertools.pairwise(times) if later > since and before < until]
    return max(gaps, default=0.0)
