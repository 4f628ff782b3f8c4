"""The parameter aggregator: every shard's integers once, then one outer step.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor.
"""

import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.config import Config, Staged
from metadist.engine.cores import on_cores
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint, Lane
from metadist.engine.exact import (
    Adding,
    Means,
    coarser,
    first_exponents,
    next_exponents,
    quantise,
    seal_of,
)
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


class Taken(NamedTuple):
    """The mean gradient of a complete sum, which the outer step has taken.

    squares: of its tensors; largest: of the sum's integers, by tensor.
    """

    squares: list[float]
    largest: list[int]


class Position(NamedTuple):
    """Where an aggregator stands that has outlived its driver, and its newest reports, oldest first."""

    step: int
    pieces: int
    reports: tuple[Report, ...]


def sealed(q: np.ndarray) -> int:
    """What a worker says that it sent: the seal of integers, or of a payload its CRC-32."""
    return seal_of(q) if q.dtype == np.int64 else zlib.crc32(np.ascontiguousarray(q).data)


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
        self._gradients, self._means = Means(self.outer.layout), Means(self._rest)
        self.reports: deque[Report] = deque(maxlen=REPORTS)
        if snapshot is not None:
            self.outer.remember({name: torch.from_numpy(np.array(value)) for name, value in snapshot.memory.items()})
        self.bytes, self.spans = 0, Spans()
        self._open(attempt=0)

    def _open(self, attempt: int) -> None:
        self.attempt, self.duplicates = attempt, 0
        self.added: set[int] = set()  # without any of them the total is of nothing
        self._taken: Taken | None = None

    def broadcast(self, out: np.ndarray | None = None) -> Broadcast:
        """θ_t for the workers; out: where its values are written to, if they are to lie in memory that is there."""
        values = self.outer.theta | self.state
        into = None if out is None else torch.from_numpy(out)
        flat = torch.cat([values[name].reshape(-1) for name in self.piece.values.names], out=into)
        return Broadcast(self.step, self.attempt, flat.numpy(), self.exponents)

    def add(self, step: int, attempt: int, shards: Collection[int], q: np.ndarray, seal: int | None = None) -> bool:
        """Count the sum of some shards. A late one, or one with a shard that is counted, is dropped: False.

        So is one that is not what its worker sent: of another size or type, or without its `seal`; and with the last,
        of integers, what was counted before, since the total is not to be had without them.
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
        if self.piece.compression is None:
            # What a sum was may change before it is taken out of the total again: the step's sum begins anew.
            whole = self._add(
                [one.q for one in sums], [one.seal for one in sums], [shard for one in sums for shard in one.shards]
            )
            return [whole for _ in sums]
        counted = [one.seal is None or one.seal == sealed(one.q) for one in sums]
        for one in (one for one, kept in zip(sums, counted, strict=True) if kept):
            for shard, q in zip(one.shards, self._decompressed(one.q, len(one.shards)), strict=True):
                self._add([q], [None], [shard])
        return counted

    def _add(self, sums: Sequence[np.ndarray], seals: Sequence[int | None], shards: Collection[int]) -> bool:
        """Add integers of these shards; False where one has another seal than it should: then nothing is counted.

        The last ones of a step are read as its mean gradient on their way.
        """
        if not sums:
            return True
        adding = Adding(self.total, sums, not self.added)
        self.added.update(shards)
        if len(self.added) == self.shards:
            kept = self.keys.at(self.step).clip is not None  # what is clipped is read once more
            squares = self.outer.take(self._gradient(partial(adding.block, kept=kept)))
            self._taken = Taken(squares, self._gradients.largest)
            for block in blocks(self.total.size - self._elements, self._elements):
                adding.block(block)
        else:
            with one_thread():
                on_cores(adding.block, blocks(self.total.size))
        if any(expected not in (None, found) for expected, found in zip(seals, adding.seals, strict=True)):
            self.added.clear()
            self._taken = None
            return False
        return True

    def _gradient(self, q: Callable[[slice], np.ndarray]) -> Gradient:
        """The mean gradient from the integers of a complete sum."""
        return self._gradients.over(q, self.exponents[: self._tensors], self.config.averaged)

    def _of_its_kind(self, q: np.ndarray, shards: int) -> bool:
        compression = self.piece.compression
        if compression is None:
            return q.shape == self.total.shape and q.dtype == self.total.dtype
        return q.shape == (shards * sum(compression.sizes),) and q.dtype == np.uint8

    def _decompressed(self, q: np.ndarray, shards: int) -> Iterator[np.ndarray]:
        """The integers of each payload, which the worker has seen to fit."""
        layout, compression = self.piece.sums, self.piece.compression
        assert compression is not None
        each = (compression.decompress(payload) for payload in np.split(q, shards))
        return (quantise(layout, tensors, self.exponents, self.shards).q for tensors in each)

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
        return None if self._missing(step) or self._taken is None else self._taken.squares

    def apply(self, step: int, *squares: Sequence[float] | None) -> tuple[Report, Broadcast]:
        """One outer step from the complete sum; without it nothing moves and the report says what is missing.

        squares: those of every piece in turn, where there are several; where one has none, none moves.
        """
        return self.outer_step(step, *squares), self.broadcast()

    def outer_step(self, step: int, *squares: Sequence[float] | None, out: np.ndarray | None = None) -> Report:
        """The same, without what is broadcast; out: where θ_{t+1} and state are written to, if the step is taken."""
        missing, whole = self._missing(step), [one for piece in squares if piece is not None for one in piece]
        if missing or None in squares:
            nan = float("nan")
            return Report(step, nan, nan, nan, 0.0, True, missing, self.duplicates)
        assert self._taken is not None, "it was taken with the last sum"
        own, largest = self._taken
        duplicates, received = self.duplicates, self.bytes
        gradient = self._gradient(self.total.__getitem__)  # read where it is clipped
        means = self._means.whole(self.total[self._elements :], self.exponents[self._tensors :], self.config.averaged)
        self.exponents = next_exponents(self.piece.sums, self.exponents, largest + self._means.largest)
        report = self._move(gradient, whole or own, means, out)._replace(duplicates=duplicates, bytes=received)
        self.reports.append(report._replace(spans=()))
        return report

    def move(self, mean: Tensor) -> Report:
        """Take the outer step by the mean, over tasks or replicas, of all that is summed, float64 [total]."""

        def gradient(run: Run, block: slice) -> Tensor:
            return mean[block]

        with self.spans.of("outer step"):
            squares = self.outer.take(gradient)
        return self._move(gradient, squares, mean[self._elements :])

    def _move(
        self, gradient: Gradient, squares: Sequence[float], rest: Tensor, out: np.ndarray | None = None
    ) -> Report:
        """Take the outer step by a gradient that is taken; squares: of all pieces' tensors; rest: the other means."""
        step, norm, means = self.step, norm_of(squares), self._rest.split(rest)
        with self.spans.of("outer step"), one_thread():
            alone = out is not None and not self.state  # θ is all of it
            finite = self.outer.move(gradient, step, norm, torch.from_numpy(out) if alone else None)
            statistics = {name: means[f"statistics.{name}"] for name in self.state}
            if self.config.outer.local is None:
                self.state = moved_state(self.state, statistics)
            else:  # replicas moved it themselves
                self.state = {name: statistics[name].to(value.dtype) for name, value in self.state.items()}
        self.step += 1
        self.bytes = 0
        self._open(attempt=0)
        if out is not None and self.state:
            self.broadcast(out)
        return Report(
            step,
            float(means.get("metric.loss", np.nan)),
            float(means.get("metric.score", np.nan)),
            norm,
            learning_rate(self.keys.at(step), step),
            finite and all(bool(value.isfinite().all()) for value in self.state.values()),
            (),
            0,
            spans=self.spans.take(),
        )

    def _missing(self, step: int) -> tuple[int, ...]:
        """Shards that are not counted."""
        shards = range(self.shards)
        return tuple(sorted(set(shards) - self.added)) if step == self.step else tuple(shards)

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
