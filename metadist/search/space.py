"""What is searched: keys of the config tree, and the values that each may take.

`{loguniform: [0.01, 3]}` stands in a job file where a value would. Every bound and every choice is tried against the
config tree before anything runs. A point of the space is a mapping of dotted keys to values.
"""

import math
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from metadist.config import Config, with_keys
from metadist.config import validate as validate_config
from metadist.errors import ConfigError
from metadist.tree import Number, Tree

Value = bool | int | float | str | None
Point = dict[str, Value]
Whole = Annotated[int, Number]
Real = Annotated[float, Field(allow_inf_nan=False), Number]

SEARCHED = ("seed", "task", "model", "algorithm", "outer")
"""Sections whose keys may be searched: those that say what is learnt. What it is judged by is the same for all."""


NEVER = {
    "outer.steps": "how long a trial trains is the same for all",
    "task.within_group": "the tasks that trials are judged on depend on it",
}

INSIDE = 0.3819660112501051
"""A place between two bounds at which no whole number lies: a real number for a whole one is found out."""


def _in_order(bounds: tuple[Any, Any], name: str) -> None:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"{name}: the lower bound comes first, not [{bounds[0]}, {bounds[1]}]")


class Uniform(Tree):
    """A number between two bounds, each as likely."""

    uniform: tuple[Real, Real]

    @model_validator(mode="after")
    def _bounds(self) -> "Uniform":
        _in_order(self.uniform, "uniform")
        return self

    @property
    def witnesses(self) -> tuple[Value, ...]:
        return *self.uniform, self.at(INSIDE)

    def at(self, u: float) -> Value:
        low, high = self.uniform
        return min(high, low + u * (high - low))


class LogUniform(Tree):
    """A number between two bounds above 0, each magnitude as likely."""

    loguniform: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]]

    @model_validator(mode="after")
    def _bounds(self) -> "LogUniform":
        _in_order(self.loguniform, "loguniform")
        return self

    @property
    def witnesses(self) -> tuple[Value, ...]:
        return *self.loguniform, self.at(INSIDE)

    def at(self, u: float) -> Value:
        low, high = self.loguniform
        return min(high, max(low, low * math.exp(u * math.log(high / low))))


class RandInt(Tree):
    """A whole number between two bounds, both included."""

    randint: tuple[Whole, Whole]

    @model_validator(mode="after")
    def _bounds(self) -> "RandInt":
        _in_order(self.randint, "randint")
        return self

    @property
    def witnesses(self) -> tuple[Value, ...]:
        return self.randint

    def at(self, u: float) -> Value:
        low, high = self.randint
        return min(high, low + int(u * (high - low + 1)))


class Choice(Tree):
    """One of some values, each as likely."""

    choice: list[Value] = Field(min_length=1)

    @property
    def witnesses(self) -> tuple[Value, ...]:
        return tuple(self.choice)

    def at(self, u: float) -> Value:
        return self.choice[min(len(self.choice) - 1, int(u * len(self.choice)))]


class Grid(Tree):
    """Each of some values; of several grids each combination."""

    grid: list[Value] = Field(min_length=1)

    @property
    def witnesses(self) -> tuple[Value, ...]:
        return tuple(self.grid)

    def at(self, u: float) -> Value:
        return self.grid[min(len(self.grid) - 1, int(u * len(self.grid)))]


Domain = Uniform | LogUniform | RandInt | Choice | Grid
KINDS: dict[str, type[Domain]] = {
    "uniform": Uniform, "loguniform": LogUniform, "randint": RandInt, "choice": Choice, "grid": Grid,
}  # fmt: skip


class Limits(Tree):
    """What a condition asks of a number."""

    at_least: Real | None = None
    at_most: Real | None = None

    def holds(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


Demand = Limits | list[Value] | Value
"""Limits of a number, some valid values, or the only one."""


class Condition(Tree):
    """Points in which everything under `when` is so must have everything under `need` so too."""

    when: dict[str, Demand]
    need: dict[str, Demand]

    def holds(self, value_of: Mapping[str, Any]) -> bool:
        """value_of: key → value of a whole config."""
        return not _all(self.when, value_of) or _all(self.need, value_of)

    def __str__(self) -> str:
        """Such as `algorithm.inner_steps at most 3 where algorithm.order is 2`."""
        where = f" where {_words(self.when)}" if self.when else ""
        return _words(self.need) + where


def _all(demands: Mapping[str, Demand], value_of: Mapping[str, Any]) -> bool:
    return all(key in value_of and _meets(demand, value_of[key]) for key, demand in demands.items())


def _words(demands: Mapping[str, Demand]) -> str:
    return " and ".join(f"{key} {_asked(demand)}" for key, demand in demands.items())


def _asked(demand: Demand) -> str:
    if isinstance(demand, Limits):
        bounds = (("at least", demand.at_least), ("at most", demand.at_most))
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)
    return f"one of {demand}" if isinstance(demand, list) else f"is {demand}"


def _meets(demand: Demand, value: Any) -> bool:
    if isinstance(demand, Limits):
        return demand.holds(value)
    return value in demand if isinstance(demand, list) else value == demand


def read_space(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Domain]:
    """The domains of `search.space`, by dotted key; sections may be nested or dotted. Raises ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"search.space: {raw!r} is no space; valid is {{KEY: {{choice: [1, 3, 5]}}}}")
    found: dict[str, Domain] = {}
    for name, entry in raw.items():
        key = f"{prefix}{name}"
        if isinstance(entry, Uniform | LogUniform | RandInt | Choice | Grid):
            found[key] = entry
            continue
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"search.space.{key}: {entry!r} is a value; valid is a way to draw one, such as {{choice: [1, 3, 5]}}"
            )
        if entry and not any(kind in KINDS for kind in entry):
            if not any(isinstance(inner, Mapping) for inner in entry.values()):
                raise ConfigError(f"search.space.{key}: unknown {next(iter(entry))}; valid: {', '.join(KINDS)}")
            found |= read_space(entry, f"{key}.")
            continue
        found[key] = _domain(key, entry)
    return found


def _domain(key: str, entry: Mapping[str, Any]) -> Domain:
    if len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise ConfigError(
            f"search.space.{key}: {dict(entry)} is not one way to draw a value; valid: {', '.join(KINDS)}"
        )
    (kind,) = entry
    try:
        return KINDS[kind].model_validate(dict(entry))
    except ValidationError as error:
        problem = error.errors()[0]
        message = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
        raise ConfigError(f"search.space.{key}: {kind}: {message.removeprefix(f'{kind}: ')}") from error


def configured(base: Mapping[str, Any], point: Mapping[str, Value], origin: str = "search.space") -> Config:
    """The config of a point. Raises ConfigError where the tree refuses it."""
    return validate_config(with_keys(dict(base), point), origin)


def check_space(base: Mapping[str, Any], space: Mapping[str, Domain]) -> None:
    """Refuse a key that does not exist, and a value that it can never have. Raises ConfigError, naming the key.

    A value that goes with some of the other keys' values only is none of these: such points are passed over.
    """
    for key, domain in space.items():
        section = key.split(".")[0]
        if key in NEVER:
            raise ConfigError(f"search.space.{key}: is not searched: {NEVER[key]}")
        if section not in SEARCHED:
            raise ConfigError(f"search.space.{key}: is not searched; valid are keys of {', '.join(SEARCHED)}")
        for value in domain.witnesses:
            problem = _never(base, space, key, value)
            if problem:
                raise ConfigError(f"search.space.{key}: {problem}")


def _never(base: Mapping[str, Any], space: Mapping[str, Domain], key: str, value: Value) -> str:
    """Why a key can never have a value; empty where it can, with some method that is searched."""
    names = space["algorithm.name"].witnesses if "algorithm.name" in space and key.startswith("algorithm.") else (None,)
    problem = ""
    for name in names:
        point = {key: value} if name is None or key == "algorithm.name" else {"algorithm.name": name, key: value}
        try:
            configured(base, point)
            return ""
        except ConfigError as error:
            cause = error.__cause__
            if not isinstance(cause, ValidationError):
                return str(error).removeprefix(f"{key}: ")
            if all(one["type"] == "value_error" for one in cause.errors()):
                return ""  # a combination: others may go with it
            problem = str(error).removeprefix("search.space: ").removeprefix(f"{key}: ")
    return problem


def grid_points(space: Mapping[str, Domain]) -> list[Point]:
    """Every combination of the grids, the last key fastest; one empty point where there are none."""
    grids = {key: domain for key, domain in space.items() if isinstance(domain, Grid)}
    return [dict(zip(grids, values, strict=True)) for values in product(*(grid.grid for grid in grids.values()))]
