"""The embedding of every task of a split, for plotting and for comparing tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.func import vmap

from metadist import algorithms
from metadist.config import Config
from metadist.data.table import Table
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
    config = config.at(config.outer.steps - 1)
    algorithm = algorithms.for_evaluation(config, sampler.shape, training_tasks(config, tables, "cpu").classes)
    if not hasattr(algorithm, "embed"):
        raise ConfigError(f"algorithm.name: {config.algorithm.name} embeds no tasks; valid is task-conditioned")
    blueprint = Blueprint(config, sampler.shape)
    theta = {name: values[name] for name in blueprint.theta}
    rows: list[dict[str, Any]] = []
    with one_thread(), torch.no_grad():
        for first in range(0, tasks, config.shard):
            # Always a whole shard, so that a task's bits do not depend on how many are asked for.
            episodes = sampler.sample(config.eval.draw, first, config.shard)
            found = vmap(lambda support: algorithm.embed(theta, support))(episodes.support)
            for offset, (vector, family) in enumerate(zip(found, episodes.family.tolist(), strict=True)):
                name = sampler.families[family]
                rows.append({"task": first + offset, "family": name, "embedding": vector.float().tolist()})
    return rows[:tasks]


def nearest_is_family(rows: Sequence[dict[str, Any]]) -> float:
    """Share of tasks whose nearest other task is of their own family."""
    vectors = np.array([row["embedding"] for row in rows])
    square = (vectors**2).sum(1)
    distance = square[:, None] + square[None] - 2 * vectors @ vectors.T
    np.fill_diagonal(distance, np.inf)
    families = np.array([row["family"] for row in rows])
    return float(np.mean(families[distance.argmin(1)] == families))
