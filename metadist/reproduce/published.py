"""A published table: which job stands for which row, and what its paper reports.

A table is a YAML file in `jobs/tables/`. A row's recipe is its job, with overrides of its own
where settings share a job. The table's `short` overrides cut it to a budget that two CPU cores
can pay; a row that belongs to that budget may have further ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from metadist.config import packaged_jobs, read_yaml
from metadist.errors import ConfigError
from metadist.tree import Tree

BUDGETS = ("short", "paper")


class Published(Tree):
    """A figure of a paper, in percent for an accuracy. ci95: the half-width it gives, if any."""

    value: float
    ci95: float | None = None
    source: str
    verified: bool = Field(False, description="read in the paper itself or in its repository")


class Line(Tree):
    """One row: a job, what its paper reports, and how its recipe is cut for the short budget.

    recipe: overrides of the job in every budget; short: further ones of the short budget, None for a row without one;
    variant: what makes the row another thing than the paper's, whose figure is then not compared with;
    aim: what the cut recipe is expected to reach at least, or at most for an error.
    """

    method: str
    setting: str
    job: str
    published: Published | None = None
    variant: str = ""
    recipe: tuple[str, ...] = ()
    short: tuple[str, ...] | None = None
    aim: float | None = None

    @property
    def name(self) -> str:
        """Such as `maml, 5w1s`."""
        return ", ".join(part for part in (self.method, self.variant, self.setting) if part)

    @property
    def folder(self) -> str:
        """Of the row's run."""
        return self.name.replace(", ", "-").replace(" ", "-")


class PublishedTable(Tree):
    """All rows. measure: accuracy in percent, or mse; short: overrides of every row for the short budget."""

    title: str
    measure: Literal["accuracy", "mse"]
    short: tuple[str, ...] = ()
    rows: tuple[Line, ...]


def tables() -> dict[str, Path]:
    """Name → file of the tables that ship with the package."""
    folder = next(iter(packaged_jobs().values())).parent / "tables"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_table(name: str) -> PublishedTable:
    """A table by name. Raises ConfigError."""
    found = tables()
    if name not in found:
        raise ConfigError(f"no table is named {name!r}; valid: {', '.join(found)}")
    try:
        return PublishedTable.model_validate(read_yaml(found[name]))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{found[name]}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


def chosen(
    table: PublishedTable, budget: str, methods: str | None = None, settings: str | None = None
) -> Sequence[Line]:
    """The rows of a budget, of some methods and settings or all. Raises ConfigError where there is none."""
    if budget not in BUDGETS:
        raise ConfigError(f"--budget: {budget!r} is none; valid: {', '.join(BUDGETS)}")
    rows = [row for row in table.rows if budget == "paper" or row.short is not None]
    for column, asked in (("method", methods), ("setting", settings)):
        if asked is None:
            continue
        known = list(dict.fromkeys(getattr(row, column) for row in rows))
        wanted = [word.strip() for word in asked.split(",") if word.strip()]
        for word in wanted:
            if word not in known:
                raise ConfigError(
                    f"--{column}s: no such row of the {budget} budget: {word!r}; valid: {', '.join(known)}"
                )
        rows = [row for row in rows if getattr(row, column) in wanted]
    return rows
