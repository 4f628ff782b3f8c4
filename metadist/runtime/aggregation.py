"""Where the sums of a step go: to one aggregator or several, Ray actors, straight or by way of a sum on each node.

`cluster.aggregators` cuts θ into pieces, each with an aggregator. With `cluster.sums: tree` the
workers' sums are added on their node first. No bit depends on either.

An only aggregator on the driver's machine is called by a line (`line.py`), and sums and θ are in shared memory, where
that is so of all workers too. On a cluster of the run's own, which ends with the driver, one of a small θ is no actor
but an object of the driver's: a message there and back takes longer than a small sum.

On a cluster that is not this run's own the aggregators are named and detached: they outlive the
driver, and one that resumes the run finds them. Without a driver they end after `cluster.linger`.
"""

import contextlib
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config
from metadist.engine.device import keep_all_memory
from metadist.engine.engine import Blueprint
from metadist.runtime import aggregator, combiner
from metadist.runtime.aggregator import Position, Report, Snapshot, Sum, joined
from metadist.runtime.cluster import first_line, on_one_machine, workers_on_a_host
from metadist.runtime.combiner import Gathered
from metadist.runtime.cut import Topology, cut, topology
from metadist.runtime.line import Address, Broken, Line, Reached
from metadist.runtime.runtime import AggregatorLost, Later, Say
from metadist.runtime.sharing import Board, Gone, Outbox, Published, Shared, Spaces
from metadist.runtime.watch import Watch, Watched
from metadist.runtime.worker import Receipt

NAMESPACE = "metadist"

TOGETHER, SMALL = 4, 1 << 23
"""So many sums, and so many bytes of them, wait here for the outer step, and go to the aggregator with it: added
together they go through memory once. More are added while others still compute."""


class Placed(NamedTuple):
    """What `add` is told of a sum, and where it lies."""

    step: int
    attempt: int
    shards: Collection[int]
    shared: Shared
    seal: int


class Aggregator(Watched, Reached, aggregator.Aggregator):
    """As an actor, or in the driver's process."""

    def __init__(self, linger: float | None, *arguments: Any, own_process: bool = True) -> None:
        if own_process:
            keep_all_memory()
        super().__init__(linger, *arguments)
        self._spaces, self._waiting = Spaces(), list[Placed]()
        self._board = Board(self.outer.flat.numpy().dtype.str, self.piece.values.total)

    def publish(self) -> Published:
        """θ_t in shared memory."""
        if not self._board.has(self.step):
            self.broadcast(self._board.place(self.step))
        return self._published()

    def _published(self) -> Published:
        return Published(self.step, self.attempt, self._board.publish(self.step), self.exponents.tobytes())

    def add_here(self, sums: Sequence[Placed]) -> None:
        """`add` by the line. What waits is added together."""
        self._waiting += sums
        if not self.more:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """A sum that died with its worker is missing when the step is to be taken."""
        waiting, self._waiting = self._waiting, []
        for (step, attempt), same in groupby(waiting, lambda one: one[:2]):
            sums, heads = list[Sum](), list[np.ndarray]()
            for one in same:
                with contextlib.suppress(Gone):
                    head, q = self._spaces.read(one.shared)
                    sums.append(Sum(one.shards, q, one.seal))
                    heads.append(head)
            self.add_all(step, attempt, sums)
            for head in heads:
                head[0] = Outbox.READ

    def redo_here(self, sums: Sequence[Placed], step: int, attempt: int, exceeding: Collection[int]) -> Published:
        """`redo` by the line, after `add_here`."""
        self._waiting += sums
        self._add_waiting()
        self.redo(step, attempt, exceeding)
        return self.publish()

    def apply_here(self, sums: Sequence[Placed], step: int) -> tuple[Report, Published]:
        """`apply` by the line, after `add_here`."""
        self._waiting += sums
        self._add_waiting()
        report = self.outer_step(step, out=self._board.place(self.step + 1))
        return report, self.publish() if report.missing else self._published()

    def served(self) -> None:
        """Add what waits to be added; let go of what is the dead's."""
        self._add_waiting()
        self._spaces.prune()


class Combiner(Watched, combiner.Combiner):
    """As an actor."""


class Aggregation:
    """The aggregators of a run, and the combiners of its nodes.

    run: a name by which a later driver finds them; None: they end with this one.
    """

    def __init__(self, ray: Any, config: Config, blueprint: Blueprint, run: str | None, say: Say) -> None:
        self.ray, self.config, self.say = ray, config, say
        self.blueprint = blueprint
        self._way = topology(config.cluster, blueprint, crowd(ray, config))
        self.pieces = cut(blueprint, self._way.aggregators)
        self._run = run if config.cluster.linger else None
        self._linger = config.cluster.linger if self._run is not None else None
        self._watch: Watch | None = None
        self._actors: list[Any] = []
        self._here: Aggregator | None = None
        self._broadcast: tuple[Any, ...] = ()
        self._published: Callable[[], Published] | None = None
        self._line: Line | None = None
        self._coming: Any = None
        self._held: list[Placed] = []
        self._spaces = Spaces()
        self._tree = self._way.tree
        self._combiners: dict[str, Any] = {}
        self._there: defaultdict[str, set[int]] = defaultdict(set)
        self._acks: list[Any] = []

    # --- their life ----------------------------------------------------------

    def adopt(self, snapshot: Snapshot | None) -> list[Report]:
        """Take over aggregators that outlived the run's last driver, if they are further than its checkpoint.

        Where their number is auto, as many as there are: for the last driver the rule may have been another.
        Returns the reports of the steps in between; none where there is nothing to take over.
        """
        first = snapshot.step if snapshot else 0
        reports: list[Report] = []
        for actors in self._left_behind():
            found = None if self._actors else self._positions(actors)
            if found is None or not self._fit(found, first):
                for actor in actors:
                    self.ray.kill(actor)
                continue
            self._actors, self.pieces = actors, cut(self.blueprint, len(actors))
            every = [[report for report in position.reports if report.step >= first] for position in found]
            reports = [_joined(parts) for parts in zip(*every, strict=True)]
        if self._actors:
            self._broadcast = tuple(actor.reopen.remote() for actor in self._actors)
            self._look_after_them()
        return reports

    def start(self, snapshot: Snapshot | None) -> None:
        """New aggregators, from a checkpoint or from initial θ."""
        self.pieces = cut(self.blueprint, self._way.aggregators)  # those that it took over may have been others
        shape, classes = self.blueprint.shape, self.blueprint.classes
        snapshot = snapshot and snapshot._replace(lanes=())
        if in_the_driver(self.config, self.blueprint, self._way):
            self._here = Aggregator(None, self.config, shape, snapshot, classes, own_process=False)
            return
        actor = self.ray.remote(Aggregator)
        # Names of their own each time: Ray gives a killed actor's name free only when its process is gone.
        together = f"{self._prefix}{uuid.uuid4().hex[:8]}"
        for piece in range(len(self.pieces)):
            options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
            if self._run is not None:
                options |= {"name": f"{together}-{piece}", "namespace": NAMESPACE, "lifetime": "detached"}
            made = actor.options(**options)
            built = (self.config, shape, snapshot, classes, piece, len(self.pieces))
            self._actors.append(made.remote(self._linger, *built))
        self._broadcast = tuple(actor.broadcast.remote() for actor in self._actors)
        self._look_after_them()

    def _look_after_them(self) -> None:
        if self.config.cluster.lines and len(self._actors) == 1 and not self._tree:
            self._coming = self._actors[0].listen.remote()
        self._watch = Watch(self.ray, self._everyone, self.config.cluster.silence, self._linger, self.say)

    def _everyone(self) -> list[Any]:
        return [*self._actors, *self._combiners.values()]

    def end(self) -> None:
        """End all of them."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for actor in self._everyone():
            self.ray.kill(actor)
        self._actors.clear()
        if self._line is not None:
            self._line.close()
        self._line = self._coming = self._published = self._here = None
        self._broadcast, self._spaces = (), Spaces()
        self._held.clear()
        self._combiners.clear()
        self._there.clear()
        self._acks.clear()

    @property
    def _prefix(self) -> str:
        return f"aggregator-{self._run}-"

    def _left_behind(self) -> list[list[Any]]:
        """Running aggregators of this run, whoever started them: those that were started together, by piece."""
        if self._run is None:
            return []
        known = self.ray.util.list_named_actors(all_namespaces=True)
        names = [one["name"] for one in known if one["namespace"] == NAMESPACE]
        together: defaultdict[str, dict[int, Any]] = defaultdict(dict)
        for name in sorted(name for name in names if name.startswith(self._prefix)):
            start, _, piece = name.rpartition("-")
            with contextlib.suppress(ValueError):  # it ended meanwhile
                together[start][int(piece)] = self.ray.get_actor(name, namespace=NAMESPACE)
        return [[actors[piece] for piece in sorted(actors)] for actors in together.values()]

    def _positions(self, actors: Sequence[Any]) -> list[Position] | None:
        from ray.exceptions import GetTimeoutError, RayError

        try:
            asked = [actor.position.remote() for actor in actors]
            found: list[Position] = self.ray.get(asked, timeout=self.config.cluster.silence)
        except (RayError, GetTimeoutError):
            return None
        return found or None

    def _fit(self, found: Sequence[Position], first: int) -> bool:
        """Whether they are at one step beyond `first` with no validation in between, nor the end: what these found
        died with the driver, so the run goes back to before them."""
        steps = {position.step for position in found}
        pieces = {len(found), *(position.pieces for position in found)}
        valid = pieces if self.config.cluster.aggregators == "auto" else {len(self.pieces)}
        if len(steps) != 1 or len(pieces) != 1 or pieces != valid:
            return False
        (step,) = steps
        every, last = self.config.eval.every, self.config.outer.steps
        missed = any(done == last or (every and done % every == 0) for done in range(first + 1, step + 1))
        kept = all([r.step for r in one.reports if r.step >= first] == list(range(first, step)) for one in found)
        return step > first and kept and not missed

    # --- θ -------------------------------------------------------------------

    @property
    def broadcast(self) -> tuple[Any, ...]:
        """References to θ_t, a piece each."""
        if not self._broadcast:
            self._rest()
            if self._here is not None:
                self._broadcast = (self.ray.put(self._here.broadcast()),)
                return self._broadcast
            self._broadcast = tuple(actor.broadcast.remote() for actor in self._actors)
        return self._broadcast

    @property
    def lined(self) -> bool:
        """Whether there is a line to the only aggregator, or none is needed. Raises AggregatorLost."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            address: Address | None = self._heard(lambda: self.ray.get(coming))
            self._line = Line.to(self.ray, self._actors[0], address)
        return self._here is not None or self._line is not None

    def why_by_ray(self) -> str:
        """What keeps the aggregator from being called by a line, in words."""
        if self._tree:
            return "sums are added on their node first (cluster.sums: tree)"
        if len(self._actors) > 1:
            return f"there are {len(self._actors)} aggregators (cluster.aggregators)"
        return "the aggregator shares no memory with the driver (another machine, container or user)"

    @property
    def published(self) -> Published:
        """θ_t in shared memory; waits until it is there. Raises AggregatorLost."""
        if self._published is None:
            self._published = self._by_line("publish")
        return self._published()

    def values(self) -> list[np.ndarray]:
        """θ_t and state, a flat buffer of each piece. Raises AggregatorLost."""
        if self._here is not None:
            return [self._here.broadcast().values]
        if self._published is not None:
            try:
                _, values = self._spaces.read(self.published.values)
            except Gone as error:
                raise AggregatorLost(f"the aggregator was lost: {error}") from error
            return [np.array(values)]
        return [found.values for found in self._heard(lambda: self.ray.get(list(self.broadcast)))]

    def _by_line(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Call the aggregator; calling what is returned waits for its answer, and gives it again."""
        if self._here is not None:
            found = getattr(self._here, method)(*arguments)
            return lambda: found
        line = self._line
        assert line is not None, "there is a line"
        ticket = line.call(method, *arguments)
        return cache(lambda: self._heard(lambda: line.answer(ticket)))

    def _rest(self) -> None:
        """Calls by Ray come after those by the line."""
        self.hand_over()
        if self._line is not None:
            self._heard(self._line.settle)

    def hand_over(self) -> None:
        """Have the sums added that are held, as where one who made them is gone: its memory is soon let go of."""
        if self._here is not None:
            self._here.add_here(self._handed_over())
            self._here.served()
        elif self._line is not None and self._held:
            self._line.tell("add_here", self._handed_over())

    def _handed_over(self) -> list[Placed]:
        """The sums that were held, once."""
        held, self._held = self._held, []
        return held

    def _heard(self, answer: Callable[[], Any]) -> Any:
        """What an aggregator answers; a dead one is AggregatorLost."""
        from ray.exceptions import RayError

        try:
            return answer()
        except Broken as error:
            raise AggregatorLost(f"the aggregator was lost: {error}") from error
        except RayError as error:
            raise aggregator_lost(error) from error

    # --- a step --------------------------------------------------------------

    def add(self, step: int, attempt: int, receipt: Receipt, sums: Sequence[Any], node: str) -> None:
        """Send the sums of a receipt's shards, one reference for each piece, on their way."""
        if self._tree:
            if node not in self._combiners:
                self._combiners[node] = self._combiner(node)
            self._there[node].update(receipt.summed)
            self._combiners[node].add.remote(step, attempt, receipt.summed, receipt.seals, *sums)
        else:
            self._send(step, attempt, receipt.summed, receipt.seals, sums)

    def _send(
        self, step: int, attempt: int, shards: Collection[int], seals: Sequence[int], sums: Sequence[Any]
    ) -> None:
        # What one driver calls runs in order, by a line and, after a rest, by Ray: this is counted before `apply`.
        if isinstance(sums[0], Shared) and self.lined:
            self._held.append(Placed(step, attempt, shards, sums[0], seals[0]))
            if len(self._held) > TOGETHER and sum(one.shared.bytes for one in self._held) > SMALL:
                self.hand_over()
            return
        self._rest()
        if self._here is not None:
            from ray.exceptions import ObjectLostError, RayError

            try:
                self._here.add(step, attempt, shards, self.ray.get(sums[0]), seals[0])
            except ObjectLostError:  # the report says which shards are missing
                pass
            except RayError as error:
                raise aggregator_lost(error) from error
            return
        for actor, one, seal in zip(self._actors, sums, seals, strict=True):
            self._acks.append(actor.add.remote(step, attempt, shards, one, seal))

    def gather(self, step: int, attempt: int) -> tuple[set[int], set[int]]:
        """When all shards are sent: bring the sums of the nodes to the aggregators.

        Returns shards whose sums were lost with a node, and those that a node did not count, as they were damaged.
        """
        from ray.exceptions import RayError

        asked = {}
        for node in self._there:
            collect = self._combiners[node].collect.options(num_returns=1 + len(self.pieces))
            asked[node] = collect.remote(step, attempt, len(self.pieces))
        lost, damaged = set[int](), set[int]()
        for node, (told, *sums) in asked.items():
            expected = self._there.pop(node)
            try:
                gathered: Gathered = self.ray.get(told)
            except RayError as error:
                self.say(f"the sum of a node was lost ({first_line(error)}); its shards are computed again")
                del self._combiners[node]
                lost |= expected
                continue
            if missing := expected.difference(gathered.shards):
                self.say(f"step {step}: sums were damaged on their way; shards {sorted(missing)} are computed again")
                damaged |= missing
            if gathered.shards:
                self._send(step, attempt, gathered.shards, gathered.seals, sums)
        return lost, damaged

    def redo(self, step: int, attempt: int, exceeding: Iterable[int]) -> None:
        """Begin the step again with coarser exponents."""
        again = step, attempt, sorted(exceeding)
        if self._published is not None:
            self._published, self._broadcast = self._by_line("redo_here", self._handed_over(), *again), ()
        elif self._here is not None:
            self._here.redo(*again)
            self._broadcast = ()
        else:
            self._broadcast = tuple(actor.redo.remote(*again) for actor in self._actors)

    def apply(self, step: int) -> Later:
        """Take the outer step; its report may be waited for. Where it says that shards are missing, none was taken."""
        acks, self._acks = self._acks, []
        if self._published is not None:
            both = self._by_line("apply_here", self._handed_over(), step)
            self._published, self._broadcast = (lambda: both()[1]), ()
            return lambda: self._report(step, acks, lambda: both()[0])
        if self._here is not None:
            told, self._broadcast = self._here.outer_step(step), ()
            return lambda: told
        squares = [actor.squares.remote(step) for actor in self._actors] if len(self._actors) > 1 else []
        applied = [actor.apply.options(num_returns=2).remote(step, *squares) for actor in self._actors]
        self._broadcast = tuple(broadcast for _, broadcast in applied)
        return lambda: self._report(step, acks, lambda: _joined(self.ray.get([report for report, _ in applied])))

    def _report(self, step: int, acks: Sequence[Any], answer: Callable[[], Report]) -> Report:
        """Wait for it, and for the answers to what was added by Ray."""
        from ray.exceptions import ObjectLostError, RayError, RayTaskError

        try:
            try:
                self.ray.get(acks)
            except RayTaskError as error:  # a sum went with its host: the report says which shards are missing
                if not isinstance(error.cause, ObjectLostError):
                    raise
            return answer()
        except RayError as error:
            raise aggregator_lost(error, f"step {step}: ") from error

    def snapshot(self) -> Callable[[], Snapshot]:
        """The state between two steps; calling what is returned waits for it."""
        self._rest()
        if self._here is not None:
            whole = self._here.snapshot()
            return lambda: joined(self.pieces, [whole])
        taken = [actor.snapshot.remote() for actor in self._actors]

        def later() -> Snapshot:
            from ray.exceptions import RayError

            try:
                return joined(self.pieces, self.ray.get(taken))
            except RayError as error:
                raise aggregator_lost(error) from error

        return later

    def _combiner(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return self.ray.remote(Combiner).options(num_cpus=0, max_restarts=0, scheduling_strategy=there).remote(None)


def in_the_driver(config: Config, blueprint: Blueprint, way: Topology) -> bool:
    """Whether the aggregator is an object of the driver's: it would end with it anyhow, and all that is added to a
    step, if every shard is sent by itself, waits for the outer step."""
    together = max(TOGETHER, config.lanes) * 8 * blueprint.sums.total <= SMALL
    return together and config.cluster.address == "local" and _lines(config) and way == Topology()


def _lines(config: Config) -> bool:
    """Whether there may be any."""
    return config.cluster.lines and not config.outer.remembers and sys.platform.startswith("linux")


def crowd(ray: Any, config: Config) -> float:
    """Of a run's workers on a host, for the rule of auto (`cut.py`); 0: all on the driver's machine."""
    if config.cluster.address == "local" or (_lines(config) and on_one_machine(ray, config.cluster)):
        return 0
    return workers_on_a_host(ray, config.cluster)


def _joined(reports: Sequence[Report]) -> Report:
    """The report of a step from those of all pieces; the first has the scalars."""
    return reports[0]._replace(
        finite=all(report.finite for report in reports),
        missing=tuple(sorted({shard for report in reports for shard in report.missing})),
        bytes=sum(report.bytes for report in reports),
    )


def aggregator_lost(error: Exception, where: str = "") -> Exception:
    """What a failed call to the aggregator means: it died; or it has a defect, and would have it again."""
    from ray.exceptions import RayError, RayTaskError

    defect = isinstance(error, RayTaskError) and not isinstance(error.cause, RayError)
    return error if defect else AggregatorLost(f"{where}the aggregator was lost: {first_line(error)}")
