"""A search from its job to its answer, and going on with one that was ended."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path

from metadist.config import Elastic, parse_override, read_yaml, with_keys
from metadist.durable import storage_errors, write
from metadist.errors import ConfigError, Interrupted, RunError, StorageError
from metadist.run import TRACKING_SECONDS, checked_tables
from metadist.runtime import run_folder
from metadist.runtime.cluster import check_resources, connect, disconnect
from metadist.search import rows
from metadist.search.director import Director
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
    ray, ours = connect(cluster.model_copy(update={"workers": job.search.concurrent * each}))
    try:
        check_resources(ray, cluster.model_copy(update={"workers": each}))
        yield
    finally:
        if ours:
            disconnect()


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

        there, workers = torch.cuda.device_count(), job.search.concurrent * max(1, cluster.most)
        if float(cluster.gpus) * workers > there:
            raise ConfigError(
                f"cluster.gpus: {job.search.concurrent} trials at once with {float(cluster.gpus):g} GPU for each "
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
