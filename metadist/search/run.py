"""A search from its job to its answer, and going on with one that was ended."""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

from metadist.config import Cluster, Elastic, parse_override, read_yaml, with_keys
from metadist.durable import storage_errors, write
from metadist.errors import ClusterError, ConfigError, Interrupted, RunError, StorageError
from metadist.run import TRACKING_SECONDS, checked_tables
from metadist.runtime import run_folder
from metadist.runtime.cluster import check_resources, connect, disconnect, hosts, places, reserved
from metadist.search import rows
from metadist.search.director import Director
from metadist.search.draw import check_draws
from metadist.search.job import SearchJob, checked, load_search, refuse_changed_search, to_yaml
from metadist.search.ledger import Ledger
from metadist.search.outcome import conclude
from metadist.search.space import Choice, Grid, RandInt
from metadist.search.state import Trial
from metadist.search.table import Table
from metadist.tracking import follow
from metadist.tracking.destination import check_uri

JOB, LEDGER = "search.yaml", "ledger.jsonl"
MOST_COUNTED = 10_000


def search(job: str | Path, overrides: Sequence[str] = (), run_dir: Path | None = None) -> Path:
    """Search a job's space into a new folder, which is returned.

    `search.yaml`, the whole job; `ledger.jsonl`; `trials/ID`, a run folder each; `logs/ID.log`; then what
    `conclude` writes.
    """
    loaded = load_search(job, overrides)
    folder = run_dir or fresh_name(str(job))
    refuse(loaded, folder)
    if loaded.search.searcher == "grid":
        _say(tried(loaded))
    checked_tables(loaded.base, _say)  # once, before trials would build them all at the same time
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:  # another search was quicker
            refuse(loaded, folder)
    write(folder / JOB, to_yaml(loaded).encode())
    _go_on(loaded, folder)
    return folder


def resume(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Go on with a search: finished trials are not run again, others from their last checkpoint."""
    path = folder / JOB
    if not path.is_file():
        raise RunError(f"{folder}: is no search folder, it has no {JOB}")
    before = load_search(path)
    after = checked(with_keys(read_yaml(path), dict(map(parse_override, overrides))), "override")
    refuse_changed_search(before, after)
    refuse_place(after)
    checked_tables(after.base, _say)
    _go_on(after, folder, rewrite=before != after)
    return folder


def _go_on(job: SearchJob, folder: Path, rewrite: bool = False) -> None:
    ledger = Ledger(folder / LEDGER, _say)
    try:
        if rewrite:
            write(folder / JOB, to_yaml(job).encode())
        with storage_errors(folder):
            for name in ("trials", "logs"):
                (folder / name).mkdir(exist_ok=True)
            (folder / "search.json").unlink(missing_ok=True)  # an answer that there was before further trials
        director = Director(job, ledger)
        with _followed(job, folder), _connected(job), _interruptible(folder):  # Ray takes SIGTERM when it starts
            from metadist.search.on_tune import fit  # and reads its environment when it is imported

            shown = _Shown(job, folder, ledger)
            try:
                fit(job, director, folder, shown, _say)
            finally:
                shown.table.close()
            if director.over and len(director.trials) < job.search.trials:
                _say(f"{len(director.trials)} of {job.search.trials} trials were started: {director.over}")
            conclude(job, director.trials, folder, ledger, _say)
    except StorageError as error:
        raise StorageError(f"{error}: make room, then `metadist search --resume {folder}`") from error
    finally:
        ledger.close()


class _Shown:
    """Keeps the table on the screen, and `trials.parquet` whenever a trial has ended."""

    def __init__(self, job: SearchJob, folder: Path, ledger: Ledger) -> None:
        self.job, self.folder, self.ledger, self.table, self.ended = job, folder, ledger, Table(job), 0

    def __call__(self, trials: Sequence[Trial]) -> None:
        self.table.show(trials)
        ended = sum(trial.end is not None for trial in trials)
        if ended != self.ended:
            rows.save(self.job, trials, self.folder, self.ledger.events)
            self.ended = ended


@contextmanager
def _followed(job: SearchJob, folder: Path) -> Iterator[None]:
    """Copied to MLflow meanwhile, by one process for the whole search."""
    follower, patience = follow.start(folder, job.base), 1.0
    try:
        yield
        patience = TRACKING_SECONDS
    finally:
        print(follower.finish(patience), flush=True)


@contextmanager
def _connected(job: SearchJob) -> Iterator[None]:
    """Connected to a cluster that holds the trials that run at once. Raises ClusterError."""
    cluster = job.base.cluster
    each = max(1, cluster.most)
    ray, ours = connect(cluster.model_copy(update={"workers": job.search.processes * each}))
    try:
        check_resources(ray, cluster.model_copy(update={"workers": each}))
        _check_hosts(ray, cluster)
        yield
    finally:
        if ours:
            disconnect()


def _check_hosts(ray: Any, cluster: Cluster) -> None:
    """Refuse a trial that no host will ever have a place for; say where trials compute, if not everywhere."""
    this, *others = hosts(ray)
    needs = ", ".join(f"{each:g} {kind}" for kind, each in reserved(cluster).items() if each)
    if cluster.most == 0 and places(this, cluster) == 0:
        elsewhere = "cluster.workers=1 or more, which lie on other hosts, or " if others else ""
        raise ClusterError(
            f"cluster.workers: with 0 a trial computes on this host, which has {_has(this, cluster)} in the cluster, "
            f"and needs {needs}; valid is {elsewhere}a driver on a host that has it"
        )
    if cluster.most == 0 and others:
        _say(
            f"cluster.workers=0: trials compute on this host alone, at most {places(this, cluster)} at once; with 1 or "
            f"more their workers lie on all {1 + len(others)} hosts of the cluster"
        )
    there = sum(places(host, cluster) for host in (this, *others))
    if there < cluster.most:
        raise ClusterError(
            f"cluster.workers: the {cluster.most} workers of a trial need {needs} each, and the cluster's hosts have "
            f"places for {there}; at most {there} is valid"
        )


def _has(host: Mapping[str, float], cluster: Cluster) -> str:
    return ", ".join(f"{host.get(kind, 0.0):g} {kind}" for kind, each in reserved(cluster).items() if each)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """SIGINT and SIGTERM end the search in one line; the ledger and the trials' checkpoints stand."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # signals are its own
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with `metadist search --resume {folder}`") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def fresh_name(job: str) -> Path:
    """`searches/JOB-DATE-TIME`."""
    return run_folder.fresh_name(job, "searches")


def refuse(job: SearchJob, folder: Path) -> None:
    """Raise what can be known before anything is made."""
    if folder.exists():
        goes_on = f"go on with it by `metadist search --resume {folder}`, or " if (folder / JOB).is_file() else ""
        raise RunError(f"{folder}: exists already; {goes_on}choose another --run-dir")
    refuse_place(job)
    check_draws(job)


def refuse_place(job: SearchJob) -> None:
    """A trial has one placement group, on a cluster that this machine is part of."""
    check_uri(job.base.tracking.uri)
    cluster, device = job.base.cluster, job.base.engine.device
    if isinstance(cluster.workers, Elastic):
        raise ConfigError("cluster.workers: a trial's placement group has one size; valid is a whole number")
    if cluster.strategy == "async":
        raise ConfigError(
            "cluster.strategy: async has no bits that a winner could be trained to again; valid: aggregator, allreduce"
        )
    if cluster.address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address: {cluster.address} keeps the driver outside of the cluster, where the trials' folders "
            f"would not be; valid: local, auto, HOST:PORT"
        )
    if cluster.most and "peak_memory" in job.search.also:
        raise ConfigError(
            "search.also: peak_memory is known of trials that compute in one process; valid with cluster.workers=0"
        )
    if cluster.address == "local" and device == "cuda":
        import torch

        there, workers = torch.cuda.device_count(), job.search.processes * max(1, cluster.most)
        if float(cluster.gpus) * workers > there:
            raise ConfigError(
                f"cluster.gpus: {job.search.processes} trials at once with {float(cluster.gpus):g} GPU for each "
                f"worker need more than the {there} of this machine; at most {there / workers:g} is valid, or a "
                f"smaller search.concurrent"
            )


def size(job: SearchJob) -> str:
    """How many points the space has, in a line."""
    finite = {key: d for key, d in job.search.space.items() if isinstance(d, Choice | Grid | RandInt)}
    values = [range(d.randint[0], d.randint[1] + 1) if isinstance(d, RandInt) else d.witnesses for d in finite.values()]
    points = [dict(zip(finite, point, strict=True)) for point in islice(product(*values), MOST_COUNTED)]
    count = f"{sum(map(job.allows, points)):,}" if len(points) < MOST_COUNTED else f"{MOST_COUNTED:,} or more"
    others = ", ".join(key for key in job.search.space if key not in finite)
    return f"{count} combinations" + (f", each with any value of {others} between its bounds" if others else "")


def tried(job: SearchJob) -> str:
    """How much of a grid is tried, in a line."""
    whole, trials = job.grid_runs(), job.search.trials
    own = ", the job's own values among them" if job.search.baseline else ""
    if trials >= whole:
        return f"grid: all {whole:,} points are tried{own}"
    return f"grid: {trials:,} of {whole:,} points are tried{own}; search.trials={whole}, or null, is the whole grid"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
