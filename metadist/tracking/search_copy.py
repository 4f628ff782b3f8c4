"""Copy a search to MLflow: a run for the search, and under it one for each trial. Only what is new is sent."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from metadist.config import Config, read_yaml, validate
from metadist.tracking import delivery, destination
from metadist.tracking.mlflow_copy import Copy, SyncReport, Undelivered, attempt, sync, written

ARTIFACTS = ("search.json", "report.html", "best.yaml", "trials.parquet", "curves.parquet", "pareto.parquet", "figures")


def is_search(folder: Path) -> bool:
    """Whether it is the folder of a search rather than of a run."""
    return (folder / "search.yaml").is_file()


def sync_folder(folder: Path, final: bool = False) -> SyncReport:
    """Deliver a run, or a search with all its trials."""
    return sync_search(folder, final) if is_search(folder) else sync(folder, final)


def sync_search(folder: Path, final: bool = False, uri: str | None = None) -> SyncReport:
    """Deliver what a search's folder holds and the tracking server has not, trials first.

    The search's own run is FINISHED with a `search.json` that names a winner, FAILED with one that names none, else
    RUNNING, or KILLED when `final` says that its process has ended. A trial without result is KILLED once
    `trials.parquet` says that it has ended. The model of the winner alone is logged. `uri` replaces `tracking.uri`.
    """
    config = base_of(folder)
    resolved = destination.resolve_uri(uri or config.tracking.uri, folder)
    if resolved is None:
        return SyncReport(delivered=True, finished=True)
    copy = Copy(folder, config, resolved, config_file="search.yaml")
    return attempt(copy, lambda: _deliver(copy, final))


def base_of(folder: Path) -> Config:
    """The run of the search's own values. Raises ConfigError."""
    raw = read_yaml(folder / "search.yaml")
    raw.pop("search", None)
    return validate(raw, str(folder / "search.yaml"))


def _deliver(copy: Copy, final: bool) -> None:
    copy.connect()
    raw = (copy.run_dir / "search.json").read_bytes() if (copy.run_dir / "search.json").exists() else None
    found: dict[str, Any] = json.loads(raw) if raw else {}
    run_id, params, status = copy.run()
    copy.deliver_config(run_id, params)
    problem = _deliver_trials(copy, run_id, found.get("run"), final)
    if raw is None:
        copy.unfinished(run_id, status, final)
    else:
        _deliver_result(copy, run_id, raw, found)
    if problem:
        raise Undelivered(problem)


def _deliver_trials(copy: Copy, parent: str, winner: str | None, final: bool) -> str | None:
    """Every trial that is not delivered yet; why one is not. winner: folder of its run."""
    problem = None
    ended = _ended(copy.run_dir / "trials.parquet")
    for path in sorted((copy.run_dir / "trials").glob("*/config.yaml")):
        trial = path.parent
        known, wins = delivery.read(trial), f"trials/{trial.name}" == winner
        if (trial / "result.json").exists():
            complete = known.finished and (known.model_logged or not wins)
        else:
            complete = trial.name in ended and known.closed == written(trial)
        if known.parent == parent and complete:
            continue
        report = sync(trial, final or trial.name in ended, copy.uri, parent, model=wins)
        copy.points += report.points
        if report.problem:
            problem = f"trial {trial.name}: {report.problem}"
    return problem


def _ended(path: Path) -> set[str]:
    """Names of the trials that will not go on."""
    if not path.exists():
        return set()
    with path.open("rb") as file:
        table = pq.read_table(file, columns=["id", "how"], use_threads=False)
    return {row["id"] for row in table.to_pylist() if row["how"] is not None}


def _deliver_result(copy: Copy, run_id: str, raw: bytes, found: dict[str, Any]) -> None:
    """The answer's figures and files; then the search's run has ended."""
    from mlflow.entities import Metric, RunTag

    digest = hashlib.sha256(raw).hexdigest()
    if copy.state.finished and copy.state.result_sha256 == digest:
        return
    end = int((copy.run_dir / "search.json").stat().st_mtime * 1000)
    metrics = [Metric(name, value, end, 0) for name, value in _figures(found).items()]
    tags = [RunTag(f"metadist.{key}", str(found[key])) for key in ("winner", "theta_sha256") if found.get(key)]
    copy.client.log_batch(run_id, metrics=metrics, tags=tags)
    for name in ARTIFACTS:
        path = copy.run_dir / name
        if path.is_dir():
            copy.client.log_artifacts(run_id, str(path), name)
        elif path.exists():
            copy.client.log_artifact(run_id, str(path))
    copy.client.set_terminated(run_id, "FINISHED" if found.get("winner") else "FAILED", end_time=end)
    copy.state.result_sha256, copy.state.finished = digest, True
    copy.record()


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Of the winner, by the names that they have in MLflow."""
    name = found["measure"]
    fresh, tested = found.get("fresh") or {}, found.get("test") or {}
    values = {"gain": fresh.get("gain"), "gain_ci95": fresh.get("gain_ci95"), "trials": found["trials"]}
    for prefix, scored in (("fresh", fresh.get("winner")), ("fresh_baseline", fresh.get("baseline"))):
        if scored:
            values |= {f"{prefix}_{name}": scored["score"], f"{prefix}_ci95": scored["ci95"]}
    for prefix, scored in (("test", tested.get("test")), ("untrained", tested.get("untrained"))):
        if scored:
            own = "accuracy" if "accuracy" in scored else "mse"  # whatever was searched by
            values |= {f"{prefix}_{own}": scored[own], f"{prefix}_ci95": scored["ci95"]}
    return {key: float(value) for key, value in values.items() if value is not None}
