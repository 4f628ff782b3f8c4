"""What a shard takes of memory and time, measured in this process, which does nothing else.

    python -m metadist.engine.memory < {"config": …, "paths": […], "repeats": …}

On a CPU the memory is the largest resident set above that of the idle process, on a GPU what
torch had taken of it at most above what it had before. Prints
{"bytes": …, "seconds": …, "free": …}, the last what there is for it.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from metadist.config import Config, validate
from metadist.data.table import open_table
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents
from metadist.engine.fit import free_bytes, give_back, smallest, status


def measure(config: Config, paths: Sequence[str], repeats: int) -> dict[str, float]:
    """Bytes at most, the median of the seconds, and free bytes before, of a shard of a resolved config."""
    engine = Engine(config, [open_table(Path(path)) for path in paths])
    blueprint, device = engine.blueprint, engine.device
    theta, state = blueprint.named(blueprint.initial(), device)
    exponents = first_exponents(blueprint.sums)

    def shard(step: int) -> object:
        if engine.programs is None:
            return engine.sums(theta, state, step, 0)
        return engine.part(blueprint.initial(), exponents, step, 0)  # a graph keeps memory of its own

    least = smallest(config)
    # Code and buffers of libraries that any shard needs are there before one is measured.
    Engine(config.with_values(task={"shard": least, "meta_batch": least}), engine.tables).sums(theta, state, 0, 0)
    before, free = _from_here(device.type), free_bytes(device.type)
    spent = []
    for repeat in range(repeats):
        began = time.perf_counter()
        shard(repeat)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    most = torch.cuda.max_memory_reserved() if device.type == "cuda" else status("VmHWM")
    return {"bytes": most - before, "seconds": statistics.median(spent), "free": free}


def _from_here(device: str) -> int:
    """Give freed memory back and count anew; what there is now, bytes."""
    give_back(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is the present one again
    return status("VmRSS")


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(measure(validate(asked["config"], "stdin"), asked["paths"], asked["repeats"])))
