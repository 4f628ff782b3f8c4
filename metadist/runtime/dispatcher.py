"""Which shard goes to which worker: any shard to any worker, each counted once.

Pure bookkeeping without processes, so that every interleaving can be tested. Shards travel
in calls of several, because a call costs the way of θ to the worker and of a sum back,
whatever it holds. Where every worker's share is one or two, one call each does it. Else the
calls become smaller towards the end of a step, so that quick workers take more, and one
waits behind the one that is computed, which hides the way.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

CALLS = 2
"""A worker holds at a time: one computed, one waiting."""

MOST = 8
"""Items of a call: with a worker that dies no more than two such calls are lost."""


class Dispatcher(Generic[Item]):
    """Pending items, the workers and the calls they hold."""

    def __init__(self) -> None:
        self.pending: deque[Item] = deque()
        self.held: dict[str, list[list[Item]]] = {}
        self.counted: dict[str, int] = {}
        self.avoid: dict[Item, str] = {}
        self.open: set[Item] = set()

    def join(self, worker: str) -> None:
        """A worker is ready for work."""
        self.held.setdefault(worker, [])
        self.counted.setdefault(worker, 0)

    def leave(self, worker: str) -> list[Item]:
        """A worker is gone; what it held and nobody else does is pending again, and returned."""
        items = [item for call in self.held.pop(worker, []) for item in call]
        lost = [item for item in items if item in self.open and not self._held(item)]
        self.pending.extendleft(reversed(lost))
        return lost

    def add(self, items: Iterable[Item]) -> None:
        """More work."""
        for item in items:
            self.pending.append(item)
            self.open.add(item)

    def assign(self) -> list[tuple[str, tuple[Item, ...]]]:
        """Calls for the workers with room: first for the idle ones, then to wait; least loaded first, then least
        counted, then by name."""
        calls = []
        for waiting in range(CALLS):
            size = self._size(waiting)
            able = [worker for worker, held in self.held.items() if len(held) == waiting]
            for worker in sorted(able, key=lambda w: (sum(map(len, self.held[w])), self.counted[w], w)):
                items = self._take(worker, size)
                if items:
                    self.held[worker].append(items)
                    calls.append((worker, tuple(items)))
        return calls

    def done(self, worker: str, item: Item) -> bool:
        """A result came in; False if it is late or a repetition and must be dropped."""
        self._release(worker, item)
        if item not in self.open:
            return False
        self.open.discard(item)
        self.avoid.pop(item, None)
        if item in self.pending:
            self.pending.remove(item)
        if worker in self.counted:
            self.counted[worker] += 1
        return True

    def again(self, worker: str, item: Item) -> None:
        """A result is unusable: compute the item once more, elsewhere if there is another worker."""
        self._release(worker, item)
        if item in self.open and not self._held(item) and item not in self.pending:
            self.avoid[item] = worker
            self.pending.appendleft(item)

    def drop(self) -> None:
        """Forget all open items; results still to come are late."""
        self.pending.clear()
        self.open.clear()
        self.avoid.clear()

    def free(self) -> None:
        """Forget what the workers hold: no result of it will come."""
        for calls in self.held.values():
            calls.clear()

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
        """Pending items that this worker may compute."""
        shunned = len(self.held) > 1
        items = [item for item in self.pending if not (shunned and self.avoid.get(item) == worker)][:size]
        for item in items:
            self.pending.remove(item)
        return items

    def _held(self, item: Item) -> bool:
        return any(item in call for calls in self.held.values() for call in calls)

    def _release(self, worker: str, item: Item) -> None:
        calls = self.held.get(worker, [])
        for call in calls:
            if item in call:
                call.remove(item)
                break
        calls[:] = [call for call in calls if call]
