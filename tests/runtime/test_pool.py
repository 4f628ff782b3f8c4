"""The driver's side of the workers, and what one of them does by its line, without Ray."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine, blueprint
from metadist.runtime import pool
from metadist.runtime.aggregation import SMALL, TOGETHER, Aggregation, Placed
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.on_ray import OnRay
from metadist.runtime.pool import Asked, Pool, Shard, Worker
from metadist.runtime.sharing import Board, Outbox, Published, Shared, Space, Spaces
from metadist.runtime.worker import Receipt
from metadist.tasks.episode import Episode

Make = Callable[..., Config]


def test_who_arrives_is_seen_though_answers_come_all_the_time(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOOKS", 0.02)
    looks: list[float] = []

    def from_ray(self: Pool, waiting: Any, patience: float) -> list[Any]:
        assert list(waiting) == ["introduced"]
        assert patience == 0, "nobody waits for Ray while answers come"
        self._looked = time.perf_counter()
        looks.append(patience)
        return []

    monkeypatch.setattr(Pool, "_from_lines", lambda self, patience: ["an answer"])
    monkeypatch.setattr(Pool, "_from_ray", from_ray)
    monkeypatch.setattr(pool, "now", time.perf_counter)
    found = Pool(None, resolve(tiny("cluster.workers=2")), [], print, lambda name: [])
    found.dispatcher.join("worker-0")
    found._told["worker-0", 0] = Asked("worker-0", (Shard(0, 0, 0),), (), 0.0)
    found._arriving["introduced"] = "worker-1"
    began = time.perf_counter()
    while time.perf_counter() < began + 0.2:
        assert found.events() == ["an answer"]
        time.sleep(0.001)
    assert 3 <= len(looks) <= 11


WAYS = ("outer.lr=0.01", "outer.compression=bf16", "engine.mode=graph", "algorithm.support_loss_weight=1e18")


@pytest.mark.parametrize("override", WAYS)
def test_a_worker_writes_its_sums_where_they_are_read(override: str, tiny: Make) -> None:
    """The numbers of `compute`, in the same place again and again, also where nothing is handed out."""
    config = resolve(tiny(override))
    worker = Worker(config, [str(prepare(source).path) for source in config.data.sources])
    worker.open()
    aggregator = Aggregator(config, worker.engine.tasks.shape)
    reader, broadcast = Spaces(), aggregator.broadcast()
    board = Board(broadcast.values.dtype.str, len(broadcast.values))
    aggregator.broadcast(board.place(0))
    published = Published(0, 0, board.publish(0), broadcast.exponents.tobytes())
    for shards in ([0], [1, 2], [3], [0, 1, 2, 3]):
        receipt, shared = worker.compute_here(published, 0, 0, shards)
        expected, q = worker.compute(broadcast, 0, 0, shards)
        assert receipt._replace(spans=()) == expected._replace(spans=())
        assert (shared is not None) == bool(receipt.summed) == ("1e18" not in override)
        if shared is not None:
            head, sums = reader.read(shared)
            assert np.array_equal(sums, q)
            assert (sealed(sums),) == receipt.seals
            assert head[0] == Outbox.WAITING
            head[0] = Outbox.READ
    assert len(worker._outbox._places) <= 3, "payloads of one, two and four shards"
    board.place(2)
    receipt, shared = worker.compute_here(published, 0, 0, [0])
    assert (receipt.current, receipt.summed, shared) == (False, (), None), "θ of another step lies there now"


def test_tasks_are_drawn_ahead_where_a_step_begins_as_the_last_did(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, before they are asked for, and to the same bits; a wrong guess costs its time alone."""
    config = resolve(tiny())
    worker = Worker(config, [str(prepare(source).path) for source in config.data.sources])
    worker.open()
    plain, drawn = Engine(config, worker.tables), list[tuple[int, int]]()
    sample, tasks, size = worker.engine.tasks.sample, worker.engine.tasks, worker.engine.shard_tasks

    def counted(step: int, first: int, count: int) -> Episode:
        drawn.append((step, first // size))
        return sample(step, first, count)

    monkeypatch.setattr(
        type(tasks), "sample", lambda self, *asked: counted(*asked) if self is tasks else sample(*asked)
    )
    waits = [False]
    monkeypatch.setattr(Worker, "more", property(lambda self: waits[0]))
    aggregator = Aggregator(config, tasks.shape)
    board = Board("<f4", aggregator.piece.values.total)
    values = aggregator.broadcast(board.place(0)).values
    begins = [[0, 1], [0, 1], [0, 1], [2], [2], [3]]
    for step, shards in enumerate(begins):
        board.place(step)[:] = values
        published = Published(step, 0, board.publish(step), aggregator.exponents.tobytes())
        for number, asked in enumerate((shards, [3])):
            receipt, shared = worker.compute_here(published, step, 0, asked)
            assert receipt.summed == tuple(asked)
            assert shared is not None
            expected = sum(plain.part(values, aggregator.exponents, step, shard).q for shard in asked)
            assert np.array_equal(Spaces().read(shared)[1], expected)
            ahead = number == 0 and step > 0 and shards == begins[step - 1]
            before = list(drawn)
            waits[0] = True
            worker.spare()
            assert drawn == before, "what is asked comes first"
            waits[0] = False
            worker.spare()
            assert drawn[len(before) :] == [(step + 1, shard) for shard in shards if ahead]
    wrong = [(3, 0), (3, 1), (5, 2)]
    asked = [(step, shard) for step, shards in enumerate(begins) for shard in (*shards, 3)]
    assert sorted(drawn) == sorted(asked + wrong)


@pytest.mark.parametrize(
    ("overrides", "place", "pieces", "why"),
    [
        (("cluster.lines=false",), "1@far", 2, "cluster.lines=false"),
        (("cluster.sums=tree",), "1@far", 2, "worker 1@far is on another machine"),
        (("cluster.sums=tree",), "1@here", 2, "worker 1@here shares no memory with the driver (another container"),
        (("outer.compression=int8",), None, 2, "outer.compression=int8 carries something from step to step"),
        (("cluster.sums=tree",), None, 2, "sums are added on their node first (cluster.sums: tree)"),
        ((), None, 2, "there are 2 aggregators (cluster.aggregators)"),
        ((), None, 1, "the aggregator shares no memory with the driver"),
    ],
    ids=lambda value: value[0].partition(".")[2] if isinstance(value, tuple) and value else None,
)
def test_why_it_goes_by_ray(  # type: ignore[no-untyped-def]
    overrides, place, pieces, why, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said when it begins, and no second time; place: of a worker that has no line."""
    monkeypatch.setattr(pool.socket, "gethostname", lambda: "here")
    config, said = resolve(tiny("cluster.workers=2", *overrides)), list[str]()
    plan = blueprint(config, [prepare(source) for source in config.data.sources])
    run = object.__new__(OnRay)
    run.config, run.say, run._transport = config, said.append, None
    run.pool, run._sums = Pool(None, config, [], print, lambda name: []), Aggregation(None, config, plan, None, print)
    run._lanes = Lanes(carried(config, None))
    run._sums._actors = ["actor"] * pieces
    run.pool.dispatcher.join("worker-0")
    if place:
        run.pool.places["worker-0"] = run.pool.called["worker-0"] = place
    else:
        run.pool.lines["worker-0"] = None  # type: ignore[assignment]
    for _ in range(2):
        run._tell(False)
    assert len(said) == 1
    assert said[0].startswith(f"workers and the aggregator talk by Ray: {why}")
    run._tell(True)
    assert said[1:] == ["workers and the aggregator talk by lines: all of them are on this machine"]


class Told:
    """A line that keeps what goes by it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def tell(self, *call: Any) -> None:
        self.calls.append(call)

    def call(self, *call: Any) -> int:
        self.calls.append(call)
        return 0

    def settle(self) -> None:
        self.calls.append(("settled",))

    def close(self) -> None:
        self.calls.clear()


def test_sums_wait_for_the_outer_step(tiny: Make) -> None:
    """Few or small ones, and not when their worker is gone, with which its memory may go; each is sent once."""
    config = resolve(tiny("cluster.workers=2"))
    plan = blueprint(config, [prepare(source) for source in config.data.sources])
    run, line = object.__new__(OnRay), Told()
    run.pool, run._recomputed = Pool(None, config, [], print, lambda name: []), 0
    run._sums = sums = Aggregation(None, config, plan, None, print)
    sums._line, sums._published = line, lambda: None  # type: ignore[assignment, return-value]

    def add(shard: int, size: int) -> Placed:
        shared = Shared(1, 2, 3, size, "<i8", size // 8)
        sums.add(7, 0, Receipt(1, (shard,), (), (), True, (shard,)), [shared], "node")
        return Placed(7, 0, (shard,), shared, shard)

    def told() -> list[tuple[Any, ...]]:
        calls, line.calls = line.calls, []
        return calls

    small = [add(shard, 64) for shard in range(12)]
    assert told() == []
    sums.apply(7)
    assert told() == [("apply_here", small, 7)]
    sums.apply(8)
    assert told() == [("apply_here", [], 8)], "once"
    large = [add(shard, SMALL // 4) for shard in range(TOGETHER)]
    assert told() == []
    large.append(add(TOGETHER, SMALL // 4))
    assert told() == [("add_here", large)]
    gone = [add(9, 64)]
    run.pool.dispatcher.join("worker-0")
    run._left("worker-0")
    assert told() == [("add_here", gone)]
    held = [add(1, 64)]
    sums.redo(7, 0, [2])
    assert told() == [("redo_here", held, 7, 0, [2])]
    held = [add(1, 64)]
    sums._rest()
    assert told() == [("add_here", held), ("settled",)], "what is called by Ray comes after them"
    add(2, 64)
    sums.end()
    assert sums._held == [], "of another aggregator"


def test_who_cannot_read_the_drivers_memory_begins_no_line(tiny: Make) -> None:
    worker = Worker(resolve(tiny()), [])
    worker.open()
    probe = Pool(None, resolve(tiny("cluster.workers=2")), [], print, lambda name: [])._probed
    there = probe()
    assert there is not None
    assert there == probe(), "one for all"
    by_ray = resolve(tiny("cluster.workers=2", "cluster.lines=false"))
    assert Pool(None, by_ray, [], print, lambda name: [])._probed() is None
    assert worker._reads(there)
    assert not worker._reads(None)
    assert not worker._reads(there._replace(pid=2**22 + 1)), "a process that is not to be seen"
    other = Space(0)
    assert not worker._reads(other.shared("u1", 0)), "memory of something else"
