"""A worker: samples its tasks, adapts to them and returns integer sums.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor. It keeps no
state between calls, so that any worker can compute any shard.
"""

import hashlib
import os
import socket
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config
from metadist.data.sources import prepare
from metadist.data.table import Table, open_table
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents
from metadist.engine.fingerprint import fingerprint
from metadist.engine.hardware import hardware
from metadist.runtime.aggregator import Broadcast, sealed


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
    current: whether the parameters were those of the step; seal: of the sum, by which the
    aggregator knows it.
    """

    pid: int
    summed: tuple[int, ...]
    not_finite: tuple[int, ...]
    exceeding: tuple[int, ...]
    current: bool
    seal: int


def open_tables(config: Config, paths: Sequence[str]) -> list[Table]:
    """The run's tables: those the driver built where this machine has them, else built here."""
    return [
        open_table(Path(path)) if Path(path).exists() else prepare(source)
        for source, path in zip(config.data.sources, paths, strict=True)
    ]


class Worker:
    """Computes shards and evaluation tasks of one run."""

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
        probe = hashlib.sha256(part.q.astype("<i8").tobytes() + bytes([part.finite, part.fits])).hexdigest()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = tuple(name for name in visible.split(",") if name)
        return Introduction(
            os.getpid(), socket.gethostname(), gpus, fingerprint(self.config, self.tables), probe, hardware()
        )

    def compute(
        self, broadcast: Broadcast, step: int, attempt: int, shards: Sequence[int]
    ) -> tuple[Receipt, np.ndarray]:
        """Some shards of one step and their integer sum; nothing is computed from a broadcast of another step."""
        if (broadcast.step, broadcast.attempt) != (step, attempt):
            return Receipt(os.getpid(), (), (), (), False, 0), np.zeros(0, dtype=np.int64)
        total, summed, not_finite, exceeding = None, [], [], set[int]()
        for shard in shards:
            part = self.engine.part(broadcast.values, broadcast.exponents, step, shard)
            if part.fits:
                total = part.q if total is None else total + part.q
                summed.append(shard)
            elif not part.finite:
                not_finite.append(shard)
            exceeding.update(part.exceeding if part.finite else ())
        q = np.zeros(0, dtype=np.int64) if total is None else total
        wrong = tuple(not_finite), tuple(sorted(exceeding))
        return Receipt(os.getpid(), tuple(summed), *wrong, True, sealed(q)), q

    def judge(self, values: np.ndarray, judged: Config, split: str, first: int, tasks: int) -> dict[str, np.ndarray]:
        """Accuracy and loss of evaluation tasks first … first+tasks−1."""
        return self.engine.judge(values, judged, split, first, tasks)
