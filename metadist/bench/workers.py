"""What Ray costs and what workers bring: the in-process loop, one worker, two workers.

All three compute the same shards of the same steps with the same classes that train. They
are measured in turn, so that a machine whose speed drifts favours none of them, and each
ratio is the median of the ratios within a turn. Two processes that loop each by itself,
without Ray and without waiting for one another, show what two cores of the machine give
at most: two cores that share a memory bus, a cache or a host do not give twice of one.
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
from metadist.runtime.cluster import connect, disconnect
from metadist.runtime.in_process import InProcess
from metadist.runtime.on_ray import OnRay
from metadist.runtime.runtime import Runtime

TURNS = 9
SECONDS = 5.0
"""About how long one measurement takes."""

PAIR = "two processes without Ray"

JOB = {
    "task": {"ways": 5, "shots": 1, "queries": 1, "meta_batch": 32, "shard": 8},
    "algorithm": {"name": "maml", "order": 2, "inner_lr": 2.0, "inner_steps": 1},
    "outer": {"steps": 10**6},
    "eval": {"every": 0, "test": False},
}
"""The MAML paper's Omniglot recipe, on the embedded letters: meta-batch 32, second order, stride-2 network."""


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some four minutes on two cores."""
    config = resolve(Config.model_validate(JOB))
    say("starting one cluster for one and for two workers")
    with ExitStack() as open_now:
        table = prepare(config.data.sources[0], say)
        connect(config.cluster.model_copy(update={"workers": 3}))
        open_now.callback(disconnect)
        contenders: dict[str, Runtime] = {"in process": InProcess(config, [table], None)}
        for name, workers in (("one worker", 1), ("two workers", 2)):
            on_ray = config.with_values(cluster={"workers": workers, "address": "auto"})
            contenders[name] = OnRay(on_ray, [table], None, say)
            open_now.callback(contenders[name].close)
        pair = _Pair(config, str(table.path))
        open_now.callback(pair.close)
        done = dict.fromkeys(contenders, 0)
        seconds = _steps(contenders["in process"], done, "in process", 5) / 5
        count = max(5, round(SECONDS / seconds))
        for name, runtime in contenders.items():  # warm
            _steps(runtime, done, name, 5)
        pair.seconds(5)
        rates: dict[str, list[float]] = {name: [] for name in (*contenders, PAIR)}
        for turn in range(TURNS):
            for name, runtime in contenders.items():
                spent = _steps(runtime, done, name, count)
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
        pipe.send(_steps(runtime, done, "", count))


def _steps(runtime: Runtime, done: dict[str, int], name: str, count: int) -> float:
    """Seconds for the next `count` meta-steps, in the training loop's order: begin, report, finish, apply."""
    first, report = done[name], None
    began = time.perf_counter()
    for step in range(first, first + count):
        runtime.begin(step)
        if report is not None:
            report()
        runtime.finish(step)
        report = runtime.apply(step)
    assert report is not None
    report()
    done[name] += count
    return time.perf_counter() - began


def _rows(rates: dict[str, list[float]], meta_batch: int) -> list[Row]:
    def ratio(name: str, baseline: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[baseline], strict=True))

    plain, one, two, pair = (statistics.median(values) for values in rates.values())
    repeats = len(rates["in process"])
    overhead = statistics.median(
        1000 * meta_batch * (1 / b - 1 / a) for a, b in zip(rates["in process"], rates["one worker"], strict=True)
    )
    return [
        Row("in process", plain, "tasks/s", None, None, repeats),
        Row("one worker", one, "tasks/s", "in process", ratio("one worker", "in process"), repeats),
        Row("two workers", two, "tasks/s", "one worker", ratio("two workers", "one worker"), repeats),
        Row(PAIR, pair, "tasks/s", "in process", ratio(PAIR, "in process"), repeats),
        Row("Ray's share of a step, one worker", overhead, "ms", None, None, repeats),
    ]
