"""A run folder and its copy in MLflow are the same."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from metadist import durable
from metadist.config import Config, flatten
from metadist.tracking import delivery, mlflow_copy
from metadist.tracking.mlflow_copy import sync


def client(run: Any) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{run.folder.parent}/mlflow.db")


def copied(run: Any, name: str) -> list[tuple[int, float, int]]:
    history = client(run).get_metric_history(run.state["run_id"], name)
    return sorted((metric.step, metric.value, metric.timestamp) for metric in history)


def written(run: Any, name: str) -> list[tuple[int, float, int]]:
    rows = run.table().select(["step", name, "time"]).to_pylist()
    return [(row["step"], row[name], int(row["time"] * 1000)) for row in rows if row[name] is not None]


def test_everything_arrives_once_and_equals_the_folder(run: Any) -> None:
    run.train(1, 12)
    report = sync(run.folder)
    assert report.delivered and not report.finished
    assert report.where == f"mlflow ui --backend-store-uri sqlite:///{run.folder.parent}/mlflow.db"
    assert client(run).get_run(run.state["run_id"]).info.status == "RUNNING"
    assert sync(run.folder).points == 0

    run.train(13, 20)
    run.end()
    report = sync(run.folder)
    assert report.finished
    assert sync(run.folder) == mlflow_copy.SyncReport(True, True, 0, report.where)

    for name in ("loss", "tasks_per_second", "val_accuracy"):
        assert copied(run, name) == written(run, name)
    new = copied(run, "something_new")
    assert len(new) == 20 and math.isnan(new[1][1]) and new[2][1] == 6.0

    there = client(run).get_run(run.state["run_id"])
    assert there.info.status == "FINISHED" and there.info.run_name == run.folder.name
    assert there.data.params["task.ways"] == "5" and there.data.params["algorithm.name"] == "maml"
    assert set(there.data.params) == set(flatten(run.config))
    assert there.data.metrics["test_accuracy"] == 0.95 and there.data.metrics["test_ci95"] == 0.004
    assert there.data.metrics["untrained_accuracy"] == 0.55
    assert there.data.tags["theta_sha256"] == "ab" * 32 and there.data.tags["reproducible"] == "true"
    assert there.data.tags["metadist.run_dir"] == run.folder.name
    for name in ("config.yaml", "result.json"):
        local = client(run).download_artifacts(there.info.run_id, name)
        assert Path(local).read_bytes() == (run.folder / name).read_bytes()
    artifacts = (run.folder.parent / "mlartifacts").as_uri()
    assert there.info.artifact_uri.startswith(artifacts)
    assert [model.model_id for model in there.outputs.model_outputs] == [run.state["model_id"]]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(run: Any) -> None:
    run.train(1, 12)
    sync(run.folder, final=True)
    before = run.state["run_id"]
    assert client(run).get_run(before).info.status == "KILLED"

    first_copy = copied(run, "tasks_per_second")
    run.configure("auto", workers=3)
    run.train(11, 11, seed=1)  # resumed at 10: steps 11 and 12 were cut and come again
    assert sync(run.folder).points == 0
    assert client(run).get_run(before).info.status == "RUNNING"
    run.train(11, 14, seed=1)
    sync(run.folder)
    assert run.state["run_id"] == before
    assert copied(run, "tasks_per_second") == first_copy + written(run, "tasks_per_second")[12:]
    assert [step for step, _, _ in copied(run, "loss")] == list(range(1, 15))
    assert client(run).get_run(before).data.tags["metadist.resumed_with"] == "cluster.workers=3"

    run.end()
    assert sync(run.folder).finished
    model = run.state["model_id"]
    (run.folder / "result.json").unlink()  # a finished run that trains for longer
    run.train(15, 16)
    sync(run.folder)
    assert client(run).get_run(before).info.status == "RUNNING"
    run.end(meta_steps=30, theta_sha256="cd" * 32)
    assert sync(run.folder).finished
    assert run.state["model_id"] != model and run.state["run_id"] == before
    assert client(run).get_run(before).data.tags["theta_sha256"] == "cd" * 32


def test_a_validation_that_is_written_after_its_row_arrives(run: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run.train(1, 10)
    table = run.table()
    index = table.schema.get_field_index("val_accuracy")
    late = table.set_column(index, "val_accuracy", pa.array([None] * 10, pa.float64()))
    pq.write_table(late, run.folder / "metrics.parquet")
    sync(run.folder)
    pq.write_table(table, run.folder / "metrics.parquet")
    sync(run.folder)
    assert [step for step, _, _ in copied(run, "val_accuracy")] == [5, 10]


def test_a_crash_after_any_confirmed_piece_repeats_no_point(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is lost at each write in turn, as if the process had died just before it."""

    class Died(BaseException):
        pass

    run.train(1, 12)
    run.end()
    monkeypatch.setattr(mlflow_copy, "METRICS_PER_BATCH", 10)
    real, lives = delivery.write, 0

    for allowed in range(30):
        left = allowed

        def dies(folder: Path, state: delivery.Delivery) -> None:
            nonlocal left
            if left == 0:
                raise Died
            left -= 1
            real(folder, state)

        monkeypatch.setattr(delivery, "write", dies)
        try:
            report = sync(run.folder)
            break
        except Died:
            lives += 1
    assert lives > 2 and report.finished
    assert copied(run, "loss") == written(run, "loss")
    runs = client(run).search_runs([run.state["experiment_id"]], f"tags.`metadist.run_dir` = '{run.folder.name}'")
    assert len(runs) == 1


def test_a_database_that_was_removed_gets_everything_again(run: Any) -> None:
    run.train(1, 3)
    sync(run.folder)
    state = delivery.read(run.folder)
    state.run_id = "0" * 32  # what a fresh database knows of this run
    delivery.write(run.folder, state)
    assert sync(run.folder).points > 0
    assert copied(run, "loss") == written(run, "loss")


def test_a_run_that_was_deleted_in_mlflow_stays_deleted(run: Any) -> None:
    run.train(1, 3)
    sync(run.folder)
    client(run).delete_run(run.state["run_id"])
    run.train(4, 5)
    report = sync(run.folder)
    assert not report.delivered and "deleted in MLflow" in str(report.problem)
    client(run).restore_run(run.state["run_id"])
    assert sync(run.folder).delivered and copied(run, "loss") == written(run, "loss")


def test_a_server_that_is_away_is_told_and_gets_all_when_it_is_back(run: Any, closed_port: int) -> None:
    run.configure(f"http://127.0.0.1:{closed_port}")
    run.train(1, 20)
    run.end()
    report = sync(run.folder)
    assert not report.delivered and report.points == 0 and "refused" in str(report.problem)
    assert "\n" not in str(report.problem)
    assert f"metadist track sync {run.folder}" in report.line(run.folder)
    back = sync(run.folder, uri="auto")
    assert back.finished and copied(run, "loss") == written(run, "loss")


def test_a_server_that_never_answers_is_told(run: Any, silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run.configure(silent_server)
    run.train(1, 3)
    report = sync(run.folder)
    assert not report.delivered and "timed out" in str(report.problem)


def test_off_is_off(run: Any) -> None:
    run.configure("off")
    run.train(1, 3)
    assert sync(run.folder).delivered
    assert not (run.folder / "tracking.json").exists()


def test_one_run_is_copied_by_one_process_at_a_time(run: Any) -> None:
    run.train(1, 3)
    with durable.lock(run.folder / ".tracking.lock", wait=False) as ours:
        assert ours
        report = sync(run.folder)
    assert not report.delivered and "another process" in str(report.problem)
    assert sync(run.folder).delivered


def test_two_runs_may_create_the_database_at_the_same_time(tmp_path: Path, make_run: Any) -> None:
    folders = [make_run(tmp_path / name).folder for name in ("a", "b")]
    code = "import sys; from pathlib import Path; from metadist.tracking.mlflow_copy import sync; "
    code += "report = sync(Path(sys.argv[1])); sys.exit(report.problem)"
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 2
    states = [json.loads((folder / "tracking.json").read_text()) for folder in folders]
    assert states[0]["experiment_id"] == states[1]["experiment_id"] and states[0]["run_id"] != states[1]["run_id"]


class StandInAdapter:
    """What the logged model calls; the real one has its own tests."""

    def __init__(self, config: Config, theta_path: Path) -> None:
        assert config.task.ways == 5 and theta_path.name == "theta.safetensors"

    def predict(self, support_images: np.ndarray, support_labels: np.ndarray, query_images: np.ndarray) -> np.ndarray:
        assert support_images.dtype == query_images.dtype == np.uint8 and support_labels.dtype == np.int64
        distance = ((query_images[:, None].astype(float) - support_images[None]) ** 2).sum(axis=(2, 3, 4))
        return np.eye(5, dtype=np.float32)[support_labels[distance.argmin(axis=1)]]

    def regress(self, support_x: np.ndarray, support_y: np.ndarray, query_x: np.ndarray) -> np.ndarray:
        assert support_x.dtype == support_y.dtype == query_x.dtype == np.float64
        return support_y[np.abs(query_x - support_x.T).argmin(axis=1)]


@pytest.mark.usefixtures("import_path")
@pytest.mark.parametrize("lists", [False, True])
def test_the_logged_model_adapts_to_a_support_set(run: Any, monkeypatch: pytest.MonkeyPatch, lists: bool) -> None:
    import mlflow.pyfunc

    run.train(1, 3)
    run.end()
    assert sync(run.folder).finished
    local = client(run).get_logged_model(run.state["model_id"]).artifact_location
    folder = Path(local.removeprefix("file://"))
    assert (folder / "code/metadist/config.py").exists() and not list(folder.rglob("*.pkl"))
    assert any(line.startswith("torch==") for line in (folder / "requirements.txt").read_text().splitlines())

    module = ModuleType("metadist.evaluation.adapter")
    module.Adapter = StandInAdapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    loaded = mlflow.pyfunc.load_model(local)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    episode = {"support_images": images, "support_labels": np.arange(5), "query_images": images[[3, 1, 4]]}
    probabilities = loaded.predict({key: value.tolist() for key, value in episode.items()} if lists else episode)
    assert probabilities.argmax(axis=1).tolist() == [3, 1, 4]
    points = {"support_x": np.array([[0.0], [1.0]]), "support_y": np.array([[7.0], [8.5]]), "query_x": np.ones((1, 1))}
    numbers = loaded.predict({key: value.tolist() for key, value in points.items()} if lists else points)
    assert numbers.tolist() == [[8.5]]
    with pytest.raises(ValueError, match="no support_y"):
        loaded.predict({"support_x": points["support_x"]})
