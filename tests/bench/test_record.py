"""What a suite found, as files, tables and a picture."""

import io
import json
import warnings
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from metadist.bench.files import save
from metadist.bench.record import Point, Row
from metadist.bench.table import show

FLAT, TREE = (Point("50 MB", line, "workers", 1024) for line in ("flat", "tree"))
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


def test_rows_of_no_sweep_are_one_table() -> None:
    assert len(shown(ROWS[:1])) == 2
