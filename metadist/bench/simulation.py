"""A cluster of any size in simulated time: the classes that train, workers that only pass time.

The dispatcher, the aggregators of the pieces of θ, the combiners of the nodes and the cut of θ
are those of the runtime, with sums of a network so narrow that they cost nothing; what sums of
the real size would take, on the wire and in a processor, passes on the simulated clock. So do
shard times, replayed from measured ones with a heavy tail.

    worker ── receipt ─► driver ── add ─► (combiner of the node ─►) aggregators ── θ ─► nodes

What is served one after the other: the driver's calls, each node's wire in either direction, each
aggregator, each combiner. θ leaves an aggregator once for each node. (Ray may pass it on from node
to node, which would be quicker.)
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from metadist.config import Config
from metadist.engine.engine import Blueprint
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.combiner import Combiner
from metadist.runtime.cut import Topology, cut
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.pool import Shard

TAIL = 2.5
"""Exponent of the Pareto distribution that measured times are multiplied with: one of 300 shards takes ten times as
long as the quickest ones; the mean stays."""


class Costs(NamedTuple):
    """Seconds. shards: times to replay; call: of the driver's, for a call and its receipt;
    hop: until a message is there;
    add: of an element of a sum; copy: of one that a combiner writes for others to read; move: of an element, in the
    outer step; wire: of a byte."""

    shards: Sequence[float]
    call: float
    hop: float
    add: float
    copy: float
    move: float
    wire: float


class Found(NamedTuple):
    """Of a simulated run: meta-steps a second; bytes that reached the aggregators in a step; which share of the time
    the busiest aggregator (its processor or its wire) and the driver were busy."""

    steps: float
    bytes: float
    aggregator: float
    driver: float


@dataclass
class _Server:
    """Serves one after the other."""

    free: float = 0.0
    busy: float = 0.0

    def serve(self, at: float, seconds: float) -> float:
        """When something that arrives at some time is done."""
        self.free = max(self.free, at) + seconds
        self.busy += seconds
        return self.free


@dataclass
class _Piece:
    """An aggregator with its wires, and how large its sums and its part of θ would be."""

    aggregator: Aggregator
    sums: int
    values: int
    cpu: _Server = field(default_factory=_Server)
    inward: _Server = field(default_factory=_Server)
    outward: _Server = field(default_factory=_Server)


class Simulation:
    """One run. narrow: its config, with a network of few channels; real: the blueprint with as many tensors whose
    sizes count; workers stand on nodes of `each`."""

    def __init__(
        self, narrow: Config, shape: tuple[int, ...], real: Blueprint, topology: Topology, costs: Costs,
        workers: int, each: int = 8, seed: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.topology, self.costs = narrow, topology, costs
        self.now = 0.0
        self._node = {f"worker-{n}": n // each for n in range(workers)}
        self.nodes = range(math.ceil(workers / each))
        small, sizes = Blueprint(narrow, shape), cut(real, topology.aggregators)
        self.cuts = cut(small, topology.aggregators)
        self.pieces = [
            _Piece(Aggregator(narrow, shape, None, 0, number, len(sizes)), size.sums.total, size.values.total)
            for number, size in enumerate(sizes)
        ]
        self.dispatcher: Dispatcher[Shard] = Dispatcher(narrow.cluster.backup, clock=lambda: self.now)
        self.combiners = {node: Combiner() for node in self.nodes}
        self.driver, self.bytes = _Server(), 0
        self._combining = {node: _Server() for node in self.nodes}
        self._leaving = {node: _Server() for node in self.nodes}
        self._free: dict[str, float] = defaultdict(float)
        self._theta: dict[int, float] = dict.fromkeys(self.nodes, 0.0)
        self._there: defaultdict[int, set[int]] = defaultdict(set)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._random = np.random.default_rng(seed)
        self._q = np.arange(small.sums.total, dtype=np.int64)
        for name in self._node:
            self.dispatcher.join(name)

    def run(self, steps: int) -> Found:
        """From the end of the first of so many meta-steps to that of the last."""
        began = (0.0, 0, 0.0, 0.0)
        for step in range(steps):
            if step == 1:
                began = (self.now, self.bytes, self._busiest(), self.driver.busy)
            self._step(step)
        seconds = self.now - began[0]
        return Found(
            (steps - 1) / seconds,
            (self.bytes - began[1]) / (steps - 1),
            (self._busiest() - began[2]) / seconds,
            (self.driver.busy - began[3]) / seconds,
        )

    def _busiest(self) -> float:
        return max(server.busy for piece in self.pieces for server in (piece.cpu, piece.inward, piece.outward))

    # --- a step, in the order of `OnRay` ---------------------------------------

    def _step(self, step: int) -> None:
        self.dispatcher.add(Shard(step, 0, shard) for shard in range(self.config.lanes))
        self._hand_out()
        while self.dispatcher.open:
            overdue = self.now + self.dispatcher.wait()
            if self._events[0][0] > overdue:
                self.now = overdue
            else:
                self.now, _, happens = heapq.heappop(self._events)
                happens()
            self._hand_out()
        if self.topology.tree:
            self._gather(step)
        self._apply(step)

    def _hand_out(self) -> None:
        for name, items in self.dispatcher.assign():
            sent = self.driver.serve(self.now, self.costs.call / 2) + self.costs.hop
            node = self._node[name]
            # A call that waits for θ, or behind another one, begins when both are there.
            begins = max(sent, self._free[name], self._theta[node])
            ends = begins + sum(self._shard_time() for _ in items)
            self._free[name] = ends
            self._at(ends + self.costs.hop, partial(self._came, name, items, ends))

    def _shard_time(self) -> float:
        time = self.costs.shards[int(self._random.integers(len(self.costs.shards)))]
        return time * float(1 + self._random.pareto(TAIL)) * (TAIL - 1) / TAIL

    def _came(self, name: str, items: tuple[Shard, ...], ends: float) -> None:
        """A receipt: count what it is of, and send its sum on its way; a late one is dropped."""
        told = self.driver.serve(self.now, self.costs.call / 2)
        current = [item for item in items if item in self.dispatcher.open]
        if len(current) < len(items):
            for item in items:
                self.dispatcher.again(name, item)
            return
        for item in items:
            self.dispatcher.done(name, item)
        shards, step = [item.shard for item in items], items[0].step
        node = self._node[name]
        if self.topology.tree:
            sums = [piece.part(self._q) for piece in self.cuts]
            assert self.combiners[node].add(step, 0, shards, [sealed(one) for one in sums], *sums)
            elements = sum(piece.sums for piece in self.pieces)
            self._combining[node].serve(told + self.costs.hop, elements * self.costs.add)
            self._there[node].update(shards)
        else:
            self._send(step, shards, node, told, [piece.part(self._q) for piece in self.cuts])

    def _send(self, step: int, shards: Sequence[int], node: int, at: float, sums: Sequence[np.ndarray]) -> None:
        """From a node to every aggregator: over both wires, then added."""
        for piece, q in zip(self.pieces, sums, strict=True):
            size = 8 * piece.sums * self.costs.wire
            left = self._leaving[node].serve(at + self.costs.hop, size)
            there = piece.inward.serve(left - size, size)
            piece.cpu.serve(max(left, there), piece.sums * self.costs.add)
            self.bytes += 8 * piece.sums
            assert piece.aggregator.add(step, 0, shards, q, sealed(q)), "every shard is counted once"

    def _gather(self, step: int) -> None:
        for node, expected in self._there.items():
            asked = self.driver.serve(self.now, self.costs.call) + self.costs.hop
            gathered, *sums = self.combiners[node].collect(step, 0, len(self.pieces))
            assert set(gathered.shards) == expected, "nothing is lost here"
            elements = sum(piece.sums for piece in self.pieces)
            ready = self._combining[node].serve(asked, elements * self.costs.copy)
            self._send(step, gathered.shards, node, ready, sums)
        self._there.clear()

    def _apply(self, step: int) -> None:
        """The outer step of every piece, once all of them are complete; θ goes to every node."""
        told = self.driver.serve(self.now, self.costs.call * len(self.pieces)) + self.costs.hop
        squares = [piece.aggregator.squares(step) for piece in self.pieces] if len(self.pieces) > 1 else []
        complete = max(told, *(piece.cpu.free for piece in self.pieces))
        if squares:  # the pieces tell one another
            complete += self.costs.hop
        for piece in self.pieces:
            report, _ = piece.aggregator.apply(step, *squares)
            assert not report.missing
            moved = piece.cpu.serve(complete, piece.values * self.costs.move)
            for node in self.nodes:
                arrives = piece.outward.serve(moved, 4 * piece.values * self.costs.wire) + self.costs.hop
                self._theta[node] = max(self._theta[node], arrives)
        self.now = max(self.now, self.driver.free)

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, happens))
