"""The parameter aggregator: every shard's integers once, then one outer step.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor.
"""

import math
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
from metadist.engine.exact import Means, coarser, first_exponents, next_exponents, quantise
from metadist.engine.layout import Layout, Run, blocks
from metadist.engine.outer import Gradient, OuterStep, learning_rate, moved_state, norm_of
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


class Sum(NamedTuple):
    """Of some shards; q: int64 [total], or their payloads one behind the other, uint8; seal: what its worker sent."""

    shards: Collection[int]
    q: np.ndarray
    seal: int | None = None


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
    return not value.numel() or all(math.isfinite(end) for end in value.aminmax())


def _added(total: np.ndarray, sums: Sequence[np.ndarray], first: bool) -> list[int]:
    """Add integers to a total, or put the first ones there; their seals, taken on the way.

    Of several at once the total goes through memory once.
    """
    seals = [np.int64(0) for _ in sums]
    with np.errstate(over="ignore"):  # it goes around
        for block in blocks(len(total)):
            here, before = total[block], None if first else total[block]
            for number, q in enumerate(sums):
                part = q[block]
                seals[number] = seals[number] + np.add.reduce(part)
                before = part if before is None else np.add(before, part, out=here)
            if before is not here and before is not None:
                here[:] = before
    return [int(seal) for seal in seals]


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
        # In name order the gradient comes first among the sums, and the rest is small.
        self._tensors, self._elements = len(self.outer.layout.names), self.outer.layout.total
        self._rest = Layout(self.piece.sums.names[self._tensors :], self.piece.sums.shapes[self._tensors :])
        self._gradients = Means(self.outer.layout, self.total[: self._elements])
        self._means = Means(self._rest, self.total[self._elements :])
        self.reports: deque[Report] = deque(maxlen=REPORTS)
        if snapshot is not None:
            self.outer.remember({name: torch.from_numpy(np.array(value)) for name, value in snapshot.memory.items()})
        self.bytes, self.spans = 0, Spans()
        self._open(attempt=0)

    def _open(self, attempt: int) -> None:
        self.attempt, self.duplicates = attempt, 0
        self.added: set[int] = set()  # without any of them the total is of nothing
        self._gradient: tuple[Gradient, list[float]] | None = None

    def broadcast(self, out: np.ndarray | None = None) -> Broadcast:
        """θ_t for the workers; out: where its values are written to, if they are to lie in memory that is there."""
        values = self.outer.theta | self.state
        into = None if out is None else torch.from_numpy(out)
        flat = torch.cat([values[name].reshape(-1) for name in self.piece.values.names], out=into)
        return Broadcast(self.step, self.attempt, flat.numpy(), self.exponents)

    def add(self, step: int, attempt: int, shards: Collection[int], q: np.ndarray, seal: int | None = None) -> bool:
        """Count the sum of some shards. A late one, or one with a shard that is counted, is dropped: False.

        So is one that is not what its worker sent: of another size or type, or without its `seal`.
        q: int64 [total], or their payloads one behind the other, uint8.
        """
        return self.add_all(step, attempt, [Sum(shards, q, seal)])[0]

    def add_all(self, step: int, attempt: int, sums: Sequence[Sum]) -> list[bool]:
        """Of several sums that are there at once, in less time; of two with the same shard the first counts."""
        self.bytes += sum(one.q.nbytes for one in sums)
        current = (step, attempt) == (self.step, self.attempt)
        usable, seen = [], set(self.added)
        for one in sums:
            usable.append(current and seen.isdisjoint(one.shards) and self._of_its_kind(one.q, len(one.shards)))
            seen.update(one.shards if usable[-1] else ())
        with self.spans.of("sum"):
            whole = iter(self._counted([one for one, kept in zip(sums, usable, strict=True) if kept]))
        counted = [kept and next(whole) for kept in usable]
        self.duplicates += sum(len(one.shards) for one, kept in zip(sums, counted, strict=True) if not kept)
        return counted

    def _counted(self, sums: Sequence[Sum]) -> list[bool]:
        """Add them, those that have their seals."""
        first = not self.added
        if self.piece.compression is not None:
            whole = [one.seal is None or one.seal == sealed(one.q) for one in sums]
            for one in (one for one, kept in zip(sums, whole, strict=True) if kept):
                for part in self._decompressed(one.q, len(one.shards)):
                    _added(self.total, [part], first)
                    first = False
        else:
            seals = _added(self.total, [one.q for one in sums], first) if sums else []
            whole = [one.seal is None or one.seal == seal for one, seal in zip(sums, seals, strict=True)]
            if not all(whole):
                # It is in the total, and what it was may change before it is taken out: the step's sum begins again.
                self.added.clear()
                return [False for _ in sums]
        self.added.update(*(one.shards for one, kept in zip(sums, whole, strict=True) if kept))
        return whole

    def _of_its_kind(self, q: np.ndarray, shards: int) -> bool:
        compression = self.piece.compression
        if compression is None:
            return q.shape == self.total.shape and q.dtype == self.total.dtype
        return q.shape == (shards * sum(compression.sizes),) and q.dtype == np.uint8

    def _decompressed(self, q: np.ndarray, shards: int) -> list[np.ndarray]:
        """The integers of each payload, which the worker has seen to fit."""
        layout, compression = self.piece.sums, self.piece.compression
        assert compression is not None
        each = (compression.decompress(payload) for payload in np.split(q, shards))
        return [quantise(layout, tensors, self.exponents, self.shards).q for tensors in each]

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
        return None if self._missing(step) else self._taken()[1]

    def apply(self, step: int, *squares: Sequence[float] | None) -> tuple[Report, Broadcast]:
        """One outer step from the complete sum; without it nothing moves and the report says what is missing.

        squares: those of every piece in turn, where there are several; where one has none, none moves.
        """
        return self.outer_step(step, *squares), self.broadcast()

    def outer_step(self, step: int, *squares: Sequence[float] | None) -> Report:
        """The same, without θ_{t+1}."""
        missing, whole = self._missing(step), [one for piece in squares if piece is not None for one in piece]
        if missing or None in squares:
            nan = float("nan")
            return Report(step, nan, nan, nan, 0.0, True, missing, self.duplicates)
        (gradient, own), duplicates, received = self._taken(), self.duplicates, self.bytes
        means = self._means.whole(self.exponents[self._tensors :], self.config.averaged)
        largest = self._gradients.largest + self._means.largest
        self.exponents = next_exponents(self.piece.sums, self.exponents, largest)
        report = self._move(gradient, whole or own, means)._replace(duplicates=duplicates, bytes=received)
        self.reports.append(report._replace(spans=()))
        return report

    def move(self, mean: Tensor) -> Report:
        """Take the outer step by the mean, over tasks or replicas, of all that is summed, float64 [total]."""

        def gradient(run: Run, block: slice) -> Tensor:
            return mean[block]

        with self.spans.of("outer step"), one_thread():
            squares = self.outer.take(gradient)
        return self._move(gradient, squares, mean[self._elements :])

    def _move(self, gradient: Gradient, squares: Sequence[float], rest: Tensor) -> Report:
        """Take the outer step by a gradient that is taken; squares: of all pieces' tensors; rest: the other means."""
        step, norm, means = self.step, norm_of(squares), self._rest.split(rest)
        with self.spans.of("outer step"), one_thread():
            self.outer.move(gradient, step, norm)
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
            all(_finite(value) for value in (self.outer.flat, *self.state.values())),
            (),
            0,
            spans=self.spans.take(),
        )

    def _missing(self, step: int) -> tuple[int, ...]:
        """Shards that are not counted."""
        shards = range(self.shards)
        return tuple(sorted(set(shards) - self.added)) if step == self.step else tuple(shards)

    def _taken(self) -> tuple[Gradient, list[float]]:
        """The mean gradient of a complete sum, which the outer step has taken, and its squares; once."""
        if self._gradient is None:
            with self.spans.of("outer step"), one_thread():
                gradient = self._gradients.over(self.exponents[: self._tensors], self.config.averaged)
                self._gradient = gradient, self.outer.take(gradient)
        return self._gradient

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
