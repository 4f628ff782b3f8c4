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


def sums(item: Item) -> np.ndarray:
    """Some shard's integers: a function of step, attempt and shard."""
    size = sum(value.size for value in blank().values.values()) + 2
    return np.random.default_rng(item).integers(-(2**44), 2**44, size)


def reference(redos: list[int]) -> Snapshot:
    """Every shard once, in order; `redos` is how often each step began again."""
    aggregator = Aggregator(CONFIG, IMAGE)
    for step, times in enumerate(redos):
        for attempt in range(times):
            aggregator.redo(step, attempt, [0])
        for shard in range(SHARDS):
            assert aggregator.add(step, times, shard, sums((step, times, shard)))
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
        self.flying: list[tuple[str, Item]] = []
        self.answered: list[tuple[str, Item]] = []
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

    def answer(self, worker: str, item: Item) -> None:
        if self.dispatcher.done(worker, item):
            assert self.aggregator.add(*item, sums(item)), "the dispatcher takes only what the aggregator counts"
            self.counted.append(item)
        else:
            assert not self.aggregator.add(*item, sums(item)), "the aggregator drops what the dispatcher drops"
        self.finish_step_if_complete()
        self.hand_out()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def result(self, data: st.DataObject) -> None:
        worker, item = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.answered.append((worker, item))
        self.answer(worker, item)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def the_same_result_again(self, data: st.DataObject) -> None:
        worker, item = data.draw(st.sampled_from(self.answered[-20:]))
        if (worker, item) not in self.flying:  # else it would be the first answer to a second question
            self.answer(worker, item)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def unusable(self, data: st.DataObject) -> None:
        worker, item = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.dispatcher.again(worker, item)
        self.hand_out()
        repeated = [w for w, i in self.flying if i == item]
        if item in self.dispatcher.open and len(self.dispatcher.held) > 1:
            assert worker not in repeated, "a failed shard goes to another worker where there is one"

    @precondition(lambda self: self.flying and self.attempt < 2)
    @rule(data=st.data())
    def exceeds_its_bound(self, data: st.DataObject) -> None:
        worker, item = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        if not self.dispatcher.done(worker, item):  # late: it changes nothing but frees its place
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
        assert set(lost) <= {item for w, item in self.flying if w == worker}
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
        assert held == sorted(self.flying)

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
    assert dispatcher.assign() == [("a", 0), ("b", 1), ("a", 2)]


def test_workers_that_are_equally_fast_get_equally_much() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    for worker in "abc":
        dispatcher.join(worker)
    dispatcher.add(range(30))
    flying = dispatcher.assign()
    while flying:
        assert dispatcher.done(*flying.pop(0))
        flying += dispatcher.assign()
    assert dispatcher.counted == {"a": 10, "b": 10, "c": 10}


def test_a_failed_shard_goes_to_its_own_worker_where_there_is_no_other() -> None:
    dispatcher: Dispatcher[int] = Dispatcher()
    dispatcher.join("a")
    dispatcher.add([0])
    dispatcher.assign()
    dispatcher.again("a", 0)
    assert dispatcher.assign() == [("a", 0)]
