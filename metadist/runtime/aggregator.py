"""The parameter aggregator: every shard's integers once, then one outer step.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor.
"""

import zlib
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.config import Config, Staged
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint, Lane
from metadist.engine.exact import coarser, dequantise, first_exponents, next_exponents, quantise, scales
from metadist.engine.layout import blocks
from metadist.engine.outer import OuterStep, learning_rate, moved_state
from metadist.runtime.cut import Piece, cut, gathered_exponents
from metadist.spans import Span, Spans

REPORTS = 1024
"""Newest reports that an aggregator keeps, for a driver that comes after a dead one."""


class Broadcast(NamedTuple):
    """What a worker needs for the shards of one step: θ and state as one flat buffer, and the exponents.

    Of one piece, where there are several aggregators.
    """

    step: int
    attempt: int
    values: np.ndarray
    exponents: np.ndarray


class Snapshot(NamedTuple):
    """The whole state of a run before meta-step `step`: what a checkpoint holds.

    values: θ and state by name; memory: the optimizer's tensors by name; exponents: int64
    per summed tensor; lanes: what each of them carries, where they carry something; ledger: of a
    run with async, int64 [entries, 4] as in `ledger.py`.
    """

    step: int
    values: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    exponents: np.ndarray
    lanes: tuple[Lane, ...] = ()
    ledger: np.ndarray | None = None


class Report(NamedTuple):
    """What one meta-step says: means over its tasks, the gradient's norm, the rate, the bytes of all sums that came.

    spans: where the aggregator's time went.
    """

    step: int
    loss: float
    score: float
    grad_norm: float
    lr: float
    finite: bool
    missing: tuple[int, ...]
    duplicates: int
    bytes: int = 0
    spans: tuple[Span, ...] = ()


class Position(NamedTuple):
    """Where an aggregator stands that has outlived its driver, and its newest reports, oldest first."""

    step: int
    pieces: int
    reports: tuple[Report, ...]


def sealed(q: np.ndarray) -> int:
    """What a worker says that it sent: the elements' sum, around the end of int64, or of a payload its CRC-32."""
    # A sum is as quick as memory, and every flipped bit moves it; a CRC of integers would cost more than adding them.
    return int(np.add.reduce(q)) if q.dtype == np.int64 else zlib.crc32(np.ascontiguousarray(q).data)


def _finite(value: Tensor) -> bool:
    """Whether all elements are, without a tensor of answers. NaN is least and largest of whatever it is among."""
    return not value.numel() or all(bool(end.isfinite()) for end in value.aminmax())


def _added(total: np.ndarray, q: np.ndarray, first: bool) -> int:
    """Add integers to a total, or put the first ones there; their seal, taken on the way."""
    seal = np.int64(0)
    with np.errstate(over="ignore"):  # it goes around
        for block in blocks(len(q)):
            if first:
                total[block] = q[block]
            else:
                np.add(total[block], q[block], out=total[block])
            seal = seal + np.add.reduce(q[block])
    return int(seal)


class Aggregator:
    """θ, the running state, the optimizer and the sum of the current step; or a piece of them.

    snapshot: of the whole run; piece: which of `pieces`.
    """

    def __init__(
        self,
        config: Config,
        shape: tuple[int, ...],
        snapshot: Snapshot | None = None,
        classes: int = 0,
        piece: int = 0,
        pieces: int = 1,
    ) -> None:
        blueprint = Blueprint(config, shape, classes)
        self.config, self.pieces = config, pieces
        self.piece: Piece = cut(blueprint, pieces)[piece]
        self.shards = config.lanes
        values: dict[str, Tensor] = blueprint.theta | blueprint.state
        self.step, self.exponents = 0, first_exponents(self.piece.sums)
        if snapshot is not None:
            values = {name: torch.from_numpy(np.array(value)) for name, value in snapshot.values.items()}
            self.step, self.exponents = snapshot.step, np.array(snapshot.exponents)[self.piece.tensors]
        self.state = {name: values[name] for name in self.piece.state}
        self.total = np.zeros(self.piece.sums.total, dtype=np.int64)
        self.keys = Staged(config, lambda here: here.outer)
        self.outer = OuterStep(config.outer, {name: values[name] for name in self.piece.theta}, self.keys.at)
        self.reports: deque[Report] = deque(maxlen=REPORTS)
        if snapshot is not None:
            self.outer.remember({name: torch.from_numpy(np.array(value)) for name, value in snapshot.memory.items()})
        self.bytes, self.spans = 0, Spans()
        self._open(attempt=0)

    def _open(self, attempt: int) -> None:
        self.attempt, self.duplicates = attempt, 0
        self.added: set[int] = set()  # without any of them the total is of nothing
        self._mean: Tensor | None = None

    def broadcast(self) -> Broadcast:
        """θ_t for the workers."""
        values = self.piece.values.flatten(self.outer.theta | self.state)
        return Broadcast(self.step, self.attempt, values.numpy(), self.exponents)

    def add(self, step: int, attempt: int, shards: Collection[int], q: np.ndarray, seal: int | None = None) -> bool:
        """Count the sum of some shards. A late one, or one with a shard that is counted, is dropped: False.

        So is one that is not what its worker sent: of another size or type, or without its `seal`.
        q: int64 [total], or their payloads one behind the other, uint8.
        """
        self.bytes += q.nbytes
        late = (step, attempt) != (self.step, self.attempt) or not self.added.isdisjoint(shards)
        if late or not self._of_its_kind(q, len(shards)) or not self._counted(q, len(shards), seal):
            self.duplicates += len(shards)
            return False
        self.added.update(shards)
        return True

    def _counted(self, q: np.ndarray, shards: int, seal: int | None) -> bool:
        """Add it, if it has its seal."""
        with self.spans.of("sum"):
            if self.piece.compression is not None:
                if seal is not None and seal != sealed(q):
                    return False
                for number, part in enumerate(self._decompressed(q, shards)):
                    _added(self.total, part, first=not self.added and number == 0)
                return True
            if _added(self.total, q, first=not self.added) == seal or seal is None:
                return True
            # Exact as integers are, they are taken out again; the total of a first sum is not read.
            self.total -= q
            return False

    def _of_its_kind(self, q: np.ndarray, shards: int) -> bool:
        compression = self.piece.compression
        if compression is None:
            return q.shape == self.total.shape and q.dtype == self.total.dtype
        return q.shape == (shards * sum(compression.sizes),) and q.dtype == np.uint8

    def _decompressed(self, q: np.ndarray, shards: int) -> list[np.ndarray]:
        """The integers of each payload, which the worker has seen to fit."""
        layout, compression = self.piece.sums, self.piece.compression
        assert compression is not None
        scale = scales(layout, self.exponents)
        each = (compression.decompress(payload) for payload in np.split(q, shards))
        return [quantise(layout, tensors, scale, self.shards).q for tensors in each]

    def redo(self, step: int, attempt: int, exceeding: Iterable[int]) -> Broadcast:
        """Begin the step again with coarser exponents for the tensors in which some shard exceeded its bound.

        exceeding: their indices among those of the run.
        """
        if (step, attempt) == (self.step, self.attempt):
            own = np.flatnonzero(np.isin(self.piece.tensors, list(exceeding)))
            self.exponents = coarser(self.exponents, own.tolist())
            self._open(attempt + 1)
        return self.broadcast()

    def squares(self, step: int) -> list[float] | None:
        """Of its tensors in the complete mean gradient, for the norm of the whole; None while shards are missing."""
        if self._missing(step):
            return None
        summed = self._summed()
        with self.spans.of("outer step"), one_thread():
            return self.outer.squares(self._gradient(summed))

    def apply(self, step: int, *squares: Sequence[float] | None) -> tuple[Report, Broadcast]:
        """One outer step from the complete sum; without it nothing moves and the report says what is missing.

        squares: those of every piece in turn, where there are several; where one has none, none moves.
        """
        missing, whole = self._missing(step), [one for piece in squares if piece is not None for one in piece]
        if missing or None in squares:
            nan = float("nan")
            return Report(step, nan, nan, nan, 0.0, True, missing, self.duplicates), self.broadcast()
        mean, duplicates, received = self._summed(), self.duplicates, self.bytes
        self.exponents = next_exponents(self.piece.sums, self.total, self.exponents)
        report = self.move(mean, whole or None)
        report = report._replace(duplicates=duplicates, bytes=received)
        self.reports.append(report._replace(spans=()))
        return report, self.broadcast()

    def move(self, mean: Tensor, squares: Sequence[float] | None = None) -> Report:
        """Take the outer step by the mean, over tasks or replicas, of all that is summed, float64 [total]."""
        step, means = self.step, self.piece.sums.split(mean)
        with self.spans.of("outer step"), one_thread():
            norm = self.outer.step(self._gradient(mean), step, squares)
            statistics = {name: means[f"statistics.{name}"] for name in self.state}
            if self.config.outer.local is None:
                self.state = moved_state(self.state, statistics)
            else:  # replicas moved it themselves
                self.state = {name: statistics[name].to(value.dtype) for name, value in self.state.items()}
        self.step += 1
        self.bytes = 0
        self._open(attempt=0)
        return Report(
            step,
            float(means.get("metric.loss", np.nan)),
            float(means.get("metric.score", np.nan)),
            norm,
            learning_rate(self.keys.at(step), step),
            all(_finite(value) for value in (self.outer.flat.detach(), *self.state.values())),
            (),
            0,
            spans=self.spans.take(),
        )

    def _missing(self, step: int) -> tuple[int, ...]:
        """Shards that are not counted."""
        shards = range(self.shards)
        return tuple(sorted(set(shards) - self.added)) if step == self.step else tuple(shards)

    def _summed(self) -> Tensor:
        """The mean of a complete sum, float64 [total]; taken once."""
        if self._mean is None:
            with self.spans.of("sum"), one_thread():
                self._mean = dequantise(self.piece.sums, self.total, self.exponents, self.config.averaged)
        return self._mean

    def _gradient(self, mean: Tensor) -> dict[str, Tensor]:
        means = self.piece.sums.split(mean)
        return {name: means[f"gradient.{name}"] for name in self.piece.theta}

    def position(self) -> Position:
        """For a driver that finds this aggregator running."""
        return Position(self.step, self.pieces, tuple(self.reports))

    def reopen(self) -> Broadcast:
        """Begin the current step anew: what its shards' sums were to another driver is computed again."""
        self._open(attempt=0)
        return self.broadcast()

    def snapshot(self) -> Snapshot:
        """The state now, of this piece; copies, so that the next step does not move them."""
        return Snapshot(
            self.step,
            {name: value.clone().numpy() for name, value in (self.outer.theta | self.state).items()},
            {name: value.numpy() for name, value in self.outer.memory().items()},
            self.exponents.copy(),
        )


def joined(pieces: Sequence[Piece], snapshots: Sequence[Snapshot]) -> Snapshot:
    """The state of a run from the snapshots of all its pieces, taken at one step."""
    return Snapshot(
        snapshots[0].step,
        {name: value for snapshot in snapshots for name, value in snapshot.values.items()},
        {name: value for snapshot in snapshots for name, value in snapshot.memory.items()},
        gathered_exponents(pieces, [snapshot.exponents for snapshot in snapshots]),
    )
