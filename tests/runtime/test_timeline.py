"""Whose spans say where a worker's time went, and that all of it is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.runtime.timeline import AGGREGATOR, DRIVER, PHASES, Account, Taken, Timeline
from metadist.spans import MOST, Span, Spans


def close(account: Account, end: float, workers: str, **spans: list[Span]) -> dict[str, float]:
    found = account.close(end, Taken(frozenset(workers), spans))
    return {phase: seconds for phase, seconds in found.items() if abs(seconds) > 1e-12}


def test_a_worker_s_own_time_comes_first_then_the_aggregator_s_then_the_way() -> None:
    a = [
        Span("transfer", 0, 2),
        Span("adapting", 2, 6),
        Span("sampling", 2, 3),
        Span("sum", 5, 6),
        Span("transfer", 6, 7),
    ]
    there = [Span("sum", 5.5, 6.5), Span("outer step", 8, 9)]
    assert close(Account(0), 10, "a", a=a, **{AGGREGATOR: there}) == pytest.approx(
        {"transfer": 2.5, "sampling": 1, "adapting": 2, "sum": 1.5, "outer step": 1, "waiting": 2}
    )


def test_workers_count_alike_and_one_without_spans_waits() -> None:
    found = close(Account(0), 10, "ab", a=[Span("adapting", 0, 10)])
    assert found == {"adapting": 5, "waiting": 5}


def test_a_validation_is_no_waiting() -> None:
    assert close(Account(0), 4, "a", **{DRIVER: [Span("validation", 1, 3)]}) == {"validation": 2, "waiting": 2}


def test_what_reaches_into_the_next_stretch_is_told_there() -> None:
    account = Account(0)
    assert close(account, 2, "a", a=[Span("adapting", 1, 5)]) == {"adapting": 1, "waiting": 1}
    assert close(account, 6, "a") == {"adapting": 3, "waiting": 1}
    assert close(account, 6, "a") == {}
    assert close(account, 5, "a") == {}, "time does not go back"
    assert close(account, 7, "a") == {"waiting": 1}


spans = st.lists(
    st.tuples(st.sampled_from([phase for phase in PHASES if phase != "waiting"]), st.floats(-5, 25), st.floats(0, 10)),
    max_size=12,
).map(lambda found: [Span(phase, begin, begin + length) for phase, begin, length in found])  # type: ignore[arg-type]


@given(a=spans, b=spans, driver=spans, aggregator=spans, ends=st.lists(st.floats(0, 20), max_size=4))
def test_phases_add_up_to_the_time(
    a: list[Span], b: list[Span], driver: list[Span], aggregator: list[Span], ends: list[float]
) -> None:
    account, total = Account(0), dict.fromkeys(PHASES, 0.0)
    for end in [*sorted(ends), 20]:
        found = account.close(end, Taken(frozenset("ab"), {"a": a, "b": b, DRIVER: driver, AGGREGATOR: aggregator}))
        assert all(seconds >= -1e-9 for seconds in found.values())
        total = {phase: total[phase] + found[phase] for phase in PHASES}
        a = b = driver = aggregator = []
    assert sum(total.values()) == pytest.approx(20)


def test_the_way_to_a_worker_and_back_is_around_its_spans() -> None:
    timeline = Timeline()
    timeline.join("a")
    timeline.call("a", 1, (Span("adapting", 2, 4), Span("sum", 4, 5)), 7)
    timeline.call("a", 7, (), 8)
    taken = timeline.take()
    assert taken.workers == {"a"}
    assert list(taken.spans["a"]) == [
        Span("transfer", 1, 2), Span("adapting", 2, 4), Span("sum", 4, 5), Span("transfer", 5, 7),
    ]  # fmt: skip
    timeline.leave("a")
    assert timeline.take().workers == frozenset()


def test_what_was_done_ahead_is_no_part_of_the_call() -> None:
    timeline, account = Timeline(), Account(0.0)
    timeline.join("a")
    timeline.call("a", 0, (Span("adapting", 0, 4),), 4)
    timeline.call("a", 6, (Span("sampling", 4, 5), Span("adapting", 6.5, 9)), 10)
    taken = timeline.take()
    assert list(taken.spans["a"])[3:] == [
        Span("transfer", 6, 6.5), Span("sampling", 4, 5), Span("adapting", 6.5, 9), Span("transfer", 9, 10),
    ]  # fmt: skip
    found = account.close(10, taken)
    told = {phase: seconds for phase, seconds in found.items() if seconds}
    assert told == pytest.approx({"adapting": 6.5, "sampling": 1, "transfer": 1.5, "waiting": 1})


def test_nobody_has_to_take_them() -> None:
    found, timeline = Spans(), Timeline()
    for _ in range(MOST + 1):
        with found.of("sum"):
            pass
    timeline.add("a", found.take())
    timeline.add("a", [Span("sum", 0, 1)])
    assert len(list(timeline.take().spans["a"])) == MOST
    assert found.take() == ()
