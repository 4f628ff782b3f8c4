"""Simulated clusters run on the classes that train, and count every shard once."""

import pytest

from metadist.bench.aggregation import SIZES, job
from metadist.bench.scale import TOPOLOGIES, narrow
from metadist.bench.simulation import Costs, Simulation
from metadist.engine.engine import Blueprint
from metadist.runtime import aggregation, aggregator, combiner, dispatcher, pool
from metadist.runtime.cut import Topology, cut

HALF = SIZES[1]
COSTS = Costs(shards=(0.1, 0.2), call=1e-3, hop=1e-3, add=1e-9, copy=1e-9, move=1e-8, wire=1e-9)


def simulation(topology: Topology = TOPOLOGIES[0], workers: int = 20, costs: Costs = COSTS) -> Simulation:
    real = Blueprint(job(HALF.model, {}), HALF.shape)
    return Simulation(narrow(HALF, workers), HALF.shape, real, topology, costs, workers)


def test_the_classes_are_those_that_train() -> None:
    """What Ray runs as an actor is the very class that is simulated; its life and its line alter nothing."""
    one = simulation()
    assert type(one.dispatcher) is dispatcher.Dispatcher is pool.Dispatcher
    assert {type(piece.aggregator) for piece in one.pieces} == {aggregator.Aggregator}
    assert {type(found) for found in one.combiners.values()} == {combiner.Combiner}
    for actor, plain in ((aggregation.Aggregator, aggregator.Aggregator), (aggregation.Combiner, combiner.Combiner)):
        assert issubclass(actor, plain)
        added = {name for one in actor.__mro__[: actor.__mro__.index(plain)] for name in vars(one)}
        assert not {name for name in added & set(vars(plain)) if not name.startswith("__")}


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_bytes_are_those_of_the_real_sums(topology: Topology) -> None:
    one = simulation(topology)
    found = one.run(3)
    assert [piece.aggregator.step for piece in one.pieces] == [3] * topology.aggregators
    elements = sum(piece.sums.total for piece in cut(Blueprint(job(HALF.model, {}), HALF.shape), topology.aggregators))
    if topology.tree:
        assert found.bytes == 8 * elements * 3, "one sum for each of three nodes"
    else:  # of a call, which has one shard or some
        assert 8 * elements * 20 <= found.bytes <= 8 * elements * 40
    assert 0 < found.aggregator < 1
    assert 0 < found.driver < 1


def test_workers_are_the_speed_while_nothing_else_costs() -> None:
    free = Costs(shards=(0.1,), call=0.0, hop=0.0, add=0.0, copy=0.0, move=0.0, wire=0.0)
    few, many = (simulation(workers=workers, costs=free).run(6).steps for workers in (1, 16))
    assert 2 < few < 10, "two shards of 0.1 s on average"
    assert 0.2 * few < many < few, "as much work for each, and all wait for the slowest"


def test_a_wire_that_is_full_is_the_speed() -> None:
    slow = COSTS._replace(shards=(1e-3,), wire=1e-6)
    flat, tree = (simulation(Topology(tree=which), costs=slow).run(3) for which in (False, True))
    assert flat.aggregator > 0.9
    assert flat.steps == pytest.approx(1e6 / flat.bytes, rel=0.35), "what comes in, and θ for three nodes"
    assert tree.steps > 3 * flat.steps


def test_the_same_again() -> None:
    assert simulation().run(3) == simulation().run(3)
