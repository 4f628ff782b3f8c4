"""What a suite found, for whoever waits for it: a table, and one for each chart of a sweep."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from metadist.bench.record import Row, charts


def show(console: Console, suite: str, rows: Sequence[Row]) -> None:
    """Print them."""
    single = [row for row in rows if row.point is None]
    if single:
        console.print(_singles(f"bench {suite}", single))
    for chart, found in charts(rows).items():
        console.print(_swept(f"bench {suite}: {chart}" if chart else f"bench {suite}", found))


def _singles(title: str, rows: Sequence[Row]) -> Table:
    table = _titled(title)
    for name in ("what", "median", "unit", "ratio", "to", "repeats"):
        words = name in ("what", "unit", "to")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, f"{row.value:,.4g}", row.unit, ratio, row.baseline or "", str(row.repeats))
    return table


def _swept(title: str, rows: Sequence[Row]) -> Table:
    """A column for every line of the chart; for every place as many rows as there are units."""
    points = [(row, row.point) for row in rows if row.point is not None]
    chosen = {point.x: point.chosen for _, point in points if point.chosen}
    found = {(point.x, row.unit, point.line): row for row, point in points if not point.chosen}
    places, units, lines = (list(dict.fromkeys(each)) for each in zip(*found, strict=True))
    table = _titled(title)
    to = {row.unit: point.to for row, point in points if row.ratio is not None}
    table.caption = f"×: {'; '.join(f'{unit} to {what}' for unit, what in to.items())}" if to else None
    table.add_column(points[0][1].along, justify="right", overflow="fold")
    table.add_column("unit", overflow="fold")
    for line in lines:
        table.add_column(line, justify="right", overflow="fold")
    if chosen:
        table.add_column("chosen", overflow="fold")
    for x in places:
        for unit in units:
            first = unit == units[0]
            told = [_cell(found.get((x, unit, line))) for line in lines]
            words = [chosen.get(x, "") if first else ""] if chosen else []
            table.add_row(f"{x:,g}" if first else "", unit, *told, *words, end_section=unit == units[-1])
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    number = f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.3g}"
    return number if row.ratio is None else f"{number} ({row.ratio:.2f}×)"


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold")
