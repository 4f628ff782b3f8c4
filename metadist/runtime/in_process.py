"""Everything in the driver's process, without Ray: the same worker and the same aggregator."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.runtime.aggregator import Aggregator, Broadcast, Snapshot
from metadist.runtime.runtime import Counts, Later, NotFinite
from metadist.runtime.worker import Worker


class InProcess:
    """`cluster.workers: 0`."""

    workers = 0

    def __init__(self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None) -> None:
        self.config = config
        self.worker = Worker(config, [str(table.path) for table in tables])
        introduction = self.worker.introduce()
        self.aggregator = self._aggregator(snapshot)
        self.fingerprint = introduction.fingerprint | {"probe": introduction.probe}
        self._broadcast: Broadcast = self.aggregator.broadcast()
        self._computed = 0
        self._recomputed = 0

    def _aggregator(self, snapshot: Snapshot | None) -> Aggregator:
        tasks = self.worker.engine.tasks
        return Aggregator(self.config, tasks.shape, snapshot, tasks.classes)

    def begin(self, step: int) -> None:
        pass

    def finish(self, step: int) -> None:
        while exceeding := self._all_shards(step):
            self._recomputed += self.worker.engine.shards
            self._broadcast = self.aggregator.redo(step, self._broadcast.attempt, sorted(exceeding))

    def _all_shards(self, step: int) -> set[int]:
        """Compute and count every shard; the tensors in which any of them exceeded its bound."""
        attempt, exceeding = self._broadcast.attempt, set[int]()
        for shard in range(self.worker.engine.shards):
            receipt, q = self.worker.compute(self._broadcast, step, attempt, shard)
            if not receipt.finite:
                self._recomputed += 1
                receipt, q = self.worker.compute(self._broadcast, step, attempt, shard)
                if not receipt.finite:
                    raise NotFinite(step, shard)
            exceeding.update(receipt.exceeding)
            if not receipt.exceeding:
                self.aggregator.add(step, attempt, shard, q)
                self._computed += 1
        return exceeding

    def apply(self, step: int) -> Later:
        report, self._broadcast = self.aggregator.apply(step)
        return lambda: report

    def snapshot(self) -> Callable[[], Snapshot]:
        taken = self.aggregator.snapshot()
        return lambda: taken

    def restart(self, snapshot: Snapshot | None) -> None:
        self.aggregator = self._aggregator(snapshot)
        self._broadcast = self.aggregator.broadcast()

    def judge(self, values: np.ndarray | None, judged: Config, split: str, episodes: int) -> dict[str, np.ndarray]:
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
