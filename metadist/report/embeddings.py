"""The embeddings of a split's tasks as Parquet and as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metadist.durable import storage_errors, write


def save(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """`embeddings.parquet`, and `embeddings.png` with the two main directions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    write(out / "embeddings.parquet", sink.getvalue().to_pybytes())
    _plot(rows, out / "embeddings.png")
    return [out / "embeddings.parquet", out / "embeddings.png"]


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    vectors = np.array([row["embedding"] for row in rows])
    _, _, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    places = (vectors - vectors.mean(0)) @ directions[:2].T
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))  # an embedding may be one number
    figure, panel = plt.subplots(figsize=(7, 5))
    for number, family in enumerate(sorted({row["family"] for row in rows})):
        here = [index for index, row in enumerate(rows) if row["family"] == family]
        colour = plt.get_cmap("tab20")(number % 20)
        panel.scatter(places[here, 0], places[here, 1], s=14, color=colour, label=family)
    panel.set_xlabel("first principal direction")
    panel.set_ylabel("second principal direction")
    panel.set_title("task embeddings")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with storage_errors(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)
