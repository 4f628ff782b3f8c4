"""What a suite found, kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metadist import __version__
from metadist.bench import plot
from metadist.bench.record import Row
from metadist.durable import storage_errors, write
from metadist.engine.hardware import hardware
from metadist.errors import RunError


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    return {**hardware(), "torch": torch.__version__, "metadist": __version__}


def save(out: Path, suite: str, rows: Sequence[Row]) -> list[Path]:
    """`bench.json`, `bench.parquet` and `bench.png` in `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is a file; name a folder")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    told = {"suite": suite, "hardware": machine(), "rows": [row.told() for row in rows]}
    write(out / "bench.json", json.dumps(told, indent=2).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"suite": suite, **row.told()} for row in rows]), sink)
    write(out / "bench.parquet", sink.getvalue().to_pybytes())
    with storage_errors(out):
        plot.save(out / "bench.png", suite, rows)
    return [out / name for name in ("bench.json", "bench.parquet", "bench.png")]
