"""What a search knows of its trials."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from metadist.search.space import Point

Decision = Literal["go", "stop", "pause"]
How = Literal["finished", "stopped", "paused", "diverged", "memory", "refused", "failed", "crashed"]
"""Ways in which a trial ends: all its steps; early, by the scheduler; and what is recorded with its reason. `paused` is
the end of a member's part in a generation, not of the trial."""

Origin = Literal["baseline", "random", "grid", "optuna"]


class Report(NamedTuple):
    """A validation of a trial behind `step` meta-steps, and what was decided then.

    values: `score` and `ci95` on the validation's tasks, and what else was measured; why: it was stopped.
    """

    step: int
    values: dict[str, float]
    decision: Decision
    why: str = ""


class End(NamedTuple):
    """How a trial ended, behind how many meta-steps; facts: of its result, and its costs."""

    how: How
    step: int
    reason: str
    facts: dict[str, Any]


@dataclass
class Trial:
    """One run of the search. id: `000`, `001`, …, also its folder's name; origin: who proposed it.

    Of a member of a population also: stages: what changed at which meta-step, in its line of ancestors; held: it waits
    for the others of its generation; released: the meta-step behind which the last generation went on; drawn: the
    values that it began with, once it has taken over another one's.
    """

    id: str
    index: int
    origin: Origin
    values: Point
    attempt: int = 0
    reports: list[Report] = field(default_factory=list)
    end: End | None = None
    stages: list[tuple[int, Point]] = field(default_factory=list)
    held: bool = False
    released: int = 0
    drawn: Point | None = None

    @property
    def now(self) -> Point:
        """The values in force behind its last stage."""
        return {**self.values, **{key: value for _, changed in self.stages for key, value in changed.items()}}

    @property
    def stopped(self) -> bool:
        """Whether it has been told to stop, and so will not go on."""
        return bool(self.reports) and self.reports[-1].decision == "stop"

    def score_at(self, step: int) -> float | None:
        """That of the first validation behind `step` meta-steps or more."""
        return next((report.values["score"] for report in self.reports if report.step >= step), None)
