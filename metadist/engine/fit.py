"""Whether a shard fits into memory; where it does not, which would.

A shard's memory grows by the same amount with every task. So two small ones, measured in a
process of their own (`memory.py`), tell of a large one.
"""

import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from metadist.config import Config
from metadist.errors import ConfigError, RunError

OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


class Need(NamedTuple):
    """Of a shard of so many tasks. bytes: at most, above those of the idle process; seconds: it takes; free: bytes that
    it could have had."""

    tasks: int
    bytes: int
    seconds: float
    free: int


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory was not there: Python's; torch's on a GPU; or a RuntimeError like any other, as
    torch's is on a CPU, and CUDA's and cuBLAS's own are."""
    told = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in told for words in OUT_OF_MEMORY)


def too_large(config: Config, paths: Sequence[str]) -> RunError:
    """What to tell of a shard that did not fit here. paths: of the tables."""
    shard = config.shard
    give_back(config.engine.device)
    try:
        needs = _two_small(config, paths)
    except RunError:
        return RunError(f"task.shard: {shard} tasks do not fit into memory, and fewer could not be measured either")
    return _told(config, needs, min(need.free for need in needs))


def misfit(config: Config, paths: Sequence[str], sharing: int) -> RunError | None:
    """The same where processes died, maybe of that; None: a shard fits beside those of all that share this memory."""
    try:
        needs = _two_small(config, paths)
    except RunError:
        return None
    free = min(need.free for need in needs) / sharing
    return _told(config, needs, free) if largest(needs, config.shard, free) < config.shard else None


def _two_small(config: Config, paths: Sequence[str]) -> list[Need]:
    least = smallest(config)
    return [needed(config, paths, tasks) for tasks in (least, 2 * least)]


def _told(config: Config, needs: Sequence[Need], free: float) -> RunError:
    batch, least = config.task.meta_batch, needs[0].tasks
    took = " and ".join(f"{_amount(need.bytes)} for {need.tasks}" for need in needs)
    told = f"task.shard: {config.shard} tasks do not fit into memory; {_amount(free)} are free, and it takes {took}"
    most = largest(needs, batch, free)
    if most < least:
        return RunError(f"{told}; not even {least} would fit, a smaller model or fewer inner steps may")
    return RunError(f"{told}; the largest that fits and divides task.meta_batch={batch} is {most}")


def largest(needs: Sequence[Need], batch: int, free: float) -> int:
    """The largest divisor of a meta-batch whose tasks fit into so many bytes as a shard, by two smaller; 0: none."""
    small, large = needs
    each = max(0.0, (large.bytes - small.bytes) / (large.tasks - small.tasks))
    fixed = max(0.0, small.bytes - each * small.tasks)
    return max((n for n in range(1, batch + 1) if batch % n == 0 and fixed + each * n <= free), default=0)


def needed(config: Config, paths: Sequence[str], tasks: int, repeats: int = 1) -> Need:
    """What a shard of so many tasks takes here. Raises RunError where that could not be measured."""
    of = config.with_values(task={"shard": tasks, "meta_batch": tasks})
    told = json.dumps({"config": of.model_dump(mode="json"), "paths": list(paths), "repeats": repeats})
    command = [sys.executable, "-m", "metadist.engine.memory"]
    ended = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"its process ended with {ended.returncode}"])[-1]
        raise RunError(f"task.shard: a shard of {tasks} tasks could not be measured: {last}")
    return Need(tasks, **json.loads(ended.stdout.splitlines()[-1]))


def smallest(config: Config) -> int:
    """Tasks of the smallest shard that the method can do with."""
    try:
        config.with_values(task={"shard": 1, "meta_batch": 1})
    except ConfigError:  # it compares tasks
        return 2
    return 1


def give_back(device: str) -> None:
    """Return memory that this process has freed but kept (`device.py`)."""
    gc.collect()  # what failed may hold itself
    ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: str) -> int:
    """Memory that is free: of the GPU; or of this machine, container and process, whichever has least."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(min(_of_the_machine(), _of_the_container(), _of_the_process()))


def status(key: str) -> int:
    """Of this process, from /proc, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def _of_the_machine() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def _of_the_container() -> float:
    group = Path("/sys/fs/cgroup")
    try:
        return float((group / "memory.max").read_text()) - float((group / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return math.inf


def _of_the_process() -> float:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else float(limit - status("VmSize"))


def _amount(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
