"""Which shard goes to which worker: any shard to any worker, each counted once.

Pure bookkeeping without processes, so that every interleaving can be tested. Shards travel
in calls of several, because a call costs the way of θ to the worker and of a sum back,
whatever it holds; and while more is pending than the workers hold, a worker has a second
call waiting for it, which hides that way.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

DEPTH = 4
"""Items a worker holds at a time, in one call or two."""


class Dispatcher(Generic[Item]):
    """Pending items, the workers and what they hold."""

    def __init__(self) -> None:
        self.pending: deque[Item] = deque()
        self.held: dict[str, list[Item]] = {}
        self.counted: dict[str, int] = {}
        self.avoid: dict[Item, str] = {}
        self.open: set[Item] = set()

    def join(self, worker: str) -> None:
        """A worker is ready for work."""
        self.held.setdefault(worker, [])
        self.counted.setdefault(worker, 0)

    def leave(self, worker: str) -> list[Item]:
        """A worker is gone; what it held and nobody else does is pending again, and returned."""
        lost = [item for item in self.held.pop(worker, []) if item in self.open and not self._held(item)]
        self.pending.extendleft(reversed(lost))
        return lost

    def add(self, items: Iterable[Item]) -> None:
        """More work."""
        for item in items:
            self.pending.append(item)
            self.open.add(item)

    def assign(self) -> list[tuple[str, tuple[Item, ...]]]:
        """Hand pending items to workers with room: least loaded first, then least counted, then by name.

        What one worker gets is one call; two where it had nothing and more is pending for later.
        """
        idle = {worker for worker, items in self.held.items() if not items}
        assigned: dict[str, list[Item]] = {}
        passed: list[Item] = []
        while self.pending:
            item = self.pending.popleft()
            worker = self._worker_for(item)
            if worker is None:
                passed.append(item)
                if not any(len(items) < DEPTH for items in self.held.values()):
                    break
                continue
            self.held[worker].append(item)
            assigned.setdefault(worker, []).append(item)
        self.pending.extendleft(reversed(passed))
        calls = []
        for worker, items in assigned.items():
            half = (len(items) + 1) // 2 if self.pending and worker in idle else len(items)
            calls += [(worker, tuple(part)) for part in (items[:half], items[half:]) if part]
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

    def _worker_for(self, item: Item) -> str | None:
        shunned = self.avoid.get(item) if len(self.held) > 1 else None
        free = [w for w, items in self.held.items() if len(items) < DEPTH and w != shunned]
        return min(free, key=lambda w: (len(self.held[w]), self.counted[w], w), default=None)

    def _held(self, item: Item) -> bool:
        return any(item in items for items in self.held.values())

    def _release(self, worker: str, item: Item) -> None:
        if item in self.held.get(worker, []):
            self.held[worker].remove(item)
