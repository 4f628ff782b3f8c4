"""One of several equal ranks that compute a meta-step together; each of them takes it.

Shard i belongs to rank i mod world. The ranks add their integers, and with them what is
wrong with any shard, in one all-reduce; integers add exactly, so that all ranks hold the same
sum, take the same outer step and decide alike. A plain class: what adds up over the ranks is
handed in.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metadist.config import Config
from metadist.engine.sweep import Setting
from metadist.runtime.aggregator import Aggregator, Report, Snapshot
from metadist.runtime.runtime import NotFinite
from metadist.runtime.worker import Worker
from metadist.spans import Span, now

AddUp = Callable[[np.ndarray], np.ndarray]
"""int64 [n] of this rank → their sum over all ranks, the same on each."""


class Stepped(NamedTuple):
    """A step that was taken. shards: by rank; recomputed: shards computed more than once; halted: some rank asked;
    spans: where this rank's time went, that of its outer step aside."""

    report: Report
    shards: tuple[int, ...]
    recomputed: int
    halted: bool
    spans: tuple[Span, ...] = ()


class Summed(NamedTuple):
    """What all ranks know after they added up: exceeding are tensors, not_finite are shards."""

    q: np.ndarray
    exceeding: tuple[int, ...]
    not_finite: tuple[int, ...]
    halted: bool


class Rank:
    """Worker and aggregator of one rank, in step with the others."""

    def __init__(
        self, config: Config, worker: Worker, snapshot: Snapshot | None, rank: int, world: int, add_up: AddUp
    ) -> None:
        self.worker, self.rank, self.world, self._add_up = worker, rank, world, add_up
        tasks = worker.engine.tasks
        self.aggregator = Aggregator(config, tasks.shape, snapshot, tasks.classes)
        self._broadcast = self.aggregator.broadcast()
        self._spans: list[Span] = []

    def step(self, halt: bool = False) -> Stepped:
        """Take the next step. Raises NotFinite, on all ranks alike, with the state as it was before."""
        step, recomputed = self.aggregator.step, 0
        while True:
            shards: Sequence[int] = range(self.worker.engine.shards)
            parts: list[tuple[list[int], np.ndarray]] = []
            counted, exceeding, halted = Counter[int](), set[int](), False
            for turn in range(2):  # what is not finite is computed once more, by another rank where there is one
                found = self._sum(shards, turn, halt)
                good = [shard for shard in shards if shard not in found.not_finite]
                parts.append((good, found.q))
                counted.update(self._of(shard, turn) for shard in good)
                exceeding.update(found.exceeding)
                halted |= found.halted
                shards = found.not_finite
                recomputed += len(shards)
                if not shards:
                    break
            else:
                raise NotFinite(step, shards[0])
            if not exceeding:
                break
            recomputed += self.worker.engine.shards
            self._broadcast = self.aggregator.redo(step, self.aggregator.attempt, sorted(exceeding))
        for good, q in parts:
            self.aggregator.add(step, self.aggregator.attempt, good, q)
        report, self._broadcast = self.aggregator.apply(step)
        assert not report.missing, "every shard was counted"
        spans, self._spans = tuple(self._spans), []
        return Stepped(report, tuple(counted[rank] for rank in range(self.world)), recomputed, halted, spans)

    def judge(
        self, values: np.ndarray | None, judged: Setting, split: str, episodes: int
    ) -> dict[int, dict[str, np.ndarray]]:
        """This rank's part of an evaluation, by its first task."""
        values = self._broadcast.values if values is None else values
        size = self.worker.engine.shard_tasks
        mine = [first for first in range(0, episodes, size) if self._of(first // size) == self.rank]
        return {first: self.worker.judge(values, judged, split, first, min(size, episodes - first)) for first in mine}

    def _of(self, item: int, turn: int = 0) -> int:
        return (item + turn) % self.world

    def _sum(self, shards: Sequence[int], turn: int, halt: bool) -> Summed:
        """Compute this rank's shards of those given and add up with the others."""
        tensors, total = len(self.aggregator.exponents), self.aggregator.total.size
        mine = [shard for shard in shards if self._of(shard, turn) == self.rank]
        buffer = np.zeros(total + tensors + self.worker.engine.shards + 1, dtype=np.int64)
        sums, exceeding, not_finite, halted = np.split(buffer, np.cumsum([total, tensors, self.worker.engine.shards]))
        receipt, q = self.worker.compute(self._broadcast, self._broadcast.step, self._broadcast.attempt, mine)
        if receipt.summed:
            sums[:] = q
        exceeding[list(receipt.exceeding)] = 1
        not_finite[list(receipt.not_finite)] = 1
        halted[:] = halt
        asked = now()
        added = self._add_up(buffer)
        self._spans += [*receipt.spans, Span("transfer", asked, now())]
        sums, exceeding, not_finite, halted = np.split(added, np.cumsum([total, tensors, self.worker.engine.shards]))
        return Summed(
            sums,
            tuple(np.flatnonzero(exceeding).tolist()),
            tuple(np.flatnonzero(not_finite).tolist()),
            bool(halted.any()),
        )
