"""One run, from config to `result.json`: what `train`, a search trial and a submitted job all call."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist import __version__
from metadist.config import Config, apply_overrides, refuse_changed_mathematics, resolve, validate, visible_gpus
from metadist.data.shared import check_shared, offer
from metadist.data.sources import check as check_source
from metadist.data.sources import prepare
from metadist.data.table import Table
from metadist.engine.device import settle
from metadist.engine.fingerprint import data_fingerprint, differences
from metadist.engine.layout import sha256
from metadist.errors import ConfigError, Interrupted, RunError, StorageError
from metadist.evaluation.protocol import check as check_evaluation
from metadist.evaluation.protocol import meta_test, settings
from metadist.measure import MEASURES
from metadist.runtime.aggregator import Snapshot
from metadist.runtime.checkpoint import Best, Damaged, checkpoints, load_checkpoint, newest_good
from metadist.runtime.in_process import InProcess
from metadist.runtime.journal import Journal, read_metrics
from metadist.runtime.ledger import staleness, write_ledger
from metadist.runtime.meters import Meters
from metadist.runtime.metrics import Emit
from metadist.runtime.preemption import Preempted, noticed
from metadist.runtime.run_folder import RunFolder, fresh_name, refuse_existing, run_name
from metadist.runtime.runtime import Runtime
from metadist.runtime.train import Stopped, Trainer, Watch
from metadist.tasks.samplers import training_tasks
from metadist.tracking import follow
from metadist.tracking.destination import check_uri, resolve_uri
from metadist.tracking.log import Log
from metadist.tracking.progress import Progress, progress

TRACKING_SECONDS = 20.0
"""How long the end of a run waits for the tracking copy; `metadist track sync` delivers the rest."""


class Finished(NamedTuple):
    """A run that is complete; `notes` are lines for the person."""

    folder: Path
    result: dict[str, Any]
    notes: list[str]


Begin = Callable[[Config, list[Table], Snapshot | None, Callable[[str], None], str | None], Runtime]
"""Makes what computes a run; `start` is one."""


def train(
    config: Config,
    job: str,
    run_dir: Path | None = None,
    started: float | None = None,
    watch: Watch | None = None,
    begin: Begin | None = None,
) -> Finished:
    """Meta-train a config into a new run folder. started: unix time of the process's start.

    watch: called behind every validation, once its checkpoint is handed over; what it raises ends the run, Stopped
    first of all, and nothing is left but the run folder. begin: makes what computes it, where the config does not say.
    """
    path = run_dir or fresh_name(job)
    refuse_existing(path)
    asked, config = config, with_tracking(resolve(config), path)
    with Log() as log:
        for told in left_idle(asked, config):
            log.say(told)
        tables = checked_tables(config, log.say)
        name = run_name(path)
        runtime = (begin or start)(config, tables, None, log.say, name)
        try:
            folder = RunFolder.create(path, config, name)
            log.keep(path)
            try:
                return _run(config, tables, folder, runtime, None, {}, started, watch, log)
            finally:
                folder.unlock()
        finally:
            runtime.close()


def resume(
    run_dir: Path,
    overrides: list[str],
    started: float | None = None,
    watch: Watch | None = None,
    begin: Begin | None = None,
) -> Finished:
    """Go on with a run from its newest good checkpoint; the rest as for `train`."""
    folder = RunFolder.open(run_dir)
    try:
        with Log() as log:
            return _resume(run_dir, folder, overrides, started, watch, begin or start, log)
    finally:
        folder.unlock()


def _resume(
    run_dir: Path,
    folder: RunFolder,
    overrides: list[str],
    started: float | None,
    watch: Watch | None,
    begin: Begin,
    log: Log,
) -> Finished:
    say = log.say
    before = folder.config()
    raw = before.model_dump()
    config = resolve(validate(apply_overrides(raw, overrides), "override"))
    refuse_changed_mathematics(before, config)
    done = folder.result()
    if done is not None and done["meta_steps"] == config.outer.steps:
        notes = [f"{run_dir} is finished: {done['meta_steps']} meta-steps; nothing to do"]
        if config != before:
            notes.append(f"{' '.join(overrides)} not applied; `metadist evaluate {run_dir}` judges it in other ways")
        return Finished(run_dir, done, notes)
    config = with_tracking(config, run_dir)
    tables = checked_tables(config, say)
    found = newest_good(folder.checkpoints, say)
    if found is None:
        say(f"{run_dir} has no usable checkpoint; starting at step 0")
    snapshot, best, record = found or (None, None, {})
    if snapshot is not None and snapshot.step > config.outer.steps:
        raise ConfigError(
            f"outer.steps: the run has done {snapshot.step} steps already; {config.outer.steps} are fewer"
        )
    then: dict[str, str] = record.get("fingerprint", {})
    data = data_fingerprint(tables)
    if then.get("data", data) != data:
        raise RunError(f"{run_dir}: the data are not those of the run: {data} instead of {then['data']}")
    runtime = begin(config, tables, snapshot, say, folder.name)
    try:
        told = differences(then, runtime.fingerprint) if then else ""
        if told:
            say(f"warning: the workers have {told}; the run goes on, but not to the same bits (reproducible: false)")
            record = record | {"reproducible": False}
        log.keep(run_dir)  # what is refused leaves no trace
        folder.write_config(config)
        (run_dir / "result.json").unlink(missing_ok=True)
        return _run(config, tables, folder, runtime, best, record, started, watch, log)
    finally:
        runtime.close()


def left_idle(asked: Config, config: Config) -> list[str]:
    """What of this machine, or of the run's workers, a resolved config leaves idle and need not.

    asked: the same with its `auto`s.
    """
    told, workers = [], config.cluster.most
    chosen = (asked.engine.device, asked.cluster.gpus, config.engine.device) == ("auto", "auto", "cpu")
    if chosen and config.cluster.address == "local" and (gpus := visible_gpus()):
        told.append(
            f"on the CPU: this machine's GPUs ({gpus}) are fewer than its workers ({workers}); "
            "engine.device=cuda shares them out, cluster.workers=0 takes one"
        )
    if workers > config.lanes and config.outer.local is None:
        told.append(
            f"a meta-step has {config.lanes} shard{'s' if config.lanes > 1 else ''} (task.shard={config.shard}) for "
            f"{workers} workers: with a smaller task.shard there would be one for each"
        )
    return told


def with_tracking(config: Config, path: Path) -> Config:
    """The config with its tracking URI resolved for a run folder."""
    check_uri(config.tracking.uri)
    return config.with_values(tracking={"uri": resolve_uri(config.tracking.uri, path) or "off"})


def checked_tables(config: Config, say: Callable[[str], None]) -> list[Table]:
    """The run's data, after everything that can be refused has been."""
    for source in config.data.sources:
        check_source(source)
    settle(config.engine) if config.cluster.most == 0 else settle(config.engine.model_copy(update={"device": "cpu"}))
    _check_gpus(config)
    if config.data.shared:
        check_shared(config.data.shared)
    tables = [prepare(source, say) for source in config.data.sources]
    training_tasks(config, tables, "cpu")
    check_evaluation(config, tables)
    if config.data.shared:
        for table in tables:
            offer(table, config.data.shared)
    return tables


def _check_gpus(config: Config) -> None:
    """Refuse more GPU than this machine has, where the workers would run on it."""
    here = config.cluster.most > 0 and config.cluster.address == "local"
    if not here or config.engine.device != "cuda":
        return
    there, each = visible_gpus(), float(config.cluster.gpus)
    if there == 0:
        raise ConfigError("engine.device: cuda, but this machine shows no GPU; valid is cpu")
    if each * config.cluster.most > there:
        raise ConfigError(
            f"cluster.gpus: {config.cluster.most} workers with {each:g} GPU each need more than the {there} "
            f"of this machine; at most {there / config.cluster.most:g} is valid"
        )


def start(
    config: Config, tables: list[Table], snapshot: Snapshot | None, say: Callable[[str], None], name: str | None = None
) -> Runtime:
    """The runtime that the config names; name: the run's own, by which a later driver finds what outlived this one."""
    if config.cluster.most == 0:
        return InProcess(config, tables, snapshot)
    if config.cluster.strategy == "allreduce":
        from metadist.runtime.allreduce import AllReduce

        return AllReduce(config, tables, snapshot, say)
    if config.cluster.strategy == "async":
        from metadist.runtime.asynchronous import Asynchronous

        return Asynchronous(config, tables, snapshot, say)
    from metadist.runtime.on_ray import OnRay

    return OnRay(config, tables, snapshot, say, name)


def _run(
    config: Config,
    tables: list[Table],
    folder: RunFolder,
    runtime: Runtime,
    best: Best | None,
    record: dict[str, Any],
    started: float | None,
    watch: Watch | None,
    log: Log,
) -> Finished:
    with Meters(config, runtime, folder.path, _emit(config, folder), log.say) as meters:
        return _measured(config, tables, folder, runtime, meters, best, record, started, watch, log)


def _emit(config: Config, folder: RunFolder) -> Emit | None:
    """Where metrics go: those of a run on Ray to Ray, under the folder's name and a part of the run's own."""
    if config.cluster.most == 0:
        return None
    from metadist.runtime.ray_metrics import through_ray

    name = folder.path.resolve().name
    return through_ray(f"{name}-{folder.name[:6]}" if folder.name else name)


def _measured(
    config: Config,
    tables: list[Table],
    folder: RunFolder,
    runtime: Runtime,
    meters: Meters,
    best: Best | None,
    record: dict[str, Any],
    started: float | None,
    watch: Watch | None,
    log: Log,
) -> Finished:
    first = runtime.step
    rows = read_metrics(folder.path / "metrics.parquet")
    lost = max((int(row["step"]) for row in rows), default=first) - first
    record = record | {"steps_recomputed": record.get("steps_recomputed", 0) + max(0, lost)}
    if not runtime.exact:
        record = record | {"reproducible": False}
    follower, patience = follow.start(folder.path, config), TRACKING_SECONDS
    try:
        journal = Journal(folder.path, rows)
        journal.cut(first)
        journal.catch_up(runtime.earlier, MEASURES[config.kind].name)
        display: Progress = progress(config.outer.steps, config.cluster.most, MEASURES[config.kind], log=log)
        trainer = Trainer(config, runtime, folder, journal, display, meters, best, record, started, watch)
        try:
            with noticed(config.checkpoint.grace):
                with display:
                    last = trainer.train(first)
                    display.done()
                result = _result(config, tables, runtime, trainer, last)
            folder.write_values("theta.safetensors", last.values)
            if last.ledger is not None:
                write_ledger(folder.path / "ledger.parquet", last.ledger)
            journal.flush()
            if trainer.best is not None:
                _write_best(folder, trainer.best, log)
            journal.close()
        except StorageError as error:
            journal.abandon()
            kept = next((p.name for _, p in checkpoints(folder.checkpoints)), "none")
            raise StorageError(
                f"{error}; the newest checkpoint is {kept}: make room, then `metadist train --resume {folder.path}`"
            ) from error
        except Preempted as end:
            journal.abandon()
            patience = 1.0
            raise Preempted(f"{end}; go on with `metadist train --resume {folder.path}`") from None
        except Stopped:
            journal.close()  # what it has come to is kept
            raise
        except KeyboardInterrupt:
            journal.abandon()
            raise Interrupted(f"interrupted; go on with `metadist train --resume {folder.path}`") from None
        except BaseException:
            journal.abandon()
            raise
        result["wall_seconds"] = trainer.seconds
        if meters.profile is not None:
            result["profile"] = meters.profile.told()
        folder.write_result(result)
        folder.unlock()
    finally:
        note = follower.finish(patience)
    return Finished(folder.path, result, [note])


def _write_best(folder: RunFolder, best: Best, log: Log) -> None:
    """The best state on validation beside the last one; a damaged one costs nothing but itself."""
    path = folder.checkpoints / f"step-{best.step}"
    try:
        state, _, _ = load_checkpoint(path)
    except Damaged as reason:
        log.say(f"{path} is damaged ({reason}); the best state on validation is lost, the last one is not")
        return
    folder.write_values("best.safetensors", state.values)


def _result(config: Config, tables: list[Table], runtime: Runtime, trainer: Trainer, last: Snapshot) -> dict[str, Any]:
    import torch

    from metadist.engine.engine import blueprint

    counts = runtime.counts()
    tests: list[dict[str, Any]] = []
    untrained = None
    if config.eval.test:
        first, *others = settings(config)
        print(f"meta-test: {2 + len(others)} × {config.eval.episodes:,} episodes", flush=True)
        tests = [meta_test(runtime, setting, None) for setting in (first, *others)]
        found = meta_test(runtime, first, blueprint(config, tables).initial())
        untrained = {key: found[key] for key in (trainer.measure.name, "ci95")}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "metadist": __version__}
    if config.cluster.most:
        import ray

        versions["ray"] = ray.__version__
    else:
        from importlib.metadata import PackageNotFoundError, version

        try:
            versions["ray"] = version("ray")
        except PackageNotFoundError:
            versions["ray"] = "absent"
    return {
        "theta_sha256": sha256({name: torch.from_numpy(np.array(value)) for name, value in last.values.items()}),
        "meta_steps": last.step,
        "steps_recomputed": trainer.recomputed,
        "shards_recomputed": counts.recomputed,
        "duplicates_dropped": counts.duplicates,
        "workers": config.cluster.most,
        "shards_by_worker": counts.shards,
        "transport": counts.transport and counts.transport._asdict(),
        "device": config.engine.device,
        "gpus": config.cluster.most * float(config.cluster.gpus),
        "hardware": runtime.hardware,
        "tasks_per_second": trainer.tasks_per_second,
        "bytes_per_step": trainer.bytes_per_step,
        "test": tests[0] if tests else None,
        "also": tests[1:],
        "untrained": untrained,
        "best": _best(trainer),
        "reproducible": trainer.record.get("reproducible", True),
        "staleness": None if last.ledger is None else staleness(last.ledger) | {"bound": config.cluster.bound},
        "seed": config.seed,
        "versions": versions,
        "numeric_fingerprint": runtime.fingerprint,
        "data_fingerprint": data_fingerprint(tables),
    }


def _best(trainer: Trainer) -> dict[str, Any] | None:
    best = trainer.best
    return best and {"step": best.step, trainer.measure.name: best.score, "ci95": best.ci95}
