"""Calls by a line and by Ray to one actor, in order whatever the actor is at; deaths and defects are told."""

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from metadist.runtime import line
from metadist.runtime.line import Address, Broken, Line, Reached
from metadist.runtime.sharing import Space


class Diary(Reached):
    """Notes what it is called for."""

    def __init__(self) -> None:
        self.notes: list[int] = []

    def note(self, number: int) -> int:
        self.notes.append(number)
        return len(self.notes)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, error: Exception) -> None:
        raise error


class Method:
    """Calls of Ray's to an actor run one after the other, in the order of the calls."""

    def __init__(self, calls: queue.Queue[Any], method: Any) -> None:
        self.calls, self.method = calls, method

    def remote(self, *arguments: Any) -> Future[Any]:
        found: Future[Any] = Future()
        self.calls.put((found, self.method, arguments))
        return found


class Actor:
    """A thread instead of Ray's process: the same queue of calls."""

    def __init__(self, of: Any) -> None:
        self.of, self.calls = of, queue.Queue[Any]()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def __getattr__(self, name: str) -> Method:
        return Method(self.calls, getattr(self.of, name))

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            found, method, arguments = call
            try:
                found.set_result(method(*arguments))
            except BaseException as error:  # noqa: BLE001, as Ray does
                found.set_exception(error)

    def end(self) -> None:
        self.calls.put(None)
        self.thread.join()


class Ray:
    @staticmethod
    def get(found: Future[Any], timeout: float | None = None) -> Any:
        return found.result(timeout)


@pytest.fixture
def diary() -> Iterator[tuple[Diary, Actor, Line]]:
    of = Diary()
    actor = Actor(of)
    found = Line.to(Ray, actor, actor.listen.remote().result())
    assert found is not None
    yield of, actor, found
    found.close()
    actor.end()


WAYS = st.lists(st.sampled_from(["call", "tell", "ray", "rest", "answer", "pause"]), max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ways=WAYS)
@example(ways=["call", "answer", "pause", "pause", "call", "rest", "answer"])
def test_in_the_order_of_the_calls(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However calls, rests and pauses fall together: all are done once, in order, and every answer is its call's."""
    monkeypatch.setattr(line, "SECONDS", 0.003)
    of = Diary()
    actor = Actor(of)
    found = Line.to(Ray, actor, actor.listen.remote().result())
    assert found is not None
    expected, tickets, by_ray = 0, [], []
    for way in ways:
        if way in ("call", "tell", "ray"):
            expected += 1
        match way:
            case "call":
                tickets.append((found.call("note", expected), expected))
            case "tell":
                found.tell("note", expected)
            case "ray":
                found.settle()
                by_ray.append((actor.note.remote(expected), expected))
            case "rest":
                found.rest()
            case "answer" if tickets:
                ticket, number = tickets.pop(0)
                assert found.answer(ticket) == number
            case "pause":
                time.sleep(0.004)
    for ticket, number in tickets:
        assert found.answer(ticket) == number
    found.settle()
    assert [one.result(10) for one, _ in by_ray] == [number for _, number in by_ray]
    assert of.notes == list(range(1, expected + 1))
    found.close()
    actor.end()


def test_what_ray_asks_has_its_turn(diary: tuple[Diary, Actor, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that is called by its line without end is not deaf to Ray."""
    monkeypatch.setattr(line, "SECONDS", 0.05)
    of, actor, found = diary
    asked = None
    for number in range(2000):
        found.answer(found.call("note", number))
        asked = asked or actor.note.remote(-1)
        if asked.done():
            break
        time.sleep(0.001)
    assert asked is not None
    assert asked.done()
    assert of.notes.count(-1) == 1


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a defect"), EOFError("a defect")], ids=repr)
def test_a_defect_is_what_ray_tells(error: Exception, diary: tuple[Diary, Actor, Line]) -> None:
    """Also one that looks like a broken line."""
    _, _, found = diary
    ticket = found.call("fail", error)
    with pytest.raises(type(error), match="a defect"):
        found.answer(ticket)


def test_no_call_is_left_behind_a_rest(diary: tuple[Diary, Actor, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's time is over while it does the first of two calls; the second one is done all the same."""
    monkeypatch.setattr(line, "SECONDS", 0.003)
    _, _, found = diary
    found.tell("sleep", 0.05)
    ticket = found.call("note", 1)
    found.rest()
    answered: list[int] = []
    waiting = threading.Thread(target=lambda: answered.append(found.answer(ticket)), daemon=True)
    waiting.start()
    waiting.join(10)
    assert answered == [1]


def test_a_defect_is_told_after_a_rest(diary: tuple[Diary, Actor, Line]) -> None:
    _, _, found = diary
    ticket = found.call("fail", ValueError("a defect"))
    found.rest()
    with pytest.raises(ValueError, match="a defect"):
        found.answer(ticket)


def test_what_is_told_is_done_meanwhile(diary: tuple[Diary, Actor, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a socket holds, to an actor that returns to Ray all the time, and that nobody asks for an answer."""
    monkeypatch.setattr(line, "SECONDS", 0.02)
    of, _, found = diary
    for number in range(3000):
        found.tell("note", number)
        if number % 1000 == 500:
            time.sleep(0.03)
            before = len(of.notes)
            found.tell("note", number)
            deadline = time.monotonic() + 10
            while len(of.notes) == before and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(of.notes) > before
    found.settle()
    assert len(of.notes) == 3003


def test_an_end_that_ray_does_not_explain(diary: tuple[Diary, Actor, Line]) -> None:
    of, _, found = diary
    ticket = found.call("note", 1)
    assert found.answer(ticket) == 1
    assert of._line is not None
    os.dup2(os.open(os.devnull, os.O_RDWR), of._line.fileno())  # the other end is gone, and nobody has an error
    with pytest.raises(Broken):
        found.answer(found.call("note", 2))


def test_a_second_driver_ends_the_line_of_the_first(diary: tuple[Diary, Actor, Line]) -> None:
    _, actor, first = diary
    assert first.answer(first.call("note", 1)) == 1
    first.settle()
    second = Line.to(Ray, actor, actor.listen.remote().result())
    assert second is not None
    assert second.answer(second.call("note", 2)) == 2
    ticket = first.call("note", 3)
    with pytest.raises(Broken):
        first.answer(ticket)
    second.close()


def test_no_line_to_another_machine() -> None:
    """Neither without its sockets nor without its memory."""
    there = Space(0)
    there.head[0] = line.PROBE
    assert Line.to(Ray, None, None) is None
    assert Line.to(Ray, None, Address("\0metadist-nobody", there.shared("u1", 0))) is None
    elsewhere = there.shared("u1", 0)._replace(inode=-1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0metadist-somebody")
        listening.listen()
        assert Line.to(Ray, None, Address("\0metadist-somebody", elsewhere)) is None
        assert Line.to(Ray, None, Address("\0metadist-somebody", there.shared("u1", 0))) is not None
