"""Metrics and profile of runs: everything that is defined is told, the time is all accounted for, no bit is another."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import metadist.run
from metadist.config import Config
from metadist.errors import Divergence, Interrupted, RunError
from metadist.run import train
from metadist.runtime.journal import read_metrics
from metadist.runtime.meters import ending
from metadist.runtime.metrics import METRICS
from metadist.runtime.preemption import Preempted
from metadist.runtime.timeline import PHASES
from metadist.runtime.train import Stopped

Make = Callable[..., Config]


class Told:
    """What a run's metrics came to: gauges as they stand, counters as they grew."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def __call__(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        metric = METRICS[name]
        assert tuple(tags) == metric.tags
        key = (name.removeprefix("metadist_"), *tags.values())
        self.values[key] = value + (self.values.get(key, 0.0) if metric.kind == "counter" else 0.0)

    @property
    def names(self) -> set[str]:
        return {f"metadist_{name}" for name, *_ in self.values}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """The metrics of this test's runs, instead of on their way to Ray."""
    told = Told()
    monkeypatch.setattr(metadist.run, "_emit", lambda config, folder: told)
    return told


def seconds(result: Mapping[str, Any], folder: Path) -> tuple[float, float]:
    """Of a profiled run: all its phases but those between steps, and its steps' time by the journal."""
    phases = result["profile"]["phases"]
    between = phases["validation"] + phases["checkpoint"]
    return sum(phases.values()) - between, sum(row["seconds"] for row in read_metrics(folder / "metrics.parquet"))


def test_metrics_say_what_the_run_folder_says(tiny: Make, tiny_run: Any, tmp_path: Path, told: Told) -> None:
    result = train(tiny(), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    rows = read_metrics(tmp_path / "run" / "metrics.parquet")
    value = told.values
    assert value["step",] == value["steps_planned",] == value["steps",] == 12
    assert value["loss",] == rows[-1]["loss"]
    assert value["validation_score", "accuracy"] == rows[-1]["val_accuracy"]
    assert value["shards",] == sum(result["shards_by_worker"].values())
    assert value["shards_recomputed",] == value["duplicates_dropped",] == 0
    assert value["bytes",] == sum(row["bytes"] for row in rows)
    assert value["step_timestamp_seconds",] <= value["checkpoint_timestamp_seconds",]
    assert value["checkpoint_timestamp_seconds",] <= value["ended_timestamp_seconds", "finished"]
    assert value["alive_timestamp_seconds",] <= value["ended_timestamp_seconds", "finished"]
    assert {phase for name, *tags in value for phase in tags if name == "phase_seconds"} == set(PHASES)
    assert told.names == METRICS.keys() - {"metadist_staleness"}


def test_metrics_that_fail_end_and_nothing_else(
    tiny: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, value: float, tags: Mapping[str, str]) -> None:
        raise OSError("the agent is gone")

    monkeypatch.setattr(metadist.run, "_emit", lambda config, folder: broken)
    assert train(tiny(), "tiny", tmp_path / "run").result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert capsys.readouterr().err.count("no metrics from here on: OSError: the agent is gone") == 1


def test_an_account_that_fails_ends_the_metrics_and_nothing_else(
    tiny: Make, tiny_run: Any, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("metadist.runtime.timeline.Account.close", lambda *_: {}["gone"])
    result = train(tiny("tracking.profile=true"), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert capsys.readouterr().err.count("no metrics from here on: KeyError: 'gone'") == 1


def test_a_run_that_diverges_says_so(tiny: Make, tmp_path: Path, told: Told) -> None:
    with pytest.raises(Divergence):
        train(tiny("algorithm.inner_lr=1e30"), "tiny", tmp_path / "run")
    assert ("ended_timestamp_seconds", "diverged") in told.values


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (None, "finished"), (Divergence, "diverged"), (Preempted, "stopped"), (Interrupted, "stopped"),
        (Stopped, "stopped"), (RunError, "failed"), (ZeroDivisionError, "failed"), (KeyboardInterrupt, "failed"),
    ],
)  # fmt: skip
def test_how_a_run_ended(kind: type[BaseException] | None, how: str) -> None:
    assert ending(kind) == how


def test_a_profile_tells_where_all_the_time_went(tiny: Make, tiny_run: Any, tmp_path: Path) -> None:
    result = train(tiny("tracking.profile=true"), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    profile = result["profile"]
    assert profile["steps"] == 12
    assert tuple(profile["phases"]) == PHASES
    accounted, stepped = seconds(result, tmp_path / "run")
    assert accounted == pytest.approx(stepped, rel=0.05, abs=0.05)
    assert profile["phases"]["transfer"] == 0
    for phase in ("sampling", "adapting", "sum", "outer step", "validation"):
        assert profile["phases"][phase] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["profile"] == profile

    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    rows = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert sorted(rows.values()) == ["aggregator", "driver", "process", "writer"]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {rows[event["tid"]] for event in events} == set(rows.values())
    assert all(event["dur"] > 0 and event["name"] in PHASES for event in events)
    count = {phase: sum(e["name"] == phase and rows[e["tid"]] == "process" for e in events) for phase in PHASES}
    assert count["sampling"] == 12 * 4, "one for each shard"
    assert count["adapting"] == 12, "one for each call"


def test_a_run_without_a_profile_has_none(tiny_run: Any) -> None:
    assert "profile" not in tiny_run.result
    assert not (tiny_run.folder / "profile.json").exists()


def test_the_flag_prints_the_table(cli: Any, tiny_job: Path, tmp_path: Path) -> None:
    ended = cli("train", tiny_job, "outer.steps=4", "eval.test=false", "--profile", "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "where the time went" in ended.out
    assert all(phase in ended.out for phase in PHASES)
    assert (tmp_path / "run" / "profile.json").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["aggregator", pytest.param("allreduce", marks=pytest.mark.chaos)])
def test_a_profile_on_ray(strategy: str, tiny: Make, tiny_run: Any, cluster: Any, tmp_path: Path, told: Told) -> None:
    overrides = ("cluster.workers=2", f"cluster.address={cluster.address}", f"cluster.strategy={strategy}")
    result = train(tiny("tracking.profile=true", *overrides), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    accounted, stepped = seconds(result, tmp_path / "run")
    assert accounted == pytest.approx(stepped, rel=0.1, abs=0.1)
    for phase in ("sampling", "adapting", "transfer", "sum", "outer step", "validation"):
        assert result["profile"]["phases"][phase] > 0
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    rows = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert rows == {"driver", "aggregator", "writer"} | (
        {"rank 0"} if strategy == "allreduce" else set(result["shards_by_worker"])
    )
    assert told.values["workers",] == 2
    phases = {tag: value for (name, *tags), value in told.values.items() for tag in tags if name == "phase_seconds"}
    assert phases == pytest.approx(result["profile"]["phases"])


@pytest.mark.cluster
def test_no_metric_is_defined_that_nothing_sets(tiny: Make, cluster: Any, tmp_path: Path, told: Told) -> None:
    """Those of async complete them."""
    overrides = ("cluster.workers=2", f"cluster.address={cluster.address}", "cluster.strategy=async")
    result = train(tiny("tracking.profile=true", *overrides), "tiny", tmp_path / "run").result
    assert told.names == set(METRICS)
    assert 0 <= told.values["staleness",] <= 4
    accounted, stepped = seconds(result, tmp_path / "run")
    assert accounted == pytest.approx(stepped, rel=0.1, abs=0.1)


def test_the_readme_has_every_metric() -> None:
    text = (Path(metadist.run.__file__).parent / "runtime" / "README.md").read_text()
    for name, metric in METRICS.items():
        tags = ", ".join(f"`{tag}`" for tag in metric.tags)
        assert f"| `{name}` | {metric.kind} | {metric.meaning} | {tags} |" in text
