"""The dispatcher with a real aggregator behind it, through random interleavings of all that can happen."""

from functools import cache

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metadist.config import Config
from metadist.runtime.aggregator import Aggregator, Snapshot
from metadist.runtime.dispatcher import CALLS, MOST, Dispatcher

SHARDS = 10
CONFIG = Config().with_values(
    task={"ways": 2, "meta_batch": SHARDS, "shard": 1},
    model={"name": "mlp", "width": 1, "layers": 1, "norm": "none"},
    engine={"mode": "vectorised", "device": "cpu"},
)
IMAGE = (1, 2, 2)

Item = tuple[int, int, int]


@cache
def blank() -> Snapshot:
    return Aggregator(CONFIG, IMAGE).snapshot()


Call = tuple[str, tuple[Item, ...]]


def sums(*items: Item) -> np.ndarray:
    """The sum of some shards' integers, each a function of step, attempt and shard."""
    size = sum(value.size for value in blank().values.values()) + 2
    each = [np.random.default_rng(item).integers(-(2**44), 2**44, size) for item in items]
    return np.sum(each, axis=0, dtype=np.int64)


def reference(redos: list[int]) -> Snapshot:
    """Every shard once, in order; `redos` is how often each step began again."""
    aggregator = Aggregator(CONFIG, IMAGE)
    for step, times in enumerate(redos):
        for attempt in range(times):
            aggregator.redo(step, attempt, [0])
        for shard in range(SHARDS):
            assert aggregator.add(step, times, [shard], sums((step, times, shard)))
        aggregator.apply(step)
    return aggregator.snapshot()


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    assert found.step == expected.step
    assert found.exponents.tobytes() == expected.exponents.tobytes()
    for ours, theirs in ((found.values, expected.values), (found.memory, expected.memory)):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


class Run(RuleBasedStateMachine):
    """A driver whose workers answer in any order, die, come, repeat themselves and fail."""

    @initialize(workers=st.integers(1, 3))
    def start(self, workers: int) -> None:
        self.now = 0.0
        # Items of even lanes are near to workers, some of which are there.
        self.dispatcher: Dispatcher[Item] = Dispatcher(
            backup=2.0, clock=lambda: self.now, near=lambda item: None if item[2] % 2 else f"worker-{item[2] // 2}"
        )
        self.aggregator = Aggregator(CONFIG, IMAGE)
        self.step = self.attempt = self.born = 0
        self.redos: list[int] = []
        self.flying: list[Call] = []
        self.answered: list[Call] = []
        self.counted: list[Item] = []
        for _ in range(workers):
            self.joins()
        self.open_step()

    def open_step(self) -> None:
        self.dispatcher.drop()
        self.dispatcher.add((self.step, self.attempt, shard) for shard in range(SHARDS))
        self.hand_out()

    def hand_out(self) -> None:
        self.flying += self.dispatcher.assign()

    def finish_step_if_complete(self) -> None:
        if self.dispatcher.open:
            return
        report, broadcast = self.aggregator.apply(self.step)
        assert report.missing == ()
        assert broadcast.step == self.step + 1, "the step was applied once"
        assert sorted(self.counted) == [(self.step, self.attempt, shard) for shard in range(SHARDS)]
        self.redos.append(self.attempt)
        self.counted.clear()
        self.step, self.attempt = self.step + 1, 0
        self.open_step()

    def add(self, items: tuple[Item, ...]) -> bool:
        """Items of one call are of one attempt of one step."""
        (place,) = {item[:2] for item in items}
        return self.aggregator.add(*place, [item[2] for item in items], sums(*items))

    def answer(self, worker: str, items: tuple[Item, ...]) -> None:
        """A call's result, as the driver takes it: the whole sum or, where a part of it counts already, none of it."""
        if all(item in self.dispatcher.open for item in items):
            assert all(self.dispatcher.done(worker, item) for item in items)
            assert self.add(items), "the dispatcher takes only what the aggregator counts"
            self.counted += items
        else:
            for item in items:
                self.dispatcher.again(worker, item)
            assert not self.add(items), "the aggregator drops what the dispatcher drops"
        self.finish_step_if_complete()
        self.hand_out()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def result(self, data: st.DataObject) -> None:
        worker, items = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.answered.append((worker, items))
        self.answer(worker, items)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def the_same_result_again(self, data: st.DataObject) -> None:
        worker, items = data.draw(st.sampled_from(self.answered[-20:]))
        under_way = {item for w, flying in self.flying if w == worker for item in flying}
        if under_way.isdisjoint(items):  # else it would be the first answer to a second question
            self.answer(worker, items)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def unusable(self, data: st.DataObject) -> None:
        worker, items = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        failed = data.draw(st.sampled_from(items))
        self.dispatcher.again(worker, failed)
        rest = tuple(item for item in items if item != failed)
        if rest:
            self.answer(worker, rest)
        self.hand_out()
        repeated = [w for w, flying in self.flying if failed in flying]
        if failed in self.dispatcher.open and len(self.dispatcher.held) > 1:
            assert worker not in repeated, "a failed shard goes to another worker where there is one"

    @precondition(lambda self: self.flying and self.attempt < 2)
    @rule(data=st.data())
    def exceeds_its_bound(self, data: st.DataObject) -> None:
        worker, items = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        taken = [self.dispatcher.done(worker, item) for item in items]
        if not any(taken):  # late: it only frees its place
            self.hand_out()
            return
        broadcast = self.aggregator.redo(self.step, self.attempt, [0])
        self.attempt += 1
        assert (broadcast.step, broadcast.attempt) == (self.step, self.attempt)
        self.counted.clear()
        self.open_step()

    @rule(seconds=st.floats(0.01, 10))
    def time_passes(self, seconds: float) -> None:
        """Slow calls become overdue, and idle workers get copies of what is in them."""
        self.now += seconds
        self.hand_out()
        assert self.dispatcher.wait() > 0, "nothing that could be handed out now is kept back"

    @rule()
    def joins(self) -> None:
        if len(self.dispatcher.held) < 4:
            self.dispatcher.join(f"worker-{self.born}")
            self.born += 1
            self.hand_out()

    @precondition(lambda self: self.dispatcher.held)
    @rule(data=st.data(), replaced=st.booleans())
    def dies(self, data: st.DataObject, replaced: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.dispatcher.held)))
        lost = self.dispatcher.leave(worker)
        assert set(lost) <= {item for w, items in self.flying if w == worker for item in items}
        self.flying = [call for call in self.flying if call[0] != worker]
        if replaced:
            self.joins()
        self.hand_out()

    @invariant()
    def nobody_holds_too_much(self) -> None:
        for calls in self.dispatcher.held.values():
            assert len(calls) <= CALLS
            assert all(0 < len(call.items) <= call.size <= MOST for call in calls)

    @invariant()
    def what_is_held_is_under_way(self) -> None:
        held = sorted((w, item) for w, calls in self.dispatcher.held.items() for call in calls for item in call.items)
        assert held == sorted((worker, item) for worker, items in self.flying for item in items)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        held = {item for calls in self.dispatcher.held.values() for call in calls for item in call.items}
        assert self.dispatcher.open <= held | set(self.dispatcher.pending)
        assert len(set(self.dispatcher.pending)) == len(self.dispatcher.pending)

    @invariant()
    def somebody_works(self) -> None:
        if self.dispatcher.open and self.dispatcher.held:
            assert self.flying, "with a worker there is always progress"

    def teardown(self) -> None:
        """From wherever this was left, the step can be finished, and all bits are those of the plain loop."""
        if not hasattr(self, "dispatcher"):
            return
        if not self.dispatcher.held:
            self.joins()
        step, answers = self.step, 0
        while self.step == step:
            self.answer(*self.flying.pop())
            answers += 1
            assert answers < 100
        assert_same(self.aggregator.snapshot(), reference(self.redos))


Run.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestRun = Run.TestCase


def of_workers(names: str) -> Dispatcher[int]:
    dispatcher: Dispatcher[int] = Dispatcher()
    for worker in names:
        dispatcher.join(worker)
    return dispatcher


@pytest.mark.parametrize(
    ("workers", "items", "calls"),
    [
        ("a", 4, [("a", 4)]),
        ("ab", 4, [("a", 2), ("b", 2)]),
        ("ab", 3, [("a", 1), ("b", 1), ("a", 1)]),
        ("abc", 2, [("a", 1), ("b", 1)]),
        ("abc", 4, [("a", 1), ("b", 1), ("c", 1), ("a", 1)]),
        ("ab", 8, [("a", 2), ("b", 2), ("a", 1), ("b", 1)]),
        ("ab", 100, [("a", 8), ("b", 8), ("a", 8), ("b", 8)]),
    ],
)
def test_one_call_each_where_shares_are_small_else_smaller_ones_behind(workers, items, calls) -> None:
    dispatcher = of_workers(workers)
    dispatcher.add(range(items))
    assert [(worker, len(held)) for worker, held in dispatcher.assign()] == calls


def makespan(speeds: dict[str, int], items: int) -> tuple[int, dict[str, int]]:
    """Time until all is done where an item takes a worker some units, and how many each has done."""
    dispatcher = of_workers("".join(speeds))
    dispatcher.add(range(items))
    busy_until = dict.fromkeys(speeds, 0)
    flying: list[tuple[int, str, tuple[int, ...]]] = []
    now = 0
    while dispatcher.open:
        for worker, held in dispatcher.assign():
            busy_until[worker] = max(now, busy_until[worker]) + speeds[worker] * len(held)
            flying.append((busy_until[worker], worker, held))
        flying.sort()
        now, worker, held = flying.pop(0)
        assert all(dispatcher.done(worker, item) for item in held)
    return now, dispatcher.counted


@pytest.mark.parametrize("items", [2, 4, 6, 8, 10, 16, 30, 64])
@pytest.mark.parametrize("workers", ["a", "ab"])
def test_workers_that_are_equally_fast_get_equally_much(workers: str, items: int) -> None:
    each = items // len(workers)
    assert makespan(dict.fromkeys(workers, 1), items) == (each, dict.fromkeys(workers, each))


@pytest.mark.parametrize("items", [8, 16, 32, 64])
def test_a_worker_of_half_the_speed_does_less(items: int) -> None:
    """Halves of fixed size would take the slow one as many units as there are items."""
    took, counted = makespan({"a": 1, "b": 2}, items)
    assert took <= 0.85 * items
    assert counted["a"] > counted["b"]


def test_items_stay_where_what_they_need_is() -> None:
    """Each worker takes its own first, then what is nobody's, and other workers' only where nothing else is left."""
    where = {0: "b", 1: "b", 2: "a", 3: "gone", 4: "a", 5: "b"}
    dispatcher: Dispatcher[int] = Dispatcher(near=where.get)
    for worker in "ab":
        dispatcher.join(worker)
    dispatcher.add(range(6))
    assert dispatcher.assign() == [("a", (2, 4)), ("b", (0, 1)), ("a", (3,)), ("b", (5,))]
    for item in range(6):
        dispatcher.done("a" if item in (2, 3, 4) else "b", item)
    dispatcher.leave("b")
    dispatcher.add([5, 4])
    assert dispatcher.assign() == [("a", (4, 5))], "what a dead worker had goes to whoever is left"


def test_what_is_freed_leaves_all_its_room() -> None:
    """After the aggregator was lost no held call is answered, and none may keep its place."""
    dispatcher = of_workers("ab")
    dispatcher.add(range(100))
    before = dispatcher.assign()
    dispatcher.drop()
    dispatcher.free()
    dispatcher.add(range(100))
    assert dispatcher.assign() == before


def test_a_failed_shard_goes_to_its_own_worker_where_there_is_no_other() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    dispatcher.join("a")
    dispatcher.add([0])
    dispatcher.assign()
    dispatcher.again("a", 0)
    assert dispatcher.assign() == [("a", (0,))]


def straggling(backup: float | None) -> tuple[float, dict[str, int], int]:
    """Two workers, 8 items a step; in the third step one of them stops. Time of that step, counts, copies."""
    now = 0.0
    dispatcher: Dispatcher[tuple[int, int]] = Dispatcher(backup, lambda: now)
    for worker in "ab":
        dispatcher.join(worker)
    until, flying, copies, began = {"a": 0.0, "b": 0.0}, [], 0, 0.0
    for step in range(3):
        began = now
        dispatcher.add((step, item) for item in range(8))
        while dispatcher.open:
            for worker, items in dispatcher.assign():
                copies += sum(len(dispatcher._holders(item)) > 1 for item in items)
                stopped = worker == "a" and step == 2
                until[worker] = max(now, until[worker]) + (1000.0 if stopped else 1.0 * len(items))
                flying.append((until[worker], worker, items))
            ends, worker, items = min(flying)
            if now + dispatcher.wait() < ends:
                now += dispatcher.wait()
                continue
            flying.remove((ends, worker, items))
            now = ends
            for item in items:
                dispatcher.done(worker, item)
    return now - began, dispatcher.counted, copies


def test_copies_of_what_a_stopped_worker_holds() -> None:
    """Eight items for the one that is left: at most 1.5 times that long, and all of them are counted."""
    seconds, counted, copies = straggling(backup=3.0)
    assert seconds <= 1.5 * 8
    assert counted["b"] + counted["a"] == 24
    assert copies > 0
    for never in (None, 1e6):
        seconds, _, copies = straggling(backup=never)
        assert seconds >= 1000
        assert copies == 0
