"""Workers that never wait for one another: outer steps from gradients of slightly older θ.

The parameters live in the driver, whose ledger says which result counts in which outer step.
Sums travel as floats and are added in the order of the ledger, in float64; the ledger makes
the run again.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.engine import blueprint
from metadist.engine.sweep import Setting
from metadist.runtime import preemption
from metadist.runtime.aggregator import Aggregator, Report, Snapshot, sealed
from metadist.runtime.cluster import check_resources, connect, disconnect
from metadist.runtime.judging import judge
from metadist.runtime.ledger import Call, Ledger, as_array, from_array, mean_of
from metadist.runtime.pool import Came, Item, Pool, Shard
from metadist.runtime.runtime import AggregatorLost, Counts, Later, NotFinite, Say
from metadist.runtime.timeline import AGGREGATOR
from metadist.runtime.worker import Floats


class Result(NamedTuple):
    """A shard's float sums, come in and not yet looked at."""

    call: Call
    worker: str
    floats: Floats


class Asynchronous:
    """`cluster.strategy: async`."""

    exact = False

    def __init__(self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, say: Say) -> None:
        self.config, self.say = config, say
        self.step, self.earlier = snapshot.step if snapshot else 0, list[Report]()
        self.ray, self._ours = connect(config.cluster)
        self.pool = Pool(self.ray, config, [str(table.path) for table in tables], say, self._left)
        self.timeline = self.pool.timeline
        self._blueprint = blueprint(config, tables)
        self._shards: Counter[str] = Counter()
        self._recomputed = self._damaged = 0
        self._late: float | None = None
        try:
            check_resources(self.ray, config.cluster)
            self._start(snapshot)
            self.pool.open()
            self.fingerprint, self.hardware = self.pool.fingerprint, self.pool.hardware
        except BaseException:
            self.close()
            raise

    def _start(self, snapshot: Snapshot | None) -> None:
        config, tasks = self.config, self._blueprint
        entries = [] if snapshot is None or snapshot.ledger is None else from_array(snapshot.ledger)
        self._ledger = Ledger(config.task.meta_batch // config.shard, config.outer.steps, config.cluster.bound, entries)
        self._parameters = Aggregator(config, tasks.shape, snapshot, tasks.classes)
        self._under_way: dict[Item, tuple[str, Call]] = {}
        self._inbox: deque[Result] = deque()
        self._taken: list[np.ndarray] = []
        self._broadcast()

    def _broadcast(self) -> None:
        """θ as it is now, for the calls to come."""
        self._theta = self.ray.put(self._parameters.broadcast())

    # --- handing out and taking in -------------------------------------------

    def _hand_out(self) -> None:
        busy = {asked.worker for asked in self.pool.asked.values()}
        for name in [name for name in self.pool.dispatcher.held if name not in busy]:
            call = self._ledger.give(name, alone=self.pool.size == 1)
            if call is not None:
                step, number = divmod(call.number, self.config.lanes)
                shard = Shard(step, call.id, number)
                self.pool.expect(self.pool.actor(name).sums.remote(self._theta, step, number), name, (shard,))
                self._under_way[shard] = name, call

    def _take_in(self, came: Came) -> None:
        """A shard's sums go into the inbox; a judgement of which another worker's came first goes nowhere."""
        (item,) = came.items
        if item in self._under_way:
            _, call = self._under_way.pop(item)
            self._inbox.append(Result(call, came.worker, came.value))
        else:
            self.pool.dispatcher.again(came.worker, item)

    def _left(self, name: str) -> Sequence[Item]:
        """What is computed again because a worker is gone."""
        lost = [item for item, (holder, _) in self._under_way.items() if holder == name]
        for item in lost:
            self._ledger.lose(self._under_way.pop(item)[1])
        self._recomputed += len(lost)
        return [*self.pool.dispatcher.leave(name), *lost]

    def _decide(self) -> None:
        """Count what has come in, in its order, until the outer step is complete."""
        while self._inbox and not self._ledger.complete:
            call, worker, floats = self._inbox.popleft()
            if floats.seal != sealed(floats.sums):
                self.say(f"shard {call.number}: its sum was damaged on its way; it is computed again")
                self._damaged += 1
                if not self._ledger.fail(call, worker):
                    raise AggregatorLost(f"shard {call.number}: its sum did not arrive whole, twice")
            elif not np.isfinite(floats.sums).all():
                self._recomputed += 1
                if not self._ledger.fail(call, worker):
                    raise NotFinite(*divmod(call.number, self.config.lanes))
            elif self._ledger.take(call, floats.pid):
                self._taken.append(floats.sums)
                self._shards[worker] += 1

    # --- a step --------------------------------------------------------------

    def begin(self, step: int) -> None:
        self.pool.dispatcher.drop()
        self._hand_out()

    def finish(self, step: int) -> None:
        self._decide()
        while not self._ledger.complete:
            preemption.check()
            self._hand_out()
            for came in self.pool.events():
                self._take_in(came)
            self._decide()

    def apply(self, step: int) -> Later:
        taken = self._ledger.advance()
        self._late = sum(entry.step - entry.version for entry in taken) / len(taken)
        with self._parameters.spans.of("sum"):
            mean = mean_of(self._taken, self.config.task.meta_batch)
        report = self._parameters.move(mean)
        self.timeline.add(AGGREGATOR, report.spans)
        self._taken = []
        self._broadcast()
        return lambda: report

    def snapshot(self) -> Callable[[], Snapshot]:
        taken = self._parameters.snapshot()._replace(ledger=as_array(self._ledger.entries))
        return lambda: taken

    def restart(self, snapshot: Snapshot | None) -> None:
        self.pool.forget()
        self._start(snapshot)

    # --- the rest ------------------------------------------------------------

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]:
        current = self._parameters.broadcast().values if values is None else values
        return judge(self.pool, current, judged, split, episodes, self._take_in)

    @property
    def workers(self) -> int:
        return self.pool.size

    def counts(self) -> Counts:
        there = self.pool.by_process(self._shards)
        return Counts(there, self._recomputed + self._damaged, self._ledger.dropped + self._damaged, self._late)

    def close(self) -> None:
        self.pool.close()
        if self._ours:
            disconnect()
