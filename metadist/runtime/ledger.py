"""Which gradient went into which outer step, where workers do not wait for one another.

Shards are numbered over the whole run: number n is shard n mod K of meta-step n div K, with K
shards a step. The outer step from version v to v + 1 is taken from the next K results that come
in and are of version v − bound or newer; an older one is dropped, and its number is computed
again from the newest θ. Every number counts once. (Bounded staleness: Ho et al. 2013, "More
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", where the bound is
on clocks of workers; here it is on the versions of θ.)

Pure bookkeeping without processes, so that every interleaving can be tested.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from metadist.durable import write
from metadist.engine.device import one_thread


class Entry(NamedTuple):
    """An applied gradient: the outer step it went into, its shard's number, θ's version it is of, who computed it."""

    step: int
    number: int
    version: int
    worker: int


class Call(NamedTuple):
    """A number that a worker computes from a version of θ. Of one number there may be several."""

    id: int
    number: int
    version: int


class Ledger:
    """Numbers to be given out, calls under way, results of the current step, and what was applied."""

    def __init__(self, per_step: int, steps: int, bound: int, entries: Iterable[Entry] = ()) -> None:
        """entries: those of the outer steps taken before, of a run that is gone on with."""
        self.per_step, self.bound, self.last = per_step, bound, per_step * steps
        self.entries = list(entries)
        self.version = len(self.entries) // per_step
        self.current: list[Entry] = []
        self.calls: dict[int, Call] = {}
        self.dropped = 0
        applied = {entry.number for entry in self.entries}
        self.fresh = max(applied, default=-1) + 1
        self.pending = [number for number in range(self.fresh) if number not in applied]
        self.failed: dict[int, list[str]] = {}
        self._open: set[int] = set(self.pending)
        self._holders: dict[int, str] = {}
        self._given = 0

    @property
    def complete(self) -> bool:
        """Whether the outer step has all its gradients."""
        return len(self.current) == self.per_step

    def give(self, worker: str, alone: bool = False) -> Call | None:
        """The next number for an idle worker: one to be computed again, a new one, or at the end of a run one that
        another worker computes, lest all wait for the slowest. alone: there is nobody else."""
        number = self._next(worker, alone)
        if number is None:
            return None
        call = Call(self._given, number, self.version)
        self._given += 1
        self._open.add(number)
        self.calls[call.id], self._holders[call.id] = call, worker
        return call

    def take(self, call: Call, worker: int) -> bool:
        """A result came in, while the step is not complete; False: it is too old or late and must be dropped."""
        assert not self.complete, "the outer step comes first"
        known = self._end(call)
        if not known or call.number not in self._open or self.version - call.version > self.bound:
            self.dropped += 1
            self._again(call.number)
            return False
        self._open.discard(call.number)
        self.failed.pop(call.number, None)
        if call.number in self.pending:
            self.pending.remove(call.number)
        self.current.append(Entry(self.version, call.number, call.version, worker))
        return True

    def fail(self, call: Call, worker: str) -> bool:
        """A result was unusable: its number is computed once more, elsewhere if it can be. False: for the second
        time."""
        if not self._end(call) or call.number not in self._open:
            self.dropped += 1
            return True
        self.failed.setdefault(call.number, []).append(worker)
        self._again(call.number)
        return len(self.failed[call.number]) < 2

    def lose(self, call: Call) -> None:
        """A call's worker is gone: the number is computed again."""
        self._end(call)
        self._again(call.number)

    def advance(self) -> list[Entry]:
        """The outer step is taken; its entries, in the order in which their gradients are added. Calls that are too
        old by now are given up: their numbers are computed again, their results will be dropped."""
        assert self.complete, "an outer step has all its gradients"
        taken, self.current = self.current, []
        self.entries += taken
        self.version += 1
        for call in [call for call in self.calls.values() if self.version - call.version > self.bound]:
            self.lose(call)
        return taken

    def _next(self, worker: str, alone: bool) -> int | None:
        """A number that failed at a worker goes to another one, unless that takes too long."""
        anywhere = alone or len(self.pending) > self.per_step
        for place, number in enumerate(self.pending):
            if anywhere or worker not in self.failed.get(number, ()):
                return self.pending.pop(place)
        if self.fresh < self.last:
            self.fresh += 1
            return self.fresh - 1
        if self.pending:
            return self.pending.pop(0)
        others = [call for call in self.calls.values() if call.number in self._open]
        mine = {call.number for call in others if self._holders[call.id] == worker}
        copies = [call.number for call in others if call.number not in mine]
        return min(copies, key=lambda number: (copies.count(number), number), default=None)

    def _end(self, call: Call) -> bool:
        self._holders.pop(call.id, None)
        return self.calls.pop(call.id, None) is not None

    def _again(self, number: int) -> None:
        """Nobody computes it any more: it is to be given out."""
        under_way = any(call.number == number for call in self.calls.values())
        if number in self._open and number not in self.pending and not under_way:
            self.pending.append(number)
            self.pending.sort()


def as_array(entries: Sequence[Entry]) -> np.ndarray:
    """int64 [entries, 4], columns as in Entry."""
    return np.array(entries, dtype=np.int64).reshape(len(entries), len(Entry._fields))


def from_array(array: np.ndarray) -> list[Entry]:
    """What `as_array` made an array of."""
    return [Entry(*row) for row in array.tolist()]


def broken_rule(entries: Sequence[Entry], per_step: int, bound: int) -> str:
    """What a ledger says that cannot have been, in words; empty if nothing does."""
    numbers = set()
    for place, entry in enumerate(entries):
        if entry.step != place // per_step:
            return f"entry {place} is of step {entry.step} instead of {place // per_step}"
        if not 0 <= entry.step - entry.version <= bound:
            return f"step {entry.step} has a gradient of version {entry.version}, and the bound is {bound}"
        if entry.number in numbers:
            return f"shard {entry.number} counts twice"
        numbers.add(entry.number)
    return ""


def mean_of(sums: Iterable[np.ndarray], tasks: int) -> Tensor:
    """Mean over tasks, float64 [total], of an outer step's shards, added in the order of its entries."""
    with one_thread():
        total = torch.zeros((), dtype=torch.float64)
        for each in sums:
            total = total + torch.from_numpy(np.array(each, dtype=np.float64))
        return total / tasks


def staleness(array: np.ndarray) -> dict[str, float]:
    """Mean and maximum of how many outer steps the gradients were late."""
    late = array[:, 0] - array[:, 2]
    return {"mean": float(late.mean()), "max": int(late.max())}


def write_ledger(path: Path, array: np.ndarray) -> None:
    """A Parquet file for reading, a row per gradient; what a run goes on with is in its checkpoints."""
    columns = {name: pa.array(array[:, place]) for place, name in enumerate(Entry._fields)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write(path, sink.getvalue().to_pybytes())
