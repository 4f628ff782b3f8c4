"""A search's job file: a job file with one more section."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from metadist.config import Config, find_job, one_line, parse_override, read_yaml, resolve, validate, with_keys
from metadist.errors import ConfigError
from metadist.search.keys import Search
from metadist.search.space import Point, check_space, configured


class SearchJob(NamedTuple):
    """base: the run of the job's own values, resolved."""

    search: Search
    base: Config

    def config(self, point: Point) -> Config:
        """The run of a point of the space. Raises ConfigError where the config tree refuses it.

        All runs sample the same training tasks in the same order and are judged on the same tasks, whatever is
        searched.
        """
        return configured(self.base.model_dump(), point)

    def allows(self, point: Point) -> bool:
        """Whether it meets the conditions and makes a config."""
        from metadist.config import flatten

        try:
            value_of = flatten(self.config(point))
        except ConfigError:
            return False
        return all(condition.holds(value_of) for condition in self.search.conditions)


def load_search(job: str | Path, overrides: Sequence[str] = ()) -> SearchJob:
    """Read and check a search's job file with `key.path=value` words applied. Raises ConfigError."""
    path = find_job(str(job))
    values = dict(map(parse_override, overrides))
    raw = with_keys(read_yaml(path), values)
    if not isinstance(raw.get("search"), dict):
        raise ConfigError(
            f"{job}: has no section search, so there is nothing to search; `metadist train {job}` trains it"
        )
    return checked(raw, str(job))


def checked(raw: dict[str, Any], origin: str) -> SearchJob:
    """The job of a raw mapping."""
    section = raw.pop("search")
    base = _judged_alike(resolve(validate(raw, origin)))
    try:
        search = Search.model_validate(section)
        search.fits(base)
    except ValidationError as error:
        line = one_line(error, section, Search)
        unknown = line.startswith("unknown key ")
        told = line.replace("unknown key ", "unknown key search.") if unknown else f"search.{line}"
        raise ConfigError(f"{origin}: {told}") from error
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error
    check_space(base.model_dump(), search.space)
    return SearchJob(search, base)


def _judged_alike(base: Config) -> Config:
    """What the evaluation takes from the task, or the seed, is said: neither may change with a searched key."""
    judged, task = base.eval, base.task
    counted = {} if base.kind == "regression" else {"ways": judged.ways or task.ways}
    same = {
        **counted,
        "shots": judged.shots or task.shots,
        "queries": judged.queries or task.queries,
        "transductive": task.transductive if judged.transductive is None else judged.transductive,
        "seed": base.seed if judged.seed is None else judged.seed,
    }
    return base.with_values(eval=same, task={"seed": base.seed if task.seed is None else task.seed})


def to_yaml(job: SearchJob) -> str:
    """The whole job as a file, every key written out."""
    section = job.search.model_dump(mode="json")
    return yaml.safe_dump({"search": section, **job.base.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)
