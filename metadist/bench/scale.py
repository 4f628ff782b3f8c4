"""Many workers: what aggregation costs on one machine, and which way of the sums is right for how many workers.

The first part (`aggregation.py`) measures with Ray; without it, it is left out and that is said.
The second (`simulation.py`) goes past one machine in simulated time, from costs measured here:
shard times, the addition of a sum, the outer step. What a call costs and how quick the network
is are given: `CALL`, `HOP`, `WIRE`.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from metadist.algorithms import for_training
from metadist.bench import aggregation
from metadist.bench.aggregation import SIZES, Size, shard_seconds, shards_of
from metadist.bench.record import Row
from metadist.bench.simulation import Costs, Found, Simulation
from metadist.config import Config, resolve
from metadist.engine.device import keep_all_memory
from metadist.engine.engine import Blueprint
from metadist.engine.shard import vectorised
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.cut import Topology
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.pool import Shard
from metadist.tasks.episode import Episode, Examples

WORKERS = (1, 4, 16, 64, 256, 1024)
SHARDS = 2
"""Shards of a step for each worker: the meta-batch grows with them."""

NODE = 8
"""Workers of a node."""

STEPS = 4
"""Simulated meta-steps, the first one not counted."""

CALL, HOP, WIRE = 0.5e-3, 0.3e-3, 8 / 10e9
"""Seconds: the driver's, for a call of Ray's and its receipt; until a message is there; of a byte, at 10 Gbit/s."""

QUICKER = 50
"""How much quicker the shards of the third scenario are than those measured."""

TOPOLOGIES = (Topology(), Topology(tree=True), Topology(aggregators=4), Topology(tree=True, aggregators=4))


class Scenario(NamedTuple):
    """What is simulated: the network whose sizes count, and how long its shards take."""

    name: str
    size: Size
    costs: Costs


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some three minutes."""
    rows: list[Row] = []
    if importlib.util.find_spec("ray") is None:
        say("without Ray the cost of aggregation on one machine is not measured")
    else:
        rows += aggregation.rows(say)
    for scenario in scenarios(say):
        for workers in WORKERS:
            rows += simulated(scenario, workers, say)
    return [*rows, *dispatching(say)]


def scenarios(say: Callable[[str], None]) -> list[Scenario]:
    """Costs measured here."""
    _, half, fifty = SIZES
    quick, slow = shard_seconds(shards_of("omniglot-maml-5w1s"), 20, say), _resnet_seconds(fifty, 2)
    say(f"shards: {1000 * statistics.median(quick):.1f} ms (0.5 MB), {statistics.median(slow):.2f} s (50 MB, one task)")
    keep_all_memory()  # as in an aggregator's process
    small, large = costs(half, quick), costs(fifty, slow)
    return [
        Scenario("0.5 MB", half, small),
        Scenario("50 MB", fifty, large),
        Scenario(f"50 MB, shards {QUICKER} × quicker", fifty, large._replace(shards=[s / QUICKER for s in slow])),
    ]


def costs(size: Size, shards: Sequence[float]) -> Costs:
    """With the addition of a sum and the outer step as they are here."""
    found = Aggregator(aggregation.job(size.model, {}), size.shape)
    q = np.random.default_rng(0).integers(-(2**20), 2**20, found.total.size)
    seal, adding, moving = sealed(q), [], []
    for step in range(4):
        began = time.perf_counter()
        for shard in range(aggregation.WORKERS):
            assert found.add(step, 0, [shard], q, seal)
        added = time.perf_counter()
        found.apply(step)
        adding.append((added - began) / aggregation.WORKERS)
        moving.append(time.perf_counter() - added)
    add, move = (statistics.median(each[1:]) / q.size for each in (adding, moving))
    return Costs(shards, CALL, HOP, add, move, WIRE)


def _resnet_seconds(size: Size, count: int) -> list[float]:
    """Of shards of one task: second-order MAML, 5-way 1-shot, one step, one query, on noise."""
    config = aggregation.job(size.model, {})
    blueprint, generator = Blueprint(config, size.shape), torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 5, *size.shape, generator=generator), torch.arange(5)[None]
    episode = Episode(Examples(x, y), Examples(x, y), y, torch.zeros(1, dtype=torch.int64))
    spent = []
    for _ in range(count):
        began = time.perf_counter()
        vectorised(for_training(config, size.shape), blueprint.theta, blueprint.state, episode, 5, 0)
        spent.append(time.perf_counter() - began)
    return spent


def narrow(size: Size, workers: int) -> Config:
    """A network with as many tensors, so narrow that its sums cost nothing."""
    shards = SHARDS * workers
    raw = {"model": {**size.model, "width": 2}, "task": {"meta_batch": shards, "shard": 1}, "engine": {"device": "cpu"}}
    return resolve(Config.model_validate(raw))


def simulated(scenario: Scenario, workers: int, say: Callable[[str], None]) -> list[Row]:
    """Every topology with so many workers."""
    config, shape = narrow(scenario.size, workers), scenario.size.shape
    real = Blueprint(aggregation.job(scenario.size.model, {}), shape)
    found: dict[Topology, Found] = {
        topology: Simulation(config, shape, real, topology, scenario.costs, workers, NODE).run(STEPS)
        for topology in TOPOLOGIES
    }
    flat, rows = TOPOLOGIES[0], []
    for topology, one in found.items():
        name = f"{scenario.name}, {workers} worker{'s' if workers > 1 else ''}, {topology}"
        baseline = None if topology == flat else name.replace(str(topology), str(flat))
        ratio = one.steps / found[flat].steps if baseline else None
        rows += [
            Row(name, one.steps, "steps/s", baseline, ratio, STEPS - 1),
            Row(name, one.bytes / 1e6, "MB/step", None, None, STEPS - 1),
            Row(name, 100 * one.aggregator, "% aggregator busy", None, None, STEPS - 1),
        ]
        say(
            f"{name}: {one.steps:.3g} steps/s, {one.bytes / 1e6:,.1f} MB a step, "
            f"aggregator {100 * one.aggregator:.0f} %, "
            f"driver {100 * one.driver:.0f} %"
        )
    return rows


def dispatching(say: Callable[[str], None]) -> list[Row]:
    """The dispatcher's own time for a call, with the most workers: real time, not simulated."""
    now, workers = 0.0, WORKERS[-1]
    dispatcher: Dispatcher[Shard] = Dispatcher(3.0, clock=lambda: now)
    for number in range(workers):
        dispatcher.join(f"worker-{number}")
    began, calls = time.perf_counter(), 0
    dispatcher.add(Shard(0, 0, shard) for shard in range(SHARDS * workers))
    held = dispatcher.assign()
    while dispatcher.open:
        worker, items = held.pop(0)
        calls, now = calls + 1, now + 0.01
        for item in items:
            dispatcher.done(worker, item)
        dispatcher.wait()
        held += dispatcher.assign()
    spent = 1000 * (time.perf_counter() - began) / calls
    say(f"the dispatcher takes {spent:.2f} ms for a call with {workers:,} workers")
    return [Row(f"dispatcher, a call of {workers:,} workers", spent, "ms", None, None, calls)]
