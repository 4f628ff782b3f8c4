"""What a trained task encoder says of every test task can be taken out and looked at."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from metadist import algorithms
from metadist.config import validate
from metadist.errors import ConfigError
from metadist.evaluate import trained
from metadist.evaluation.embeddings import embeddings, nearest_is_family
from metadist.report.embeddings import save
from metadist.run import train
from metadist.tasks.samplers import evaluation_tasks

JOB = {
    "data": {"name": "sinusoid"},
    "task": {"shots": 10, "queries": 10, "meta_batch": 16, "shard": 8},
    "model": {"name": "mlp", "width": 16, "layers": 1, "norm": "none"},
    "algorithm": {"name": "task-conditioned", "inner_lr": 0.01},
    "outer": {"steps": 3},
    "cluster": {"workers": 0},
    "eval": {"every": 0, "episodes": 8},
    "tracking": {"uri": "off"},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(validate(JOB, "test"), "job", tmp_path_factory.mktemp("embed") / "run").folder


def test_every_task_has_its_family_and_the_encoders_vector(run_dir: Path, tmp_path: Path) -> None:
    config, tables, values = trained(run_dir, "test")
    rows = embeddings(config, tables, values, "test", 21)  # two shards and a bit
    assert [row["task"] for row in rows] == list(range(21))
    sampler = evaluation_tasks(config, tables, "test", "cpu")
    algorithm = algorithms.for_evaluation(config, (1,))
    whole = sampler.sample(0, 0, 21)
    for row in rows:
        one = whole.support._replace(x=whole.support.x[row["task"]], y=whole.support.y[row["task"]])
        expected = algorithm.embed(values, one)  # type: ignore[attr-defined]
        assert torch.allclose(torch.tensor(row["embedding"]), expected, atol=1e-6)
        assert row["family"] == sampler.families[int(whole.family[row["task"]])]
    assert len({row["family"] for row in rows}) > 1

    table, picture = save(rows, tmp_path / "out")
    assert pq.read_table(table).to_pylist()[5] == {
        **rows[5],
        "embedding": pytest.approx(rows[5]["embedding"]),
    }
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_method_without_embeddings_is_refused(tiny_run, tmp_path: Path) -> None:
    config, tables, values = trained(tiny_run.folder, "test")
    with pytest.raises(ConfigError, match="task-conditioned"):
        embeddings(config, tables, values, "test", 4)


def test_share_of_nearest_neighbours() -> None:
    rows = [
        {"family": family, "embedding": [place, 0.0]}
        for family, place in (("a", 0.0), ("a", 0.1), ("b", 5.0), ("b", 5.2), ("a", 5.3))
    ]
    assert nearest_is_family(rows) == pytest.approx(3 / 5)
    assert np.isfinite(nearest_is_family(rows))
