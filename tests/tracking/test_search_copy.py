"""A search in MLflow: a run for the search and one for each trial under it, in a real SQLite store."""

import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from metadist.tracking import delivery, destination, follow
from metadist.tracking.search_copy import base_of, sync_search

ANSWER: dict[str, Any] = {
    "winner": "000", "run": "trials/000", "theta_sha256": "ab" * 32, "measure": "accuracy", "trials": 3,
    "fresh": {"winner": {"score": 0.9, "ci95": 0.01}, "baseline": {"score": 0.8, "ci95": 0.02}, "gain": 0.1,
              "gain_ci95": 0.015},
    "test": {"test": {"accuracy": 0.91, "ci95": 0.01}, "untrained": {"accuracy": 0.3, "ci95": None}, "also": []},
}  # fmt: skip


class Searched:
    """A search's folder as the search writes it; trials are runs under the hands of the test."""

    def __init__(self, folder: Path, make_run: Any, uri: str) -> None:
        self.folder = folder
        self.trials = [make_run(folder / "trials" / f"{n:03}", "off", 0) for n in range(3)]
        self.point(uri)
        for trial in self.trials:
            trial.train(1, 6)

    def point(self, uri: str) -> None:
        base = self.trials[0].config.with_values(tracking={"uri": uri}).model_dump(mode="json")
        (self.folder / "search.yaml").write_text(yaml.safe_dump({"search": {"trials": 3}, **base}))

    def end(self, *how: str | None) -> None:
        table = pa.table({"id": ["000", "001", "002"], "how": pa.array(how, pa.string()), "score": [0.1, 0.2, 0.3]})
        pq.write_table(table, self.folder / "trials.parquet")

    def answer(self, **changes: Any) -> None:
        (self.folder / "search.json").write_text(json.dumps(ANSWER | changes))
        (self.folder / "best.yaml").write_text("seed: 0\n")
        (self.folder / "report.html").write_text("<p>")
        (self.folder / "figures").mkdir(exist_ok=True)
        (self.folder / "figures" / "curves.png").write_bytes(b"png")


@pytest.fixture
def search(runs: Path, make_run: Any, request: pytest.FixtureRequest) -> Searched:
    return Searched(runs / request.node.name, make_run, "auto")


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    uri = destination.resolve_uri(base_of(folder).tracking.uri, folder)
    return MlflowClient(tracking_uri=uri)


def runs_of(search: Searched) -> tuple[Any, dict[str, Any]]:
    """The search's run, and those of its trials by name, as MLflow finds them by the parent."""
    api, state = client(search.folder), delivery.read(search.folder)
    assert state.run_id is not None
    children = api.search_runs([state.experiment_id], f"tags.`mlflow.parentRunId` = '{state.run_id}'")
    return api.get_run(state.run_id), {run.info.run_name: run for run in children}


def test_a_run_for_the_search_and_one_under_it_for_every_trial(search: Searched) -> None:
    search.trials[0].end()
    search.end("finished", "stopped", None)
    report = sync_search(search.folder)
    assert report.delivered and not report.finished and report.points > 0
    parent, children = runs_of(search)
    assert parent.info.status == "RUNNING" and parent.data.params["algorithm.name"] == "maml"
    assert {name: run.info.status for name, run in children.items()} == {
        "000": "FINISHED", "001": "KILLED", "002": "RUNNING"
    }  # fmt: skip
    assert all(run.data.metrics["val_accuracy"] == 0.05 for run in children.values())
    assert not any(delivery.read(trial.folder).model_id for trial in search.trials), "who wins is not known yet"
    assert sync_search(search.folder).points == 0, "nothing is sent twice"
    assert len(runs_of(search)[1]) == 3


def test_the_end_of_the_search(search: Searched) -> None:
    for trial in search.trials[:2]:
        trial.end()
    search.end("finished", "finished", "stopped")
    assert sync_search(search.folder).delivered
    search.answer()
    report = sync_search(search.folder, final=True)
    assert report.finished and report.problem is None
    parent, children = runs_of(search)
    assert parent.info.status == "FINISHED" and children["002"].info.status == "KILLED"
    assert parent.data.metrics == {
        "gain": 0.1, "gain_ci95": 0.015, "trials": 3.0, "fresh_accuracy": 0.9, "fresh_ci95": 0.01,
        "fresh_baseline_accuracy": 0.8, "fresh_baseline_ci95": 0.02, "test_accuracy": 0.91, "test_ci95": 0.01,
        "untrained_accuracy": 0.3,
    }  # fmt: skip
    assert parent.data.tags["metadist.winner"] == "000"
    api = client(search.folder)
    names = {entry.path for entry in api.list_artifacts(parent.info.run_id)}
    assert {"search.yaml", "search.json", "best.yaml", "report.html", "figures", "trials.parquet"} == names
    logged = [bool(delivery.read(trial.folder).model_logged) for trial in search.trials]
    assert logged == [True, False, False], "the winner's model alone, although its run was finished before"


def test_a_database_that_was_replaced_gets_everything_again(search: Searched, tmp_path: Path) -> None:
    search.point(f"sqlite:///{tmp_path / 'one.db'}")
    search.trials[0].end()
    search.end("finished", "stopped", "stopped")
    search.answer()
    assert sync_search(search.folder, final=True).finished
    with sqlite3.connect(tmp_path / "one.db") as database:  # as if new, without making one for seconds
        for table in ("latest_metrics", "metrics", "params", "tags", "outputs", "inputs", "runs"):
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute(f"DELETE FROM {table}")
    assert sync_search(search.folder, final=True).finished
    _, children = runs_of(search)
    assert {name: run.info.status for name, run in children.items()} == {
        "000": "FINISHED", "001": "KILLED", "002": "KILLED"
    }  # fmt: skip
    assert all(run.data.metrics["loss"] == 1 / 6 for run in children.values())


def test_a_trial_of_a_search_that_goes_on_after_its_answer(search: Searched) -> None:
    search.end("stopped", "stopped", None)
    search.answer()
    assert sync_search(search.folder, final=True).delivered
    assert runs_of(search)[1]["002"].info.status == "KILLED"
    search.trials[2].train(7, 9)
    search.trials[2].end()
    search.end("stopped", "stopped", "finished")
    assert sync_search(search.folder).delivered
    last = runs_of(search)[1]["002"]
    assert last.info.status == "FINISHED" and last.data.metrics["loss"] == 1 / 9


def test_a_search_in_which_nothing_finished(search: Searched) -> None:
    search.end("stopped", "diverged", "stopped")
    search.answer(winner=None, run=None, fresh=None, test=None)
    assert sync_search(search.folder, final=True).finished
    parent, children = runs_of(search)
    assert parent.info.status == "FAILED" and {run.info.status for run in children.values()} == {"KILLED"}


def test_off(search: Searched) -> None:
    search.point("off")
    assert sync_search(search.folder).finished
    assert not (search.folder / "tracking.json").exists()
    assert follow.start(search.folder, base_of(search.folder)).finish(1.0) == "MLflow: off"


def test_a_server_that_is_away_gets_all_of_it_later(search: Searched, closed_port: int, cli: Any) -> None:
    search.point(f"http://127.0.0.1:{closed_port}")
    search.trials[0].end()
    search.end("finished", "stopped", "stopped")
    search.answer()
    report = sync_search(search.folder, final=True)
    assert not report.delivered and "refused" in (report.problem or "")
    assert f"metadist track sync {search.folder}" in report.line(search.folder)
    search.point("auto")  # it is back: here, another one
    ended = cli("track", "sync", search.folder)
    assert ended.code == 0 and "mlflow ui" in ended.out
    parent, children = runs_of(search)
    assert parent.info.status == "FINISHED" and len(children) == 3


def test_one_process_follows_the_whole_search(search: Searched) -> None:
    follower = follow.start(search.folder, base_of(search.folder))
    until = time.monotonic() + 100
    while delivery.read(search.trials[2].folder).delivered.get("loss") != 6 and time.monotonic() < until:
        time.sleep(0.1)
    search.trials[0].train(7, 9)
    search.trials[0].end()
    search.end("finished", "stopped", "stopped")
    search.answer()
    assert "mlflow ui" in follower.finish(100)
    assert delivery.read(search.trials[0].folder).delivered["loss"] == 9
    parent, children = runs_of(search)
    assert parent.info.status == "FINISHED" and len(children) == 3
    assert "Traceback" not in (search.folder / "tracking.log").read_text()


def test_a_folder_that_is_neither(refused: Any, tmp_path: Path) -> None:
    refused("track", "sync", tmp_path, say=("is no run folder",))
