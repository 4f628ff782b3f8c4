"""The driver's side of the workers, and what one of them does by its line, without Ray."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.runtime import pool
from metadist.runtime.aggregator import Aggregator, sealed
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
    aggregator.broadcast(board.place(0))
    published = Published(0, 0, board.publish(0), broadcast.exponents)
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
