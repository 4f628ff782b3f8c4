"""Population-based training: the worst of a generation take over the best one's state, and its values a little changed.

Jaderberg et al. 2017, "Population Based Training of Neural Networks", with truncation selection, and in generations:
all members train `search.interval` meta-steps, then one decision moves them all. It is a pure function of the search's
seed, the generation and the scores, so it does not depend on how many members train at once. All members see the same
tasks in the same order, so what the winner's line of ancestors did is an ordinary run with a schedule (`stages`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from metadist.search.draw import RESOLUTION
from metadist.search.job import SearchJob
from metadist.search.space import Choice, Domain, Grid, Point, RandInt, Value
from metadist.search.state import Trial
from metadist.tasks.counter import below, key

MOVES = 3
"""First coordinate of the random numbers here; see `draw.py`."""


class Move(NamedTuple):
    """A member that goes on from another one's state, with values of its own."""

    id: str
    donor: str
    values: Point


def moves(job: SearchJob, members: Sequence[Trial], step: int) -> list[Move]:
    """What a generation whose members stand behind `step` meta-steps does next.

    The lowest `search.quantile` of them take over a random one of the highest.
    """
    measure = job.measure
    sign = 1 if measure.higher_is_better else -1
    ranked = sorted(members, key=lambda one: (-sign * one.reports[-1].values["score"], one.index))
    count = min(len(ranked) // 2, max(1, int(len(ranked) * job.search.quantile)))
    found = []
    for member in sorted(ranked[len(ranked) - count :], key=lambda one: one.index):
        donor = ranked[_below(job, step, member.index, 0, count)]
        found.append(Move(member.id, donor.id, _explored(job, member.index, donor.now, step)))
    return found


def _explored(job: SearchJob, index: int, own: Point, step: int) -> Point:
    """Values near those of the donor; where conditions or the config tree refuse them, the donor's own."""
    found: Point = {}
    for number, (name, domain) in enumerate(job.search.space.items()):
        place = 4 * number + 1
        if name not in own:
            continue
        if _below(job, step, index, place, RESOLUTION) < job.search.resample * RESOLUTION:
            found[name] = domain.at((_below(job, step, index, place + 1, RESOLUTION) + 0.5) / RESOLUTION)
        else:
            found[name] = _near(job, domain, own[name], _below(job, step, index, place + 2, 2))
    return found if job.allows(found) else dict(own)


def _near(job: SearchJob, domain: Domain, value: Value, way: int) -> Value:
    """A little less, or a little more; of listed values a neighbour."""
    if isinstance(domain, Choice | Grid):
        values = domain.witnesses
        at = values.index(value) if value in values else 0
        return values[min(len(values) - 1, max(0, at + (1 if way else -1)))]
    assert isinstance(value, int | float)
    low, high = domain.witnesses[:2]
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    moved: Any = min(high, max(low, value * job.search.perturb[way]))
    if isinstance(domain, RandInt):
        whole = round(moved)
        return min(int(high), max(int(low), whole if whole != value else int(value) + (1 if way else -1)))
    return float(moved)


def _below(job: SearchJob, step: int, index: int, place: int, end: int) -> int:
    return int(below(key(job.search.seed, MOVES, step, index, place), 0, end))
