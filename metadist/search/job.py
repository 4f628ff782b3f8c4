"""A search's job file: a job file with one more section."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from metadist.config import (
    Config,
    find_job,
    flatten,
    one_line,
    parse_override,
    read_yaml,
    refuse_changed_mathematics,
    resolve,
    validate,
    with_keys,
)
from metadist.errors import ConfigError
from metadist.measure import LOSS, MEASURES, Measure
from metadist.methods import every_method
from metadist.search.keys import Search
from metadist.search.space import Point, check_space, configured
from metadist.search.state import Trial


class SearchJob(NamedTuple):
    """base: the run of the job's own values, resolved."""

    search: Search
    base: Config

    @property
    def measure(self) -> Measure:
        """What the score of a validation is, and which of two is better: `search.metric` and `search.mode`."""
        metric = LOSS if self.search.metric == "loss" else MEASURES[self.base.kind]
        return metric if self.search.mode is None else metric._replace(higher_is_better=self.search.mode == "max")

    def config(self, point: Point) -> Config:
        """The run of a point of the space. Raises ConfigError where the config tree refuses it.

        All runs sample the same training tasks in the same order and are judged on the same tasks, whatever is
        searched.
        """
        return configured(self.base.model_dump(), point)

    def run_of(self, trial: Trial) -> Config:
        """The run of a trial, with the schedule of its line of ancestors. Raises ConfigError."""
        config = self.config(trial.values)
        if not trial.stages:
            return config
        stages = [{"at": at, "set": changed} for at, changed in trial.stages]
        return validate({**config.model_dump(), "stages": stages}, f"trial {trial.id}")

    def grid_runs(self) -> int:
        """Trials of a whole grid, the baseline among them."""
        from metadist.search.draw import grid  # which reads jobs

        return sum(1 for _ in grid(self)) + self.search.baseline

    def allows(self, point: Point) -> bool:
        """Whether it meets the conditions and makes a config."""
        try:
            value_of = flatten(self.config(point))
        except ConfigError:
            return False
        return all(condition.holds(value_of) for condition in self.search.conditions)


def load_search(job: str | Path, overrides: Sequence[str] = ()) -> SearchJob:
    """Read and check a search's job file with `key.path=value` words applied. Raises ConfigError."""
    path = find_job(str(job))
    values = dict(map(parse_override, overrides))
    return checked(with_keys(read_yaml(path), values), str(job))


def checked(raw: dict[str, Any], origin: str) -> SearchJob:
    """The job of a raw mapping."""
    section = raw.pop("search", None)
    if not isinstance(section, dict):
        raise ConfigError(f"{origin}: has no section search, so there is nothing to search; `metadist train` trains it")
    given = validate(raw, origin)
    try:
        search = Search.model_validate(section)
        base = _judged_alike(_resolved(given, search.processes))
        search.fits(base)
    except ValidationError as error:
        line = one_line(error, section, Search)
        unknown = line.startswith("unknown key ")
        told = line.replace("unknown key ", "unknown key search.") if unknown else f"search.{line}"
        raise ConfigError(f"{origin}: {told}") from error
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if given.task.shard == "auto" and "task.meta_batch" in search.space:
        base = base.with_values(task={"shard": "auto"})  # each meta-batch has its own
    if base.stages:
        raise ConfigError(f"{origin}: stages: a search makes its own; leave them out")
    check_space(base.model_dump(), search.space)
    _check_conditions(search, base)
    if search.scheduler == "pbt":
        _check_schedules(search, base)
    job = SearchJob(search, base)
    if search.searcher == "grid" and section.get("trials") is None:
        return SearchJob(search.model_copy(update={"trials": max(search.baseline + 1, job.grid_runs())}), base)
    return job


def _check_conditions(search: Search, base: Config) -> None:
    """Refuse a condition on a key that neither the run nor a searched method has."""
    names = search.space["algorithm.name"].witnesses if "algorithm.name" in search.space else ()
    keys = {*flatten(base), *search.space}
    for method in every_method():
        if method.method_name() in names:
            keys |= {f"algorithm.{key}" for key in method.model_fields}
    for number, condition in enumerate(search.conditions):
        for part, demands in (("when", condition.when), ("need", condition.need)):
            for key in demands:
                if key not in keys:
                    near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.6)
                    valid = f"did you mean {near[0]}?" if near else "valid are dotted keys such as algorithm.inner_lr"
                    raise ConfigError(f"search.conditions.{number}.{part}: unknown key {key}; {valid}")


def _check_schedules(search: Search, base: Config) -> None:
    """Refuse keys that cannot change while a run goes on."""
    for key, domain in search.space.items():
        if base.outer.steps < 2:
            raise ConfigError("outer.steps: a run of one meta-step has no generations; valid is 2 or more")
        stages = [{"at": 1, "set": {key: domain.witnesses[0]}}]
        try:
            validate({**base.model_dump(), "stages": stages}, "")
        except ConfigError as error:
            told = str(error).removeprefix(": stages.0.set: ")
            raise ConfigError(f"search.space.{key}: search.scheduler=pbt changes values on the way: {told}") from error


def _resolved(base: Config, processes: int) -> Config:
    """The run with every `auto` replaced; all trials at once share this machine's GPUs."""
    workers = base.cluster.workers
    if base.cluster.address != "local" or not isinstance(workers, int):
        return resolve(base)
    shared = resolve(base.with_values(cluster={"workers": max(1, processes) * max(1, workers)}))
    return shared.with_values(cluster={"workers": workers})


FREE_ON_RESUME = ("search.concurrent", "search.trials", "search.budget", "cluster", "tracking")
"""Keys and sections that a resumed search may change; of the trials there can only be more."""


def refuse_changed_search(before: SearchJob, after: SearchJob) -> None:
    """A resumed search compares like with like: one line names the first key that would not be alike."""
    old, new = _keys(before), _keys(after)
    for key in dict.fromkeys([*old, *new]):
        free = any(key == one or key.startswith(f"{one}.") for one in FREE_ON_RESUME)
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{key}: was {old.get(key)} and cannot become {new.get(key)} on resume, trials would not be compared "
                f"alike; what may change: {', '.join(FREE_ON_RESUME)}"
            )
    if after.search.trials < before.search.trials:
        raise ConfigError(
            f"search.trials: was {before.search.trials} and cannot become {after.search.trials} on resume; "
            f"there can only be more"
        )
    if after.search.scheduler == "pbt" and after.search.trials != before.search.trials:
        raise ConfigError(
            f"search.trials: was {before.search.trials} and cannot become {after.search.trials} on resume; a "
            f"population trains its generations together"
        )
    refuse_changed_mathematics(before.base, after.base)


def _keys(job: SearchJob) -> dict[str, Any]:
    """Dotted key → value of the whole job; the ways to draw a value, and the conditions, each as one."""
    section = job.search.model_dump(mode="json", exclude={"metric", "mode"})
    measure = {"search.metric": job.measure.name, "search.mode": job.measure.mode}
    space = {f"search.space.{key}": domain for key, domain in section.pop("space").items()}
    return {**space, **{f"search.{key}": value for key, value in section.items()}, **flatten(job.base), **measure}


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
