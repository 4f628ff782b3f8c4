"""Whether aggregators live, as their driver sees it, and whether the driver does, as they see it.

An actor that stands still is as bad as a dead one, but nobody tells of it: who waits for it waits for ever. So it is
asked now and then. One that does not answer may be waiting itself, for a sum that is on its way; so its process is
looked at where it is, and killed if it is stopped, which everybody notices. One that outlives its driver ends itself
when nobody asks any more.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metadist.runtime.runtime import Say

QUESTIONS = 6
"""In the time after which one is looked at. They are counted, not seconds: a machine that was asleep is not mute."""


class Place(NamedTuple):
    """Where an actor's process is, and of which class the actor is."""

    node: str
    pid: int
    kind: str


class Watched:
    """An actor that can be asked. Ray Client calls nothing but methods of the actor's class.

    linger: as of `asked`, for one whose driver dies before it has asked at all.
    """

    def __init__(self, linger: float | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        _end_after(linger)

    def asked(self, linger: float | None) -> Place:
        """Somebody is there: without another call within `linger` seconds this process ends."""
        import ray

        _end_after(linger)
        return Place(ray.get_runtime_context().get_node_id(), os.getpid(), type(self).__name__.lower())


class Watch:
    """A thread that asks actors, those of `watched` at the time.

    silence: seconds without an answer after which one is looked at; linger: seconds after which an actor ends itself
    when nobody has asked, None: never.
    """

    def __init__(
        self, ray: Any, watched: Callable[[], Sequence[Any]], silence: float, linger: float | None, say: Say
    ) -> None:
        self.ray, self.watched, self.say = ray, watched, say
        self.linger, self.every = linger, min(silence / QUESTIONS, linger / 10 if linger else silence)
        self._patience = max(1, round(silence / self.every))
        self._waiting: dict[Any, tuple[Any, int]] = {}
        self._places: dict[Any, Place] = {}
        self._looking: dict[Any, tuple[Any, Place]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask_again_and_again, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask no more; what has been looked at is told."""
        self._ended.set()
        self._thread.join()
        self._tell(patience=1.0)

    def _ask_again_and_again(self) -> None:
        while not self._ended.is_set():
            actors = self.watched()
            for known in (self._waiting, self._places):
                for gone in known.keys() - set(actors):
                    del known[gone]
            for actor in actors:
                try:
                    self._ask(actor)
                except Exception:  # noqa: BLE001, it is dead, which those who wait for it hear; the others are asked
                    self._waiting.pop(actor, None)
            self._tell()
            self._ended.wait(self.every)

    def _ask(self, actor: Any) -> None:
        answer, times = self._waiting.get(actor, (None, 0))
        if answer is None:
            self._waiting[actor] = actor.asked.remote(self.linger), 0
        elif self.ray.wait([answer], timeout=0)[0]:
            del self._waiting[actor]
            self._places[actor] = self.ray.get(answer)
            self._waiting[actor] = actor.asked.remote(self.linger), 0
        else:
            self._waiting[actor] = answer, times + 1
            self._look(actor, times + 1)

    def _look(self, actor: Any, times: int) -> None:
        """Have the process of a silent actor looked at."""
        place = self._places.get(actor)
        if place is not None and actor not in self._looking and times % self._patience == 0:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            # Ray asks a process to end itself, which one that stands still does not hear.
            there = NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)
            look = self.ray.remote(end_if_stopped).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            self._looking[actor] = look.remote(place.pid), place

    def _tell(self, patience: float = 0.0) -> None:
        """What came of the looks."""
        for actor, (looking, place) in list(self._looking.items()):
            try:
                if not self.ray.wait([looking], timeout=patience)[0]:
                    continue
                del self._looking[actor]
                if self.ray.get(looking):
                    self.say(f"the {place.kind} in process {place.pid} stood still; it is ended")
            except Exception:  # noqa: BLE001, its node is gone, and it with it
                self._looking.pop(actor, None)


def end_if_stopped(pid: int) -> bool:
    """Kill a process of this machine that is stopped; False: it is not, or is gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in ("T", "t"):
            os.kill(pid, signal.SIGKILL)
            return True
    except OSError:
        pass
    return False


# --- in the actor ------------------------------------------------------------

_timer: threading.Timer | None = None


def _end_after(seconds: float | None) -> None:
    """Of this process, unless it is asked before."""
    global _timer
    if _timer is not None:
        _timer.cancel()
    if seconds is not None:
        _timer = threading.Timer(seconds, os._exit, (0,))
        _timer.daemon = True
        _timer.start()
