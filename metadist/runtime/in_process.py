"""Everything in the driver's process, without Ray: the same worker and the same aggregator."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.engine import Engine, Lane
from metadist.engine.sweep import Setting
from metadist.runtime import preemption
from metadist.runtime.aggregator import Aggregator, Broadcast, Report, Snapshot
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.runtime import Counts, Later, NotFinite
from metadist.runtime.timeline import AGGREGATOR, PROCESS, Timeline
from metadist.runtime.worker import Introduction, Worker


class Computing(Protocol):
    """What computes a run's shards and judges its tasks: a `Worker`, or what does so together with other runs."""

    @property
    def engine(self) -> Engine: ...

    @property
    def exact(self) -> bool:
        """Whether its bits are those of the run alone."""
        ...

    def introduce(self) -> Introduction: ...

    def compute(
        self, broadcast: Broadcast, step: int, attempt: int, shards: Sequence[int], *others: Any
    ) -> tuple[Any, ...]: ...

    def judge(
        self, values: np.ndarray, judged: Setting, split: str, first: int, tasks: int
    ) -> dict[str, np.ndarray]: ...


class InProcess:
    """`cluster.workers: 0`. worker: the run's own without it."""

    workers = 0

    def __init__(
        self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, worker: Computing | None = None
    ) -> None:
        self.config = config
        self.worker: Computing = worker or Worker(config, [str(table.path) for table in tables])
        self.exact = self.worker.exact
        introduction = self.worker.introduce()
        self.aggregator = self._aggregator(snapshot)
        self.step, self.earlier = self.aggregator.step, list[Report]()
        self._lanes: Lanes[Lane] = Lanes(carried(config, snapshot))
        self.fingerprint = introduction.fingerprint | {"probe": introduction.probe}
        self.hardware = introduction.hardware
        self._broadcast: Broadcast = self.aggregator.broadcast()
        self._computed = 0
        self._recomputed = 0
        self.timeline = Timeline()
        self.timeline.join(PROCESS)

    def _aggregator(self, snapshot: Snapshot | None) -> Aggregator:
        tasks = self.worker.engine.tasks
        return Aggregator(self.config, tasks.shape, snapshot, tasks.classes)

    def begin(self, step: int) -> None:
        pass

    def finish(self, step: int) -> None:
        preemption.check()
        while exceeding := self._computed_shards(step, range(self.worker.engine.shards)):
            self._recomputed += self.worker.engine.shards
            self._broadcast = self.aggregator.redo(step, self._broadcast.attempt, sorted(exceeding))

    def _computed_shards(self, step: int, shards: Sequence[int], again: bool = True) -> set[int]:
        """Compute and count shards; the tensors in which any of them exceeded its bound.

        What is not finite is computed once more where `again`; then it is divergence.
        """
        attempt = self._broadcast.attempt
        receipt, q, *lanes = self.worker.compute(self._broadcast, step, attempt, shards, *self._lanes.of(shards))
        assert receipt.current, "worker and aggregator are of one step here"
        self.timeline.add(PROCESS, receipt.spans)
        if receipt.summed:
            self.aggregator.add(step, attempt, receipt.summed, q, *receipt.seals)
            self._computed += len(receipt.summed)
        self._lanes.computed(shards, lanes)
        exceeding = set(receipt.exceeding)
        if receipt.not_finite:
            if not again:
                raise NotFinite(step, receipt.not_finite[0])
            self._recomputed += len(receipt.not_finite)
            exceeding |= self._computed_shards(step, receipt.not_finite, again=False)
        return exceeding

    def apply(self, step: int) -> Later:
        report, self._broadcast = self.aggregator.apply(step)
        assert not report.missing, "every shard was counted"
        self.timeline.add(AGGREGATOR, report.spans)
        self._lanes.advance()
        self._lanes.settle()
        return lambda: report

    def snapshot(self) -> Callable[[], Snapshot]:
        taken = self.aggregator.snapshot()._replace(lanes=tuple(self._lanes.states))
        return lambda: taken

    def restart(self, snapshot: Snapshot | None) -> None:
        self.aggregator = self._aggregator(snapshot)
        self._lanes = Lanes(carried(self.config, snapshot))
        self._broadcast = self.aggregator.broadcast()

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]:
        values = self._broadcast.values if values is None else values
        size = self.worker.engine.shard_tasks
        parts = [
            self.worker.judge(values, judged, split, first, min(size, episodes - first))
            for first in range(0, episodes, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def counts(self) -> Counts:
        return Counts({str(os.getpid()): self._computed}, self._recomputed, 0)

    def close(self) -> None:
        pass
