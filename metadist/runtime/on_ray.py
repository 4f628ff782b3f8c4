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
from metadist.engine.fingerprint import differences
from metadist.errors import ClusterError, MetadistError
from metadist.runtime import preemption
from metadist.runtime.aggregator import Aggregator, Report, Snapshot
from metadist.runtime.cluster import check_resources, connect, disconnect, reserved, room
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.runtime import AggregatorLost, Counts, Later, NotFinite, Say
from metadist.runtime.worker import Introduction, Receipt, Worker
from metadist.tasks.samplers import training_tasks

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

    def __init__(self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, say: Say) -> None:
        self.config, self.say = config, say
        self.paths = [str(table.path) for table in tables]
        tasks = training_tasks(config, tables, "cpu")
        self._shape, self._classes = tasks.shape, tasks.classes
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
        self._complete = False
        self._group: Any = None
        self._places: list[int] = []
        self._place_of: dict[str, int] = {}
        self._dispatcher: Dispatcher[Item] = Dispatcher(config.cluster.backup)
        self._size = config.shard
        self._per_step = config.task.meta_batch // config.shard
        try:
            check_resources(self.ray, config.cluster)
            self._start_aggregator(snapshot)
            self._place()
            for _ in range(config.cluster.most):
                self._hire()
            self._first_workers()
            self._complete = True
        except BaseException:
            self.close()
            raise

    def _start_aggregator(self, snapshot: Snapshot | None) -> None:
        actor = self.ray.remote(Aggregator).options(num_cpus=0, max_restarts=0)
        self._aggregator = actor.remote(self.config, self._shape, snapshot, self._classes)
        self._broadcast = self._aggregator.broadcast.remote()

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
                self.say(f"waiting for workers: {self.workers} of {wanted} are there; {self._free()}")
        if self.workers < cluster.least and self._arriving:
            self.say(f"going on with {self.workers} of {cluster.least} workers; others join when they can")

    def _free(self) -> str:
        """What a worker needs, beside what nobody has reserved."""
        free = self.ray.available_resources()
        needs = {kind: each for kind, each in reserved(self.config.cluster).items() if each}
        return ", ".join(f"each needs {each:g} {kind}, {free.get(kind, 0):g} are free" for kind, each in needs.items())

    def _expect_a_worker(self) -> None:
        """Refuse to wait for ever for a worker that nothing can start."""
        timeout = self.config.cluster.timeout
        if self._dispatcher.held:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > timeout:
            raise ClusterError(f"cluster.timeout: no worker was ready within {timeout:g} s; {self._free()}")

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
        lost = self._dispatcher.leave(name)
        self._recomputed += sum(isinstance(item, Shard) for item in lost)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != name}
        self._deaths += 1
        if self._deaths >= MOST_DEATHS_IN_A_ROW:
            raise ClusterError(f"{self._deaths} workers died one after the other; the last one: {reason}")
        self.say(f"worker {self._called.get(name, name)} died ({reason}); {len(lost)} of its shards are computed again")
        self._hire()

    # --- handing out and taking in -------------------------------------------

    def _hand_out(self, judged: tuple[Any, Config, str] | None = None) -> None:
        for name, items in self._dispatcher.assign():
            actor = self._actors[name]
            together = [item for item in items if isinstance(item, Shard)]
            if together:
                step, attempt, shards = together[0].step, together[0].attempt, [item.shard for item in together]
                receipt, q = actor.compute.options(num_returns=2).remote(self._broadcast, step, attempt, shards)
                self._calls[receipt] = (name, items, q)
            for item in items:
                if isinstance(item, Judgement):
                    assert judged is not None
                    found = actor.judge.remote(*judged, item.first, item.tasks)
                    self._calls[found] = (name, (item,), None)

    def _events(self) -> list[tuple[str, tuple[Item, ...], Any, Any]]:
        """Results that came in, after a second at most: (worker, items, receipt or judgement, the sum's reference)."""
        from ray.exceptions import RayActorError, RayError, RayTaskError

        waiting = [*self._calls, *self._arriving]
        if not waiting:
            raise ClusterError("no worker is left: each one was refused, because its bits differ from the run's")
        self._expect_a_worker()
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
                if isinstance(error.cause, RayError):  # θ_t, its argument, was lost with the aggregator
                    raise AggregatorLost(f"the aggregator was lost: {_first_line(error.cause)}") from error
                raise
            except RayActorError as error:
                self._arriving.pop(ref, None)
                self._lost(name, _first_line(error))
                continue
            except RayError as error:  # the result was lost with its node, or never fitted the memory
                self._arriving.pop(ref, None)
                self._lost(name, _first_line(error))
                continue
            if ref in self._arriving:
                del self._arriving[ref]
                self._arrived(name, value)
            else:
                _, items, q = self._calls.pop(ref)
                results.append((name, items, value, q))
                self._deaths = 0
        return results

    # --- a step --------------------------------------------------------------

    def begin(self, step: int) -> None:
        self._acks: list[Any] = []
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
            for name, items, receipt, q in self._events():
                if isinstance(receipt, Receipt):
                    self._take(step, name, [item for item in items if isinstance(item, Shard)], receipt, q)
            if not self._dispatcher.open and self._exceeding:
                self._recomputed += self._per_step
                self._broadcast = self._aggregator.redo.remote(step, self._attempt, sorted(self._exceeding))
                self._attempt += 1
                self._open_step(step)
            self._hand_out()

    def _take(self, step: int, name: str, items: list[Shard], receipt: Receipt, q: Any) -> None:
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
        for item in items:
            if item.shard not in receipt.not_finite:
                self._dispatcher.done(name, item)
                continue
            self._recomputed += 1
            self._failures[item] = self._failures.get(item, 0) + 1
            if self._failures[item] > 1:
                raise NotFinite(step, item.shard)
            self._dispatcher.again(name, item)
        if receipt.summed:
            self._shards[self._called[name]] += len(receipt.summed)
            # Calls from one driver to one actor run in order, so this is counted before `apply`.
            place = items[0].step, items[0].attempt
            added = self._aggregator.add.remote(*place, receipt.summed, q, receipt.seal)
            self._acks.append(added)

    def apply(self, step: int) -> Later:
        report, self._broadcast = self._aggregator.apply.options(num_returns=2).remote(step)
        acks, self._acks = self._acks, []

        def later() -> Report:
            from ray.exceptions import RayError

            try:
                self.ray.get(acks)
                found: Report = self.ray.get(report)
            except RayError as error:
                raise _aggregator_lost(error, f"step {step}: ") from error
            self._duplicates += found.duplicates
            if found.missing:
                raise AggregatorLost(f"step {step}: shards {found.missing} did not reach the aggregator whole")
            return found

        return later

    def snapshot(self) -> Callable[[], Snapshot]:
        taken = self._aggregator.snapshot.remote()

        def later() -> Snapshot:
            from ray.exceptions import RayError

            try:
                found: Snapshot = self.ray.get(taken)
            except RayError as error:
                raise _aggregator_lost(error) from error
            return found

        return later

    def restart(self, snapshot: Snapshot | None) -> None:
        self._dispatcher.drop()
        self._dispatcher.free()
        self._calls.clear()  # they wait for parameters that are lost with the aggregator
        self.ray.kill(self._aggregator)
        self._start_aggregator(snapshot)

    # --- evaluation ----------------------------------------------------------

    def judge(self, values: np.ndarray | None, judged: Config, split: str, episodes: int) -> dict[str, np.ndarray]:
        from ray.exceptions import RayError

        try:
            current = self.ray.get(self._broadcast).values if values is None else values
        except RayError as error:
            raise _aggregator_lost(error) from error
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

    # --- the rest ------------------------------------------------------------

    def counts(self) -> Counts:
        return Counts(dict(self._shards), self._recomputed, self._duplicates)

    def close(self) -> None:
        for name in list(self._actors):
            self._dismiss(name)
        if hasattr(self, "_aggregator"):
            self.ray.kill(self._aggregator)
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)
        if self._ours:
            disconnect()


def _aggregator_lost(error: Exception, where: str = "") -> Exception:
    """What a failed call to the aggregator means: it died; or it has a defect, and would have it again."""
    from ray.exceptions import RayError, RayTaskError

    defect = isinstance(error, RayTaskError) and not isinstance(error.cause, RayError)
    return error if defect else AggregatorLost(f"{where}the aggregator was lost: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:  # Ray puts the cause last
        return lines[-1]
    return lines[0] if lines else type(error).__name__
