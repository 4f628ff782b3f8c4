"""The dispatcher with a real aggregator behind it, through random interleavings of all that can happen."""

from functools import cache

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metadist.config import Config
from metadist.runtime.aggregator import Aggregator, Snapshot
from metadist.runtime.dispatcher import DEPTH, Dispatcher

SHARDS = 6
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
        self.dispatcher: Dispatcher[Item] = Dispatcher()
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
        assert all(len(items) <= DEPTH for items in self.dispatcher.held.values())

    @invariant()
    def what_is_held_is_under_way(self) -> None:
        held = sorted((worker, item) for worker, items in self.dispatcher.held.items() for item in items)
        assert held == sorted((worker, item) for worker, items in self.flying for item in items)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        held = {item for items in self.dispatcher.held.values() for item in items}
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


Run.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRun = Run.TestCase


def test_the_least_loaded_worker_gets_the_next_shard() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    dispatcher.join("a")
    dispatcher.join("b")
    dispatcher.add(range(3))
    assert dispatcher.assign() == [("a", (0, 2)), ("b", (1,))]


def test_one_call_each_where_nothing_is_left_for_later_else_a_second_one_waits() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    dispatcher.join("a")
    dispatcher.join("b")
    dispatcher.add(range(2 * DEPTH))
    assert dispatcher.assign() == [("a", (0, 2, 4, 6)), ("b", (1, 3, 5, 7))]
    dispatcher.drop()
    for worker in "ab":
        for item in range(2 * DEPTH):
            dispatcher.done(worker, item)
    dispatcher.add(range(10, 19))
    assert dispatcher.assign() == [("a", (10, 12)), ("a", (14, 16)), ("b", (11, 13)), ("b", (15, 17))]
    dispatcher.done("a", 10)
    dispatcher.done("a", 12)
    assert dispatcher.assign() == [("a", (18,))]


def test_workers_that_are_equally_fast_get_equally_much() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for worker in "abc":
        dispatcher.join(worker)
    dispatcher.add(range(30))
    busy_until = dict.fromkeys("abc", 0)
    flying: list[tuple[int, str, tuple[int, ...]]] = []
    now = 0
    while dispatcher.open:
        for worker, items in dispatcher.assign():  # an item takes one unit of time
            busy_until[worker] = max(now, busy_until[worker]) + len(items)
            flying.append((busy_until[worker], worker, items))
        flying.sort()
        now, worker, items = flying.pop(0)
        assert all(dispatcher.done(worker, item) for item in items)
    assert dispatcher.counted == {"a": 10, "b": 10, "c": 10}
    assert now == 10, "nobody waited"


def test_a_failed_shard_goes_to_its_own_worker_where_there_is_no_other() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    dispatcher.join("a")
    dispatcher.add([0])
    dispatcher.assign()
    dispatcher.again("a", 0)
    assert dispatcher.assign() == [("a", (0,))]
