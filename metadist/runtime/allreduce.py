"""A Ray Train group of equal ranks that sum among themselves, and the driver's side of it.

The group runs by itself from one stop (a validation or a checkpoint) to the next. The driver
reads what the first rank reports of every step, and tells the group what to do at the stops.
Ray Train starts the ranks, connects them and notices their deaths; its own restarts are off,
because a group that lost a rank goes back to a checkpoint as every run does.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.fingerprint import differences
from metadist.engine.sweep import Setting
from metadist.errors import ClusterError, MetadistError
from metadist.runtime import preemption
from metadist.runtime.aggregator import Report, Snapshot
from metadist.runtime.cluster import check_resources, connect, disconnect, first_line, free, reserved, room
from metadist.runtime.mailbox import Ended, Mailbox
from metadist.runtime.rank import Rank, Stepped
from metadist.runtime.runtime import AggregatorLost, Counts, Later, NotFinite, Say
from metadist.runtime.stops import next_stop
from metadist.runtime.timeline import AGGREGATOR, Timeline
from metadist.runtime.worker import Introduction, Worker
from metadist.spans import now

WAITING = 10.0
"""Seconds between two lines about what is waited for."""

POLL = 0.25
"""Seconds between two looks at SIGTERM while the group works."""

SILENCE = 300
"""Seconds that ranks wait for one of them in a sum. Equal ranks differ by one shard at most."""

AHEAD = 16
"""Reports that the first rank sends without hearing that they arrived."""

FIRST = "rank 0"
"""The rank whose time is told; the others are its equals."""

PLACEMENTS = {"any": "PACK", "spread": "SPREAD", "pack": "PACK"}


class RankLost(Exception):
    """The ranks could not add up: one of them is gone."""


class Introduce(NamedTuple):
    """Compute the probe shard. Answer: Introduction."""


class Run(NamedTuple):
    """Take steps until so many are done, or until another command is there. No answer, but reports."""

    until: int


class Halt(NamedTuple):
    """Stop. Answer: the steps done."""


class Take(NamedTuple):
    """Answer: of the first rank the Snapshot."""


class Judge(NamedTuple):
    """Answer: this rank's part of an evaluation, by first task."""

    values: np.ndarray | None
    judged: Setting
    split: str
    episodes: int


class End(NamedTuple):
    """Leave."""


class Unusable(NamedTuple):
    """A report: a shard of a step was not finite, twice."""

    step: int
    shard: int


def serve(mailbox: Any, config: Config, paths: Sequence[str], snapshot: Snapshot | None) -> None:
    """What each rank does until it is told to end."""
    import ray
    import ray.train

    context = ray.train.get_context()
    place, world = context.get_world_rank(), context.get_world_size()
    worker = Worker(config, paths)
    rank: Rank | None = None
    done = 0
    while True:
        command = ray.get(mailbox.command.remote(done))
        match command:
            case Introduce():
                introduction = worker.introduce()
                rank = Rank(config, worker, snapshot, place, world, _all_reduce())
                mailbox.answer.remote(done, place, introduction)
            case Run():
                assert rank is not None
                _run(rank, command.until, mailbox if place == 0 else None, done)
            case Halt():
                assert rank is not None
                mailbox.answer.remote(done, place, rank.aggregator.step)
            case Take():
                assert rank is not None
                mailbox.answer.remote(done, place, rank.aggregator.snapshot() if place == 0 else None)
            case Judge():
                assert rank is not None
                mailbox.answer.remote(done, place, rank.judge(*command))
            case End() | Ended():
                return
        done += 1


def _run(rank: Rank, until: int, mailbox: Any, number: int) -> None:
    """Steps up to the next stop. The first rank alone has the mailbox: it tells, and hears of other commands."""
    import ray

    told: deque[Any] = deque()
    halt = False
    while rank.aggregator.step < until:
        step = rank.aggregator.step
        try:
            found = rank.step(halt)
        except NotFinite as problem:
            if mailbox is not None:
                mailbox.report.remote(Unusable(step, problem.shard))
            return
        if mailbox is not None:
            told.append(mailbox.report.remote(found))
            while told and (len(told) > AHEAD or ray.wait([told[0]], timeout=0)[0]):
                halt = ray.get(told.popleft()) > number + 1
        if found.halted or not found.report.finite:
            return


def _all_reduce() -> Callable[[np.ndarray], np.ndarray]:
    import torch
    import torch.distributed

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"

    def add_up(mine: np.ndarray) -> np.ndarray:
        buffer = torch.from_numpy(mine).to(device)
        try:
            torch.distributed.all_reduce(buffer)
            return buffer.cpu().numpy()
        except RuntimeError as error:
            raise RankLost(first_line(error)) from error

    return add_up


class AllReduce:
    """`cluster.strategy: allreduce`."""

    exact = True

    def __init__(self, config: Config, tables: Sequence[Table], snapshot: Snapshot | None, say: Say) -> None:
        self.config, self.say = config, say
        self.paths = [str(table.path) for table in tables]
        self.step, self.earlier = snapshot.step if snapshot else 0, list[Report]()
        self.ray, self._ours = connect(config.cluster)
        self.fingerprint: dict[str, str] = {}
        self.hardware: dict[str, Any] = {}
        self.workers = 0
        self._shards: dict[str, int] = {}
        self._recomputed = 0
        self._mark = now()
        self.timeline = Timeline(lambda: self._mark)
        self.timeline.join(FIRST)
        self._mailbox: Any = None
        try:
            check_resources(self.ray, config.cluster)
            self._start(snapshot)
            self._meet()
        except AggregatorLost as lost:
            self.close()
            raise ClusterError(str(lost)) from lost
        except BaseException:
            self.close()
            raise

    # --- the group -----------------------------------------------------------

    def _start(self, snapshot: Snapshot | None) -> None:
        cluster = self.config.cluster
        # Ray Train reads these where the group is started.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.timeout)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from metadist.runtime.group_network import GroupConfig

        world = min(cluster.most, max(cluster.least, room(self.ray, cluster)))
        mailbox = self.ray.remote(Mailbox).options(num_cpus=0, max_restarts=0).remote(world)
        config, paths = self.config, self.paths
        gpus = float(cluster.gpus)
        self._folder = tempfile.mkdtemp(prefix="metadist-group-")
        trainer = TorchTrainer(
            lambda: serve(mailbox, config, paths, snapshot),
            scaling_config=ScalingConfig(
                num_workers=world,
                use_gpu=gpus > 0,
                resources_per_worker={kind: each for kind, each in reserved(cluster).items() if each},
                placement_strategy=PLACEMENTS[cluster.placement],
            ),
            # Two ranks of NCCL cannot share a GPU.
            torch_config=GroupConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=SILENCE),
            run_config=RunConfig(
                name="group",
                storage_path=self._folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        self._mailbox, self._world = mailbox, world
        self._pids: list[int] = []
        self._until, self._halted = 0, False
        self._reports: deque[Stepped | Unusable] = deque()
        self._coming: Any = None
        self._thread = threading.Thread(target=self._fit, args=(trainer, mailbox), name="group", daemon=True)
        self._introductions = self._tell(Introduce())
        self._thread.start()

    def _fit(self, trainer: Any, mailbox: Any) -> None:
        """The group's whole life, in a thread."""
        try:
            trainer.fit()
            ended = Ended("it was told to end")
        except Exception as error:  # noqa: BLE001, told to whoever waits for the group
            ended = _reason(error, self.config)
        with contextlib.suppress(Exception):  # the driver may have left meanwhile
            self.ray.get(mailbox.end.remote(ended))

    def _meet(self) -> None:
        """Wait for the ranks' introductions."""
        coming = self._mailbox.answers.remote(self._introductions)
        while not self.ray.wait([coming], timeout=WAITING)[0]:
            there = self.ray.get(self._mailbox.answered.remote(self._introductions))
            needs = free(self.ray, self.config.cluster)
            self.say(f"waiting for the group: {there} of {self._world} ranks are there; {needs}")
        introductions: list[Introduction] = self._got(coming)
        self.fingerprint = agreed(self.fingerprint, introductions)
        self.hardware = introductions[0].hardware
        self._pids = [one.pid for one in introductions]
        self.workers = len(introductions)

    def _leave(self) -> None:
        """End the group and wait until it is gone."""
        if self._mailbox is None:
            return
        with contextlib.suppress(Exception):
            self._tell(End())
        self._thread.join(20)
        self.ray.kill(self._mailbox)
        self._mailbox, self.workers = None, 0
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- commands and answers --------------------------------------------------

    def _tell(self, command: Any) -> int:
        from ray.exceptions import RayError

        try:
            number: int = self.ray.get(self._mailbox.tell.remote(command))
        except RayError as error:
            raise AggregatorLost(f"the group's mailbox was lost: {first_line(error)}") from error
        return number

    def _ask(self, command: Any) -> list[Any]:
        return self._got(self._mailbox.answers.remote(self._tell(command)))

    def _got(self, coming: Any) -> list[Any]:
        """What the group said. Raises AggregatorLost where it has ended, or what ended it."""
        from ray.exceptions import RayError

        try:
            found: list[Any] | Ended = self.ray.get(coming)
        except RayError as error:
            raise AggregatorLost(f"the group's mailbox was lost: {first_line(error)}") from error
        if not isinstance(found, Ended):
            return found
        if found.defect is not None:
            raise found.defect
        raise AggregatorLost(f"the group of ranks was lost: {found.reason}")

    # --- a step ----------------------------------------------------------------

    def begin(self, step: int) -> None:
        if not self.workers:
            self._meet()
        if step >= self._until and not preemption.asked():
            self._until = next_stop(self.config, step)
            self._tell(Run(self._until))

    def finish(self, step: int) -> None:
        while not self._reports:
            if preemption.asked():
                if not self._halted:
                    self._halted, self._until = True, max(self._ask(Halt()))
                if step >= self._until:
                    preemption.check()
            if self._coming is None:
                self._coming = self._mailbox.reports.remote()
            if self.ray.wait([self._coming], timeout=POLL)[0]:
                coming, self._coming = self._coming, None
                self._take(self._got(coming))
        first = self._reports[0]
        if isinstance(first, Unusable):
            raise NotFinite(first.step, first.shard)
        if first.report.step != step:
            raise AggregatorLost(f"step {step}: the group is at step {first.report.step}")

    def _take(self, came: Sequence[Stepped | Unusable]) -> None:
        self._reports.extend(came)
        for one in came:
            if isinstance(one, Stepped):
                self.timeline.add(FIRST, one.spans)
                self.timeline.add(AGGREGATOR, one.report.spans)
                self._mark = max(span.end for span in one.report.spans)  # what it does now is not told yet

    def apply(self, step: int) -> Later:
        found = self._reports.popleft()
        assert isinstance(found, Stepped), "finish() has seen it"
        for pid, count in zip(self._pids, found.shards, strict=True):
            self._shards[str(pid)] = self._shards.get(str(pid), 0) + count
        self._recomputed += found.recomputed
        return lambda: found.report

    def snapshot(self) -> Callable[[], Snapshot]:
        coming = self._mailbox.answers.remote(self._tell(Take()))

        def later() -> Snapshot:
            found: Snapshot = self._got(coming)[0]
            return found

        return later

    def restart(self, snapshot: Snapshot | None) -> None:
        self._leave()
        self._start(snapshot)

    # --- evaluation ------------------------------------------------------------

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]:
        found: dict[int, dict[str, np.ndarray]] = {}
        for part in self._ask(Judge(values, judged, split, episodes)):
            found |= part
        parts = [found[first] for first in sorted(found)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    # --- the rest --------------------------------------------------------------

    def counts(self) -> Counts:
        return Counts(dict(self._shards), self._recomputed, 0)

    def close(self) -> None:
        self._leave()
        if self._ours:
            disconnect()


def agreed(expected: dict[str, str], introductions: Sequence[Introduction]) -> dict[str, str]:
    """The fingerprint of all ranks, with `probe`. Raises ClusterError: ranks whose bits differ cannot sum."""
    for one in introductions:
        found = one.fingerprint | {"probe": one.probe}
        expected = expected or found
        told = differences(expected, found)
        if told:
            raise ClusterError(
                f"cluster.strategy: allreduce needs equal ranks; the one on {one.host} (process {one.pid}) has "
                f"{told}; valid are other workers, or aggregator, which goes on without it"
            )
    return expected


def _reason(error: Exception, config: Config) -> Ended:
    """Why a group ended: what one of its ranks raised, or the loss of one."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        known = [cause for cause in error.worker_failures.values() if isinstance(cause, MetadistError)]
        if known:
            return Ended(str(known[0]), known[0])
        gone = {rank: cause for rank, cause in error.worker_failures.items() if _is_gone(cause)}
        left_alone = [cause for cause in error.worker_failures.values() if isinstance(cause, RankLost)]
        if len(gone) + len(left_alone) < len(error.worker_failures):
            return Ended("a defect", error)
        if gone:
            return Ended(f"rank {min(gone)} died: {_cause(gone[min(gone)])}")
        return Ended(first_line(left_alone[0]))
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        late = f"cluster.timeout: no group was ready within {config.cluster.timeout:g} s"
        line = _cause(cause)
        return Ended(line, ClusterError(f"{late}: {line}" if "Timeout" in type(cause).__name__ else line))
    return Ended("a defect", error)


def _is_gone(cause: BaseException) -> bool:
    """Whether a rank's failure is the end of its process, as Ray or Ray Train's health check tells it."""
    from ray.exceptions import RayError

    return isinstance(cause, RayError) or type(cause).__name__.startswith("WorkerHealthCheck")


def _cause(error: BaseException) -> str:
    """What a rank died of; Ray Train's health check wraps it, and Ray what was raised in another process."""
    error = getattr(error, "health_check_failure", error)
    return first_line(getattr(error, "cause", None) or error)
