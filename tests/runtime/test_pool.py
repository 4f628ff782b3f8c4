"""The driver's side of the workers, and what one of them does by its line, without Ray."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import blueprint
from metadist.runtime import pool
from metadist.runtime.aggregation import Aggregation
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.on_ray import OnRay
from metadist.runtime.pool import Asked, Pool, Shard, Worker
from metadist.runtime.sharing import Board, Outbox, Published, Spaces

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
    worker._spaces, worker._outbox = Spaces(), Outbox()
    aggregator = Aggregator(config, worker.engine.tasks.shape)
    reader, broadcast = Spaces(), aggregator.broadcast()
    board = Board(broadcast.values.dtype.str, len(broadcast.values))
    published = Published(0, 0, board.publish(0, aggregator.broadcast), broadcast.exponents)
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
    board.publish(2, aggregator.broadcast)
    receipt, shared = worker.compute_here(published, 0, 0, [0])
    assert (receipt.current, receipt.summed, shared) == (False, (), None), "θ of another step lies there now"


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
