"""Points of the space by counter: trial i's is a pure function of the search's seed and of i, whatever was tried."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from metadist.config import flatten
from metadist.errors import ConfigError
from metadist.methods import every_method
from metadist.search.job import SearchJob
from metadist.search.space import Point, grid_points
from metadist.tasks.counter import below, key

ATTEMPTS = 1000
"""Points that are drawn for a trial before the conditions are taken to allow none."""

POINTS, MODELS = 1, 2
"""First coordinates of the search's random numbers: of points drawn by counter, and of a searcher that models."""

RESOLUTION = 1 << 30


def random_point(job: SearchJob, index: int) -> Point:
    """Every key drawn by itself; all of them again until the conditions allow the point. Raises ConfigError."""
    space, refused = job.search.space, list[Point]()
    for attempt in range(ATTEMPTS):
        keys = key(job.search.seed, POINTS, index, attempt, torch.arange(len(space)))
        places = ((below(keys, 0, RESOLUTION).double() + 0.5) / RESOLUTION).tolist()
        point = had({name: domain.at(u) for (name, domain), u in zip(space.items(), places, strict=True)})
        if job.allows(point):
            return point
        refused.append(point)
    raise ConfigError(_why_none(job, f"none of {ATTEMPTS:,} points drawn for trial {index:03d}", refused))


def _why_none(job: SearchJob, told: str, refused: Sequence[Point]) -> str:
    """A line about points of which none is allowed: what refuses most of them, and what would be valid."""
    by: Counter[int] = Counter()
    problem = ""
    for point in refused:
        try:
            value_of = flatten(job.config(point))
        except ConfigError as error:
            problem = str(error).removeprefix("search.space: ")
            continue
        by.update(n for n, condition in enumerate(job.search.conditions) if not condition.holds(value_of))
    if not by:
        return f"search.space: {told} is a run; the last: {problem}"
    (number, count), *others = by.most_common()
    condition = job.search.conditions[number]
    keys = [key for key in (*condition.need, *condition.when) if key in job.search.space]
    drawn = "; ".join(f"search.space draws {key} by {job.search.space[key].model_dump()}" for key in keys)
    return (
        f"search.conditions: {told} is allowed; search.conditions.{number} refuses {count:,} of them: it asks for "
        f"{condition}" + (f"; {drawn}" if drawn else "") + ("; others refuse the rest" if others else "")
    )


def check_draws(job: SearchJob) -> None:
    """Refuse a space of which no point would be tried, before anything runs. Raises ConfigError."""
    search = job.search
    if search.trials <= search.baseline:
        return
    if search.searcher != "grid":
        random_point(job, int(search.baseline))
    elif next(grid(job), None) is None:
        points = list(map(had, grid_points(search.space)))
        refused = [point for point in points if not job.allows(point)]
        if refused:
            raise ConfigError(_why_none(job, f"none of {len(points):,} combinations", refused))
        raise ConfigError("search.space: its only point is the job's own run; add values, or train it alone")


def grid(job: SearchJob) -> Iterator[Point]:
    """Every allowed combination, the last key fastest; those that make the same run as one before, or as the baseline,
    are left out."""
    seen = {job.base.model_dump_json()} if job.search.baseline else set()
    for combination in grid_points(job.search.space):
        point = had(combination)
        if job.allows(point):
            run = job.config(point).model_dump_json()
            if run not in seen:
                seen.add(run)
                yield point


def own_point(job: SearchJob) -> Point:
    """The values that the job's own run has of the searched keys."""
    own = flatten(job.base)
    return {name: own[name] for name in job.search.space if name in own}


def had(point: Point) -> Point:
    """Without the keys that the point's method does not have."""
    name = point.get("algorithm.name")
    keys = next((method.model_fields for method in every_method() if method.method_name() == name), None)
    if keys is None:
        return point
    return {key: value for key, value in point.items() if not key.startswith("algorithm.") or key.split(".")[1] in keys}
