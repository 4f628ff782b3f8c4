"""What Ray costs, what workers bring, and the strategies beside one another.

All of them compute the same shards of the same steps with the same classes that train. They
are measured in turn, so that a machine whose speed drifts favours none of them, and each
ratio is the median of the ratios within a turn. Two processes that loop each by itself,
without Ray and without waiting for one another, show what two cores of the machine give
at most: two cores that share a memory bus, a cache or a host do not give twice of one.

An idle process of Ray's takes some 0.6 % of a core. The strategies, whose processes are many,
come up when the rest is measured, and are compared with one of themselves.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
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
from metadist.runtime.runtime import Later, Runtime

TURNS = 7
SECONDS = 5.0
"""About how long one measurement takes."""

IN_PROCESS, PAIR = "in process", "two processes without Ray"

WORKERS: dict[str, dict[str, Any]] = {"one worker": {"workers": 1}, "two workers": {"workers": 2}}
"""Their keys of `cluster`."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "aggregator": {"workers": 2},
    "aggregator, sums: tree": {"workers": 2, "sums": "tree"},
    "aggregator, aggregators: 2": {"workers": 2, "aggregators": 2},
    "allreduce": {"workers": 2, "strategy": "allreduce"},
    "async": {"workers": 2, "strategy": "async"},
}
"""The same; what they are compared with comes first."""

JOB = {
    "task": {"ways": 5, "shots": 1, "queries": 1, "meta_batch": 32, "shard": 8},
    "algorithm": {"name": "maml", "order": 2, "inner_lr": 2.0, "inner_steps": 1},
    "outer": {"steps": 10**6},
    "engine": {"device": "cpu"},
    "eval": {"every": 0, "test": False},
}
"""The MAML paper's Omniglot recipe, on the embedded letters: meta-batch 32, second order, stride-2 network."""


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some six minutes on two cores."""
    config = resolve(Config.model_validate(JOB))
    with ExitStack() as open_now:
        table = prepare(config.data.sources[0], say)
        alone = _Loop(InProcess(config, [table], None))
        alone.seconds(5)  # warm
        count = max(5, round(5 * SECONDS / alone.seconds(5)))
        say(f"measurements of {count} steps; starting one cluster for all")
        connect(config.cluster.model_copy(update={"workers": 2 * len(STRATEGIES)}))
        open_now.callback(disconnect)

        def started(keys: dict[str, Any], until: ExitStack) -> _Loop:
            # A group of ranks stops at checkpoints only: one behind every measurement.
            on_ray = config.with_values(cluster=keys | {"address": "auto"}, checkpoint={"every": count + 1})
            runtime = start(on_ray, [table], None, say)
            until.callback(runtime.close)
            return _Loop(runtime)

        with ExitStack() as until:
            pair = _Pair(config, str(table.path))
            until.callback(pair.close)
            workers = {name: started(keys, until) for name, keys in WORKERS.items()}
            first = _rates({IN_PROCESS: alone, **workers, PAIR: pair}, count, config.task.meta_batch, say)
        with ExitStack() as until:
            strategies = {name: started(keys, until) for name, keys in STRATEGIES.items()}
            second = _rates(strategies, count, config.task.meta_batch, say)
    return _rows(first, second, config.task.meta_batch)


def _rates(
    contenders: "Mapping[str, _Loop | _Pair]", count: int, meta_batch: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Tasks per second of each, a figure for every turn."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():  # warm
        contender.seconds(count)
    for turn in range(TURNS):
        for name, contender in contenders.items():
            rates[name].append(contender.loops * count * meta_batch / contender.seconds(count))
        told = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
        say(f"turn {turn + 1}/{TURNS}: {told} tasks/s")
    return rates


class _Loop:
    """A runtime, and how far it is."""

    loops = 1

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.done = runtime, 0

    def seconds(self, count: int) -> float:
        """Time for `count` meta-steps, in the training loop's order: begin, report, finish, apply.

        From one outer step to another: a first one is not measured, because the group of allreduce and the workers
        of async do not wait for their driver, and would bring what they computed before the clock ran.
        """
        report: Later | None = None
        began = 0.0
        for step in range(self.done, self.done + count + 1):
            self.runtime.begin(step)
            if report is not None:
                report()
            self.runtime.finish(step)
            report = self.runtime.apply(step)
            if step == self.done:
                began = time.perf_counter()
        spent = time.perf_counter() - began
        assert report is not None
        report()
        self.done += count + 1
        return spent


class _Pair:
    """Two processes, each with an in-process loop of its own."""

    loops = 2

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
    loop = _Loop(InProcess(config, [open_table(Path(path))], None))
    while count := pipe.recv():
        pipe.send(loop.seconds(count))


def _rows(workers: dict[str, list[float]], strategies: dict[str, list[float]], meta_batch: int) -> list[Row]:
    def row(rates: dict[str, list[float]], name: str, baseline: str | None) -> Row:
        pairs = zip(rates[name], rates[baseline], strict=True) if baseline else ()
        ratio = statistics.median(a / b for a, b in pairs) if baseline else None
        return Row(name, statistics.median(rates[name]), "tasks/s", baseline, ratio, len(rates[name]))

    overhead = statistics.median(
        1000 * meta_batch * (1 / b - 1 / a) for a, b in zip(workers[IN_PROCESS], workers["one worker"], strict=True)
    )
    first, *others = strategies
    return [
        row(workers, IN_PROCESS, None),
        row(workers, "one worker", IN_PROCESS),
        row(workers, "two workers", "one worker"),
        row(workers, PAIR, IN_PROCESS),
        row(strategies, first, None),
        *(row(strategies, name, first) for name in others),
        Row("Ray's share of a step, one worker", overhead, "ms", None, None, len(workers[IN_PROCESS])),
    ]
