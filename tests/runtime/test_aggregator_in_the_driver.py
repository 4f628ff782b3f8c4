"""The aggregator of a small θ, an object of the driver's on a cluster of the run's own: by shared memory and by Ray."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from metadist.config import Config, resolve
from metadist.engine.engine import Blueprint
from metadist.runtime.aggregation import Aggregation, in_the_driver
from metadist.runtime.aggregator import Aggregator, sealed
from metadist.runtime.cut import Topology
from metadist.runtime.sharing import Space, Spaces
from metadist.runtime.worker import Receipt

IMAGE, SHARDS, STEPS = (1, 16, 16), 4, 4


class Store:
    """As much of Ray as there is to it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def put(self, value: Any) -> str:
        self.kept[name := f"reference-{len(self.kept)}"] = value
        return name

    def get(self, name: str | list[str]) -> Any:
        if isinstance(name, list):
            return [self.get(one) for one in name]
        if name not in self.kept:
            raise ObjectLostError(name, None, "")
        return self.kept[name]


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return resolve(tiny("cluster.workers=2", "cluster.address=local", "outer.optimizer=adam", "outer.clip=0.05"))


@pytest.fixture
def sums(config: Config) -> Aggregation:
    made = Aggregation(Store(), config, Blueprint(config, IMAGE), None, print)
    made.start(None)
    assert made.lined
    return made


def integers(config: Config, step: int, shard: int) -> np.ndarray:
    size = Blueprint(config, IMAGE).sums.total
    return np.random.default_rng([step, shard]).integers(-(2**40), 2**40, size)


def receipt(shard: int, q: np.ndarray) -> Receipt:
    return Receipt(os.getpid(), (shard,), (), (), True, (sealed(q),))


class Sent:
    """Sums as a worker sends them, by either way."""

    def __init__(self, sums: Aggregation, by_memory: bool) -> None:
        self.sums, self.by_memory, self.spaces = sums, by_memory, list[Space]()

    def theta(self) -> np.ndarray:
        """As a worker reads it."""
        if self.by_memory:
            _, values = Spaces().read(self.sums.published.values)
            return np.array(values)
        (reference,) = self.sums.broadcast
        found: np.ndarray = self.sums.ray.get(reference).values
        return found

    def add(self, step: int, attempt: int, shard: int, q: np.ndarray) -> None:
        where: Any
        if self.by_memory:
            self.spaces.append(Space(q.nbytes))
            self.spaces[-1].array("<i8", len(q))[:] = q
            where = self.spaces[-1].shared("<i8", len(q))
        else:
            where = self.sums.ray.put(q)
        self.sums.add(step, attempt, receipt(shard, q), (where,), "node")


@pytest.mark.parametrize("by_memory", [True, False])
def test_it_takes_the_steps_that_an_aggregator_takes(config: Config, sums: Aggregation, by_memory: bool) -> None:
    plain, sent = Aggregator(config, IMAGE), Sent(sums, by_memory)
    for step in range(STEPS):
        assert sent.theta().tobytes() == plain.broadcast().values.tobytes()
        if step == 2:  # begun again with coarser exponents
            sent.add(step, 0, 0, integers(config, step, 0))
            sums.redo(step, 0, {1})
            plain.redo(step, 0, {1})
        attempt = int(step == 2)
        for shard in range(SHARDS):
            q = integers(config, step, shard)
            sent.add(step, attempt, shard, q)
            if shard == 1:
                sums.hand_over()  # a worker died
            assert plain.add(step, attempt, [shard], q)
        assert sums.gather(step, attempt) == (set(), set())
        found, (expected, _) = sums.apply(step)(), plain.apply(step)
        assert found._replace(spans=(), bytes=0) == expected._replace(spans=(), bytes=0)
    whole, there = sums.snapshot()(), plain.snapshot()
    for one, other in ((whole.values, there.values), (whole.memory, there.memory)):
        assert {name: value.tobytes() for name, value in one.items()} == {n: v.tobytes() for n, v in other.items()}
    assert sums.values()[0].tobytes() == plain.broadcast().values.tobytes()
    sums.end()
    assert not sums.lined


def test_the_way_may_change_from_step_to_step(config: Config, sums: Aggregation) -> None:
    plain, ways = Aggregator(config, IMAGE), [Sent(sums, by_memory) for by_memory in (True, False)]
    for step in range(STEPS):
        sent = ways[step % 2]
        assert sent.theta().tobytes() == plain.broadcast().values.tobytes()
        for shard in range(SHARDS):
            sent.add(step, 0, shard, integers(config, step, shard))
            plain.add(step, 0, [shard], integers(config, step, shard))
        assert sums.apply(step)().grad_norm == plain.apply(step)[0].grad_norm


@pytest.mark.parametrize("by_memory", [True, False])
def test_a_new_one_begins_where_the_checkpoint_is(config: Config, sums: Aggregation, by_memory: bool) -> None:
    sent = Sent(sums, by_memory)

    def take(step: int) -> None:
        sent.theta()
        for shard in range(SHARDS):
            sent.add(step, 0, shard, integers(config, step, shard))
        assert sums.apply(step)().missing == ()

    take(0)
    kept, there = sums.snapshot()(), sent.theta().tobytes()
    take(1)
    later = sent.theta().tobytes()
    sums.end()
    sums.start(kept)
    assert sent.theta().tobytes() == sums.values()[0].tobytes() == there
    take(1)
    assert sent.theta().tobytes() == later


def test_sums_that_are_lost_are_missing(config: Config, sums: Aggregation) -> None:
    sent = Sent(sums, by_memory=False)
    before = sent.theta().tobytes()
    for shard in range(SHARDS - 1):
        sent.add(0, 0, shard, integers(config, 0, shard))
    q = integers(config, 0, 3)
    sums.add(0, 0, receipt(3, q), ("lost",), "node")
    assert sums.apply(0)().missing == (3,)
    assert sent.theta().tobytes() == before
    sent.add(0, 0, 3, q)
    assert sums.apply(0)().missing == ()


def test_a_sum_of_a_process_that_is_gone_is_missing(config: Config, sums: Aggregation) -> None:
    sent = Sent(sums, by_memory=True)
    sent.theta()
    for shard in range(SHARDS):
        sent.add(0, 0, shard, integers(config, 0, shard))
    sums._held[2] = sums._held[2]._replace(shared=sums._held[2].shared._replace(pid=2**22 + 1))
    assert sums.apply(0)().missing == (2,)


@pytest.mark.parametrize(("words", "there"), [
    ([], True), (["cluster.address=auto"], False), (["cluster.lines=false"], False),
    (["outer.compression=int8"], False), (["model.width=4096"], False),
    (["task.meta_batch=4096", "task.shard=1"], False),
])  # fmt: skip
def test_the_rule(words: list[str], there: bool, tiny: Callable[..., Config]) -> None:
    config = resolve(tiny("cluster.workers=2", "cluster.address=local", *words))
    assert in_the_driver(config, Blueprint(config, IMAGE), Topology()) is there
    assert not in_the_driver(config, Blueprint(config, IMAGE), Topology(aggregators=2))
    assert not in_the_driver(config, Blueprint(config, IMAGE), Topology(tree=True))
