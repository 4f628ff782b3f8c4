"""What Ray costs, what workers bring, and the strategies beside one another.

The in-process loop, one worker, and two workers under each strategy compute the same shards
of the same steps with the same classes that train. They are measured in turn, so that a
machine whose speed drifts favours none of them, and each ratio is the median of the ratios
within a turn. Two processes that loop each by itself, without Ray and without waiting for
one another, show what two cores of the machine give at most: two cores that share a memory
bus, a cache or a host do not give twice of one.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from metadist.bench.record import Row
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.data.table import open_table
from metadist.run import start
from metadist.runtime.cluster import connect, disconnect
from metadist.runtime.in_process import InProcess
from metadist.runtime.runtime import Runtime

TURNS = 7
SECONDS = 5.0
"""About how long one measurement takes."""

IN_PROCESS, PAIR = "in process", "two processes without Ray"

ON_RAY: dict[str, dict[str, Any]] = {
    "one worker": {"workers": 1},
    "two workers": {"workers": 2},
    "two workers, sums: tree": {"workers": 2, "sums": "tree"},
    "two workers, aggregators: 2": {"workers": 2, "aggregators": 2},
    "two workers, allreduce": {"workers": 2, "strategy": "allreduce"},
    "two workers, async": {"workers": 2, "strategy": "async"},
}
"""What is measured on Ray, and its keys of `cluster`. Those with a comma are compared with two workers."""

JOB = {
    "task": {"ways": 5, "shots": 1, "queries": 1, "meta_batch": 32, "shard": 8},
    "algorithm": {"name": "maml", "order": 2, "inner_lr": 2.0, "inner_steps": 1},
    "outer": {"steps": 10**6},
    "eval": {"every": 0, "test": False},
}
"""The MAML paper's Omniglot recipe, on the embedded letters: meta-batch 32, second order, stride-2 network."""


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some six minutes on two cores."""
    config = resolve(Config.model_validate(JOB))
    with ExitStack() as open_now:
        table = prepare(config.data.sources[0], say)
        alone: Runtime = InProcess(config, [table], None)
        done = {IN_PROCESS: 0, **dict.fromkeys(ON_RAY, 0)}
        _seconds(alone, done, IN_PROCESS, 5)  # warm
        count = max(5, round(5 * SECONDS / _seconds(alone, done, IN_PROCESS, 5)))
        say(f"starting one cluster for {len(ON_RAY)} runs; measurements of {count} steps")
        connect(config.cluster.model_copy(update={"workers": sum(keys["workers"] for keys in ON_RAY.values())}))
        open_now.callback(disconnect)
        contenders = {IN_PROCESS: alone}
        for name, keys in ON_RAY.items():
            # A group of ranks stops at checkpoints only: one behind every measurement.
            on_ray = config.with_values(cluster=keys | {"address": "auto"}, checkpoint={"every": count + 1})
            contenders[name] = start(on_ray, [table], None, say)
            open_now.callback(contenders[name].close)
            _seconds(contenders[name], done, name, count)  # warm
        pair = _Pair(config, str(table.path))
        open_now.callback(pair.close)
        pair.seconds(5)
        rates: dict[str, list[float]] = {name: [] for name in (*contenders, PAIR)}
        for turn in range(TURNS):
            for name, runtime in contenders.items():
                spent = _seconds(runtime, done, name, count)
                rates[name].append(count * config.task.meta_batch / spent)
            rates[PAIR].append(2 * count * config.task.meta_batch / pair.seconds(count))
            told = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
            say(f"turn {turn + 1}/{TURNS}: {told} tasks/s")
    return _rows(rates, config.task.meta_batch)


class _Pair:
    """Two processes, each with an in-process loop of its own."""

    def __init__(self, config: Config, path: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for _ in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_loop, args=(there, config, path), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)

    def seconds(self, count: int) -> float:
        """Time until both have done `count` meta-steps, side by side."""
        for pipe in self._pipes:
            pipe.send(count)
        return max(float(pipe.recv()) for pipe in self._pipes)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(0)
            process.join()


def _loop(pipe: Connection, config: Config, path: str) -> None:
    """One of the two: steps when told how many, until told none."""
    runtime: Any = InProcess(config, [open_table(Path(path))], None)
    done = {"": 0}
    while count := pipe.recv():
        pipe.send(_seconds(runtime, done, "", count))


def _seconds(runtime: Runtime, done: dict[str, int], name: str, count: int) -> float:
    """Seconds for `count` meta-steps, in the training loop's order: begin, report, finish, apply.

    From one outer step to another: a first one is not measured, because the group of allreduce and the workers of
    async do not wait for their driver, and would bring what they computed before the clock ran.
    """
    first, report = done[name], None
    began = 0.0
    for step in range(first, first + count + 1):
        runtime.begin(step)
        if report is not None:
            report()
        runtime.finish(step)
        report = runtime.apply(step)
        if step == first:
            began = time.perf_counter()
    spent = time.perf_counter() - began
    assert report is not None
    report()
    done[name] += count + 1
    return spent


def _rows(rates: dict[str, list[float]], meta_batch: int) -> list[Row]:
    repeats = len(rates[IN_PROCESS])

    def row(name: str, baseline: str | None) -> Row:
        pairs = zip(rates[name], rates[baseline], strict=True) if baseline else ()
        ratio = statistics.median(a / b for a, b in pairs) if baseline else None
        return Row(name, statistics.median(rates[name]), "tasks/s", baseline, ratio, repeats)

    overhead = statistics.median(
        1000 * meta_batch * (1 / b - 1 / a) for a, b in zip(rates[IN_PROCESS], rates["one worker"], strict=True)
    )
    return [
        row(IN_PROCESS, None),
        row("one worker", IN_PROCESS),
        row("two workers", "one worker"),
        *(row(name, "two workers") for name in ON_RAY if "," in name),
        row(PAIR, IN_PROCESS),
        Row("Ray's share of a step, one worker", overhead, "ms", None, None, repeats),
    ]
