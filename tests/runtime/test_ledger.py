"""The ledger of an asynchronous run through random interleavings, and a run made again from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.errors import RunError
from metadist.replay import replay
from metadist.runtime.aggregator import Aggregator, Broadcast, Snapshot
from metadist.runtime.checkpoint import newest_good, save_checkpoint
from metadist.runtime.ledger import Call, Entry, Ledger, as_array, broken_rule, from_array, mean_of
from metadist.runtime.run_folder import RunFolder
from metadist.runtime.worker import Worker

PER_STEP, STEPS = 3, 12


class Run(RuleBasedStateMachine):
    """Workers that take, answer in any order, late or never, fail and die; a driver that comes and goes."""

    @initialize(bound=st.integers(0, 3), workers=st.integers(1, 4))
    def start(self, bound: int, workers: int) -> None:
        self.ledger = Ledger(PER_STEP, STEPS, bound)
        self.workers = [f"worker-{number}" for number in range(workers)]
        self.busy: dict[str, Call] = {}
        self.lost: list[Call] = []
        self.counted = 0

    def move(self) -> None:
        if self.ledger.complete:
            before = self.ledger.version
            taken = self.ledger.advance()
            assert [entry.step for entry in taken] == [before] * PER_STEP, "no version is skipped"
            assert self.ledger.version == before + 1

    @rule(data=st.data())
    def takes(self, data: st.DataObject) -> None:
        idle = [worker for worker in self.workers if worker not in self.busy]
        if idle:
            worker = data.draw(st.sampled_from(idle))
            call = self.ledger.give(worker, alone=len(self.workers) == 1)
            if call is not None:
                assert call.version == self.ledger.version, "the newest θ"
                self.busy[worker] = call

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def answers(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        self.take(self.busy.pop(worker))

    def take(self, call: Call) -> None:
        dropped = self.ledger.dropped
        if self.ledger.take(call, 0):
            self.counted += 1
            assert self.ledger.version - call.version <= self.ledger.bound
        else:
            assert self.ledger.dropped == dropped + 1
        self.move()

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def answers_of_the_dead_and_repetitions(self, data: st.DataObject) -> None:
        call = self.lost.pop(data.draw(st.integers(0, len(self.lost) - 1)))
        assert not self.ledger.take(call, 0)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        call = self.busy[worker]
        if not self.ledger.failed.get(call.number):
            del self.busy[worker]
            assert self.ledger.fail(call, worker)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.busy)))
        call = self.busy.pop(worker)
        self.ledger.lose(call)
        self.lost.append(call)

    @rule()
    def is_gone_on_with(self) -> None:
        """From what the last outer step left: what came in since is computed again."""
        ledger = self.ledger
        kept = from_array(as_array(ledger.entries))
        self.counted -= len(ledger.current)
        self.ledger = Ledger(PER_STEP, STEPS, ledger.bound, kept)
        self.busy.clear()
        self.lost.clear()

    @invariant()
    def the_rules_hold(self) -> None:
        if not hasattr(self, "ledger"):
            return
        entries = self.ledger.entries
        assert broken_rule(entries, PER_STEP, self.ledger.bound) == ""
        assert len(entries) == PER_STEP * self.ledger.version
        assert self.counted == len(entries) + len(self.ledger.current)
        assert len(set(self.ledger.pending)) == len(self.ledger.pending)
        assert not {entry.number for entry in entries} & set(self.ledger.pending)

    def teardown(self) -> None:
        """However it stands, one worker ends the run, and nobody waits for those who never answer."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(10 * PER_STEP * STEPS):
            if self.ledger.version == STEPS:
                break
            call = self.ledger.give("the last", alone=False)
            assert call is not None, "there is always something to compute"
            self.take(call)
        assert sorted(entry.number for entry in self.ledger.entries) == list(range(PER_STEP * STEPS))
        assert self.ledger.give("the last") is None


Run.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRun = Run.TestCase


def test_a_result_beyond_the_bound_is_dropped_and_its_number_given_again() -> None:
    ledger = Ledger(per_step=1, steps=9, bound=1)
    slow = ledger.give("slow")
    assert slow == Call(0, 0, 0)
    for number in (1, 2):
        assert ledger.take(ledger.give("quick"), 7)
        ledger.advance()
        assert [entry.number for entry in ledger.entries][-1] == number
    assert not ledger.take(slow, 8)
    assert ledger.dropped == 1
    again = ledger.give("quick")
    assert (again.number, again.version) == (0, 2)
    assert ledger.take(again, 7)


def test_what_failed_goes_to_another_worker_and_fails_once_more_at_most() -> None:
    ledger = Ledger(per_step=2, steps=9, bound=1)
    bad = ledger.give("one")
    assert ledger.fail(bad, "one")
    assert ledger.give("one").number == 1, "not the same again while there is another worker"
    again = ledger.give("other")
    assert again.number == bad.number
    assert not ledger.fail(again, "other")


def test_what_failed_comes_back_where_nobody_else_takes_it() -> None:
    """One worker is diverging, the other stands still: the run must come to its end all the same."""
    ledger = Ledger(per_step=2, steps=1000, bound=1)
    ledger.give("still")
    assert any(not ledger.fail(ledger.give("diverging"), "diverging") for _ in range(10))


def test_broken_rules_are_named() -> None:
    good = [Entry(0, 1, 0, 7), Entry(0, 0, 0, 7), Entry(1, 2, 0, 8), Entry(1, 3, 1, 7)]
    assert broken_rule(good, 2, 1) == ""
    assert "the bound is 0" in broken_rule(good, 2, 0)
    assert "counts twice" in broken_rule([*good[:3], good[0]._replace(step=1)], 2, 1)
    assert "is of step 1 instead of 0" in broken_rule(good[2:], 2, 1)
    assert "version 1" in broken_rule([good[0]._replace(version=1)], 2, 1)


# --- replay ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An asynchronous run of 12 steps without Ray: three workers that answer in a random order of a seed."""
    config = resolve(tiny("cluster.strategy=async", "cluster.workers=3", "cluster.staleness=2"))
    table = prepare(config.data.sources[0])
    worker, random = Worker(config, [str(table.path)]), np.random.default_rng(5)
    introduction = worker.introduce()
    parameters, ledger = Aggregator(config, worker.engine.tasks.shape), Ledger(4, 12, 2)
    versions: list[Broadcast] = []
    busy: dict[str, Call] = {}
    while ledger.version < 12:
        versions.append(parameters.broadcast())
        sums = []
        while not ledger.complete:
            for idle in sorted({"a", "b", "c"} - set(busy)):
                if call := ledger.give(idle):
                    busy[idle] = call
            name = random.choice(sorted(busy), p=[[1.0], [0.2, 0.8], [0.1, 0.3, 0.6]][len(busy) - 1])
            call = busy.pop(name)
            if ledger.take(call, 0):
                sums.append(worker.sums(versions[call.version], *divmod(call.number, 4)).sums)
        ledger.advance()
        parameters.move(mean_of(sums, config.task.meta_batch))
    assert {entry.step - entry.version for entry in ledger.entries} == {0, 1, 2}
    folder = RunFolder.create(tmp_path_factory.mktemp("simulated") / "run", config, "name")
    snapshot = parameters.snapshot()._replace(ledger=as_array(ledger.entries))
    record = {"fingerprint": introduction.fingerprint | {"probe": introduction.probe}}
    save_checkpoint(folder.checkpoints, snapshot, None, record)
    folder.unlock()
    return folder.path


def test_a_run_is_made_again_from_its_ledger(simulated: Path, cli: Callable[..., Any]) -> None:
    ended = cli("replay", simulated)
    assert ended.code == 0, ended
    assert "12 outer steps from 48 gradients" in ended.out
    assert "2 at most" in ended.out
    assert "the run's bits" in ended.out
    assert "warning" not in ended.err


def changed(run: Path, tmp_path: Path, change: Callable[[Snapshot], Snapshot]) -> Path:
    """A copy of a run whose checkpoint says something else, with good checksums."""
    found = newest_good(run / "checkpoints", pytest.fail)
    assert found is not None
    snapshot, best, record = found
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    kept = {key: record[key] for key in ("fingerprint",)}
    save_checkpoint(copy / "checkpoints", change(snapshot), best, kept)
    return copy


def test_another_order_is_another_run(simulated: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Two gradients of the ledger's first and second step change places: the rules hold, the bits do not."""

    def swapped(snapshot: Snapshot) -> Snapshot:
        ledger = np.array(snapshot.ledger)
        ledger[[0, 1], 1] = ledger[[0, 4], 1]
        ledger[4, 1] = snapshot.ledger[1, 1]
        return snapshot._replace(ledger=ledger)

    ended = cli("replay", changed(simulated, tmp_path, swapped))
    assert ended.code == 1, ended
    assert "instead of the run's" in ended.out


def test_an_impossible_ledger_is_refused(simulated: Path, tmp_path: Path) -> None:
    def too_old(snapshot: Snapshot) -> Snapshot:
        ledger = np.array(snapshot.ledger)
        ledger[-1, 2] = 0
        return snapshot._replace(ledger=ledger)

    with pytest.raises(RunError, match=r"step 11 has a gradient of version 0, and the bound is 2"):
        replay(changed(simulated, tmp_path, too_old), pytest.fail)


def test_a_run_without_ledger_is_told(tiny_run: Any, refused: Callable[..., Any], tmp_path: Path) -> None:
    refused("replay", tiny_run.folder, say=("cluster.strategy=aggregator", "needs no ledger"))
    refused("replay", tmp_path, say=("is no run folder",))
