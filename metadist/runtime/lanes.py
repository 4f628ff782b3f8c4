"""What lanes carry from step to step, on the driver's side.

A lane's new state counts only with its step: what was computed for a step that is begun
again, or that never ends, changes nothing. Here it does not matter what a state is: in one
process the tensors themselves, on Ray a reference to them, so that they stay where they were
computed until someone else computes the lane.
"""

from collections.abc import Iterable
from typing import Generic, TypeVar

from metadist.config import Config
from metadist.engine.engine import Lane
from metadist.runtime.aggregator import Snapshot

State = TypeVar("State")


class Lanes(Generic[State]):
    """States before the current step, one for each lane; none of them where lanes carry nothing."""

    def __init__(self, states: Iterable[State] = ()) -> None:
        self.states = list(states)
        self._next: dict[int, State] = {}
        self._before: tuple[list[State], dict[int, State]] = ([], {})

    def of(self, lanes: Iterable[int]) -> list[State]:
        """What is needed to compute some lanes."""
        return [self.states[lane] for lane in lanes] if self.states else []

    def computed(self, lanes: Iterable[int], states: Iterable[State]) -> None:
        """What they carry on, from a result that counts; of a lane that is computed again, the same."""
        if self.states:
            self._next.update(zip(lanes, states, strict=True))

    def advance(self) -> None:
        """The step is asked for: all its lanes go on."""
        self._before = self.states, self._next
        if self.states:
            self.states = [self._next[lane] for lane in range(len(self.states))]
        self._next = {}

    def settle(self) -> None:
        """It was taken."""
        self._before = ([], {})

    def back(self) -> None:
        """It was not: they are where they were before `advance`."""
        self.states, self._next = self._before


def carried(config: Config, snapshot: Snapshot | None) -> list[Lane]:
    """What the lanes of a run carry at a checkpoint, or at its start; none where they carry nothing."""
    if not config.outer.remembers:
        return []
    return list(snapshot.lanes) if snapshot is not None and snapshot.lanes else [{} for _ in range(config.lanes)]
