"""Points of the space by counter: trial i's is a pure function of the search's seed and of i, whatever was tried."""

from collections.abc import Iterator

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
    space = job.search.space
    for attempt in range(ATTEMPTS):
        keys = key(job.search.seed, POINTS, index, attempt, torch.arange(len(space)))
        places = ((below(keys, 0, RESOLUTION).double() + 0.5) / RESOLUTION).tolist()
        point = had({name: domain.at(u) for (name, domain), u in zip(space.items(), places, strict=True)})
        if job.allows(point):
            return point
    raise _nothing(job, index, point)


def _nothing(job: SearchJob, index: int, last: Point) -> ConfigError:
    told = f"none of {ATTEMPTS:,} points drawn for trial {index:03d}"
    try:
        job.config(last)
    except ConfigError as error:
        return ConfigError(f"search.space: {told} is a run; the last: {str(error).removeprefix('search.space: ')}")
    return ConfigError(f"search.conditions: {told} is allowed; loosen them, or narrow search.space to what they allow")


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
