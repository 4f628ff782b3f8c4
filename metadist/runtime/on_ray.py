"""Workers and aggregator as Ray actors, and the driver's side of them.

The driver reads receipts only; a worker's sums go on to the aggregator unread. The next
step's shards are handed out while the aggregator still takes the outer step: they wait for
θ where they are, not here.
"""

import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.engine import blueprint
from metadist.engine.fingerprint import differences
from metadist.errors import ClusterError, MetadistError
from metadist.runtime import preemption
from metadist.runtime.aggregation import Aggregation, aggregator_lost, first_line
from metadist.runtime.aggregator import Report, Snapshot
from metadist.runtime.cluster import check_resources, connect, disconnect, free, reserved, room
from metadist.runtime.cut import assembled
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.runtime import AggregatorLost, Counts, Later, NotFinite, Say
from metadist.runtime.worker import Introduction, Receipt, Worker

WAITING = 10.0
"""Seconds between two lines about what is waited for, and those for workers that the run can begin without."""

MOST_DEATHS_IN_A_ROW = 5
"""Workers that may die one after the other before any of them finishes anything."""


class Shard(NamedTuple):
    """A shard of a meta-step; a step that is done again with coarser exponents is a new attempt."""

    step: int
    attempt: int
    shard: int


class Judgement(NamedTuple):
    """Some tasks of an evaluation."""

    evaluation: int
    first: int
    tasks: int


Item = Shard | Judgement


class OnRay:
    """`cluster.workers` ≥ 1."""

    def __init__(
        self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, say: Say, run: str | None = None
    ) -> None:
        self.config, self.say = config, say
        self.paths = [str(table.path) for table in tables]
        self.step, self.earlier = snapshot.step if snapshot else 0, list[Report]()
        self.ray, self._ours = connect(config.cluster)
        self.fingerprint: dict[str, str] = {}
        self.hardware: dict[str, Any] = {}
        self.pids: dict[str, int] = {}
        self._called: dict[str, str] = {}
        self._actors: dict[str, Any] = {}
        self._arriving: dict[Any, str] = {}
        self._calls: dict[Any, tuple[str, tuple[Item, ...], Any]] = {}
        self._failures: dict[Item, int] = {}
        self._shards: dict[str, int] = {}
        self._born = self._deaths = self._recomputed = self._duplicates = 0
        self._evaluations = 0
        self._alone_since: float | None = None
        self._asked: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._complete = False
        self._group: Any = None
        self._places: list[int] = []
        self._place_of: dict[str, int] = {}
        self._at: dict[int, str] = {}
        self._dispatcher: Dispatcher[Item] = Dispatcher(config.cluster.backup, near=self._near)
        self._size = config.shard
        self._per_step = config.lanes
        # A lane's state is this driver's: it dies with it, and so does the step that the aggregator is at.
        run = None if config.cluster.address == "local" or config.outer.remembers else run
        self._sums = Aggregation(self.ray, config, blueprint(config, tables), run, say)
        try:
            check_resources(self.ray, config.cluster)
            self._take_over_or_start(snapshot)
            self._place()
            for _ in range(config.cluster.most):
                self._hire()
            self._first_workers()
            self._complete = True
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

    # --- workers -------------------------------------------------------------

    @property
    def workers(self) -> int:
        return len(self._dispatcher.held)

    def _place(self) -> None:
        """Reserve the places of as many workers as the run waits for, where `cluster.placement` says how."""
        cluster = self.config.cluster
        if cluster.placement != "any":
            bundle = {kind: each for kind, each in reserved(cluster).items() if each}
            strategy = {"spread": "SPREAD", "pack": "PACK"}[cluster.placement]
            self._group = self.ray.util.placement_group([bundle] * cluster.least, strategy)
            self._places = list(range(cluster.least))

    def _hire(self) -> None:
        """Start a worker; it joins when it has introduced itself, once the cluster has room for it."""
        name = f"worker-{self._born}"
        self._born += 1
        cluster = self.config.cluster
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "resources": cluster.resources, "max_restarts": 0,
        }  # fmt: skip
        if self._places:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            self._place_of[name] = self._places.pop(0)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, self._place_of[name])
        self._actors[name] = self.ray.remote(Worker).options(**options).remote(self.config, self.paths)
        if cluster.sums == "tree":
            self._asked[name] = self._actors[name].__ray_call__.remote(_node)
        self._arriving[self._actors[name].introduce.remote()] = name

    def _first_workers(self) -> None:
        """Wait for as many workers as the run needs, and some seconds for those that come with them."""
        cluster = self.config.cluster
        deadline, told = time.monotonic() + cluster.timeout, time.monotonic()
        enough = math.inf
        # Workers started together take part together, so that each has some of the first shards.
        while self.workers < (wanted := max(cluster.least, room(self.ray, cluster))) and self._arriving:
            self._events()
            if self.workers >= cluster.least:  # the rest of the room may be another run's
                enough = min(enough, time.monotonic())
            if time.monotonic() > min(deadline, enough + WAITING) and self.workers >= 1:
                break
            if time.monotonic() > told + WAITING:
                told = time.monotonic()
                self.say(f"waiting for workers: {self.workers} of {wanted} are there; {free(self.ray, cluster)}")
        if self.workers < cluster.least and self._arriving:
            self.say(f"going on with {self.workers} of {cluster.least} workers; others join when they can")

    def _expect_a_worker(self) -> None:
        """Refuse to wait for ever for a worker that nothing can start."""
        timeout = self.config.cluster.timeout
        if self._dispatcher.held:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > timeout:
            raise ClusterError(
                f"cluster.timeout: no worker was ready within {timeout:g} s; {free(self.ray, self.config.cluster)}"
            )

    def _arrived(self, name: str, introduction: Introduction) -> None:
        """Admit a worker whose bits are the run's."""
        found = introduction.fingerprint | {"probe": introduction.probe}
        if not self.fingerprint:
            self.fingerprint, self.hardware = found, introduction.hardware
        told = differences(self.fingerprint, found)
        if told:
            self._dismiss(name)
            self.say(f"refused a worker on {introduction.host} (process {introduction.pid}): it has {told}")
            return
        if name in self._asked:
            self._nodes[name] = self.ray.get(self._asked.pop(name))
        self.pids[name] = introduction.pid
        # Hosts have process ids of their own: two workers may have the same.
        here = introduction.host == socket.gethostname()
        self._called[name] = f"{introduction.pid}" if here else f"{introduction.pid}@{introduction.host}"
        self._shards.setdefault(self._called[name], 0)
        self._dispatcher.join(name)
        if self._complete:
            self.say(f"worker {self._called[name]} joined; {self.workers} workers now")

    def _dismiss(self, name: str) -> None:
        actor = self._actors.pop(name, None)
        if actor is not None:
            self.ray.kill(actor)
            self._leave_place(name)

    def _leave_place(self, name: str) -> None:
        if name in self._place_of:
            self._places.append(self._place_of.pop(name))

    def _lost(self, name: str, reason: str) -> None:
        """A worker died: its shards are pending again, and another one is started."""
        if name not in self._actors:
            return
        del self._actors[name]
        self._leave_place(name)
        lost = self._given_back(name)
        self._recomputed += sum(isinstance(item, Shard) for item in lost)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != name}
        self._deaths += 1
        if self._deaths >= MOST_DEATHS_IN_A_ROW:
            raise ClusterError(f"{self._deaths} workers died one after the other; the last one: {reason}")
        self.say(f"worker {self._called.get(name, name)} died ({reason}); {len(lost)} of its shards are computed again")
        self._hire()

    def _given_back(self, name: str) -> list[Item]:
        """What is to be computed again, because a worker is gone."""
        return self._dispatcher.leave(name)

    # --- handing out and taking in -------------------------------------------

    def _hand_out(self, judged: tuple[Any, Config, str] | None = None) -> None:
        for name, items in self._dispatcher.assign():
            actor = self._actors[name]
            together = [item for item in items if isinstance(item, Shard)]
            if together:
                step, attempt, shards = together[0].step, together[0].attempt, [item.shard for item in together]
                first, *others = self._sums.broadcast
                lanes = self._lanes.of(shards)
                compute = actor.compute.options(num_returns=2 + len(others) + len(lanes))
                receipt, *sent = compute.remote(first, step, attempt, shards, *others, *lanes)
                self._calls[receipt] = (name, items, sent)
            for item in items:
                if isinstance(item, Judgement):
                    assert judged is not None
                    found = actor.judge.remote(*judged, item.first, item.tasks)
                    self._calls[found] = (name, (item,), None)

    def _events(self) -> list[tuple[str, tuple[Item, ...], Any, Any]]:
        """Results that came in, after a second at most.

        (worker, items, receipt or judgement, references to the sums and to the lanes afterwards)
        """
        from ray.exceptions import RayActorError, RayError, RayTaskError

        waiting = [*self._calls, *self._arriving]
        if not waiting:
            raise ClusterError("no worker is left: each one was refused, because its bits differ from the run's")
        self._expect_a_worker()
        self._sums.touch()
        patience = min(1.0, self._dispatcher.wait())
        ready, _ = self.ray.wait(waiting, num_returns=1, timeout=patience, fetch_local=True)
        results = []
        for ref in ready:
            name = self._arriving[ref] if ref in self._arriving else self._calls[ref][0] if ref in self._calls else None
            if name is None:
                continue  # its worker was lost while we looked at another result
            try:
                value = self.ray.get(ref)
            except RayTaskError as error:
                if isinstance(error.cause, MetadistError):
                    raise error.cause from error
                if isinstance(error.cause, RayError):  # θ_t or a lane, its arguments, was lost with where it was
                    what = "the aggregator or a lane" if self._lanes.states else "the aggregator"
                    raise AggregatorLost(f"{what} was lost: {first_line(error.cause)}") from error
                raise
            except RayActorError as error:
                self._arriving.pop(ref, None)
                self._lost(name, first_line(error))
                continue
            except RayError as error:  # the result was lost with its node, or never fitted the memory
                self._arriving.pop(ref, None)
                self._lost(name, first_line(error))
                continue
            if ref in self._arriving:
                del self._arriving[ref]
                self._arrived(name, value)
            else:
                _, items, sent = self._calls.pop(ref)
                results.append((name, items, value, sent))
                self._deaths = 0
        return results

    # --- a step --------------------------------------------------------------

    def begin(self, step: int) -> None:
        self._attempt = 0
        self._open_step(step)

    def _open_step(self, step: int) -> None:
        self._dispatcher.drop()
        self._failures.clear()
        self._exceeding: set[int] = set()
        self._dispatcher.add(Shard(step, self._attempt, shard) for shard in range(self._per_step))
        self._hand_out()

    def finish(self, step: int) -> None:
        while self._dispatcher.open:
            preemption.check()
            for name, items, receipt, sent in self._events():
                if isinstance(receipt, Receipt):
                    self._take(step, name, [item for item in items if isinstance(item, Shard)], receipt, sent)
            if not self._dispatcher.open:
                lost = self._sums.gather(step, self._attempt)
                self._recomputed += len(lost)
                self._dispatcher.add(Shard(step, self._attempt, shard) for shard in sorted(lost))
            if not self._dispatcher.open and self._exceeding:
                self._recomputed += self._per_step
                self._sums.redo(step, self._attempt, self._exceeding)
                self._attempt += 1
                self._open_step(step)
            self._hand_out()

    def _take(self, step: int, name: str, items: list[Shard], receipt: Receipt, sent: Sequence[Any]) -> None:
        """Count a worker's sum of some shards; all of it or, where some of them count already, nothing."""
        late = [item for item in items if item not in self._dispatcher.open]
        if late:
            self._duplicates += len(late)
            for item in items:
                self._dispatcher.again(name, item)
            return
        if not receipt.current:
            raise AggregatorLost(f"step {step}: the aggregator's parameters are of another step")
        self._exceeding.update(receipt.exceeding)
        sums, lanes = sent[: len(self._sums.pieces)], sent[len(self._sums.pieces) :]
        self._lanes.computed((item.shard for item in items), lanes)
        for item in items:
            if item.shard not in receipt.not_finite:
                self._dispatcher.done(name, item)
                self._at[item.shard] = name
                continue
            self._recomputed += 1
            self._failures[item] = self._failures.get(item, 0) + 1
            if self._failures[item] > 1:
                raise NotFinite(step, item.shard)
            self._dispatcher.again(name, item)
        if receipt.summed:
            self._shards[self._called[name]] += len(receipt.summed)
            self._sums.add(items[0].step, items[0].attempt, receipt, sums, self._nodes.get(name))

    def _near(self, item: Item) -> str | None:
        """The worker that has what a lane carries, where lanes carry something."""
        return self._at.get(item.shard) if self._lanes.states and isinstance(item, Shard) else None

    def apply(self, step: int) -> Later:
        applied = self._sums.apply(step)
        self._lanes.advance()

        def later() -> Report:
            report = applied()
            self._duplicates += report.duplicates
            return report

        return later

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
        self._dispatcher.drop()
        self._dispatcher.free()
        self._calls.clear()  # they wait for parameters that are lost with the aggregator
        self._sums.end()
        self._take_lanes(snapshot)
        self._sums.start(snapshot)

    # --- evaluation ----------------------------------------------------------

    def judge(self, values: np.ndarray | None, judged: Config, split: str, episodes: int) -> dict[str, np.ndarray]:
        from ray.exceptions import RayError

        try:
            current = self._current() if values is None else values
        except RayError as error:
            raise aggregator_lost(error) from error
        shared = self.ray.put(current)
        self._evaluations += 1
        self._dispatcher.drop()
        self._dispatcher.add(
            Judgement(self._evaluations, first, min(self._size, episodes - first))
            for first in range(0, episodes, self._size)
        )
        found: dict[int, dict[str, np.ndarray]] = {}
        self._hand_out((shared, judged, split))
        while self._dispatcher.open:
            for name, items, value, _ in self._events():
                for item in items:  # of a late shard there may be several
                    if self._dispatcher.done(name, item) and isinstance(item, Judgement):
                        found[item.first] = value
            self._hand_out((shared, judged, split))
        parts = [found[first] for first in sorted(found)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _current(self) -> np.ndarray:
        """θ and state as they are now, one flat buffer."""
        parts = [broadcast.values for broadcast in self.ray.get(list(self._sums.broadcast))]
        return assembled(self._sums.pieces, parts, sum(part.size for part in parts))

    # --- the rest ------------------------------------------------------------

    def counts(self) -> Counts:
        return Counts(dict(self._shards), self._recomputed, self._duplicates)

    def close(self) -> None:
        for name in list(self._actors):
            self._dismiss(name)
        self._sums.end()
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)
        if self._ours:
            disconnect()


def _node(_: Any) -> str:
    """In an actor: the node it runs on."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node
