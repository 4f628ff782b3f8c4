"""The verdict on what `auto` chooses."""

import pytest

from metadist.bench.aggregation import SIZES
from metadist.bench.scale import TOPOLOGIES, Scenario, counted, simulated, told, verdict
from metadist.bench.simulation import Costs, Found
from metadist.runtime.cut import Topology

COSTS = Costs(shards=(0.01,), call=1e-4, hop=1e-4, add=1e-9, copy=1e-9, move=1e-8, wire=1e-9)


@pytest.mark.parametrize(
    ("size", "workers", "each", "auto"),
    [(1, 4, 8, Topology()), (3, 4, 8, Topology(True, 4)), (3, 4, 1, Topology(aggregators=4))],
)
def test_how_far_auto_is_behind(size: int, workers: int, each: int, auto: Topology) -> None:
    scenario, said = Scenario("this", SIZES[size], COSTS, each), list[str]()
    found = {way: Found(8.0 if way == auto else 4.0, 1.0, 0.5, 0.5) for way in TOPOLOGIES}
    row = verdict(scenario, workers, found, said.append)
    assert (row.name, row.value, row.ratio) == (f"this, {workers} workers, auto: {auto}", 8.0, 1.0)
    assert row.point == ("this", str(auto), "workers", workers, "", f"{auto}: the best")
    best = next(way for way in TOPOLOGIES if way != auto)
    found[best] = found[best]._replace(steps=10.0)
    row = verdict(scenario, workers, found, said.append)
    assert (row.baseline, row.ratio, row.repeats) == (f"this, {workers} workers, {best}", 0.8, counted(workers))
    assert said == [
        f"this, {workers} workers: auto is {auto}, the best",
        f"this, {workers} workers: auto is {auto}, 20 % behind {best}",
    ]


def test_every_topology_has_its_line_and_is_said_once() -> None:
    scenario, said = Scenario("this", SIZES[1], COSTS), list[str]()
    found = {way: Found(2.0 + number, 3e6, 0.25, 0.5) for number, way in enumerate(TOPOLOGIES)}
    rows = told(scenario, 4, found, said.append)
    assert [(row.point.line, row.value) for row in rows if row.point and row.unit == "% driver busy"] == [
        (str(way), 50) for way in TOPOLOGIES
    ]
    assert [row.value for row in rows if row.unit == "MB/step"] == [3.0] * len(TOPOLOGIES)
    assert [row.ratio for row in rows if row.unit == "steps/s"] == [None, 1.5, 2.0, 2.5]
    assert said == ["this, 4 workers: flat 2; tree 3; flat, 4 aggregators 4; tree, 4 aggregators 5 steps/s"]


def test_a_step_has_one_node_or_several() -> None:
    together, alone = (simulated(Scenario("this", SIZES[1], COSTS, each), 8) for each in (8, 1))
    tree = Topology(tree=True)
    assert alone[tree].bytes > 7 * together[tree].bytes > 0, "a sum a node"
