"""θ in pieces: every tensor in one of them, and the same bits as whole."""

import socket
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.config import Config, resolve, validate
from metadist.engine.engine import Blueprint
from metadist.runtime.aggregation import crowd
from metadist.runtime.aggregator import Aggregator, Snapshot, joined, sealed
from metadist.runtime.combiner import Combiner
from metadist.runtime.cut import Topology, assembled, cut, gathered_exponents, topology

IMAGE, SHARDS, STEPS = (1, 16, 16), 4, 4
STATEFUL = (
    "model.name=conv4",
    "model.layers=2",
    "model.width=4",
    "model.statistics=running",
    "task.transductive=false",
)
"""A network with running statistics: state beside θ."""


@pytest.fixture(scope="module")
def config(tiny: Callable[..., Config]) -> Config:
    made = resolve(tiny(*STATEFUL, "outer.clip=0.01", "outer.weight_decay=0.1", "outer.optimizer=adamw"))
    assert Blueprint(made, IMAGE).state, "there is state to cut"
    return made


def sums(config: Config, step: int, shard: int) -> np.ndarray:
    size = Blueprint(config, IMAGE).sums.total
    return np.random.default_rng([step, shard]).integers(-(2**40), 2**40, size)


def trained(config: Config, pieces: int, first: int = 0, snapshot: Snapshot | None = None) -> Snapshot:
    """The state after steps first … STEPS−1, by that many aggregators."""
    parts = cut(Blueprint(config, IMAGE), pieces)
    several = [Aggregator(config, IMAGE, snapshot, 0, number, pieces) for number in range(len(parts))]
    for step in range(first, STEPS):
        for shard in range(SHARDS):
            q = sums(config, step, shard)
            assert all(one.add(step, 0, [shard], part.part(q)) for one, part in zip(several, parts, strict=True))
        squares = [one.squares(step) for one in several]
        reports = [one.apply(step, *squares)[0] for one in several]
        assert len({report.grad_norm for report in reports}) == 1, "all clip by the same norm"
    return joined(parts, [one.snapshot() for one in several])


def assert_same(one: Snapshot, other: Snapshot) -> None:
    assert one.step == other.step
    assert np.array_equal(one.exponents, other.exponents)
    for a, b in ((one.values, other.values), (one.memory, other.memory)):
        assert a.keys() == b.keys()
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("pieces", [2, 3, 5, 100])
def test_pieces_give_the_bits_of_the_whole(pieces: int, config: Config) -> None:
    assert_same(trained(config, 1), trained(config, pieces))


def test_so_they_do_where_tensors_are_larger_than_a_block(config: Config, small_blocks: None) -> None:
    whole = trained(config, 1)
    assert any(len(list(run.blocks())) > 1 for run in Blueprint(config, IMAGE).sums.runs)
    for pieces in (2, 3):
        assert_same(whole, trained(config, pieces))


def test_a_checkpoint_of_pieces_is_gone_on_with_by_others(config: Config) -> None:
    half = trained(config.with_values(), 3)
    assert half.step == STEPS
    begun = trained(config, 1)
    for pieces in (1, 2):
        continued = Aggregator(config, IMAGE, half, 0, 0, pieces)
        assert continued.step == STEPS
    again = [Aggregator(config, IMAGE, half, 0, number, 2).snapshot() for number in range(2)]
    assert_same(joined(cut(Blueprint(config, IMAGE), 2), again), begun)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100])
def test_every_tensor_is_in_one_piece(pieces: int, config: Config) -> None:
    blueprint = Blueprint(config, IMAGE)
    parts = cut(blueprint, pieces)
    assert len(parts) == min(pieces, len(blueprint.theta))
    assert [name for part in parts for name in part.theta] == sorted(blueprint.theta), "in name order"
    assert sorted(name for part in parts for name in part.state) == sorted(blueprint.state)
    assert sorted(np.concatenate([part.tensors for part in parts]).tolist()) == list(range(len(blueprint.sums.names)))
    if pieces == 2:
        sizes = [part.sums.total for part in parts]
        assert max(sizes) < 0.8 * sum(sizes), "of about the same size"
    q = np.arange(blueprint.sums.total)
    assert sorted(np.concatenate([part.part(q) for part in parts]).tolist()) == q.tolist()
    values = np.arange(blueprint.values.total)
    own = [np.concatenate([values[span] for span in part.values_at]) for part in parts]
    assert np.array_equal(assembled(parts, own, values.size), values)
    exponents = np.arange(len(blueprint.sums.names))
    assert np.array_equal(gathered_exponents(parts, [exponents[part.tensors] for part in parts]), exponents)


def test_a_piece_without_all_shards_moves_nothing(config: Config) -> None:
    part = cut(Blueprint(config, IMAGE), 2)[1]
    one = Aggregator(config, IMAGE, None, 0, 1, 2)
    one.add(0, 0, [0, 2], part.part(sums(config, 0, 0)))
    before = one.broadcast().values.tobytes()
    assert one.squares(0) is None
    assert one.apply(0, [1.0], None)[0].missing == (1, 3)
    assert one.broadcast().values.tobytes() == before


def test_no_piece_moves_while_another_is_incomplete(config: Config) -> None:
    """What is missing elsewhere is computed again, for the same step."""
    parts = cut(Blueprint(config, IMAGE), 2)
    whole, other = (Aggregator(config, IMAGE, None, 0, k, 2) for k in range(2))
    q = [sums(config, 0, shard) for shard in range(4)]
    for shard in range(4):
        whole.add(0, 0, [shard], parts[0].part(q[shard]))
        if shard != 2:
            other.add(0, 0, [shard], parts[1].part(q[shard]))
    before = whole.broadcast().values.tobytes()
    squares = [whole.squares(0), other.squares(0)]
    assert squares[0] and squares[1] is None
    assert [one.apply(0, *squares)[0].missing for one in (whole, other)] == [(), (2,)]
    assert whole.broadcast().values.tobytes() == before
    assert whole.step == other.step == 0
    assert whole.add(0, 0, [2], parts[0].part(q[2])) is False, "it has that one"
    assert other.add(0, 0, [2], parts[1].part(q[2])) is True
    squares = [whole.squares(0), other.squares(0)]
    reports = [one.apply(0, *squares)[0] for one in (whole, other)]
    assert [report.missing for report in reports] == [(), ()]
    alone = Aggregator(config, IMAGE)
    alone.add(0, 0, range(4), sum(q[1:], q[0]))
    assert alone.apply(0)[0].grad_norm == reports[0].grad_norm
    both = assembled(parts, [whole.broadcast().values, other.broadcast().values], alone.broadcast().values.size)
    assert both.tobytes() == alone.broadcast().values.tobytes()


def test_an_exceeded_bound_makes_its_own_tensors_coarser(config: Config) -> None:
    """Indices are those of the run; a piece knows which are its own."""
    blueprint = Blueprint(config, IMAGE)
    parts = cut(blueprint, 3)
    exceeding = [0, len(blueprint.sums.names) - 1]
    whole = Aggregator(config, IMAGE).redo(0, 0, exceeding).exponents
    own = [Aggregator(config, IMAGE, None, 0, k, 3).redo(0, 0, exceeding).exponents for k in range(3)]
    assert np.array_equal(gathered_exponents(parts, own), whole)


@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), max_size=20), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_sum_of_a_node_holds_every_shard_once(calls: list[list[int]], random: object) -> None:
    """Whatever comes twice: what is in the sum is what it says."""
    combiner, q = Combiner(), np.random.default_rng(0).integers(-(2**40), 2**40, (8, 5))
    taken: set[int] = set()
    for shards in calls:
        parts = q[shards].sum(0), q[shards].sum(0) * 2
        seals = tuple(map(sealed, parts))
        assert combiner.add(3, 0, shards, (seals[0] ^ 8, seals[1]), *parts) is False, "damaged on its way"
        fits = taken.isdisjoint(shards)
        assert combiner.add(3, 0, shards, seals, *parts) is fits
        taken |= set(shards) if fits else set()
        assert combiner.add(2, 5, shards, seals, *parts) is False, "of an earlier step"
    gathered, *totals = combiner.collect(3, 0, 2)
    counted = set(gathered.shards)
    assert len(counted) == len(gathered.shards)
    assert counted == taken
    if counted:
        assert np.array_equal(totals[0], q[sorted(counted)].sum(0))
        assert np.array_equal(totals[1], 2 * totals[0])
        assert gathered.seals == tuple(map(sealed, totals))
    assert combiner.collect(4, 0, 2)[0].shards == ()
    assert combiner.collect(3, 0, 2)[0].shards == (), "it was handed over"
    if counted:  # it was damaged on its way from here
        again = sorted(counted)[:1]
        assert combiner.add(3, 0, again, tuple(map(sealed, (q[1], q[2]))), q[1], q[2]) is True
        assert combiner.collect(3, 0, 2)[0].shards == tuple(again)


LARGE, SMALL = ({"name": "resnet12"}, (3, 84, 84)), ({}, (1, 28, 28))


@pytest.mark.parametrize(
    ("network", "cluster", "crowd", "expected"),
    [
        (SMALL, {"workers": 100}, 8, Topology()),
        (SMALL, {"workers": 200}, 8, Topology(tree=True)),
        (SMALL, {"workers": 200}, 3.9, Topology()),
        (LARGE, {"workers": 4}, 1, Topology(aggregators=4)),
        (LARGE, {"workers": 4}, 4, Topology(True, 4)),
        (LARGE, {"workers": 64}, 1, Topology(aggregators=4)),
        (LARGE, {"workers": 64}, 8, Topology(True, 4)),
        (LARGE, {"workers": 64}, 0, Topology()),
        (LARGE, {"workers": 64, "sums": "flat", "aggregators": 2}, 8, Topology(False, 2)),
        (LARGE, {"workers": 64, "sums": "tree", "aggregators": 2}, 0, Topology(True, 2)),
    ],
)
def test_where_sums_go(network, cluster, crowd, expected) -> None:  # type: ignore[no-untyped-def]
    """By the size of θ, the workers, and how many of them a host has."""
    model, image = network
    config = validate({"model": model, "cluster": {"address": "auto", **cluster}}, "test")
    assert topology(config.cluster, Blueprint(config, image), crowd) == expected


@pytest.mark.parametrize(
    ("hosts", "cluster", "expected"),
    [
        ([("here", 4)], {}, 0),
        ([("here", 4)], {"workers": {"min": 1, "max": 4}}, 0),
        ([("here", 4)], {"workers": {"min": 1, "max": 8}}, 4),
        ([("here", 4), ("there", 4)], {}, 2),
        ([("here", 0), ("there", 4)], {}, 4),
        ([("here", 0), ("there", 64), ("elsewhere", 64)], {"workers": 32}, 16),
        ([("here", 0), ("there", 64), ("elsewhere", 64)], {"workers": 32, "placement": "spread"}, 16),
        ([("here", 0), ("there", 64), ("elsewhere", 64)], {"workers": 32, "placement": "pack"}, 32),
        ([("here", 0), ("there", 24), ("elsewhere", 16)], {"workers": 32, "placement": "pack"}, 24),
        ([("there", 4)], {}, 4),
        ([("here", 4), ("dead", 4)], {}, 0),
        ([("here", 4)], {"lines": False}, 4),
        ([("there", 4), ("elsewhere", 4)], {"address": "local"}, 0),
        ([("here", 0)], {}, 4),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_how_many_workers_share_a_host(  # type: ignore[no-untyped-def]
    hosts, cluster, expected, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hosts of the cluster and the CPUs of each; 0 where lines go, for an elastic run if all will fit."""
    told = [{"Alive": name != "dead", "NodeManagerHostname": name, "Resources": {"CPU": cpus}} for name, cpus in hosts]
    total = {"CPU": float(sum(cpus for name, cpus in hosts if name != "dead"))}
    ray = SimpleNamespace(nodes=lambda: told, cluster_resources=lambda: total)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    config = resolve(validate({"cluster": {"address": "a:1", "workers": 4, **cluster}}, "test"))
    assert crowd(ray, config) == expected
    carrying = resolve(tiny("outer.compression=int8", "cluster.workers=4", "cluster.address=a:1"))
    assert crowd(ray, carrying) > 0, "what lanes carry goes by Ray"
