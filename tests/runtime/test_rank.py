"""Ranks that sum among themselves, in threads of this process: the bits of the plain run for any number of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.layout import sha256
from metadist.errors import ClusterError
from metadist.run import train
from metadist.runtime.allreduce import agreed
from metadist.runtime.rank import Rank, Stepped
from metadist.runtime.runtime import NotFinite
from metadist.runtime.stops import next_stop
from metadist.runtime.worker import Introduction, Worker

Make = Callable[..., Config]


class Group:
    """`world` ranks, each in a thread; their buffers meet at a barrier."""

    def __init__(self, config: Config, world: int) -> None:
        self.barrier, self.given = threading.Barrier(world, timeout=60), [np.zeros(0, np.int64)] * world
        paths = [str(prepare(source).path) for source in config.data.sources]
        self.ranks = [
            Rank(config, Worker(config, paths), None, rank, world, lambda mine, rank=rank: self.add_up(rank, mine))
            for rank in range(world)
        ]
        self.threads = ThreadPoolExecutor(world)

    def add_up(self, rank: int, mine: np.ndarray) -> np.ndarray:
        self.given[rank] = mine
        self.barrier.wait()
        total = np.sum(self.given, axis=0)
        self.barrier.wait()
        return total

    def all(self, ask: Callable[[Rank], Any]) -> list[Any]:
        """What each rank says, asked at the same time."""
        return list(self.threads.map(ask, self.ranks))

    def steps(self, count: int) -> list[Stepped]:
        """Steps as the first rank tells of them; the others must say the same, but for where their time went."""
        told = []
        for _ in range(count):
            first, *others = [
                one._replace(spans=(), report=one.report._replace(spans=()))
                for one in self.all(lambda rank: rank.step())
            ]
            assert all(repr(other) == repr(first) for other in others)
            told.append(first)
        return told

    def hashes(self) -> set[str]:
        return {sha256({n: torch.from_numpy(v) for n, v in r.aggregator.snapshot().values.items()}) for r in self.ranks}


@pytest.fixture
def group(tiny: Make) -> Callable[..., Group]:
    return lambda world, *overrides: Group(resolve(tiny(*overrides)), world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_ranks(world: int, group: Callable[..., Group], tiny_run: Any) -> None:
    """Four shards a step: with three ranks their shares differ, with five one rank only listens."""
    ranks = group(world)
    told = ranks.steps(12)
    assert ranks.hashes() == {tiny_run.result["theta_sha256"]}
    each = [len(range(rank, 4, world)) for rank in range(world)]
    assert all(list(step.shards) == each and step.recomputed == 0 and not step.halted for step in told)


def test_an_evaluation_is_divided(group: Callable[..., Group], tiny: Make) -> None:
    config = resolve(tiny())
    alone, together = group(1), group(3)
    (whole,) = alone.all(lambda rank: rank.judge(None, config, "val", 21))
    parts = together.all(lambda rank: rank.judge(None, config, "val", 21))
    assert sorted(first for part in parts for first in part) == sorted(whole) == list(range(0, 21, 2))
    for part in parts:
        assert 3 <= len(part) <= 4
        assert all((part[first]["score"] == whole[first]["score"]).all() for first in part)


def test_a_bound_that_is_exceeded(group: Callable[..., Group], tiny: Make, tmp_path: Any) -> None:
    """Every rank does the step again with the same coarser exponents, whichever rank's shard it was."""
    override = "algorithm.support_loss_weight=1e18"
    alone = train(tiny(override), "tiny", tmp_path / "alone").result
    ranks = group(2, override)
    told = ranks.steps(12)
    assert ranks.hashes() == {alone["theta_sha256"]}
    assert sum(step.recomputed for step in told) == alone["shards_recomputed"] > 0


def unusable(group: Group, step: int, shard: int, times: int) -> list[int]:
    """Make a shard of a step come out as not finite, on whichever rank; returns the ranks that computed it so."""
    met: list[int] = []
    for rank in group.ranks:

        def compute(
            broadcast: Any, at: int, attempt: int, shards: Sequence[int], rank: Rank = rank,
            real: Any = rank.worker.compute,
        ) -> Any:  # fmt: skip
            if at != step or shard not in shards or len(met) >= times:
                return real(broadcast, at, attempt, shards)
            met.append(rank.rank)
            receipt, q = real(broadcast, at, attempt, [s for s in shards if s != shard])
            return receipt._replace(not_finite=(shard,)), q

        rank.worker.compute = compute  # type: ignore[method-assign]
    return met


def test_what_is_not_finite_once_is_computed_by_another_rank(group: Callable[..., Group], tiny_run: Any) -> None:
    ranks = group(2)
    met = unusable(ranks, step=3, shard=1, times=1)
    told = ranks.steps(12)
    assert met == [1]
    assert ranks.hashes() == {tiny_run.result["theta_sha256"]}
    assert [step.recomputed for step in told] == [0, 0, 0, 1] + [0] * 8
    assert told[3].shards == (3, 1), "the other rank computed it"


def test_what_is_not_finite_twice_is_divergence_on_every_rank(group: Callable[..., Group]) -> None:
    ranks = group(2)
    met = unusable(ranks, step=2, shard=3, times=2)
    ranks.steps(2)
    before = ranks.hashes()

    def refused(rank: Rank) -> tuple[int, int]:
        with pytest.raises(NotFinite) as told:
            rank.step()
        return told.value.step, told.value.shard

    assert ranks.all(refused) == [(2, 3)] * 2
    assert sorted(met) == [0, 1], "two ranks have computed it"
    assert ranks.hashes() == before, "θ is not touched"
    ranks.steps(1)


def test_one_rank_that_asks_halts_all(group: Callable[..., Group]) -> None:
    ranks = group(3)
    told = ranks.all(lambda rank: rank.step(halt=rank.rank == 1))
    assert [step.halted for step in told] == [True] * 3
    assert [rank.aggregator.step for rank in ranks.ranks] == [1] * 3


def test_ranks_with_other_bits_are_refused() -> None:
    one = Introduction(11, "here", (), {"threads": "1"}, "aa", {})
    assert agreed({}, [one, one]) == {"threads": "1", "probe": "aa"}
    with pytest.raises(ClusterError, match=r"the one on there \(process 12\) has threads 2 instead of 1, probe bb ins"):
        agreed({}, [one, one._replace(pid=12, host="there", fingerprint={"threads": "2"}, probe="bb")])
    with pytest.raises(ClusterError, match="probe aa instead of cc"):
        agreed({"threads": "1", "probe": "cc"}, [one])


def test_the_stops_of_a_run(tiny: Make) -> None:
    config = tiny("outer.steps=13")  # checkpoints every 4, validations every 6
    stops, step = [], 0
    while step < 13:
        step = next_stop(config, step)
        stops.append(step)
    assert stops == [4, 6, 8, 12, 13]
