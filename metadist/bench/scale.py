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
from metadist.bench.aggregation import LINED, SIZES, Size, shard_seconds, shards_of, share
from metadist.bench.record import Point, Row
from metadist.bench.simulation import Costs, Found, Simulation
from metadist.config import Cluster, Config, resolve
from metadist.engine.device import keep_all_memory
from metadist.engine.engine import Blueprint
from metadist.engine.shard import vectorised
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.cut import Topology, topology
from metadist.runtime.dispatcher import Dispatcher
from metadist.runtime.pool import Shard
from metadist.tasks.episode import Episode, Examples

WORKERS = (1, 4, 16, 64, 256, 1024)
SHARDS = 2
"""Shards of a step for each worker: the meta-batch grows with them."""

NODE = 8
"""Workers of a node."""

STEPS, SHARES = 3, 3072
"""Simulated meta-steps at least, and workers' shares in all of them; a first one is not counted."""

CALL, HOP, WIRE = 0.5e-3, 0.3e-3, 8 / 10e9
"""Seconds: the driver's, for a call of Ray's and its receipt; until a message is there; of a byte, at 10 Gbit/s."""

QUICKER = 50
"""How much quicker shards are in some scenarios than those measured."""

TOPOLOGIES = (Topology(), Topology(tree=True), Topology(aggregators=4), Topology(tree=True, aggregators=4))


class Scenario(NamedTuple):
    """What is simulated: the network whose sizes count, how long its shards take, workers of a node."""

    name: str
    size: Size
    costs: Costs
    each: int = NODE


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some seven minutes."""
    rows: list[Row] = []
    if importlib.util.find_spec("ray") is None:
        say("without Ray the cost of aggregation on one machine is not measured")
    else:
        rows += aggregation.rows(say)
    made = scenarios(say)
    rows += shares(rows, made, say)
    behind: list[Row] = []
    for scenario in made:
        for workers in WORKERS:
            found = simulated(scenario, workers)
            rows += told(scenario, workers, found, say)
            behind.append(verdict(scenario, workers, found, say))
    worst = min(behind, key=lambda row: row.ratio or 1)
    say(f"auto is furthest behind, {100 - 100 * (worst.ratio or 1):.0f} %, with {worst.name}")
    return [*rows, *behind, *dispatching(say)]


def scenarios(say: Callable[[str], None]) -> list[Scenario]:
    """Costs measured here."""
    _, half, eight, fifty = SIZES
    spent = [
        (half, shard_seconds(shards_of("omniglot-maml-5w1s"), 20, say)),
        (eight, _resnet_seconds(eight, 4)),
        (fifty, _resnet_seconds(fifty, 2)),
    ]
    for size, each in spent:
        say(f"{size.name}: shards of {1000 * statistics.median(each):,.0f} ms{'' if size is half else ', one task'}")
    keep_all_memory()  # as in an aggregator's process
    small, middle, large = (Scenario(size.name, size, costs(size, each)) for size, each in spent)
    quick = _quicker(large)
    alone = quick._replace(name=f"{quick.name}, one worker a node", each=1)
    return [small, middle, _quicker(middle), large, quick, alone]


def _quicker(one: Scenario) -> Scenario:
    shards = [seconds / QUICKER for seconds in one.costs.shards]
    return one._replace(name=f"{one.name}, shards {QUICKER} × quicker", costs=one.costs._replace(shards=shards))


def shares(measured: Sequence[Row], made: Sequence[Scenario], say: Callable[[str], None]) -> list[Row]:
    """Of a step with the largest network, one shard a worker: what aggregation costs on one machine."""
    found, cost = [], {row.name: row.value for row in measured}.get(f"{SIZES[-1].name}, {LINED}")
    for scenario in made:
        if scenario.size is SIZES[-1] and scenario.each == NODE and cost is not None:
            seconds = 1000 * statistics.median(scenario.costs.shards)
            found.append(share(f"a step of {scenario.name}", cost, seconds, aggregation.WORKERS, say))
    return found


def costs(size: Size, shards: Sequence[float]) -> Costs:
    """With the addition of a sum and the outer step as they are here."""
    found = Aggregator(aggregation.job(size.model, {}), size.shape)
    q = np.random.default_rng(0).integers(-(2**20), 2**20, found.total.size)
    seal, adding, copying, moving = sealed(q), [], [], []
    there = np.empty_like(q)
    for step in range(4):
        began = time.perf_counter()
        for shard in range(aggregation.WORKERS):
            assert found.add(step, 0, [shard], q, seal)
        added = time.perf_counter()
        found.apply(step)
        adding.append((added - began) / aggregation.WORKERS)
        moved = time.perf_counter()
        moving.append(moved - added)
        there[:] = q
        copying.append(time.perf_counter() - moved)
    add, copy, move = (statistics.median(each[1:]) / q.size for each in (adding, copying, moving))
    return Costs(shards, CALL, HOP, add, copy, move, WIRE)


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


def simulated(scenario: Scenario, workers: int) -> dict[Topology, Found]:
    """Every topology with so many workers."""
    config, shape = narrow(scenario.size, workers), scenario.size.shape
    real = Blueprint(aggregation.job(scenario.size.model, {}), shape)
    return {
        way: Simulation(config, shape, real, way, scenario.costs, workers, scenario.each).run(1 + counted(workers))
        for way in TOPOLOGIES
    }


def counted(workers: int) -> int:
    """Meta-steps that are: more where few workers make them uneven."""
    return max(STEPS, min(48, SHARES // workers))


def named(scenario: Scenario, workers: int) -> str:
    """Of a row, without the topology."""
    return f"{scenario.name}, {workers} worker{'s' if workers > 1 else ''}"


def told(scenario: Scenario, workers: int, found: dict[Topology, Found], say: Callable[[str], None]) -> list[Row]:
    """Every topology beside the flat one."""
    flat, rows, steps = TOPOLOGIES[0], list[Row](), counted(workers)
    for way, one in found.items():
        name = f"{named(scenario, workers)}, {way}"
        baseline = None if way == flat else f"{named(scenario, workers)}, {flat}"
        ratio = one.steps / found[flat].steps if baseline else None
        point = Point(scenario.name, str(way), "workers", workers, to=str(flat))
        rows += [
            Row(name, one.steps, "steps/s", baseline, ratio, steps, point),
            Row(name, one.bytes / 1e6, "MB/step", None, None, steps, point),
            Row(name, 100 * one.aggregator, "% aggregator busy", None, None, steps, point),
            Row(name, 100 * one.driver, "% driver busy", None, None, steps, point),
        ]
    rates = "; ".join(f"{way} {one.steps:.3g}" for way, one in found.items())
    say(f"{named(scenario, workers)}: {rates} steps/s")
    return rows


def verdict(scenario: Scenario, workers: int, found: dict[Topology, Found], say: Callable[[str], None]) -> Row:
    """What `auto` chooses beside the best, on a cluster of more than the driver's machine."""
    real = Blueprint(aggregation.job(scenario.size.model, {}), scenario.size.shape)
    auto = topology(Cluster(address="auto", workers=workers), real, min(workers, scenario.each))
    best = max(found, key=lambda way: found[way].steps)
    ratio, name = found[auto].steps / found[best].steps, named(scenario, workers)
    away = "the best" if auto == best else f"{100 - 100 * ratio:.0f} % behind {best}"
    say(f"{name}: auto is {auto}, {away}")
    point = Point(scenario.name, str(auto), "workers", workers, chosen=f"{auto}: {away}")
    return Row(f"{name}, auto: {auto}", found[auto].steps, "steps/s", f"{name}, {best}", ratio, counted(workers), point)


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
