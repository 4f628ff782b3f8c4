"""What a suite found: rows for a person, a machine and a plot."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from metadist import __version__
from metadist.durable import storage_errors, write
from metadist.engine.hardware import hardware
from metadist.errors import RunError


@dataclass(frozen=True)
class Row:
    """One figure: the median over `repeats`, and its ratio to the row named `baseline`."""

    name: str
    value: float
    unit: str
    baseline: str | None
    ratio: float | None
    repeats: int


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    return {**hardware(), "torch": torch.__version__, "metadist": __version__}


def show(console: Console, suite: str, rows: list[Row]) -> None:
    """The table."""
    table = Table(title=f"bench {suite}", title_justify="left", title_style="bold")
    for name in ("what", "median", "unit", "ratio", "to", "repeats"):
        table.add_column(name, justify="left" if name in ("what", "unit", "to") else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, f"{row.value:,.4g}", row.unit, ratio, row.baseline or "", str(row.repeats))
    console.print(table)


def save(out: Path, suite: str, rows: list[Row]) -> list[Path]:
    """`bench.json`, `bench.parquet` and `bench.png` in `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is a file; name a folder")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    told = {"suite": suite, "hardware": machine(), "rows": [asdict(row) for row in rows]}
    write(out / "bench.json", json.dumps(told, indent=2).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"suite": suite, **asdict(row)} for row in rows]), sink)
    write(out / "bench.parquet", sink.getvalue().to_pybytes())
    _plot(out / "bench.png", suite, rows)
    return [out / name for name in ("bench.json", "bench.parquet", "bench.png")]


def rates_rows(rates: Mapping[str, Sequence[float]], what: str, baseline: str) -> list[Row]:
    """Tasks per second of several on the same shards, turn by turn: medians, and ratios within a turn to the baseline's
    if there is one."""

    def row(name: str, found: Sequence[float]) -> Row:
        if name == baseline or baseline not in rates:
            return Row(f"{name} {what}", statistics.median(found), "tasks/s", None, None, len(found))
        ratio = statistics.median(a / b for a, b in zip(found, rates[baseline], strict=True))
        return Row(f"{name} {what}", statistics.median(found), "tasks/s", f"{baseline} {what}", ratio, len(found))

    return [row(name, found) for name, found in rates.items()]


def _plot(path: Path, suite: str, rows: list[Row]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    by_unit: dict[str, list[Row]] = {}
    for row in rows:
        by_unit.setdefault(row.unit, []).append(row)
    height = 1.2 + 0.22 * max(9, *map(len, by_unit.values()))
    figure, panels = plt.subplots(1, len(by_unit), figsize=(1 + 4.5 * len(by_unit), height), squeeze=False)
    for panel, (unit, mine) in zip(panels[0], by_unit.items(), strict=True):
        bars = panel.barh([row.name for row in mine], [row.value for row in mine], color="#4878a8")
        panel.bar_label(bars, [f" {row.value:,.3g}" + (f" ({row.ratio:.2f}×)" if row.ratio else "") for row in mine])
        panel.margins(x=0.35)
        panel.invert_yaxis()
        panel.set_xlabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"metadist bench {suite}")
    figure.tight_layout()
    with storage_errors(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)
