"""Workers and aggregators as Ray actors, and the driver's side of them: any shard to any worker.

The driver reads receipts only; a worker's sums go on to the aggregator unread, which on a cluster of the run's own may
be in the driver's process. By Ray the next step's shards are handed out while the aggregator still takes the outer
step: they wait for θ where they are, not here. By lines they are handed out when θ is there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.engine import blueprint
from metadist.engine.sweep import Setting
from metadist.runtime import preemption
from metadist.runtime.aggregation import Aggregation, aggregator_lost
from metadist.runtime.aggregator import Report, Snapshot
from metadist.runtime.cluster import check_resources, connect, disconnect
from metadist.runtime.cut import assembled
from metadist.runtime.judging import judge
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.pool import Came, Item, Pool, Shard
from metadist.runtime.runtime import AggregatorLost, Counts, Later, NotFinite, Say, Transport
from metadist.runtime.timeline import AGGREGATOR
from metadist.runtime.worker import Receipt


class OnRay:
    """`cluster.strategy: aggregator`, with `cluster.workers` ≥ 1."""

    exact = True

    def __init__(
        self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, say: Say, run: str | None = None
    ) -> None:
        self.config, self.say = config, say
        self.step, self.earlier = snapshot.step if snapshot else 0, list[Report]()
        plan = blueprint(config, tables)
        self.ray, self._ours = connect(config.cluster, 8 * plan.sums.total)
        near = self._near if config.outer.remembers else None
        self.pool = Pool(self.ray, config, [str(table.path) for table in tables], say, self._left, near)
        self.timeline = self.pool.timeline
        self._shards: Counter[str] = Counter()
        self._failures: dict[Item, int] = {}
        self._at: dict[int, str] = {}
        self._recomputed = self._duplicates = self._attempt = self._damages = 0
        self._begun = -1
        self._transport: Transport | None = None
        # A lane's state is this driver's: it dies with it, and so does the step that the aggregator is at.
        run = None if config.cluster.address == "local" or config.outer.remembers else run
        self._sums = Aggregation(self.ray, config, plan, run, say)
        try:
            check_resources(self.ray, config.cluster)
            self._take_over_or_start(snapshot)
            self.pool.open()
            self.fingerprint, self.hardware = self.pool.fingerprint, self.pool.hardware
        except BaseException:
            self.close()
            raise

    def _take_over_or_start(self, snapshot: Snapshot | None) -> None:
        """Go on with the aggregators that outlived the run's last driver, or start new ones."""
        self._take_lanes(snapshot)
        self.earlier = self._sums.adopt(snapshot)
        if self.earlier:
            self.step = self.earlier[-1].step + 1
            self.say(f"the aggregator outlived its driver; going on from step {self.step}")
        else:
            self._sums.start(snapshot)

    def _take_lanes(self, snapshot: Snapshot | None) -> None:
        self._lanes: Lanes[Any] = Lanes(self.ray.put(lane) for lane in carried(self.config, snapshot))

    # --- a step --------------------------------------------------------------

    def begin(self, step: int) -> None:
        self._attempt, self._begun, self._damages = 0, step, 0
        self._open(step, range(self.config.lanes))

    def _open(self, step: int, shards: Sequence[int]) -> None:
        self.pool.dispatcher.drop()
        self._failures.clear()
        self._exceeding: set[int] = set()
        self.pool.dispatcher.add(Shard(step, self._attempt, shard) for shard in shards)
        self._hand_out()

    def _hand_out(self) -> None:
        here = not self._lanes.states and self.pool.lined and self._sums.lined
        for name, items in self.pool.dispatcher.assign():
            self._tell(here)
            step, attempt, _ = items[0]
            shards = [item.shard for item in items if isinstance(item, Shard)]
            if here:
                self.pool.call(name, items, "compute_here", self._sums.published, step, attempt, shards)
                continue
            first, *others = self._sums.broadcast
            lanes = self._lanes.of(shards)
            compute = self.pool.actor(name).compute.options(num_returns=2 + len(others) + len(lanes))
            receipt, *sent = compute.remote(first, step, attempt, shards, *others, *lanes)
            self.pool.expect(receipt, name, items, sent)

    def _tell(self, here: bool) -> None:
        """Say by which way it goes from now on, whenever that changes."""
        by = "lines" if here else "Ray"
        if self._transport is None or self._transport.by != by:
            self._transport = Transport(by, "all of them are on this machine" if here else self._why_by_ray())
            self.say(f"workers and the aggregator talk by {by}: {self._transport.why}")

    def _why_by_ray(self) -> str:
        """The first reason why there are no lines that a person can do something about."""
        outer = self.config.outer
        carries = "outer.local" if outer.local else f"outer.compression={outer.compression}"
        return (
            self.pool.why_by_ray()
            or (f"{carries} carries something from step to step" if self._lanes.states else None)
            or self._sums.why_by_ray()
        )

    def finish(self, step: int) -> None:
        dispatcher = self.pool.dispatcher
        while dispatcher.open:
            preemption.check()
            for came in self.pool.events():
                self._take(step, came)
            if not dispatcher.open:
                lost = self._gathered(step)
                dispatcher.add(Shard(step, self._attempt, shard) for shard in sorted(lost))
            if not dispatcher.open and self._exceeding:
                self._recomputed += self.config.lanes
                self._sums.redo(step, self._attempt, self._exceeding)
                self._attempt += 1
                self._open(step, range(self.config.lanes))
            self._hand_out()

    def _gathered(self, step: int) -> set[int]:
        """Shards whose sums were lost or damaged on their node."""
        gone, damaged = self._sums.gather(step, self._attempt)
        self._duplicates += len(damaged)
        self._damages += bool(damaged)
        if self._damages > 1:
            raise AggregatorLost(f"step {step}: shards {sorted(damaged)} did not reach their node's sum whole, twice")
        self._discount(gone | damaged)
        return gone | damaged

    def _take(self, step: int, came: Came) -> None:
        """Count a worker's sum of some shards; all of it or, where some of them count already, nothing."""
        dispatcher, receipt = self.pool.dispatcher, came.value
        items = [item for item in came.items if isinstance(item, Shard) and item in dispatcher.open]
        if len(items) < len(came.items):
            self._drop(came)
            return
        assert isinstance(receipt, Receipt), "the answer to shards"
        if not receipt.current:
            raise AggregatorLost(f"step {step}: the aggregator's parameters are of another step")
        self._exceeding.update(receipt.exceeding)
        pieces = len(self._sums.pieces)
        self._lanes.computed((item.shard for item in items), came.sent[pieces:])
        for item in items:
            if item.shard not in receipt.not_finite:
                dispatcher.done(came.worker, item)
                self._at[item.shard] = came.worker
                continue
            self._recomputed += 1
            self._failures[item] = self._failures.get(item, 0) + 1
            if self._failures[item] > 1:
                raise NotFinite(step, item.shard)
            dispatcher.again(came.worker, item)
        if receipt.summed:
            self._shards[came.worker] += len(receipt.summed)
            node = self.pool.nodes[came.worker]
            self._sums.add(items[0].step, items[0].attempt, receipt, came.sent[:pieces], node)

    def _drop(self, came: Came) -> None:
        """Something of it counts already; what does not is computed again."""
        dispatcher = self.pool.dispatcher
        self._duplicates += sum(item not in dispatcher.open for item in came.items)
        for item in came.items:
            dispatcher.again(came.worker, item)

    def _discount(self, shards: Iterable[int]) -> None:
        """Shards of this step that are computed again, because their sums were lost on their way."""
        for shard in shards:
            self._shards[self._at[shard]] -= 1
            self._recomputed += 1

    def _near(self, item: Item) -> str | None:
        """The worker that has what a lane carries, where lanes carry something."""
        return self._at.get(item.shard) if self._lanes.states and isinstance(item, Shard) else None

    def _left(self, name: str) -> Sequence[Item]:
        """What is computed again because a worker is gone."""
        self._sums.hand_over()
        lost = self.pool.dispatcher.leave(name)
        self._recomputed += sum(isinstance(item, Shard) for item in lost)
        return lost

    def apply(self, step: int) -> Later:
        applied, attempt = self._sums.apply(step), self._attempt
        self._lanes.advance()

        def later() -> Report:
            report = applied()
            if report.missing:
                report = self._mended(step, attempt, report.missing)
            self._lanes.settle()
            self.timeline.add(AGGREGATOR, report.spans)
            self._duplicates += report.duplicates
            return report

        return later

    def _mended(self, step: int, attempt: int, missing: Sequence[int]) -> Report:
        """The outer step, once the shards are computed again whose sums did not reach the aggregators whole.

        Nothing has moved. The next step may have begun: it begins again.
        """
        self.say(f"step {step}: a sum was damaged or lost on its way; shards {[*missing]} are computed again")
        self.pool.forget()  # shards of the next step, for which there was no θ
        self._lanes.back()
        self._attempt = attempt
        if len(self._sums.pieces) > 1:  # some have what others miss: all of it anew
            self._duplicates += len(missing)  # which the pieces forget
            self._sums.redo(step, attempt, ())
            self._attempt, missing = attempt + 1, range(self.config.lanes)
        self._discount(missing)
        self._open(step, missing)
        try:
            self.finish(step)
        except NotFinite as problem:  # it was finite before
            raise AggregatorLost(
                f"step {step}: shard {problem.shard} is not the same when it is computed again"
            ) from None
        report = self._sums.apply(step)()
        if report.missing:
            raise AggregatorLost(f"step {step}: shards {report.missing} did not reach the aggregator whole, twice")
        self._lanes.advance()
        if self._begun > step:
            self.begin(self._begun)
        return report

    def snapshot(self) -> Callable[[], Snapshot]:
        taken, lanes = self._sums.snapshot(), list(self._lanes.states)

        def later() -> Snapshot:
            from ray.exceptions import RayError

            try:
                return taken()._replace(lanes=tuple(self.ray.get(lanes)))
            except RayError as error:
                raise aggregator_lost(error) from error

        return later

    def restart(self, snapshot: Snapshot | None) -> None:
        self.pool.forget()  # what they hold waits for parameters that are lost with the aggregator
        self._sums.end()
        self._take_lanes(snapshot)
        self._sums.start(snapshot)

    # --- the rest ------------------------------------------------------------

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]:
        current = self._current() if values is None else values
        return judge(self.pool, current, judged, split, episodes, self._drop)

    def _current(self) -> np.ndarray:
        """θ and state as they are now, one flat buffer."""
        parts = self._sums.values()
        return assembled(self._sums.pieces, parts, sum(part.size for part in parts))

    @property
    def workers(self) -> int:
        return self.pool.size

    def counts(self) -> Counts:
        return Counts(self.pool.by_process(self._shards), self._recomputed, self._duplicates, None, self._transport)

    def close(self) -> None:
        self.pool.close()
        self._sums.end()
        if self._ours:
            disconnect()
