"""Which shard goes to which worker: any shard to any worker, each counted once.

Pure bookkeeping without processes, so that every interleaving can be tested. Shards travel
in calls of several, because a call costs the way of θ to the worker and of a sum back,
whatever it holds. Where every worker's share is one or two, one call each does it. Else the
calls become smaller towards the end of a step, so that quick workers take more, and one
waits behind the one that is computed, which hides the way.

Where nothing is left to hand out and a worker has taken far longer than usual, idle workers
compute copies of what it holds. The first result counts, the other one is late.
"""

import math
import statistics
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

CALLS = 2
"""A worker holds at a time: one computed, one waiting."""

MOST = 8
"""Items of a call: with a worker that dies no more than two such calls are lost."""

RECENT = 32
"""Calls whose times say what is usual."""

LEAST = 0.05
"""Seconds below which no call is slow."""


@dataclass
class Call(Generic[Item]):
    """What a worker was given at once; size: how many items that were; kind: their type, which times depend on."""

    items: list[Item]
    size: int
    kind: type


class Dispatcher(Generic[Item]):
    """Pending items, the workers and the calls they hold.

    backup: how many times the usual a call may take before others compute it too; None: for ever.
    near: the worker that has what an item needs, if one does: it takes that item before others.
    """

    def __init__(
        self,
        backup: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        near: Callable[[Item], str | None] | None = None,
    ) -> None:
        self.backup, self.clock, self.near = backup, clock, near
        self.pending: OrderedDict[Item, None] = OrderedDict()
        self.held: dict[str, list[Call[Item]]] = {}
        self.counted: dict[str, int] = {}
        self.avoid: dict[Item, str] = {}
        self.open: set[Item] = set()
        self._holding: defaultdict[Item, Counter[str]] = defaultdict(Counter)  # the other way round than `held`
        self._began: dict[str, float] = {}
        self._times: defaultdict[type, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._usual: dict[type, float] = {}

    def join(self, worker: str) -> None:
        """A worker is ready for work."""
        self.held.setdefault(worker, [])
        self.counted.setdefault(worker, 0)

    def leave(self, worker: str) -> list[Item]:
        """A worker is gone; what it held and nobody else does is pending again, and returned."""
        items = [item for call in self.held.pop(worker, []) for item in call.items]
        for item in items:
            self._drops(worker, item)
        lost = [item for item in items if item in self.open and not self._holders(item)]
        for item in reversed(lost):
            self._first(item)
        return lost

    def add(self, items: Iterable[Item]) -> None:
        """More work."""
        for item in items:
            self.pending[item] = None
            self.open.add(item)

    def assign(self) -> list[tuple[str, tuple[Item, ...]]]:
        """Calls for the workers with room: first for the idle ones, then to wait; least loaded first, then least
        counted, then by name. Last, copies of what is overdue."""
        calls = []
        for waiting in range(CALLS if self.pending else 0):
            size = self._size(waiting)
            able = [worker for worker, held in self.held.items() if len(held) == waiting]
            for worker in sorted(able, key=lambda w: (sum(len(c.items) for c in self.held[w]), self.counted[w], w)):
                items = self._take(worker, size)
                if items:
                    calls.append(self._give(worker, items))
        return calls + self._copies()

    def wait(self) -> float:
        """Seconds until `assign` may have copies to hand out; infinite where there is nobody to hand them to."""
        idle, first = self._idle(), math.inf
        for worker in self.held if idle else ():
            due = self._due(worker)
            if due < first and self._for_any(idle, self._alone(worker)):
                first = due
        return max(0.0, first - self.clock())

    def done(self, worker: str, item: Item) -> bool:
        """A result came in; False if it is late or a repetition and must be dropped."""
        self._release(worker, item)
        if item not in self.open:
            return False
        self.open.discard(item)
        self.avoid.pop(item, None)
        self.pending.pop(item, None)
        if worker in self.counted:
            self.counted[worker] += 1
        return True

    def again(self, worker: str, item: Item) -> None:
        """A result is unusable: compute the item once more, elsewhere if there is another worker."""
        self._release(worker, item)
        if item not in self.open:
            return
        self.avoid[item] = worker
        if not self._holders(item) and item not in self.pending:
            self._first(item)

    def drop(self) -> None:
        """Forget all open items; results still to come are late."""
        self.pending.clear()
        self.open.clear()
        self.avoid.clear()

    def free(self) -> None:
        """Forget what the workers hold: no result of it will come."""
        for calls in self.held.values():
            calls.clear()
        self._holding.clear()

    def _first(self, item: Item) -> None:
        """Pending, before all others."""
        self.pending[item] = None
        self.pending.move_to_end(item, last=False)

    def _size(self, waiting: int) -> int:
        """Items of the next call of a worker that holds `waiting` calls."""
        workers = max(1, len(self.held))
        share = len(self.pending) // workers
        if waiting:
            return max(1, min(share // 2, MOST))
        if workers > 1 and share > 2:
            share = (share + 1) // 2
        return max(1, min(share, MOST))

    def _take(self, worker: str, size: int) -> list[Item]:
        """Pending items that this worker may compute: its own first, those of other workers last."""
        shunned = len(self.held) > 1
        able: Iterable[Item] = (item for item in self.pending if not (shunned and self.avoid.get(item) == worker))
        near = self.near
        if near is not None:
            able = sorted(able, key=lambda item: self._far(worker, near(item)))
        items = list(islice(able, size))
        for item in items:
            del self.pending[item]
        return items

    def _far(self, worker: str, near: str | None) -> int:
        return 0 if near == worker else 2 if near in self.held else 1

    def _give(self, worker: str, items: list[Item]) -> tuple[str, tuple[Item, ...]]:
        if not self.held[worker]:
            self._began[worker] = self.clock()
        self.held[worker].append(Call(items, len(items), type(items[0])))
        for item in items:
            self._holding[item][worker] += 1
        return worker, tuple(items)

    def _copies(self) -> list[tuple[str, tuple[Item, ...]]]:
        """What overdue workers compute alone, for the idle ones: half of it, next time half of the rest."""
        idle, now, calls = self._idle(), self.clock(), []
        slow = [item for worker in self.held if idle and self._due(worker) <= now for item in self._alone(worker)]
        for worker in sorted(idle, key=lambda w: (self.counted[w], w)) if slow else ():
            items = self._for(worker, slow)[: min(MOST, -(-len(slow) // (2 * len(idle))))]
            if items:
                calls.append(self._give(worker, items))
                slow = [item for item in slow if item not in items]
        return calls

    def _for(self, worker: str, items: list[Item]) -> list[Item]:
        """Those that did not fail at a worker."""
        return [item for item in items if self.avoid.get(item) != worker]

    def _for_any(self, idle: list[str], items: list[Item]) -> bool:
        """Whether one of the idle workers may compute one of the items."""
        return any(len(idle) > 1 or self.avoid.get(item) != idle[0] for item in items)

    def _idle(self) -> list[str]:
        """Workers without a call, when there is nothing pending that they may take."""
        return [] if self.pending else [worker for worker, held in self.held.items() if not held]

    def _alone(self, worker: str) -> list[Item]:
        """Open items that a worker holds and no other."""
        items = [item for call in self.held[worker] for item in call.items if item in self.open]
        return [item for item in items if len(self._holders(item)) == 1]

    def _due(self, worker: str) -> float:
        """When the call that a worker computes becomes overdue."""
        call = next(iter(self.held[worker]), None)
        if self.backup is None or call is None or call.kind not in self._times:
            return math.inf
        if call.kind not in self._usual:
            self._usual[call.kind] = statistics.median(self._times[call.kind])
        usual = self._usual[call.kind] * call.size
        return self._began[worker] + max(LEAST, self.backup * usual)

    def _holders(self, item: Item) -> list[str]:
        return list(self._holding.get(item, ()))

    def _drops(self, worker: str, item: Item) -> None:
        """It holds the item once less."""
        holders = self._holding[item]
        holders[worker] -= 1
        if holders[worker] <= 0:
            del holders[worker]
        if not holders:
            del self._holding[item]

    def _release(self, worker: str, item: Item) -> None:
        calls = self.held.get(worker, [])
        for number, call in enumerate(calls):
            if item in call.items:
                call.items.remove(item)
                self._drops(worker, item)
                if not call.items:
                    del calls[number]
                    now = self.clock()
                    if number == 0 and worker in self._began:
                        self._times[call.kind].append((now - self._began[worker]) / call.size)
                        self._usual.pop(call.kind, None)
                        self._began[worker] = now
                break
