"""Copy a run folder to MLflow. Asking again is harmless: only what is new is sent."""

import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metadist import durable
from metadist.config import Config, flatten, load
from metadist.tracking import delivery, destination, model_copy
from metadist.tracking.delivery import Delivery

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

METRICS_PER_BATCH = 1000  # the most that MLflow takes at once
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
PARENT = "mlflow.parentRunId"
"""The tag by which MLflow shows a run under another."""

QUIET_AND_BRIEF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The copying process tries again itself; MLflow's own retries would hold it for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment of a process that copies; what a person has set stays."""


@dataclass(frozen=True)
class SyncReport:
    """What one attempt achieved."""

    delivered: bool
    """The server has all that the run folder holds."""
    finished: bool = False
    """The result and the model are among it: there is nothing left to come."""
    points: int = 0
    """Metric points sent by this attempt."""
    where: str | None = None
    """How a person opens the run in MLflow."""
    problem: str | None = None
    """Why not everything was delivered, in one line."""

    def line(self, run_dir: Path) -> str:
        """The report in one line for a person."""
        if self.delivered:
            return f"MLflow: {self.where or 'off'}"
        return f"MLflow: not delivered: {self.problem}; run `metadist track sync {run_dir}` when it is back"


def sync(
    run_dir: Path, final: bool = False, uri: str | None = None, parent: str | None = None, model: bool = True
) -> SyncReport:
    """Deliver what the run folder holds and the tracking server has not.

    Creates the MLflow run or continues the one of `tracking.json`. With a `result.json`
    the model is logged and the run is FINISHED; without one it is RUNNING, or KILLED
    when `final` says that its process has ended. `uri` replaces `tracking.uri`; `parent` is
    the MLflow run that this one is shown under; `model` says whether the model goes too. A
    server that does not take the data is reported, not raised.
    """
    config = load(run_dir / "config.yaml")
    resolved = destination.resolve_uri(uri or config.tracking.uri, run_dir)
    if resolved is None:
        return SyncReport(delivered=True, finished=True)
    copy = Copy(run_dir, config, resolved, parent=parent, model=model)
    return attempt(copy, lambda: copy.deliver(final))


def attempt(copy: "Copy", deliver: Callable[[], None]) -> SyncReport:
    """What came of delivering; only one process at a time copies a folder."""
    with durable.lock(copy.run_dir / ".tracking.lock", wait=False) as ours:
        if not ours:
            return SyncReport(delivered=False, problem="another process is copying this run")
        return _attempt(copy, deliver)


def _attempt(copy: "Copy", deliver: Callable[[], None]) -> SyncReport:
    for name, value in QUIET_AND_BRIEF.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

    problem, uri = None, copy.uri
    copy.refresh()  # another process may have delivered since
    try:
        deliver()
    except Undelivered as error:
        problem = str(error)
    except (MlflowException, SQLAlchemyError, OSError) as error:  # requests' errors are OSErrors
        problem = _one_line(error, uri)
    state = copy.state
    if state.problem != problem:
        state.problem = problem
        with contextlib.suppress(OSError):  # a full disk is then the problem, and is reported already
            copy.record()
    where = destination.look_here(uri, state.experiment_id, state.run_id) if state.run_id else None
    return SyncReport(problem is None, state.finished and problem is None, copy.points, where, problem)


class Undelivered(Exception):
    """A part that was not delivered, told in one line already."""


class Copy:
    """One attempt to bring MLflow up to the run folder. config_file: what is copied as the run's config."""

    client: "MlflowClient"

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        uri: str,
        parent: str | None = None,
        model: bool = True,
        config_file: str = "config.yaml",
    ) -> None:
        self.run_dir, self.config, self.uri = run_dir, config, uri
        self.parent, self.model, self.config_file = parent, model, run_dir / config_file
        self.points, self.written = 0, written(run_dir)
        self.refresh()

    def refresh(self) -> None:
        """Read how much was delivered; another place knows nothing yet."""
        shown, experiment = destination.masked(self.uri), self.config.tracking.experiment
        self.state = delivery.read(self.run_dir)
        if (self.state.uri, self.state.experiment) != (shown, experiment):
            self.state = Delivery(uri=shown, experiment=experiment)

    def record(self) -> None:
        delivery.write(self.run_dir, self.state)

    def deliver(self, final: bool) -> None:
        """Everything that is new, the oldest first, and then the run's status."""
        self.connect()
        result_file = self.run_dir / "result.json"
        result_bytes = result_file.read_bytes() if result_file.exists() else None
        run_id, params, status = self.run()
        self.deliver_config(run_id, params)
        self._deliver_metrics(run_id, _new_points(self.run_dir / "metrics.parquet", self.state.delivered))
        if result_bytes is not None:
            self._deliver_result(run_id, result_bytes, int(result_file.stat().st_mtime * 1000))
            return
        self.unfinished(run_id, status, final)

    def unfinished(self, run_id: str, status: str, final: bool) -> None:
        """The status of a run without a result."""
        wanted = "KILLED" if final else "RUNNING"
        if final and status == "RUNNING":
            self.client.set_terminated(run_id, wanted)
        elif status != wanted:
            self.client.update_run(run_id, status=wanted)
        closed = self.written if final else None
        if self.state.finished or self.state.closed != closed:
            self.state.finished, self.state.closed = False, closed
            self.record()

    def connect(self) -> None:
        """Open the store and find or create the experiment, one process at a time on a fresh database."""
        database = destination.sqlite_database(self.uri)
        if database is None:
            self._open()
            return
        database.parent.mkdir(parents=True, exist_ok=True)
        with durable.lock(database.with_name(f".{database.name}.lock")):
            self._open()

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.client = MlflowClient(tracking_uri=self.uri)
        name = self.config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                location = destination.artifact_location(self.uri, self.run_dir)
                self.state.experiment_id = self.client.create_experiment(name, artifact_location=location)
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(name)  # another run was faster
        if experiment is None or experiment.lifecycle_stage == "deleted":
            raise MlflowException(f"the experiment {name!r} was deleted in MLflow; restore it or name another")
        self.state.experiment_id = experiment.experiment_id

    def run(self) -> tuple[str, dict[str, str], str]:
        """Id, parameters and status of the MLflow run, created where there is none."""
        from mlflow.exceptions import MlflowException

        if self.state.run_id is not None:
            try:
                run = self.client.get_run(self.state.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # The database was replaced: it gets everything.
                fresh = Delivery(self.state.uri, self.state.experiment, self.state.experiment_id)
                self.state = fresh
            else:
                if run.info.lifecycle_stage == "deleted":
                    raise MlflowException(f"the run {self.state.run_id} was deleted in MLflow; restore it there")
                if self.state.parent != self.parent:
                    self._put_under_parent(run)
                    self.record()
                return run.info.run_id, run.data.params, run.info.status
        self.record()  # the token, before a run may exist that carries it
        found = self.client.search_runs([self.state.experiment_id], f"tags.`metadist.token` = '{self.state.token}'")
        run = found[0] if found else self.client.create_run(
            self.state.experiment_id,
            start_time=_start_time(self.config_file),
            run_name=self.run_dir.absolute().name,
            tags={
                "metadist.run_dir": self.run_dir.absolute().name,
                "metadist.token": self.state.token,
                **({PARENT: self.parent} if self.parent else {}),
            },
        )  # fmt: skip
        self.state.run_id = str(run.info.run_id)
        self._put_under_parent(run)
        self.record()
        return self.state.run_id, run.data.params, run.info.status

    def _put_under_parent(self, run: "Run") -> None:
        if self.parent and run.data.tags.get(PARENT) != self.parent:
            self.client.set_tag(run.info.run_id, PARENT, self.parent)
        self.state.parent = self.parent

    def deliver_config(self, run_id: str, known: dict[str, str]) -> None:
        """`config.yaml` and its flat form as parameters, once and whenever a resume has changed it."""
        from mlflow.entities import Param, RunTag

        digest = hashlib.sha256(self.config_file.read_bytes()).hexdigest()
        if digest == self.state.config_sha256:
            return
        values = {key: _param(value) for key, value in flatten(self.config).items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for batch in _batches(new, PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=batch)
        # A parameter of MLflow never changes: what a resume changed is told by a tag.
        changed = {key: value for key, value in values.items() if known.get(key, value) != value}
        if changed:
            told = ", ".join(f"{key}={value}" for key, value in changed.items())
            self.client.log_batch(run_id, tags=[RunTag("metadist.resumed_with", told[:PARAM_LENGTH])])
        self.client.log_artifact(run_id, str(self.config_file))
        self.state.config_sha256 = digest
        self.record()

    def _deliver_metrics(self, run_id: str, points: Iterable["Metric"]) -> None:
        for batch in _batches(points, METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=batch)
            self.state.delivered.update({metric.key: metric.step for metric in batch})
            self.points += len(batch)
            self.record()

    def _deliver_result(self, run_id: str, raw: bytes, written: int) -> None:
        """The final numbers and the model; then the run is FINISHED. `written` is in milliseconds."""
        state, result = self.state, json.loads(raw)
        digest = hashlib.sha256(raw).hexdigest()
        if state.result_sha256 != digest:
            state.result_sha256, state.model_id, state.model_logged, state.finished = digest, None, False, False
            self.record()
        if state.finished and (state.model_logged or not self.model):
            return
        meta_steps = int(result["meta_steps"])
        if self.model and state.model_id is None:
            state.model_id = model_copy.create(self.client, state.experiment_id, run_id, meta_steps)
            self.record()
        if self.model and not state.model_logged:
            assert state.model_id is not None
            model_copy.upload(self.client, state.model_id, run_id, self.run_dir)
            state.model_logged = True
            self.record()
        self._deliver_final_numbers(run_id, result, meta_steps, written)
        self.client.log_artifact(run_id, str(self.run_dir / "result.json"))
        self.client.set_terminated(run_id, "FINISHED", end_time=written)
        state.finished = True
        self.record()

    def _deliver_final_numbers(self, run_id: str, result: dict[str, Any], meta_steps: int, written: int) -> None:
        from mlflow.entities import Metric, RunTag

        test, untrained = result.get("test") or {}, result.get("untrained") or {}
        values = {f"test_{key}": test.get(key) for key in ("accuracy", "mse", "ci95")}
        values |= {f"untrained_{key}": untrained.get(key) for key in ("accuracy", "mse")}
        metrics = [
            Metric(key, float(value), written, meta_steps, model_id=self.state.model_id, run_id=run_id)
            for key, value in values.items()
            if value is not None
        ]
        tags = [RunTag(key, str(result[key]).lower()) for key in ("theta_sha256", "reproducible") if key in result]
        self.client.log_batch(run_id, metrics=metrics, tags=tags)


def written(run_dir: Path) -> int:
    """When the metrics were written, in nanoseconds; 0 before."""
    try:
        return (run_dir / "metrics.parquet").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _new_points(path: Path, delivered: dict[str, int]) -> Iterator["Metric"]:
    """Every measured value whose step is past what its metric has delivered, in the order of steps."""
    from mlflow.entities import Metric

    if not path.exists():
        return iter(())
    with path.open("rb") as file:  # by its path it would be opened twice, and may be replaced in between
        table = pq.read_table(file, use_threads=False)
    columns = []
    for field in table.schema:
        number = pa.types.is_floating(field.type) or pa.types.is_integer(field.type) or pa.types.is_boolean(field.type)
        if field.name in ("step", "time") or not number:
            continue
        past = pc.greater(table["step"], delivered.get(field.name, -1))
        rows = table.filter(pc.and_(past, pc.is_valid(table[field.name])))
        columns.append(_points(field.name, rows))
    return (Metric(key, float(value), int(seconds * 1000), step) for step, key, value, seconds in heapq.merge(*columns))


def _points(key: str, rows: pa.Table) -> Iterator[tuple[int, str, float, float]]:
    steps, values, times = (rows[name].to_pylist() for name in ("step", key, "time"))
    return zip(steps, itertools.repeat(key), values, times)


def _start_time(config_file: Path) -> int:
    """When the run began, in milliseconds: its config is the first file of its folder."""
    return int(min(config_file.stat().st_mtime, time.time()) * 1000)


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return destination.masked(text)[:PARAM_LENGTH]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _one_line(error: BaseException, uri: str) -> str:
    """What went wrong: the operating system's word for it where there is one, else MLflow's."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    refused = [e for e in chain[1:] if isinstance(e, OSError) and type(e).__module__ in ("builtins", "socket")]
    text = f"{uri}: {refused[-1].strerror or refused[-1]}" if refused else str(error).strip() or type(error).__name__
    return destination.masked(text.splitlines()[0])[:300]
