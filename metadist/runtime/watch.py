"""Whether aggregators live, as their driver sees it, and whether the driver does, as they see it.

An actor that stands still is as bad as a dead one, but nobody tells of it: who waits for it waits for ever. So it is
asked now and then, and one that does not answer is killed, which everybody notices. One that outlives its driver ends
itself when nobody asks any more.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from metadist.runtime.runtime import Say

QUESTIONS = 6
"""In the time after which silence is a death. They are counted, not seconds: a machine that was asleep is not mute."""


class Place(NamedTuple):
    """Where an actor's process is."""

    node: str
    pid: int


class Watch:
    """A thread that asks actors, those of `watched` at the time.

    silence: seconds without an answer after which one is killed; patience: the same for its first answer; linger:
    seconds after which an actor ends itself when nobody has asked, None: never.
    """

    def __init__(
        self,
        ray: Any,
        watched: Callable[[], Sequence[Any]],
        silence: float,
        patience: float,
        linger: float | None,
        say: Say,
    ) -> None:
        self.ray, self.watched, self.say = ray, watched, say
        self.linger, self.silence = linger, silence
        self.every = min(silence / QUESTIONS, linger / 10 if linger else silence)
        self._most = round(silence / self.every)
        self._most_at_first = max(self._most, round(patience / self.every))
        self._waiting: dict[Any, tuple[Any, int]] = {}
        self._places: dict[Any, Place] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask_again_and_again, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._thread.join()

    def _ask_again_and_again(self) -> None:
        while True:
            actors = self.watched()
            known = set(actors)
            self._waiting = {actor: asked for actor, asked in self._waiting.items() if actor in known}
            self._places = {actor: place for actor, place in self._places.items() if actor in known}
            for actor in actors:
                self._ask(actor)
            if self._ended.wait(self.every):
                return

    def _ask(self, actor: Any) -> None:
        from ray.exceptions import RayError

        answer, times = self._waiting.pop(actor, (None, 0))
        if answer is not None:
            if not self.ray.wait([answer], timeout=0)[0]:
                self._waiting[actor] = answer, times + 1
                if times + 1 == (self._most if actor in self._places else self._most_at_first):
                    self._kill(actor)
                return
            try:
                self._places[actor] = self.ray.get(answer)
            except RayError:  # it is dead, which those who wait for it hear as well
                return
        self._waiting[actor] = actor.__ray_call__.remote(_asked, self.linger), 0

    def _kill(self, actor: Any) -> None:
        place = self._places.get(actor)
        self.say(
            f"an aggregator{f' (process {place.pid})' if place else ''} said nothing for {self.silence:g} s: ended"
        )
        if place is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            # Ray asks a process to end itself, which one that stands still does not hear.
            there = NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)
            end = self.ray.remote(_end).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            end.remote(place.pid)
        else:
            self.ray.kill(actor)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


# --- in the actor ------------------------------------------------------------

_timer: threading.Timer | None = None


def _asked(_: Any, linger: float | None) -> Place:
    """Somebody is there: without another call within `linger` seconds this process ends."""
    import ray

    global _timer
    if _timer is not None:
        _timer.cancel()
    if linger is not None:
        _timer = threading.Timer(linger, os._exit, (0,))
        _timer.daemon = True
        _timer.start()
    return Place(ray.get_runtime_context().get_node_id(), os.getpid())
