"""What a suite found."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Point(NamedTuple):
    """Where a row lies in a sweep: in which chart, on which of its lines, and how far along.

    to: in words, what the row's ratio is to. chosen: in words, where the row is one of the chart's lines once more, the
    one that was chosen at this place.
    """

    chart: str
    line: str
    along: str
    x: float
    to: str = ""
    chosen: str = ""


@dataclass(frozen=True)
class Row:
    """One figure: the median over `repeats`, and its ratio to the row named `baseline`; point: for tables and plots."""

    name: str
    value: float
    unit: str
    baseline: str | None
    ratio: float | None
    repeats: int
    point: Point | None = None

    def told(self) -> dict[str, Any]:
        """As in the files."""
        return {name: value for name, value in vars(self).items() if name != "point"}


def rates_rows(rates: Mapping[str, Sequence[float]], what: str, baseline: str) -> list[Row]:
    """Tasks per second of several on the same shards, turn by turn: medians, and ratios within a turn to the baseline's
    if there is one."""

    def row(name: str, found: Sequence[float]) -> Row:
        if name == baseline or baseline not in rates:
            return Row(f"{name} {what}", statistics.median(found), "tasks/s", None, None, len(found))
        ratio = statistics.median(a / b for a, b in zip(found, rates[baseline], strict=True))
        return Row(f"{name} {what}", statistics.median(found), "tasks/s", f"{baseline} {what}", ratio, len(found))

    return [row(name, found) for name, found in rates.items()]


def charts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of a sweep, chart by chart."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.point is not None:
            found.setdefault(row.point.chart, []).append(row)
    return found
