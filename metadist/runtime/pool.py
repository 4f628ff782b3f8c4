"""The workers of a run as Ray actors: placed, admitted, replaced when they die, and what they were asked.

What is asked, and what becomes of the answers, is the strategy's (`on_ray.py`, `asynchronous.py`).
"""

import math
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from metadist.config import Config
from metadist.engine.fingerprint import differences
from metadist.errors import ClusterError, MetadistError
from metadist.runtime import worker
from metadist.runtime.aggregator import Broadcast
from metadist.runtime.cluster import first_line, free, reserved, room
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.line import PROBE, Address, Line, Reached, heard
from metadist.runtime.runtime import AggregatorLost, Say
from metadist.runtime.sharing import Gone, Outbox, Published, Shared, Space, Spaces
from metadist.runtime.timeline import Timeline
from metadist.runtime.worker import Floats, Introduction, Receipt
from metadist.spans import now
from metadist.tracking.log import concerning

WAITING = 10.0
"""Seconds between two lines about what is waited for, and those for workers that the run can begin without."""

LONGEST = 60.0
"""Seconds that an open call holds up the account of where the time went."""

LOOKS = 0.2
"""Seconds between two looks at what comes by Ray, while answers come by lines."""

MOST_DEATHS_IN_A_ROW = 5
"""Workers that may die one after the other before any of them finishes anything."""


class Shard(NamedTuple):
    """A shard of a meta-step. attempt: of a step that is done again with coarser exponents; of async, of a shard."""

    step: int
    attempt: int
    shard: int


class Judgement(NamedTuple):
    """Some tasks of an evaluation."""

    evaluation: str
    first: int
    tasks: int


Item = Shard | Judgement


class Asked(NamedTuple):
    """A call that a worker has not answered yet; sent: what of its results does not come here; at: since when."""

    worker: str
    items: tuple[Item, ...]
    sent: Sequence[Any]
    at: float


class Came(NamedTuple):
    """The answer to a call."""

    worker: str
    items: tuple[Item, ...]
    value: Any
    sent: Sequence[Any]


class Worker(Reached, worker.Worker):
    """As an actor. Ray Client calls nothing but methods of the actor's class."""

    def introduced(self, probe: Shared | None = None) -> tuple[Introduction, str, Address | None]:
        """Who it is, the node it runs on, and where a line to it begins, if it can read the driver's memory as well."""
        import ray

        self.open()
        return self.introduce(), ray.get_runtime_context().get_node_id(), self.listen() if self._reads(probe) else None

    def _reads(self, probe: Shared | None) -> bool:
        if probe is None:
            return False
        try:
            head, _ = self._spaces.read(probe)
        except Gone:
            return False
        return bool(head[0] == PROBE)

    def open(self) -> None:
        """Ready for what comes by the line."""
        self._spaces, self._outbox = Spaces(), Outbox()
        self._first: tuple[int, Sequence[int]] = -1, ()
        self._ahead = deque[tuple[int, int]]()

    def compute_here(
        self, published: Published, step: int, attempt: int, shards: Sequence[int]
    ) -> tuple[Receipt, Shared | None]:
        """The same as `compute`, from θ in memory that is shared, into memory that is."""
        late = Receipt(os.getpid(), (), (), (), False, ())
        self._look_ahead(step, shards)
        try:
            head, values = self._spaces.read(published.values)
        except Gone:  # the aggregator
            return late, None
        exponents = np.frombuffer(published.exponents, np.int64)
        blueprint, broadcast = self.engine.blueprint, Broadcast(*published[:2], values, exponents)
        own = blueprint.compression is None and self.engine.programs is None  # else what is sent lies elsewhere
        space = self._outbox.place(step, 8 * blueprint.sums.total) if own else None
        into = None if space is None else space.array("<i8", blueprint.sums.total)
        try:
            receipt, q = self.compute(broadcast, step, attempt, shards, into=into)
        except Exception:
            if head[0] != published.step:
                return late, None
            raise
        if head[0] != published.step:  # one that was stopped for two steps; nobody waits for its answer
            receipt = late
        if not receipt.summed:
            if space is not None:
                space.head[0] = Outbox.READ
            return receipt, None
        if space is None:
            space = self._outbox.place(step, q.nbytes)
            space.array(q.dtype.str, len(q))[:] = q
        return receipt, space.shared(q.dtype.str, len(q))

    def _look_ahead(self, step: int, shards: Sequence[int]) -> None:
        """Who began two steps with the same shards will most likely begin the next one with them."""
        before, those = self._first
        if step != before:
            self._first = step, shards
            self._ahead = deque((step + 1, shard) for shard in shards if shards == those)

    def spare(self) -> None:
        """Draw the tasks of what comes next, while the aggregator takes the outer step."""
        while self._ahead and not self.more:
            self.engine.sample_ahead(*self._ahead.popleft())

    def served(self) -> None:
        """Let go of what is the dead's."""
        self._spaces.prune()


class Pool:
    """`cluster.workers` of them, by name: worker-0, worker-1, …

    leave: told of a worker that is gone, returns what is computed again. near: the worker that has what an item
    needs, if one does.
    """

    def __init__(
        self,
        ray: Any,
        config: Config,
        paths: Sequence[str],
        say: Say,
        leave: Callable[[str], Sequence[Item]],
        near: Callable[[Item], str | None] | None = None,
    ) -> None:
        self.ray, self.config, self.paths, self.say = ray, config, paths, say
        self.dispatcher: Dispatcher[Item] = Dispatcher(config.cluster.backup, near=near)
        self.actors: dict[str, Any] = {}
        self.asked: dict[Any, Asked] = {}
        self.lines: dict[str, Line] = {}
        self._lines_wanted = config.cluster.lines and config.cluster.strategy == "aggregator"
        self._probe: Space | None = None
        self._told: dict[tuple[str, int], Asked] = {}
        self._looked = 0.0
        self.pids: dict[str, int] = {}
        self.nodes: dict[str, str] = {}
        self.called: dict[str, str] = {}
        self.places: dict[str, str] = {}
        self.fingerprint: dict[str, str] = {}
        self.hardware: dict[str, Any] = {}
        self.timeline = Timeline(self._mark)
        self._leave = leave
        self._arriving: dict[Any, str] = {}
        self._born = self._deaths = 0
        self._alone_since: float | None = None
        self._complete = False
        self._group: Any = None
        self._places: list[int] = []
        self._place_of: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Workers that take part now."""
        return len(self.dispatcher.held)

    @property
    def lined(self) -> bool:
        """Whether there is a line to every one of them."""
        return bool(self.lines) and self.lines.keys() >= self.dispatcher.held.keys()

    def why_by_ray(self) -> str | None:
        """What keeps one of them from being called by a line, in words."""
        if not self.config.cluster.lines:
            return "cluster.lines=false"
        if not sys.platform.startswith("linux"):
            return "lines need Linux"
        name = next((name for name in self.dispatcher.held if name not in self.lines), None)
        if name is None:
            return None
        _, _, host = self.places[name].partition("@")
        if host != socket.gethostname():
            return f"worker {self.called[name]} is on another machine"
        return f"worker {self.called[name]} shares no memory with the driver (another container, another user)"

    def by_process(self, counts: Mapping[str, int]) -> dict[str, int]:
        """What is counted by worker, by the process that it was, the dead ones among them."""
        found: Counter[str] = Counter()
        for name, called in self.called.items():
            found[called] += counts.get(name, 0)
        return dict(found)

    # --- their life ----------------------------------------------------------

    def open(self) -> None:
        """Start the workers and wait for as many as the run needs."""
        self._place()
        for _ in range(self.config.cluster.most):
            self._hire()
        self._first_workers()
        self._complete = True

    def close(self) -> None:
        """End them, and give back their places."""
        for name in list(self.actors):
            self._dismiss(name)
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)

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
        self.actors[name] = self.ray.remote(Worker).options(**options).remote(self.config, self.paths)
        self._arriving[self.actors[name].introduced.remote(self._probed())] = name

    def _probed(self) -> Shared | None:
        """Memory of this process that whoever is to be called by a line can read; None where there are no lines."""
        if not self._lines_wanted or not sys.platform.startswith("linux"):
            return None
        if self._probe is None:
            self._probe = Space(0)
            self._probe.head[0] = PROBE
        return self._probe.shared("u1", 0)

    def _first_workers(self) -> None:
        """Wait for as many workers as the run needs, and some seconds for those that come with them."""
        cluster = self.config.cluster
        deadline, told = time.monotonic() + cluster.timeout, time.monotonic()
        enough = math.inf
        # Workers started together take part together, so that each has some of the first shards.
        while self.size < (wanted := max(cluster.least, room(self.ray, cluster))) and self._arriving:
            self.events()
            if self.size >= cluster.least:  # the rest of the room may be another run's
                enough = min(enough, time.monotonic())
            if time.monotonic() > min(deadline, enough + WAITING) and self.size >= 1:
                break
            if time.monotonic() > told + WAITING:
                told = time.monotonic()
                self.say(f"waiting for workers: {self.size} of {wanted} are there; {free(self.ray, cluster)}")
        if self.size < cluster.least and self._arriving:
            self.say(f"going on with {self.size} of {cluster.least} workers; others join when they can")

    def _expect_a_worker(self) -> None:
        """Refuse to wait for ever for a worker that nothing can start."""
        timeout = self.config.cluster.timeout
        if self.size:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > timeout:
            raise ClusterError(
                f"cluster.timeout: no worker was ready within {timeout:g} s; {free(self.ray, self.config.cluster)}"
            )

    def _arrived(self, name: str, introduction: Introduction, node: str, address: Address | None) -> None:
        """Admit a worker whose bits are the run's."""
        found = introduction.fingerprint | {"probe": introduction.probe}
        if not self.fingerprint:
            self.fingerprint, self.hardware = found, introduction.hardware
        told = differences(self.fingerprint, found)
        self.places[name] = f"{introduction.pid}@{introduction.host}"
        if told:
            self._dismiss(name)
            with concerning(self.places[name]):
                self.say(f"refused a worker on {introduction.host} (process {introduction.pid}): it has {told}")
            return
        self.nodes[name], self.pids[name] = node, introduction.pid
        # Hosts have process ids of their own: two workers may have the same.
        here = introduction.host == socket.gethostname()
        self.called[name] = f"{introduction.pid}" if here else f"{introduction.pid}@{introduction.host}"
        line = Line.to(self.ray, self.actors[name], address) if self._lines_wanted else None
        if line is not None:
            self.lines[name] = line
        self.dispatcher.join(name)
        self.timeline.join(self.called[name])
        if self._complete:
            with concerning(self.places[name]):
                self.say(f"worker {self.called[name]} joined; {self.size} workers now")

    def _dismiss(self, name: str) -> None:
        actor = self.actors.pop(name, None)
        if actor is not None:
            self._cut(name)
            self.ray.kill(actor)
            self._leave_place(name)

    def _cut(self, name: str) -> None:
        """Its line ends, if there is one."""
        if name in self.lines:
            self.lines.pop(name).close()

    def _leave_place(self, name: str) -> None:
        if name in self._place_of:
            self._places.append(self._place_of.pop(name))

    def _lost(self, name: str, reason: str) -> None:
        """A worker died: what it held is computed again, and another one is started."""
        if name not in self.actors:
            return
        del self.actors[name]
        self._cut(name)
        self._leave_place(name)
        self.timeline.leave(self.called.get(name, name))
        again = self._leave(name)
        self.asked = {ref: asked for ref, asked in self.asked.items() if asked.worker != name}
        self._told = {ticket: asked for ticket, asked in self._told.items() if asked.worker != name}
        self._deaths += 1
        if self._deaths >= MOST_DEATHS_IN_A_ROW:
            raise self._too_large() or ClusterError(
                f"{self._deaths} workers died one after the other; the last one: {reason}"
            )
        with concerning(self.places.get(name, name)):
            called = self.called.get(name, name)
            self.say(f"worker {called} died ({reason}); {len(again)} of its shards are computed again")
        self._hire()

    def _too_large(self) -> MetadistError | None:
        """A worker that is killed for memory says nothing: what a shard takes is measured where one would be."""
        from ray.exceptions import RayError

        cluster = self.config.cluster
        sharing = cluster.most if cluster.address == "local" else 1
        there = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "resources": cluster.resources, "max_retries": 0}
        asked = self.ray.remote(worker.misfitting).options(**there).remote(self.config, self.paths, sharing)
        try:
            found: MetadistError | None = self.ray.get(asked, timeout=cluster.timeout)
        except (RayError, TimeoutError):
            return None
        return found

    # --- calls and answers ---------------------------------------------------

    def actor(self, name: str) -> Any:
        """For a call by Ray."""
        if name in self.lines:
            self.lines[name].rest()
        return self.actors[name]

    def expect(self, ref: Any, worker: str, items: tuple[Item, ...], sent: Sequence[Any] = ()) -> None:
        """A worker was called by Ray; its answer will come in by `events`."""
        self.asked[ref] = Asked(worker, items, sent, now())

    def call(self, worker: str, items: tuple[Item, ...], method: str, *arguments: Any) -> None:
        """Call a worker by its line; the method answers with a value and what does not come here, or None."""
        self._told[worker, self.lines[worker].call(method, *arguments)] = Asked(worker, items, (), now())

    def _mark(self) -> float:
        """By then everything that was asked is answered."""
        asked = [*self.asked.values(), *self._told.values()]
        return max(now() - LONGEST, min((one.at for one in asked), default=now()))

    def forget(self) -> None:
        """Whatever is open or asked for: no answer to it counts."""
        self.dispatcher.drop()
        self.dispatcher.free()
        self.asked.clear()
        self._told.clear()

    def events(self) -> list[Came]:
        """Answers that came in, after a second at most; workers that came and went are seen to."""
        waiting = [*self.asked, *self._arriving]
        if not waiting and not self._told:
            raise ClusterError("no worker is left: each one was refused, because its bits differ from the run's")
        self._expect_a_worker()
        patience = min(1.0, self.dispatcher.wait())
        if not self._told:
            return self._from_ray(waiting, patience)
        patience = min(LOOKS, patience)
        came = self._from_lines(0.0 if self.asked else patience)
        if waiting and (self.asked or now() > self._looked + LOOKS):
            came += self._from_ray(waiting, patience if self.asked and not came else 0.0)
        return came

    def _from_lines(self, patience: float) -> list[Came]:
        """Answers by lines. A broken one is the death of a worker."""
        from ray.exceptions import RayTaskError

        names = {line: name for name, line in self.lines.items()}
        came = []
        for line in heard(names, patience):
            name = names[line]
            if name not in self.lines:
                continue  # it was lost while we looked at another answer
            try:
                answers = line.answers()
            except (EOFError, OSError):
                error = line.why()
                if isinstance(error, RayTaskError):
                    self._failed(name, error)
                self._lost(name, first_line(error))
                continue
            for ticket, (value, sent) in answers.items():
                asked = self._told.pop((name, ticket), None)
                if asked is not None:
                    came.append(self._came(asked._replace(sent=() if sent is None else (sent,)), value))
        return came

    def _from_ray(self, waiting: Sequence[Any], patience: float) -> list[Came]:
        """Answers by Ray, and workers that arrive."""
        from ray.exceptions import RayError, RayTaskError

        self._looked = now()
        ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=patience, fetch_local=True)
        came = []
        for ref in ready:
            asked, arriving = self.asked.pop(ref, None), self._arriving.pop(ref, None)
            name = asked.worker if asked else arriving
            if name is None:
                continue  # its worker was lost while we looked at another answer
            try:
                value = self.ray.get(ref)
            except RayTaskError as error:
                self._failed(name, error)
            except RayError as error:  # the worker died; or its answer did, with its node, or never fitted the memory
                self._lost(name, first_line(error))
                continue
            if asked is None:
                self._arrived(name, *value)
            else:
                came.append(self._came(asked, value))
        return came

    def _came(self, asked: Asked, value: Any) -> Came:
        if isinstance(value, Receipt | Floats):
            self.timeline.call(self.called[asked.worker], asked.at, value.spans, now())
        self._deaths = 0
        return Came(asked.worker, asked.items, value, asked.sent)

    def _failed(self, name: str, error: Any) -> NoReturn:
        """A worker lives, and what it was called for failed."""
        from ray.exceptions import RayError

        if isinstance(error.cause, MetadistError):
            raise error.cause from error
        if isinstance(error.cause, RayError):  # θ_t or a lane, its arguments
            what = f"what a worker was to compute from is lost with its process: {first_line(error.cause)}"
            raise AggregatorLost(what) from error
        with concerning(self.places.get(name, name)):
            raise error
