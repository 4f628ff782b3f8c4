"""The embedding of every task of a split, for plotting and for comparing tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import vmap

from metadist import algorithms
from metadist.config import Config
from metadist.data.table import Table
from metadist.durable import storage_errors, write
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint
from metadist.errors import ConfigError
from metadist.tasks.samplers import evaluation_tasks, training_tasks


def embeddings(
    config: Config, tables: Sequence[Table], values: dict[str, torch.Tensor], split: str, tasks: int
) -> list[dict[str, Any]]:
    """A row per task: its number, its family, its embedding (float32 [d]) by the run's trained task encoder.

    The tasks are those of the meta-test, in its order. Raises ConfigError for a method that embeds no tasks.
    """
    sampler = evaluation_tasks(config, tables, split, "cpu")
    algorithm = algorithms.for_evaluation(config, sampler.shape, training_tasks(config, tables, "cpu").classes)
    if not hasattr(algorithm, "embed"):
        raise ConfigError(f"algorithm.name: {config.algorithm.name} embeds no tasks; valid is task-conditioned")
    blueprint = Blueprint(config, sampler.shape)
    theta = {name: values[name] for name in blueprint.theta}
    state = {name: values[name] for name in blueprint.state}
    rows: list[dict[str, Any]] = []
    with one_thread(), torch.no_grad():
        for first in range(0, tasks, config.shard):
            episodes = sampler.sample(0, first, min(config.shard, tasks - first))
            found = vmap(lambda support: algorithm.embed(theta, state, support))(episodes.support)
            for offset, (vector, family) in enumerate(zip(found, episodes.family.tolist(), strict=True)):
                name = sampler.families[family]
                rows.append({"task": first + offset, "family": name, "embedding": vector.float().tolist()})
    return rows


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


def nearest_is_family(rows: Sequence[dict[str, Any]]) -> float:
    """Share of tasks whose nearest other task is of their own family."""
    vectors = np.array([row["embedding"] for row in rows])
    distance = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    families = np.array([row["family"] for row in rows])
    return float(np.mean(families[distance.argmin(1)] == families))


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    vectors = np.array([row["embedding"] for row in rows])
    _, _, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    places = (vectors - vectors.mean(0)) @ directions[:2].T
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
