"""Actors that answer, are silent, or die: who is looked at, and when; and a stopped process is told from a busy one."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from metadist.runtime.watch import QUESTIONS, Place, Watch, end_if_stopped


class Answer:
    """A reference to what will be there when `ready` says so."""

    def __init__(self, ready: Callable[[], bool], value: Callable[[], Any]) -> None:
        self.ready, self.value = ready, value


class Actor:
    """Answers as often as it is told, then not at all; or raises."""

    def __init__(self, answers: float = float("inf"), dies: bool = False) -> None:
        self.left, self.dies, self.heard, self.asked = answers, dies, list[Any](), self

    def remote(self, linger: float | None) -> Answer:
        self.heard.append(linger)
        self.left -= 1
        left = self.left

        def value() -> Place:
            if self.dies:
                raise RuntimeError("it is dead")
            return Place("ab" * 28, 42, "aggregator")

        return Answer(lambda: left >= 0, value)


class Ray:
    """As much of Ray as the watch sees; tasks are what it had looked at."""

    def __init__(self, stopped: bool) -> None:
        self.stopped, self.tasks = stopped, list[int]()

    def wait(self, refs: list[Answer], timeout: float) -> tuple[list[Answer], list[Answer]]:
        return [ref for ref in refs if ref.ready()], []

    def get(self, ref: Answer) -> Any:
        return ref.value()

    def remote(self, what: Any) -> Any:
        """`ray.remote(f).options(…).remote(pid)`."""
        if what is end_if_stopped:
            return self
        self.tasks.append(what)
        return Answer(lambda: True, lambda: self.stopped)

    def options(self, **keys: Any) -> "Ray":
        return self


def watched(actors: list[Actor], stopped: bool, wait_until: Any, until: Callable[[Ray], bool], **keys: Any) -> Any:
    ray, said = Ray(stopped), list[str]()
    watch = Watch(ray, lambda: actors, **{"silence": 0.06, "linger": None, "say": said.append} | keys)
    wait_until(lambda: until(ray), 20, "what the watch does")
    watch.close()
    assert not any(thread.name == "watch" for thread in threading.enumerate())
    return ray, said


def test_one_that_answers_is_left_alone(wait_until: Any) -> None:
    actor = Actor()
    ray, said = watched([actor], True, wait_until, lambda ray: len(actor.heard) > 4 * QUESTIONS, linger=7.0)
    assert not ray.tasks
    assert not said
    assert set(actor.heard) == {7.0}


def test_a_silent_one_is_looked_at_again_and_again_and_told_of_when_it_stood_still(wait_until: Any) -> None:
    actor = Actor(answers=1)
    ray, said = watched([actor], True, wait_until, lambda ray: len(ray.tasks) > 2)
    assert set(ray.tasks) == {42}
    assert set(said) == {"the aggregator in process 42 stood still; it is ended"}
    ray, said = watched([Actor(answers=1)], False, wait_until, lambda ray: len(ray.tasks) > 2)
    assert not said, "it was busy"


def test_a_dead_one_is_no_end_of_the_watch(wait_until: Any) -> None:
    dead, silent, living = Actor(dies=True), Actor(answers=1), Actor()
    ray, _ = watched([dead, silent, living], True, wait_until, lambda ray: bool(ray.tasks) and len(living.heard) > 20)
    assert set(ray.tasks) == {42}


def test_one_that_has_never_answered_is_left_to_those_who_start_it(wait_until: Any) -> None:
    living = Actor()
    ray, _ = watched([Actor(answers=0), living], True, wait_until, lambda ray: len(living.heard) > 3 * QUESTIONS)
    assert not ray.tasks


def test_only_a_stopped_process_is_killed(wait_until: Any) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert end_if_stopped(process.pid) is False
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: end_if_stopped(process.pid), 10, "the end of a stopped process")
        assert process.wait(10) == -signal.SIGKILL
        assert end_if_stopped(process.pid) is False, "it is gone"
    finally:
        process.kill()
