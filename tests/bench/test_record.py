"""What a suite found, as files, tables and a picture."""

import io
import json
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure, SubFigure
from rich.console import Console

from metadist.bench import plot
from metadist.bench.files import save
from metadist.bench.record import Point, Row
from metadist.bench.table import show

FLAT, TREE = (Point("50 MB", line, "workers", 1024, "flat") for line in ("flat", "tree"))
ROWS = [
    Row("one thing", 1234.5, "ms", None, None, 3),
    Row("50 MB, 4 workers, flat", 0.5, "steps/s", None, None, 3, FLAT._replace(x=4)),
    Row("50 MB, flat", 0.01, "steps/s", None, None, 3, FLAT),
    Row("50 MB, flat", 102_005.1, "MB/step", None, None, 3, FLAT),
    Row("50 MB, tree", 0.02, "steps/s", "50 MB, flat", 2.0, 3, TREE),
    Row("50 MB, tree", 12_725.8, "MB/step", None, None, 3, TREE),
    Row("50 MB, auto", 0.02, "steps/s", "50 MB, flat", 2.0, 3, TREE._replace(chosen="tree: the best")),
]


def test_the_files_have_every_row_and_nothing_of_the_charts(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save(tmp_path / "new" / "folder", "scale", ROWS)
    assert [path.name for path in paths] == ["bench.json", "bench.parquet", "bench.png"]
    kept = json.loads(paths[0].read_text())
    assert set(kept) == {"suite", "hardware", "rows"}
    assert [row["value"] for row in kept["rows"]] == [row.value for row in ROWS]
    assert all(set(row) == {"name", "value", "unit", "baseline", "ratio", "repeats"} for row in kept["rows"])
    assert [row | {"suite": "scale"} for row in kept["rows"]] == pq.read_table(paths[1]).to_pylist()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def shown(rows: list[Row]) -> list[list[str]]:
    """The cells of all tables."""
    console = Console(width=160, record=True, file=io.StringIO())
    show(console, "scale", rows)
    lines = console.export_text().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def test_a_sweep_has_a_column_for_every_line_and_says_what_was_chosen() -> None:
    assert shown(ROWS) == [
        ["what", "median", "unit", "ratio", "to", "repeats"],
        ["one thing", "1,234", "ms", "", "", "3"],
        ["workers", "unit", "flat", "tree", "chosen"],
        ["4", "steps/s", "0.5", "–", ""],
        ["", "MB/step", "–", "–", ""],
        ["1,024", "steps/s", "0.01", "0.02 (2.00×)", "tree: the best"],
        ["", "MB/step", "102,005", "12,726", ""],
    ]


def test_a_sweep_says_what_its_ratios_are_to():
    console = Console(width=160, record=True, file=io.StringIO())
    show(console, "scale", ROWS)
    assert console.export_text().splitlines()[-1].strip() == "×: steps/s to flat"


def test_a_narrow_terminal_cuts_no_figure():
    console = Console(width=40, record=True, file=io.StringIO())
    show(console, "scale", ROWS)
    assert "…" not in console.export_text()


@pytest.mark.parametrize(
    ("unit", "scale", "lines"),
    [("steps/s", "log", ["flat", "tree", "chosen"]), ("MB/step", "linear", ["flat", "tree"])],
)
def test_a_chart_has_its_lines_and_a_ring_for_what_was_chosen(unit, scale, lines):
    rows = [row for row in ROWS[1:] if row.unit == unit]
    panel = Figure().subplots()
    plot._lines(panel, unit, rows, {"elsewhere": "red", "flat": "green", "tree": "blue"})
    handles, labels = panel.get_legend_handles_labels()
    assert labels == lines
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in handles] == [
        ([row.point.x for row in mine], [row.value for row in mine])
        for mine in (
            [row for row in rows if ("chosen" if row.point.chosen else row.point.line) == name] for name in lines
        )
    ]
    assert [line.get_color() for line in handles] == ["green", "blue", "black"][: len(lines)]
    assert (panel.get_yscale(), panel.get_ylabel(), panel.get_xlabel()) == (scale, unit, "workers")
    assert [text.get_text() for text in panel.get_xticklabels()] == sorted(
        {f"{row.point.x:,}" for row in rows}, key=len
    )


def test_every_line_of_every_chart_is_drawn_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are colours; a unit that one of the charts has not got."""
    points = [
        Point(chart, f"line {n}", "k", x) for chart in "ab" for n in range(9) for x in (1, 2) if chart == "b" or n
    ]
    rows = [Row("row", 1.0 + n, unit, None, None, 1, point) for n, point in enumerate(points) for unit in ("s", "B")]
    rows = [row for row in rows if (row.point.chart, row.unit) != ("a", "B")]
    named: list[str] = []
    monkeypatch.setattr(SubFigure, "legend", lambda self, handles, labels, **keys: named.extend(labels))
    plot.save(tmp_path / "bench.png", "memory", rows)
    assert sorted(named) == [f"line {n}" for n in range(9)]


def test_rows_of_no_sweep_are_one_table() -> None:
    assert len(shown(ROWS[:1])) == 2
