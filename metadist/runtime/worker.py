"""A worker: samples its tasks, adapts to them and returns integer sums.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor. It keeps no
state between calls, so that any worker can compute any shard; what a lane carries from step to
step comes in with the call and goes out with its result.
"""

import hashlib
import os
import socket
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config, Source
from metadist.data.shared import fetch
from metadist.data.sources import prepare
from metadist.data.table import Table, open_table
from metadist.engine.engine import Engine, Lane
from metadist.engine.exact import first_exponents, seal_of_all
from metadist.engine.fingerprint import fingerprint
from metadist.engine.fit import misfit
from metadist.engine.hardware import hardware
from metadist.engine.sweep import Setting
from metadist.errors import RunError
from metadist.runtime.aggregator import Broadcast, sealed
from metadist.runtime.cut import assembled, cut, gathered_exponents
from metadist.spans import Span


class Introduction(NamedTuple):
    """What a worker says of itself when it is ready: fingerprint, hash of the probe shard, hardware."""

    pid: int
    host: str
    gpus: tuple[str, ...]
    fingerprint: dict[str, str]
    probe: str
    hardware: dict[str, Any]


class Receipt(NamedTuple):
    """What goes to the driver about computed shards; their sum itself goes to the aggregator.

    summed: the shards in the sum; not_finite: those that have no sum; exceeding: the tensors
    in which some shard is beyond the bound of the exact sum (it is not in the sum either);
    current: whether the parameters were those of the step; seals: of the sum's parts, by which
    the aggregators know them; spans: where the worker's time went.
    """

    pid: int
    summed: tuple[int, ...]
    not_finite: tuple[int, ...]
    exceeding: tuple[int, ...]
    current: bool
    seals: tuple[int, ...]
    spans: tuple[Span, ...] = ()


class Floats(NamedTuple):
    """One shard's float sums [total], from whom, their seal, and where the worker's time went."""

    pid: int
    sums: np.ndarray
    seal: int
    spans: tuple[Span, ...] = ()


def open_tables(config: Config, paths: Sequence[str]) -> list[Table]:
    """The run's tables: those the driver built where this machine has them, else shared ones, else built here."""

    def one(source: Source, path: Path) -> Table:
        if path.exists():
            return open_table(path)
        return fetch(path.name, config.data.shared) if config.data.shared else prepare(source)

    return [one(source, Path(path)) for source, path in zip(config.data.sources, paths, strict=True)]


def misfitting(config: Config, paths: Sequence[str], sharing: int) -> RunError | None:
    """Whether a shard is too large for the memory here, and which would not be, where workers die and say nothing."""
    return misfit(config, [str(table.path) for table in open_tables(config, paths)], sharing)


class Worker:
    """Computes shards and evaluation tasks of one run."""

    exact = True

    def __init__(self, config: Config, paths: Sequence[str]) -> None:
        self.config, self.paths = config, paths

    # Built at the first call, not on construction: what goes wrong in a call of an actor
    # arrives with its cause, what goes wrong in its construction is told as a death.

    @cached_property
    def tables(self) -> list[Table]:
        """The run's data."""
        return open_tables(self.config, self.paths)

    @cached_property
    def engine(self) -> Engine:
        """Tasks, method and device of this process."""
        return Engine(self.config, self.tables)

    def introduce(self) -> Introduction:
        """Compute the probe shard, the first of the run at initial θ, and say who is here."""
        blueprint = self.engine.blueprint
        part = self.engine.part(blueprint.initial(), first_exponents(blueprint.sums), 0, 0)
        self.engine.spans.take()  # of the probe
        probe = hashlib.sha256(part.q.astype("<i8").tobytes() + bytes([part.finite, part.fits])).hexdigest()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = tuple(name for name in visible.split(",") if name)
        return Introduction(
            os.getpid(), socket.gethostname(), gpus, fingerprint(self.config, self.tables), probe, hardware()
        )

    def compute(
        self,
        broadcast: Broadcast,
        step: int,
        attempt: int,
        shards: Sequence[int],
        *others: Any,
        into: np.ndarray | None = None,
    ) -> tuple[Any, ...]:
        """Some shards of one step: a receipt, their sum, a part for every piece of θ, and the lanes afterwards.

        broadcast, others: of all the pieces in turn (`cluster.aggregators`), and what each shard carries, if they
        carry anything; with `outer.local` a shard is a replica. Compressed, it is not their sum but their payloads,
        one behind the other. Nothing is computed from a broadcast of another step. into: int64 [total], where the only
        sum is to lie.
        """
        broadcasts = broadcast, *(other for other in others if isinstance(other, Broadcast))
        lanes: tuple[Lane, ...] = others[len(broadcasts) - 1 :]
        pieces = cut(self.engine.blueprint, len(broadcasts))
        none = np.zeros(0, dtype=np.int64)
        if any((one.step, one.attempt) != (step, attempt) for one in broadcasts):
            return Receipt(os.getpid(), (), (), (), False, ()), *(none for _ in pieces), *lanes
        after, summed, not_finite, exceeding = list[Lane](), list[int](), list[int](), set[int]()
        parts = list[int]()
        total: np.ndarray | None = None
        with self.engine.spans.of("adapting"):
            values = assembled(pieces, [one.values for one in broadcasts], self.engine.blueprint.values.total)
            exponents = gathered_exponents(pieces, [one.exponents for one in broadcasts])
            for shard, lane in zip(shards, lanes or [{}] * len(shards), strict=True):
                part, carried = self.engine.sent(values, exponents, step, shard, lane, into if total is None else None)
                if part.fits:
                    total = part.q if total is None else self._together(total, part.q)
                    summed.append(shard)
                    parts.append(part.seal)
                elif not part.finite:
                    not_finite.append(shard)
                exceeding.update(part.exceeding if part.finite else ())
                after.append(carried)
        with self.engine.spans.of("sum"):
            sums = [none if total is None else piece.part(total, len(summed)) for piece in pieces]
            # A sum's seal is that of its parts, which were sealed while they were in the processor's cache.
            whole = len(pieces) == 1 and self.engine.blueprint.compression is None
            seals = (seal_of_all(parts),) if whole else tuple(sealed(one) for one in sums)
        wrong = tuple(not_finite), tuple(sorted(exceeding))
        receipt = Receipt(os.getpid(), tuple(summed), *wrong, True, seals, self.engine.spans.take())
        return receipt, *sums, *after[: len(lanes)]

    def _together(self, total: np.ndarray, q: np.ndarray) -> np.ndarray:
        """The sum of both, where the first one is; or both payloads."""
        if self.engine.blueprint.compression is not None:
            return np.concatenate([total, q])
        total += q
        return total

    def sums(self, broadcast: Broadcast, step: int, shard: int) -> Floats:
        """One shard's float sums from whatever version of θ it is handed."""
        with self.engine.spans.of("adapting"):
            found = self.engine.flat(broadcast.values, step, shard)
        with self.engine.spans.of("sum"):
            seal = sealed(found)
        return Floats(os.getpid(), found, seal, self.engine.spans.take())

    def judge(self, values: np.ndarray, judged: Setting, split: str, first: int, tasks: int) -> dict[str, np.ndarray]:
        """Accuracy and loss of evaluation tasks first … first+tasks−1."""
        return self.engine.judge(values, judged, split, first, tasks)
