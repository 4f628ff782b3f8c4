"""Ray Tune runs the trials: their processes, placement groups, the queue for resources, the news of a death.

What is tried, who is stopped and who is tried again is the Director's, whatever Tune keeps is thrown away. Tune calls
searcher and scheduler from the driver's main thread, one event at a time. The order of the calls, as of Ray 2.60
(`tune/execution/tune_controller.py`): `suggest` while nobody waits for resources; for each result `on_trial_result`;
for one that is `done` only the searcher's `on_trial_complete`; for a process that died the scheduler's
`on_trial_error`, then the searcher's `on_trial_complete(error=True)`.

A trial that is told to stop ends by itself, as one that has taken all its steps does: so its end says what it was
like, and its run folder is free when the end is recorded.
"""

import json
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from metadist.config import Cluster
from metadist.data.files import cache_folder
from metadist.errors import ClusterError, StorageError
from metadist.runtime.cluster import free, hosts, reserved
from metadist.runtime.runtime import Say
from metadist.runtime.train import Stopped
from metadist.search.director import Director, Finished, Graft, Start
from metadist.search.graft import graft
from metadist.search.job import SearchJob, load_search
from metadist.search.packed import run_pack
from metadist.search.state import Decision, End, How, Report, Trial
from metadist.search.trial import run_trial, trial_config

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Tune prints nothing and keeps nothing."""

LOOKS = 5.0
"""Seconds between two looks at trials that wait for a place."""

Show = Callable[[Sequence[Trial]], None]
"""Draws the trials as they are now."""

_made: list[PlacementGroup] = []
"""Groups of this process's search: Tune makes a factory for each trial, and keeps the groups to itself."""


class TrialGroup(tune.PlacementGroupFactory):
    """Where a trial's processes are placed; remembers what it has made."""

    def to_placement_group(self) -> PlacementGroup:
        group = super().to_placement_group()
        _made.append(group)
        return group


class TrialActor(tune.Trainable):
    """A process that runs trials one after the other, or some of a pack together, in threads of their own.

    Its results are JSON: `report`, whose answer comes by `decide`; `end` of a trial; or `problem` where the whole
    search cannot go on. The last one is `done`.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> TrialGroup:
        order = json.loads(config["order"])
        return TrialGroup(order["bundles"], order["strategy"])

    def setup(self, config: dict[str, Any]) -> None:
        order = json.loads(config["order"])
        os.environ["METADIST_CACHE"] = order["cache"]
        self._job = load_search(Path(order["folder"]) / "search.yaml")
        self._begin(order)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._begin(json.loads(new_config["order"]))
        return True

    def step(self) -> dict[str, Any]:
        told = self._told.get()
        if isinstance(told, BaseException):
            raise told
        return told

    def decide(self, decision: Decision) -> None:
        """The answer to the last report."""
        self._decided.put(decision)

    def cleanup(self) -> None:
        self._leave()

    def _begin(self, order: dict[str, Any]) -> None:
        os.chdir(order["here"])  # Tune has gone to a folder of its own; paths of a job are the driver's
        self._told: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._decided: queue.Queue[Decision | None] = queue.Queue()
        self._away = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(order,), name="trial", daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        """Wait until the run has unwound, where the trial is taken away from it."""
        self._away.set()
        self._decided.put(None)
        self._thread.join()

    def _run(self, order: dict[str, Any]) -> None:
        told, decided, away = self._told, self._decided, self._away
        trials, folder = [_trial(one) for one in order["trials"]], Path(order["folder"])
        left = {trial.id for trial in trials}

        def ask(trial: Trial, step: int, values: dict[str, float]) -> Decision:
            if not away.is_set():
                told.put({"report": json.dumps([trial.id, step, values])})
                decision = decided.get()
                if decision is not None:
                    return decision
            raise Stopped("taken away")

        def ended(trial: Trial, end: End) -> None:
            left.discard(trial.id)
            told.put({"end": json.dumps([trial.id, end._asdict()]), "done": not left})

        try:
            if len(trials) == 1:
                ended(trials[0], run_trial(self._job, trials[0], folder, partial(ask, trials[0])))
            else:
                run_pack(self._job, trials, folder, ask, ended)
        except StorageError as error:
            told.put({"done": True, "problem": str(error)})
        except BaseException as error:  # noqa: BLE001, raised again where Tune hears it
            told.put(error)


def _order(trials: Sequence[Trial], folder: Path, group: TrialGroup) -> str:
    """All that a process needs for its trials. Tune makes names of a config, so it is one word."""
    return json.dumps(
        {
            "folder": str(folder.resolve()),
            "here": str(Path.cwd()),
            "cache": str(cache_folder().resolve()),
            "bundles": group.bundles,
            "strategy": group.strategy,
            "trials": [asdict(trial) for trial in trials],
        }
    )


def _trial(told: dict[str, Any]) -> Trial:
    reports = [Report(*report) for report in told["reports"]]
    stages = [(at, changed) for at, changed in told["stages"]]
    return Trial(**{**told, "reports": reports, "end": None, "stages": stages})


# --- Tune's calls --------------------------------------------------------------


class _Calls:
    """What searcher and scheduler share.

    broken: what went wrong in a call. Tune swallows exceptions, so they are kept and raised outside of it.
    """

    def __init__(self, job: SearchJob, director: Director, folder: Path, group: TrialGroup, show: Show) -> None:
        self.job, self.director, self.folder, self.group, self.show = job, director, folder, group, show
        self.ids: dict[str, list[str]] = {}  # Tune's → ours that have not ended
        self.reasons: dict[str, str] = {}  # why a process died, by Tune's id
        self.broken: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps copies of searcher and scheduler, for a resume of its own

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.broken = self.broken or error

    def graft(self, order: Graft) -> None:
        """Let members of a population take over others' runs; nobody trains in these folders now."""
        place = self.folder / "trials"
        for trial, donor in order.moves:
            graft(place / donor, place / trial.id, trial_config(self.job, trial))

    def started(self, tune_id: str, first: Trial) -> dict[str, str]:
        trials = [first]
        while len(trials) < self.job.search.pack and (other := self.director.beside(first)) is not None:
            trials.append(other)
        self.ids[tune_id] = [trial.id for trial in trials]
        self.show(self.director.trials)
        name = f"{first.id}-{first.attempt}-{first.released}"
        return {"name": name, "order": _order(trials, self.folder, self.group)}

    def told(self, tune_id: str, result: dict[str, Any]) -> Decision | None:
        """A result of a process; what is decided where it asks."""
        decision = None
        if "problem" in result:
            raise StorageError(result["problem"])
        if "report" in result:
            decision = self.director.report(*json.loads(result["report"]))
        else:
            id, end = json.loads(result["end"])
            self.ids[tune_id].remove(id)
            self.director.end(id, end["how"], end["step"], end["reason"], end["facts"])
        self.show(self.director.trials)
        return decision

    def died(self, tune_id: str) -> None:
        """A process has died, and the trials in it with it."""
        reason = self.reasons.pop(tune_id, "its process died")
        for id in self.ids.pop(tune_id):
            reports = self.director.trials[int(id)].reports
            how: How = "memory" if "memory" in reason else "crashed"
            self.director.end(id, how, reports[-1].step if reports else 0, reason, {})
        self.show(self.director.trials)


class _Searcher(Searcher):
    """Hands the Director's trials to Tune."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        with self.calls.kept():
            director = self.calls.director
            now = director.next()
            while isinstance(now, Graft):
                self.calls.graft(now)
                director.grafted()
                now = director.next()
            if isinstance(now, Start):
                return self.calls.started(trial_id, now.trial)
            return Searcher.FINISHED if isinstance(now, Finished) else None
        return Searcher.FINISHED  # broken; Tune would wait for a trial a minute long

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass  # the scheduler has told of it

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        with self.calls.kept():
            if error:
                self.calls.died(trial_id)
            else:
                self.calls.told(trial_id, result or {})

    def save(self, checkpoint_path: str) -> None:
        pass  # the ledger has it

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from its ledger")


class _Scheduler(FIFOScheduler):
    """Hands results to the Director, and its decisions to the trials."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        with self.calls.kept():
            decision = self.calls.told(trial.trial_id, result)
            if decision is not None:
                trial.temporary_state.ray_actor.decide.remote(decision)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        with self.calls.kept():
            error = trial.get_pickled_error() or trial.get_error()
            self.calls.reasons[trial.trial_id] = _why_it_died(error)


class _Broken(BaseException):
    """Ends Tune's loop at once; the trials' checkpoints stand."""


class _Stopper(Stopper):
    """Tune asks it all the time, so it also sees when a trial waits long for a place."""

    def __init__(self, calls: _Calls, say: Say) -> None:
        self.calls, self.say = calls, say
        self._looked, self._waiting, self._told = time.monotonic(), 0, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.calls.broken is not None:
            raise _Broken
        if time.monotonic() - self._looked > LOOKS:
            self._looked = time.monotonic()
            with self.calls.kept():
                self._look()
        return False

    def _look(self) -> None:
        """Tell once what is waited for, when there was no place at two looks."""
        states = [placement_group_table(group).get("state") for group in _made]
        self._waiting = self._waiting + 1 if "PENDING" in states else 0
        if self._waiting >= 2 and not self._told:
            needs = free(ray, self.calls.job.base.cluster)
            running = states.count("CREATED")
            self.say(f"a trial waits for a place on the cluster, where {running} compute: {needs}")
        self._told = self._waiting >= 2


def _why_it_died(error: Exception | None) -> str:
    if isinstance(error, RayTaskError):  # it lives, and raised
        lines = str(error.cause or error).strip().splitlines()
        return ": ".join([type(error.cause).__name__, *lines[-1:]])
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        return "its process was ended because the node ran out of memory"
    return "its process died"


# --- the search ------------------------------------------------------------------


def fit(job: SearchJob, director: Director, folder: Path, show: Show, say: Say) -> None:
    """Run trials on the connected cluster until the Director has no more.

    Raises what went wrong in its calls, and ClusterError.
    """
    calls = _Calls(job, director, folder, _group(job.base.cluster), show)
    show(director.trials)
    whole = False
    try:
        _tune(calls, say)
        whole = True
    finally:
        left = _clear_away()
        if whole and left:
            say(f"Ray Tune left {left} placement groups behind; they are removed")


def _group(cluster: Cluster) -> TrialGroup:
    """A trial's own process, on the driver's host, where the run folders are, and its workers."""
    here, each = {_this_host(): 0.001}, reserved(cluster)
    if not cluster.most:
        return TrialGroup([{**each, **here}])
    workers = [each] * cluster.most if any(each.values()) else []
    return TrialGroup([here, *workers], "SPREAD" if cluster.placement == "spread" else "PACK")


def _this_host() -> str:
    """The resource that every host has of its own."""
    return next(name for name in hosts(ray)[0] if name.startswith("node:") and "__" not in name)


def _tune(calls: _Calls, say: Say) -> None:
    storage = tempfile.mkdtemp(prefix="metadist-tune-")
    try:
        with _surroundings(calls.job.search.processes):
            tune.Tuner(
                TrialActor,
                tune_config=tune.TuneConfig(
                    search_alg=_Searcher(calls),
                    scheduler=_Scheduler(calls),
                    num_samples=-1,
                    reuse_actors=True,
                    trial_name_creator=lambda trial: trial.config["name"],
                    trial_dirname_creator=lambda trial: trial.config["name"],
                ),
                run_config=tune.RunConfig(
                    storage_path=storage,
                    name="search",
                    verbose=0,
                    stop=_Stopper(calls, say),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            ).fit()
    except _Broken:
        pass
    except tune.TuneError as error:
        if calls.broken is None:
            raise ClusterError(f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if calls.broken is not None:
        raise calls.broken


@contextmanager
def _surroundings(processes: int) -> Iterator[None]:
    """Tune is quiet; processes of trials at once may start at once."""
    wanted = {**ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(processes)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _clear_away() -> int:
    """Remove the groups that Tune has left (ray issue 54305), with what is in them; how many there were."""
    left = [group for group in _made if placement_group_table(group).get("state") not in ("REMOVED", None)]
    for group in left:
        remove_placement_group(group)
    _made.clear()
    return len(left)
