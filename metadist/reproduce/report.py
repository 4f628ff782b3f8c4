"""The reproduced table as Markdown, Parquet and on a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metadist.durable import storage_errors, write
from metadist.measure import ACCURACY, MSE, NORMALISATION
from metadist.reproduce.published import PublishedTable
from metadist.reproduce.rows import Outcome
from metadist.tracking.progress import duration

HEADINGS = ("method", "setting", "ours", "published", "difference", "untrained", "normalisation", "budget")


def save(folder: Path, table: PublishedTable, budget: str, rows: Sequence[Outcome]) -> list[Path]:
    """`table.md` and `table.parquet`, replaced in one step each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write(folder / "table.md", markdown(table, budget, rows).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([_record(table, budget, row) for row in rows]), sink)
    write(folder / "table.parquet", sink.getvalue().to_pybytes())
    return [folder / "table.md", folder / "table.parquet"]


def markdown(table: PublishedTable, budget: str, rows: Sequence[Outcome]) -> str:
    """The table, and below it the command of every row."""
    lines = [f"# {table.title}: {budget} budget", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    lines += [f"| {' | '.join(_cells(table, row))} |" for row in rows]
    higher = table.measure == "accuracy"
    missed = [row.line.name for row in rows if row.falls_short(higher)]
    if missed and budget == "paper":
        lines += ["", f"Worse than the published figure by more than our interval: {'; '.join(missed)}."]
    missed = [f"{row.line.name} ({row.line.aim:g})" for row in rows if row.misses_its_aim(higher)]
    if missed and budget == "short":
        lines += ["", f"Worse than the aim of the short budget: {'; '.join(missed)}."]
    told = [_curve(row) for row in rows if row.curve]
    if told:
        lines += ["", "Meta-validation on the way, by meta-step:", "", *told]
    unverified = [row.line.name for row in rows if row.line.published and not row.line.published.verified]
    if unverified:
        lines += ["", f"Published figures quoted second-hand: {'; '.join(unverified)}."]
    machines = dict.fromkeys(row.hardware for row in rows if row.hardware)
    lines += ["", f"Hardware: {'; '.join(machines) or '–'}.", "", "```", *(row.command for row in rows), "```", ""]
    return "\n".join(lines)


def show(console: Console, table: PublishedTable, budget: str, rows: Sequence[Outcome]) -> None:
    """The same for a person at a terminal."""
    drawn = Table(*HEADINGS, title=f"{table.title}: {budget} budget", title_justify="left", title_style="bold")
    for row in rows:
        drawn.add_row(*_cells(table, row))
    console.print(drawn)


def _cells(table: PublishedTable, row: Outcome) -> list[str]:
    published = row.line.published
    theirs = "–" if published is None else f"{_figure(table, published.value, published.ci95)} ({published.source})"
    method = ", ".join(part for part in (row.line.method, row.line.variant) if part)
    if row.value is None:
        return [method, row.line.setting, f"failed: {row.problem}", theirs, "–", "–", "–", "–"]
    difference = "–" if row.difference is None else f"{row.difference:+.2f}"
    return [
        method,
        row.line.setting,
        _figure(table, row.value, row.ci95),
        theirs,
        difference,
        "–" if row.untrained is None else _figure(table, row.untrained, None),
        NORMALISATION[row.transductive],
        f"{row.steps:,} steps, {duration(row.seconds)}",
    ]


def _curve(row: Outcome) -> str:
    """At most some ten points of it."""
    every = -(-len(row.curve) // 10)
    points = row.curve[::-1][::every][::-1]
    return f"- {row.line.name}: {', '.join(f'{step:,}: {value:.4g}' for step, value in points)}"


def _figure(table: PublishedTable, value: float, ci95: float | None) -> str:
    if table.measure == "accuracy":
        return ACCURACY.interval(value / 100, None if ci95 is None else ci95 / 100, 2)
    return MSE.interval(value, ci95)


def _record(table: PublishedTable, budget: str, row: Outcome) -> dict[str, Any]:
    published = row.line.published
    return {
        "table": table.title,
        "budget": budget,
        "method": row.line.method,
        "variant": row.line.variant or None,
        "setting": row.line.setting,
        "measure": table.measure,
        "ours": row.value,
        "ci95": row.ci95,
        "untrained": row.untrained,
        "published": published.value if published else None,
        "published_ci95": published.ci95 if published else None,
        "source": published.source if published else None,
        "difference": row.difference,
        "transductive": row.transductive,
        "steps": row.steps,
        "seconds": row.seconds,
        "aim": row.line.aim,
        "curve": [{"step": step, "value": value} for step, value in row.curve],
        "hardware": row.hardware,
        "command": row.command,
        "problem": row.problem or None,
    }
