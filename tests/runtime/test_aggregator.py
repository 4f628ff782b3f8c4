"""The sum of a step: once each, in any order, to the bit."""

from collections.abc import Callable

import numpy as np
import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Blueprint
from metadist.engine.exact import COARSER_BITS, FIRST_EXPONENT
from metadist.engine.layout import sha256
from metadist.runtime.aggregator import Aggregator, Snapshot, Sum, joined, sealed
from metadist.runtime.cut import cut
from metadist.runtime.worker import Worker

IMAGE = (1, 4, 4)
SHARDS = 4

OUTERS = {
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "momentum": 0.9},
    "plain-sgd": {"optimizer": "sgd"},
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.5},
    "clipped-cosine": {"optimizer": "adam", "clip": 0.01, "schedule": "cosine", "warmup": 2, "steps": 8},
}


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return resolve(tiny()).with_values(model={"width": 3})


def sums(config: Config, step: int, shard: int, bits: int = 40) -> np.ndarray:
    size = Blueprint(config, IMAGE).sums.total
    return np.random.default_rng([step, shard]).integers(-(2**bits), 2**bits, size)


def take(aggregator: Aggregator, step: int, order: list[int]) -> None:
    for shard in order:
        assert aggregator.add(step, aggregator.attempt, [shard], sums(aggregator.config, step, shard))
    report, _ = aggregator.apply(step)
    assert report.missing == ()


def bits(snapshot: Snapshot) -> bytes:
    parts = [b"%d" % snapshot.step, snapshot.exponents.tobytes()]
    for named in (snapshot.values, snapshot.memory):
        parts += [name.encode() + named[name].tobytes() for name in sorted(named)]
    return b"".join(parts)


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
def test_order_is_irrelevant(config: Config, outer: dict[str, object]) -> None:
    config = config.with_values(outer=outer)
    orders = ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1])
    found = []
    for order in orders:
        aggregator = Aggregator(config, IMAGE)
        for step in range(5):
            take(aggregator, step, order[step % 2 :] + order[: step % 2])
        found.append(bits(aggregator.snapshot()))
    assert len(set(found)) == 1


def test_partial_sums_may_be_taken_in_any_grouping(config: Config) -> None:
    one, other = Aggregator(config, IMAGE), Aggregator(config, IMAGE)
    take(one, 0, [0, 1, 2, 3])
    pairs = [sums(config, 0, 2) + sums(config, 0, 0), sums(config, 0, 3) + sums(config, 0, 1)]
    assert other.add(0, 0, (3, 1), pairs[1])
    assert not other.add(0, 0, (1, 2), pairs[0]), "a sum with a shard that counts already counts nothing"
    assert other.add(0, 0, (2, 0), pairs[0])
    report, _ = other.apply(0)
    assert (report.missing, report.duplicates) == ((), 2)
    assert bits(one.snapshot()) == bits(other.snapshot())


def test_repeated_and_late_shards_are_dropped(config: Config) -> None:
    aggregator, clean = Aggregator(config, IMAGE), Aggregator(config, IMAGE)
    for step in range(3):
        take(clean, step, [0, 1, 2, 3])
        for shard in range(SHARDS):
            assert aggregator.add(step, 0, [shard], sums(config, step, shard))
            assert not aggregator.add(step, 0, [shard], sums(config, step, shard)), "twice"
            assert not aggregator.add(step - 1, 0, [shard], sums(config, step, shard)), "of the step before"
            assert not aggregator.add(step + 1, 0, [shard], sums(config, step, shard)), "of the next step"
            assert not aggregator.add(step, 1, [shard], sums(config, step, shard)), "of another attempt"
        report, _ = aggregator.apply(step)
        assert report.duplicates == 4 * SHARDS
    assert bits(aggregator.snapshot()) == bits(clean.snapshot())


def test_several_sums_at_once_are_those_one_by_one(config: Config, small_blocks: None) -> None:
    one, other = Aggregator(config, IMAGE), Aggregator(config, IMAGE)
    for step, groups in enumerate(([(0, 1, 2, 3)], [(2,), (3, 0, 1)], [(0,), (1,), (2, 3)])):
        take(one, step, [0, 1, 2, 3])
        for group in groups:
            q = [sums(config, step, shard) for shard in group]
            several = [Sum([shard], each, sealed(each)) for shard, each in zip(group, q, strict=True)]
            assert other.add_all(step, 0, several) == [True] * len(group)
        assert other.add_all(step, 0, []) == []
        other.apply(step)
        assert bits(other.snapshot()) == bits(one.snapshot())


def test_damages_that_cancel_are_seen(config: Config) -> None:
    """The total's elements have the right sum, and it is not the right total."""
    aggregator = Aggregator(config, IMAGE)
    several = [Sum([shard], q, sealed(q)) for shard in range(SHARDS) for q in [sums(config, 0, shard)]]
    sent = [one.q.copy() for one in several]
    sent[0][3] += 2**30
    sent[2][5] -= 2**30
    damaged = [one._replace(q=q) for one, q in zip(several, sent, strict=True)]
    assert aggregator.add_all(0, 0, damaged) == [False] * SHARDS
    assert aggregator.apply(0)[0].missing == (0, 1, 2, 3)


@pytest.mark.parametrize("wrong", [[], [0], [1], [3], [0, 1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("before", [0, 1], ids="{} before".format)
def test_with_a_damaged_sum_the_step_begins_again(config: Config, wrong: list[int], before: int) -> None:
    """It is in the total already, and nobody knows any more what it was: what was counted is missing."""
    aggregator, clean = Aggregator(config, IMAGE), Aggregator(config, IMAGE)
    several = [Sum([shard], q, sealed(q)) for shard in range(SHARDS) for q in [sums(config, 0, shard)]]
    sent = [one._replace(q=one.q + (number in wrong)) for number, one in enumerate(several)]
    assert aggregator.add_all(0, 0, several[:before]) == [True] * before
    twice = [several[2], Sum([SHARDS], np.zeros(3))]
    found = aggregator.add_all(0, 0, [*sent[before:], *twice])
    damaged = any(number >= before for number in wrong)
    assert found == [not damaged] * (SHARDS - before) + [False] * 2
    assert aggregator.add_all(1, 0, several) == [False] * SHARDS, "of another step"
    report, _ = aggregator.apply(0)
    assert report.missing == (tuple(range(SHARDS)) if damaged else ())
    if damaged:
        assert aggregator.add_all(0, 0, several) == [True] * SHARDS
        report, _ = aggregator.apply(0)
    assert report.missing == ()
    take(clean, 0, [0, 1, 2, 3])
    assert bits(aggregator.snapshot()) == bits(clean.snapshot())


def test_broadcast_writes_where_it_is_told(config: Config) -> None:
    aggregator = Aggregator(config.with_values(model={"statistics": "running"}, task={"transductive": False}), IMAGE)
    values = aggregator.broadcast().values
    there = np.zeros_like(values)
    found = aggregator.broadcast(there)
    assert np.shares_memory(found.values, there)
    assert there.tobytes() == found.values.tobytes() == values.tobytes()
    take(aggregator, 0, [0, 1, 2, 3])
    assert there.tobytes() == values.tobytes(), "the next step does not move it"


@pytest.mark.parametrize("running", [False, True])
def test_a_step_writes_theta_where_it_is_told(config: Config, running: bool, small_blocks: None) -> None:
    config = config.with_values(model={"statistics": "running" if running else "support"})
    aggregator = Aggregator(config.with_values(task={"transductive": not running}), IMAGE)
    assert bool(aggregator.state) == running
    there = np.zeros_like(aggregator.broadcast().values)
    assert aggregator.outer_step(0, out=there).missing == (0, 1, 2, 3)
    assert not there.any(), "no step was taken"
    for shard in range(SHARDS):
        aggregator.add(0, 0, [shard], sums(config, 0, shard))
    report = aggregator.outer_step(0, out=there)
    assert (report.missing, report.finite) == ((), True)
    assert there.tobytes() == aggregator.broadcast().values.tobytes()


@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_is_told(config: Config, last: bool, small_blocks: None) -> None:
    aggregator = Aggregator(config.with_values(outer={"optimizer": "sgd", "lr": 1e38}), IMAGE)
    q = np.zeros(aggregator.total.size, dtype=np.int64)
    q[aggregator.outer.layout.total - 1 if last else 0] = 2**60
    for shard in range(SHARDS):
        aggregator.add(0, 0, [shard], q)
    report = aggregator.outer_step(0)
    assert (report.missing, report.finite) == ((), False)


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
@pytest.mark.parametrize("statistics", ["support", "running"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_step_in_blocks_is_a_step_over_all_of_theta_at_once(
    config: Config, outer: dict[str, object], statistics: str, pieces: int
) -> None:
    """The bits of a large network do not depend on how much of it is worked on at a time.

    But for the norm, which is summed block by block, and for what is clipped by it.
    """
    config = config.with_values(outer=outer, model={"statistics": statistics, "width": 5})
    config = config.with_values(task={"transductive": statistics == "support"})
    found = []
    for size in (64, 1 << 17):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("layout", "exact", "outer"):
                patch.setattr(f"metadist.engine.{module}.BLOCK", size)
            blueprint = Blueprint(config, IMAGE)
            parts = cut(blueprint, pieces)
            aggregators = [Aggregator(config, IMAGE, None, 0, piece, pieces) for piece in range(pieces)]
            assert (len(aggregators[0].outer.layout.runs) > 1) == (size == 64)
            for step in range(5):
                for piece, aggregator in zip(parts, aggregators, strict=True):
                    for shard in range(SHARDS):
                        assert aggregator.add(step, 0, [shard], piece.part(sums(config, step, shard)))
                squares = [one.squares(step) for one in aggregators] if pieces > 1 else []
                reports = [one.apply(step, *squares)[0]._replace(spans=()) for one in aggregators]
            norms = [report.grad_norm for report in reports]
            rest = [repr(report._replace(grad_norm=0.0)) for report in reports]
            found.append((norms, rest, joined(parts, [one.snapshot() for one in aggregators])))
    norms, rest, snapshots = zip(*found, strict=True)
    assert norms[0] == pytest.approx(norms[1], rel=1e-15)
    assert rest[0] == rest[1]
    if "clip" not in outer:
        assert bits(snapshots[0]) == bits(snapshots[1])
    for one, other in zip(*(snapshot.values.values() for snapshot in snapshots), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


DAMAGES = {
    "one-bit": lambda q: np.concatenate([q[:2], q[2:3] ^ 1, q[3:]]),
    "cut-off": lambda q: q[:-1],
    "one-number": lambda q: q[:1],
    "nothing": lambda q: q[:0],
    "floats": lambda q: q.astype(np.float64),
    "zeros": np.zeros_like,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_sum_that_is_not_what_its_worker_sealed_is_dropped(
    config: Config, damage: Callable[[np.ndarray], np.ndarray]
) -> None:
    aggregator, clean = Aggregator(config, IMAGE), Aggregator(config, IMAGE)
    q = sums(config, 0, 1)
    assert not aggregator.add(0, 0, [1], damage(q), sealed(q))
    report, _ = aggregator.apply(0)
    assert (report.missing, report.duplicates) == ((0, 1, 2, 3), 1)
    assert aggregator.add(0, 0, [1], q, sealed(q)), "the whole one counts then"
    for shard in (0, 2, 3):
        aggregator.add(0, 0, [shard], sums(config, 0, shard))
    aggregator.apply(0)
    take(clean, 0, [0, 1, 2, 3])
    assert bits(aggregator.snapshot()) == bits(clean.snapshot())


def test_an_incomplete_step_moves_nothing_and_names_what_is_missing(config: Config) -> None:
    aggregator = Aggregator(config, IMAGE)
    before = bits(aggregator.snapshot())
    aggregator.add(0, 0, [2], sums(config, 0, 2))
    report, broadcast = aggregator.apply(0)
    assert report.missing == (0, 1, 3)
    assert broadcast.step == 0
    assert bits(aggregator.snapshot()) == before
    report, _ = aggregator.apply(7)
    assert report.missing == (0, 1, 2, 3), "another step than the current one has none of its shards"
    assert bits(aggregator.snapshot()) == before
    for shard in (0, 1, 3):
        aggregator.add(0, 0, [shard], sums(config, 0, shard))
    assert aggregator.apply(0)[0].missing == ()
    assert aggregator.step == 1


def test_a_step_is_done_again_with_coarser_exponents(config: Config) -> None:
    aggregator = Aggregator(config, IMAGE)
    theta = aggregator.broadcast().values
    aggregator.add(0, 0, [0], sums(config, 0, 0))
    names = aggregator.piece.sums.names
    again = aggregator.redo(0, 0, range(len(names)))
    assert (again.step, again.attempt) == (0, 1)
    assert (again.exponents == FIRST_EXPONENT - COARSER_BITS).all()
    assert again.values.tobytes() == theta.tobytes()
    assert aggregator.redo(0, 0, [0]).attempt == 1, "the same request twice is one"
    assert aggregator.redo(3, 1, [0]).attempt == 1, "a request for another step is none"
    assert not aggregator.add(0, 0, [1], sums(config, 0, 1)), "what comes of the first attempt is late"
    take(aggregator, 0, [3, 1, 0, 2])
    assert aggregator.attempt == 0
    scaled = Aggregator(config, IMAGE)
    for shard in range(SHARDS):  # the same values with the finer exponent
        scaled.add(0, 0, [shard], sums(config, 0, shard) << COARSER_BITS)
    scaled.apply(0)
    assert bits(aggregator.snapshot()) == bits(scaled.snapshot()), "the exponents are no part of the mathematics"


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
def test_a_restored_aggregator_continues_to_the_same_bits(config: Config, outer: dict[str, object]) -> None:
    config = config.with_values(outer=outer, model={"statistics": "running"}, task={"transductive": False})
    aggregator = Aggregator(config, IMAGE)
    assert aggregator.state, "running statistics are state"
    for step in range(3):
        take(aggregator, step, [0, 1, 2, 3])
    taken = aggregator.snapshot()
    kept = bits(taken)
    other = Aggregator(config, IMAGE, taken)
    assert bits(other.snapshot()) == kept
    for step in range(3, 7):
        take(aggregator, step, [0, 1, 2, 3])
        take(other, step, [2, 3, 0, 1])
    assert bits(other.snapshot()) == bits(aggregator.snapshot())
    assert bits(taken) == kept, "a snapshot is not moved by later steps"


def test_real_shards_in_any_order_with_repetitions(tiny: Callable[..., Config], tiny_run) -> None:
    """The engine's own sums, shuffled differently in every step, end in the hash of the plain run."""
    config = resolve(tiny())
    table = prepare(config.data.sources[0])
    worker = Worker(config, [str(table.path)])
    aggregator = Aggregator(config, worker.engine.tasks.shape)
    random = np.random.default_rng(0)
    broadcast = aggregator.broadcast()
    for step in range(config.outer.steps):
        parts = {shard: worker.compute(broadcast, step, 0, [shard])[1] for shard in random.permutation(SHARDS).tolist()}
        for shard in random.permutation([*parts, *parts]).tolist():
            aggregator.add(step, 0, [shard], parts[shard])
        report, broadcast = aggregator.apply(step)
        assert (report.missing, report.duplicates) == ((), SHARDS)
    values = Blueprint(config, worker.engine.tasks.shape).values
    import torch

    assert sha256(values.split(torch.from_numpy(broadcast.values))) == tiny_run.result["theta_sha256"]


def test_a_worker_computes_nothing_from_parameters_of_another_step(tiny: Callable[..., Config]) -> None:
    config = resolve(tiny())
    worker = Worker(config, [str(prepare(config.data.sources[0]).path)])
    broadcast = Aggregator(config, worker.engine.tasks.shape).broadcast()
    for step, attempt in ((1, 0), (0, 1)):
        receipt, q = worker.compute(broadcast, step, attempt, [0])
        assert not receipt.current
        assert q.size == 0
