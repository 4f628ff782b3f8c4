"""Decisions: the same after every death of the driver, none lost and none taken twice, whatever comes in first."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_search import CONDITIONS, Kept, job, search

from metadist.errors import ConfigError, StorageError
from metadist.search.director import Director, Finished, Start, Wait
from metadist.search.events import trials_of
from metadist.search.job import refuse_changed_search
from metadist.search.ledger import Ledger
from metadist.search.outcome import ranked

SEARCHERS, SCHEDULERS = ("random", "grid", "optuna"), ("fifo", "asha", "median")


def of(searcher, scheduler, **more):
    """A search in which everything happens: trials end in every way."""
    conditions = [] if searcher == "grid" else CONDITIONS
    return job(searcher=searcher, scheduler=scheduler, trials=7, conditions=conditions, **more)


@pytest.mark.parametrize(("searcher", "scheduler"), itertools.product(SEARCHERS, SCHEDULERS))
def test_one_at_a_time_a_driver_killed_anywhere_decides_as_if_it_had_not_been(searcher, scheduler):
    task = of(searcher, scheduler, concurrent=1)
    whole = Kept()
    director = search(task, whole)
    assert repr(trials_of(whole.events)) == repr(director.trials) and len(director.trials) == 7
    for cut in range(len(whole.events) + 1):
        again = Kept(whole.events[:cut])
        search(task, again)
        assert again.events == whole.events, f"killed behind event {cut}"


def test_on_a_disk_killed_within_any_line(tmp_path):
    task, path = of("random", "asha", concurrent=1), tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    search(task, ledger)
    ledger.close()
    content = path.read_bytes()
    for size in range(0, len(content), 151):
        path.write_bytes(content[:size])
        ledger = Ledger(path)
        search(task, ledger)
        ledger.close()
        assert path.read_bytes() == content


def test_several_aims_killed_anywhere():
    task = of("optuna", "fifo", concurrent=1, also=["adaptation_mflop"])
    whole = Kept()
    search(task, whole)
    assert Counter(event["event"] for event in whole.events)["end"] == 7
    for cut in range(0, len(whole.events), 5):
        again = Kept(whole.events[:cut])
        search(task, again)
        assert again.events == whole.events


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_simulated_search_has_every_end(scheduler):
    """Else the tests above would show little."""
    jobs = [of(searcher, scheduler, concurrent=1) for searcher in SEARCHERS]
    found = {trial.end.how for task in jobs for trial in search(task, Kept()).trials}
    early = set() if scheduler == "fifo" else {"stopped"}
    assert {"finished", "diverged", "crashed"} | early == found


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SEARCHERS),
    st.sampled_from(SCHEDULERS),
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.integers(1, 25), max_size=4),
)
def test_three_at_once_nothing_is_decided_twice_or_lost(searcher, scheduler, order, deaths):
    task = of(searcher, scheduler, concurrent=3)
    ledger, before, turns = Kept(), [], iter(order)

    def choose(running):
        return running[next(turns, 0) % len(running)]

    for lives in deaths:
        left = itertools.count(lives, -1)
        search(task, ledger, choose, until=lambda left=left: next(left) == 0)
        ledger = Kept(ledger.events)
        assert ledger.events[: len(before)] == before
        before = list(ledger.events)
    director = search(task, ledger, choose)
    assert ledger.events[: len(before)] == before
    assert repr(trials_of(ledger.events)) == repr(director.trials)  # NaN among them
    assert [trial.index for trial in director.trials] == list(range(7))
    told = [(event["event"], event["id"], event.get("step"), event.get("attempt")) for event in ledger.events]
    reports = [(id, step) for event, id, step, _ in told if event == "report"]
    assert len(set(reports)) == len(reports)
    assert Counter(id for event, id, *_ in told if event == "end") == Counter(trial.id for trial in director.trials)
    for trial in director.trials:
        assert [report.step for report in trial.reports] == list(range(1, len(trial.reports) + 1))
        assert trial.index == 0 or task.allows(trial.values)
        assert all(report.decision == "go" for report in trial.reports[:-1])
        assert trial.stopped == (trial.end.how == "stopped")


@pytest.mark.parametrize(("searcher", "scheduler"), [("random", "asha"), ("optuna", "asha"), ("optuna", "median")])
def test_one_pack_at_a_time_a_driver_killed_anywhere_decides_as_if_it_had_not_been(searcher, scheduler):
    """Trials of a pack come in in the order of their meta-steps, then of their numbers, as `run_pack` lets them."""
    task = job(searcher=searcher, scheduler=scheduler, trials=7, pack=3, concurrent=3, retries=0)
    whole = Kept()
    search(task, whole, choose=lambda running: running[0])
    for cut in range(len(whole.events) + 1):
        again = Kept(whole.events[:cut])
        search(task, again, choose=lambda running: running[0])
        assert again.events == whole.events, f"killed behind event {cut}"


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("random", "optuna")),
    st.sampled_from(SCHEDULERS),
    st.sampled_from([(2, 2), (2, 4), (3, 3), (3, 6)]),
    st.lists(st.integers(0, 5), max_size=60),
    st.lists(st.integers(1, 25), max_size=4),
)
def test_packs_are_whole_and_nothing_is_decided_twice_or_lost(searcher, scheduler, sizes, order, deaths):
    pack, concurrent = sizes
    task = job(searcher=searcher, scheduler=scheduler, trials=8, pack=pack, concurrent=concurrent)
    ledger, turns = Kept(), iter(order)

    def choose(running):
        return running[next(turns, 0) % len(running)]

    for lives in deaths:
        left = itertools.count(lives, -1)
        search(task, ledger, choose, until=lambda left=left: next(left) == 0)
        ledger = Kept(ledger.events)
    director = search(task, ledger, choose)
    assert [trial.index for trial in director.trials] == list(range(8))
    told = [(event["event"], event["id"], event.get("step")) for event in ledger.events]
    assert Counter(id for event, id, _ in told if event == "end") == Counter(trial.id for trial in director.trials)
    reports = [(id, step) for event, id, step in told if event == "report"]
    assert len(set(reports)) == len(reports)
    started = [int(event["id"]) for event in ledger.events if event["event"] == "trial"]
    assert started == sorted(started)


def test_a_pack_is_filled_and_the_next_one_waits_for_its_last_trial():
    director = Director(job(searcher="random", trials=8, pack=3, concurrent=3), Kept())
    own = director.next().trial
    assert own.origin == "baseline" and director.beside(own) is None and director.next() == Wait()
    director.end(own.id, "finished", 8, "", {})
    first = director.next().trial
    assert [first.id, director.beside(first).id, director.beside(first).id] == ["001", "002", "003"]
    assert director.beside(first) is None and director.next() == Wait()
    director.end("001", "stopped", 1, "", {})
    director.end("002", "crashed", 1, "defect", {})
    assert director.next() == Wait(), "it is tried again when nobody is in its pack"
    director.end("003", "finished", 8, "", {})
    again = director.next().trial
    assert again.id == "002" and director.beside(again) is None
    director.end("002", "finished", 8, "", {})
    assert director.next().trial.id == "004"


def test_a_report_that_is_recorded_is_answered_as_it_was():
    task, ledger = job(scheduler="asha", searcher="random", concurrent=3), Kept()
    director = Director(task, ledger)
    assert [director.next().trial.id for _ in range(3)] == ["000", "001", "002"]
    assert director.next() == Wait()
    assert director.report("000", 1, {"score": 0.9}) == "go"
    assert director.report("001", 1, {"score": 0.5}) == "stop"
    count = len(ledger.events)
    assert director.report("001", 1, {"score": 0.99}) == "stop"
    assert director.report("000", 1, {"score": 0.1}) == "go"
    assert director.report("001", 2, {"score": 0.99}) == "stop"
    assert len(ledger.events) == count
    assert director.trials[1].reports[0].why == (
        "50.0 % at step 1 is not among the best 1/2 of 2 trials, from 90.0 % on"
    )


def test_a_resumed_search_first_gives_what_runs_and_buries_what_was_stopped():
    task, ledger = job(scheduler="asha", searcher="random", concurrent=3), Kept()
    director = Director(task, ledger)
    for _ in range(3):
        director.next()
    director.report("000", 1, {"score": 0.9})
    director.report("001", 1, {"score": 0.5})  # is stopped, and the driver is killed
    again = Director(task, ledger)
    assert [again.next().trial.id for _ in range(3)] == ["000", "002", "003"]
    assert again.trials[1].end.how == "stopped" and "best 1/2" in again.trials[1].end.reason
    assert [event["event"] for event in ledger.events].count("end") == 1


def test_a_trial_that_is_stopped_and_dies_on_its_way_out_is_stopped():
    task, ledger = job(scheduler="asha", searcher="random", concurrent=2), Kept()
    director = Director(task, ledger)
    director.next(), director.next()
    director.report("000", 1, {"score": 0.9})
    director.report("001", 1, {"score": 0.5})
    director.end("001", "crashed", 1, "its process died", {})
    assert director.trials[1].end.how == "stopped" and director.trials[1].attempt == 0


def test_retries_are_counted_over_drivers():
    task, ledger = job(searcher="random", scheduler="fifo", trials=1, retries=2), Kept()
    for attempt in range(3):
        director = Director(task, ledger)
        start = director.next()
        assert isinstance(start, Start) and start.trial.attempt == attempt
        director.end("000", "crashed", 0, "its process died", {})
    assert director.next() == Finished()
    assert director.trials[0].end.how == "crashed"
    assert [event["event"] for event in ledger.events] == ["trial", "retry", "retry", "end"]


def test_other_ends_are_not_tried_again():
    director = Director(job(searcher="random", trials=1, retries=2), Kept())
    director.next()
    director.end("000", "memory", 0, "out of memory", {"peak_memory": float("inf")})
    assert director.next() == Finished() and director.trials[0].end.facts == {"peak_memory": "inf"}


def test_the_first_trial_is_the_jobs_own_and_goes_on_whatever_it_scores():
    task = job(searcher="random", scheduler="asha", concurrent=3)
    director = Director(task, Kept())
    own = director.next().trial
    assert own.origin == "baseline" and task.config(own.values) == task.base
    director.next(), director.next()
    director.report("001", 1, {"score": 0.9})
    director.report("002", 1, {"score": 0.8})
    assert director.report("000", 1, {"score": 0.1}) == "go"
    other = Director(job(searcher="random", baseline=False), Kept()).next().trial
    assert other.origin == "random" and other.index == 0


def test_the_budget_is_an_event_and_spans_drivers():
    now = [100.0]
    task, ledger = job(searcher="random", scheduler="fifo", budget=1.0, concurrent=1), Kept()
    director = Director(task, ledger, clock=lambda: now[0])
    director.next()
    now[0] += 40
    director.report("000", 1, {"score": 0.5})
    now[0] += 1000  # between two drivers
    director = Director(task, ledger, clock=lambda: now[0])
    assert director.next().trial.id == "000"
    now[0] += 15
    director.end("000", "finished", 8, "", {})
    assert director.next().trial.id == "001"  # 55 s
    now[0] += 10
    director.end("001", "crashed", 3, "its process died", {})
    assert director.next().trial.id == "001"  # it had begun
    director.end("001", "finished", 8, "", {})
    assert director.next() == Finished() and ledger.events[-1]["event"] == "budget"
    now[0] = 0.0
    assert Director(task, ledger, clock=lambda: now[0]).next() == Finished()
    assert [event["event"] for event in ledger.events].count("budget") == 1


def test_a_budget_that_is_raised_goes_on():
    now = [0.0]
    task, ledger = job(searcher="random", scheduler="fifo", budget=1.0, concurrent=1), Kept()
    director = Director(task, ledger, clock=lambda: now[0])
    director.next()
    now[0] = 70.0
    director.end("000", "finished", 8, "", {})
    assert director.next() == Finished() and director.over.startswith("search.budget: its 1 minutes are over")
    assert Director(task, ledger, clock=lambda: 0.0).next() == Finished()
    for budget in (2.0, None):
        more = job(searcher="random", scheduler="fifo", budget=budget, concurrent=1)
        refuse_changed_search(task, more)
        again = Director(more, Kept(ledger.events), clock=lambda: now[0])
        assert again.over == "" and again.next().trial.id == "001"
        now[0] += 60.0  # 130 s in all
        again.end("001", "finished", 8, "", {})
        assert isinstance(again.next(), Finished if budget else Start)


def test_a_draw_that_finds_nothing_ends_the_drawing_alone():
    """A condition that one point in some hundreds meets: what was tried stands, and is concluded."""
    rare = [{"when": {}, "need": {"algorithm.inner_lr": {"at_least": 4.93}}}]
    task = job(searcher="random", scheduler="fifo", conditions=rare, trials=1000)
    ledger = Kept()
    director = search(task, ledger)
    assert 3 < len(director.trials) < 1000, "else this test shows nothing"
    (event,) = (event for event in ledger.events if event["event"] == "exhausted")
    assert director.over == event["reason"] and "algorithm.inner_lr at least 4.93" in event["reason"]
    assert Director(task, ledger).next() == Finished()
    assert [event["event"] for event in ledger.events].count("exhausted") == 1


def test_what_is_not_durable_has_not_been_decided():
    class Full(Kept):
        def append(self, event):
            if len(self.events) == 2:
                raise StorageError("ledger.jsonl: cannot be written: No space left on device")
            return super().append(event)

    director = Director(job(searcher="random", concurrent=3), Full())
    director.next(), director.next()
    with pytest.raises(StorageError):
        director.next()
    with pytest.raises(StorageError):
        director.report("001", 1, {"score": 0.5})
    assert len(director.trials) == 2 and not director.trials[1].reports


def test_other_events_are_passed_over():
    task, ledger = job(searcher="random", trials=1), Kept([{"event": "session", "pid": 1}])
    search(task, ledger)
    ledger.append({"event": "selected", "id": "000"})
    assert search(task, ledger).trials[0].end.how == "finished"


def test_a_grid_ends_behind_its_last_point_and_more_trials_go_on_with_it():
    few = search(job(searcher="grid", scheduler="fifo", trials=4, concurrent=1), kept := Kept())
    assert len(few.trials) == 4
    more = search(job(searcher="grid", scheduler="fifo", trials=99, concurrent=1), kept)
    runs = [tuple(trial.values.values()) for trial in more.trials]
    # the baseline is one of the 9 combinations
    assert len(runs) == len(set(runs)) == 9 and more.trials[0].origin == "baseline"


def test_conditions_that_allow_nothing_are_told_in_one_line():
    never = [{"when": {}, "need": {"algorithm.inner_steps": {"at_least": 6}}}]
    director = Director(job(searcher="random", conditions=never), Kept())
    assert director.next().trial.origin == "baseline"
    with pytest.raises(ConfigError, match=r"^search.conditions: none of 1,000 points drawn for trial 001 is allowed"):
        director.next()


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_metric_and_mode_say_who_is_stopped_and_who_wins(scheduler):
    """Searched by the least, the same trials go the other way."""
    best = {}
    for section in ({}, {"metric": "loss", "mode": "max"}, {"mode": "min"}, {"metric": "loss"}):
        task = job(searcher="random", scheduler=scheduler, trials=12, concurrent=1, baseline=False, **section)
        found = ranked(search(task, Kept()).trials, task.measure)
        best[tuple(section.values())] = [trial.id for trial in found]
    assert best[()] == best["loss", "max"] != best["min",] == best["loss",]
