"""Workers that never wait for one another: outer steps from gradients of slightly older θ.

The workers are those of `on_ray`: they join, leave and judge in the same way. The parameters
live in the driver, whose ledger says which result counts in which outer step. Sums travel as
floats and are added in the order of the ledger, in float64; the ledger makes the run again.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config
from metadist.runtime import preemption
from metadist.runtime.aggregator import Aggregator, Snapshot
from metadist.runtime.ledger import Call, Ledger, as_array, from_array, mean_of
from metadist.runtime.on_ray import Item, OnRay, Shard
from metadist.runtime.runtime import Counts, Later, NotFinite


class Result(NamedTuple):
    """A shard's float sums, come in and not yet looked at."""

    call: Call
    worker: str
    pid: int
    sums: np.ndarray


class Asynchronous(OnRay):
    """`cluster.strategy: async`."""

    def _take_over_or_start(self, snapshot: Snapshot | None) -> None:
        config, tasks = self.config, self._sums.blueprint
        entries = [] if snapshot is None or snapshot.ledger is None else from_array(snapshot.ledger)
        self._ledger = Ledger(config.task.meta_batch // config.shard, config.outer.steps, config.cluster.bound, entries)
        self._take_lanes(None)
        self._parameters = Aggregator(config, tasks.shape, snapshot, tasks.classes)
        self._under_way: dict[Any, Call] = {}
        self._inbox: deque[Result] = deque()
        self._taken: list[np.ndarray] = []
        self._broadcast()

    # --- handing out and taking in -------------------------------------------

    def _hand_out(self, judged: tuple[Any, Config, str] | None = None) -> None:
        super()._hand_out(judged)
        if judged is not None:
            return  # the evaluation comes first
        busy = {name for name, _, _ in self._calls.values()}
        for name in [name for name in self._dispatcher.held if name not in busy]:
            call = self._ledger.give(name, alone=self.workers == 1)
            if call is not None:
                shard = self._shard(call)
                coming = self._actors[name].sums.remote(*self._sums.broadcast, shard.step, shard.shard)
                self._calls[coming] = (name, (shard,), None)
                self._under_way[coming] = call

    def _shard(self, call: Call) -> Shard:
        step, shard = divmod(call.number, self._per_step)
        return Shard(step, call.id, shard)

    def _events(self) -> list[tuple[str, tuple[Item, ...], Any, Any]]:
        """Those that are no shard's; a shard's results go into the inbox."""
        calls = {self._shard(call): call for call in self._under_way.values()}
        others = []
        for name, items, value, q in super()._events():
            if isinstance(items[0], Shard):
                self._inbox.append(Result(calls[items[0]], name, *value))
            else:
                others.append((name, items, value, q))
        self._under_way = {coming: call for coming, call in self._under_way.items() if coming in self._calls}
        return others

    def _given_back(self, name: str) -> list[Item]:
        here = {coming for coming, (holder, _, _) in self._calls.items() if holder == name}
        lost = [call for coming, call in self._under_way.items() if coming in here]
        for call in lost:
            self._ledger.lose(call)
        self._under_way = {coming: call for coming, call in self._under_way.items() if call not in lost}
        return [*super()._given_back(name), *map(self._shard, lost)]

    def _decide(self) -> None:
        """Count what has come in, in its order, until the outer step is complete."""
        while self._inbox and not self._ledger.complete:
            call, worker, pid, sums = self._inbox.popleft()
            if not np.isfinite(sums).all():
                self._recomputed += 1
                if not self._ledger.fail(call, worker):
                    raise NotFinite(*divmod(call.number, self._per_step))
            elif self._ledger.take(call, pid):
                self._taken.append(sums)
                self._shards[self._called[worker]] += 1

    # --- a step --------------------------------------------------------------

    def begin(self, step: int) -> None:
        self._hand_out()

    def finish(self, step: int) -> None:
        self._decide()
        while not self._ledger.complete:
            preemption.check()
            self._hand_out()
            self._events()
            self._decide()

    def apply(self, step: int) -> Later:
        self._ledger.advance()
        report = self._parameters.move(mean_of(self._taken, self.config.task.meta_batch))
        self._taken = []
        self._broadcast()
        return lambda: report

    def _broadcast(self) -> None:
        """θ as it is now, for the calls to come."""
        self._sums.broadcast = (self.ray.put(self._parameters.broadcast()),)

    def snapshot(self) -> Callable[[], Snapshot]:
        taken = self._parameters.snapshot()._replace(ledger=as_array(self._ledger.entries))
        return lambda: taken

    def restart(self, snapshot: Snapshot | None) -> None:
        self._dispatcher.drop()
        self._dispatcher.free()
        self._calls.clear()
        self._take_over_or_start(snapshot)

    def counts(self) -> Counts:
        return super().counts()._replace(duplicates=self._ledger.dropped)
