"""The training loop: steps, validations and checkpoints, for any runtime."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from metadist.config import Config
from metadist.errors import ClusterError, Divergence, MetadistError
from metadist.evaluation.protocol import Score, score, validation_settings
from metadist.measure import MEASURES
from metadist.runtime.aggregator import Report, Snapshot
from metadist.runtime.checkpoint import Best, newest_good, prune, save_checkpoint
from metadist.runtime.journal import Journal
from metadist.runtime.meters import Meters
from metadist.runtime.preemption import Preempted
from metadist.runtime.run_folder import RunFolder
from metadist.runtime.runtime import AggregatorLost, Later, NotFinite, Runtime
from metadist.runtime.stops import saves, validates
from metadist.spans import Span, now
from metadist.tracking.progress import Progress

MOST_LOSSES = 5
"""Aggregators that may die one after the other without a new checkpoint in between."""

Watch = Callable[[int, Mapping[str, Score]], None]
"""Told of each validation: steps done, and the score. The loop waits for it."""


class Stopped(MetadistError):
    """Raised by whoever watches: the run ends here, its checkpoints stand."""

    level = "info"


class Validation(NamedTuple):
    """scores: the measure and the loss, by name; better: than every one before, by the measure."""

    scores: Mapping[str, Score]
    better: bool


class Trainer:
    """One run's loop with what it has to remember."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        journal: Journal,
        display: Progress,
        meters: Meters,
        best: Best | None,
        record: dict[str, Any],
        started: float | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config, self.runtime, self.folder = config, runtime, folder
        self.journal, self.display, self.meters, self.best, self.watch = journal, display, meters, best, watch
        self.record = {
            "fingerprint": runtime.fingerprint,
            "reproducible": record.get("reproducible", True),
            "steps_recomputed": record.get("steps_recomputed", 0),
        }
        self.recomputed: int = self.record["steps_recomputed"]
        self._began: float = (started or time.time()) - record.get("seconds", 0.0)
        self.measure = MEASURES[config.kind]
        self._done_here, self._training = 0, 0.0
        self._losses, self._went_back_to = 0, -1

    @property
    def seconds(self) -> float:
        """Wall time of the run: of this process, and of those before it up to their last checkpoint."""
        return time.time() - self._began

    @property
    def tasks_per_second(self) -> float:
        """Of training alone, validations and start-up aside."""
        return self._done_here * self.config.step_tasks / self._training if self._training else 0.0

    @property
    def bytes_per_step(self) -> float | None:
        """Mean over the meta-steps of the bytes that reached the aggregator."""
        sent = [row["bytes"] for row in self.journal.rows if "bytes" in row]
        return sum(sent) / len(sent) if sent else None

    def train(self, first: int) -> Snapshot:
        """Run meta-steps first … outer.steps−1; returns the final state. Raises Divergence."""
        step = first
        self.display.start(first)
        self.meters.start(first)
        while True:
            try:
                last = self._steps(step)
                self.meters.trained()
                return last
            except AggregatorLost as lost:
                step = self._go_back(lost)
            except Preempted as end:
                raise self._kept(end) from None

    def _steps(self, first: int) -> Snapshot:
        steps = self.config.outer.steps
        report: Later | None = None
        seconds = mark = 0.0
        for step in range(first, steps):
            began = time.perf_counter()
            self.runtime.begin(step)
            if report is not None:  # the workers are busy with this step: time to tell of the one before
                self._log(report(), seconds, mark)
            try:
                self.runtime.finish(step)
            except NotFinite as problem:
                self._stop(problem)
            mark = self.runtime.timeline.mark()
            report = self.runtime.apply(step)
            done = step + 1
            validate, save = validates(self.config, done), saves(self.config, done)
            if validate or save:
                told, report = report(), None
                seconds = time.perf_counter() - began
                self._log(told, seconds, mark)
            seconds = time.perf_counter() - began
            self._training += seconds
            self._done_here += 1
            found = self._validate(done) if validate else None
            if save or (found is not None and found.better):
                with self.runtime.timeline.driver.of("checkpoint"):
                    self._checkpoint(self.runtime.snapshot())
            if found is not None and self.watch is not None:  # last of all: what it decides on is complete
                self.watch(done, found.scores)
        with self.runtime.timeline.driver.of("checkpoint"):
            self.journal.flush()  # an aggregator lost in the last checkpoint is found here, where it can be replaced
            return self.runtime.snapshot()()

    def _log(self, report: Report, seconds: float, mark: float) -> None:
        if not report.finite:
            raise Divergence(f"step {report.step}: the meta-parameters are not finite after the outer step")
        rate = self.config.step_tasks / seconds
        self.journal.row(
            report.step + 1,
            loss=report.loss,
            **{self.measure.name: report.score},
            grad_norm=report.grad_norm,
            lr=report.lr,
            tasks_per_second=rate,
            seconds=seconds,
            bytes=report.bytes,
        )
        self.display.step(report.step + 1, report.loss, report.score, rate, self.runtime.workers)
        self.meters.step(report, seconds, mark)

    def _validate(self, done: int) -> Validation:
        """Judge the state on meta-validation."""
        setting = validation_settings(self.config, done)
        with self.runtime.timeline.driver.of("validation"):
            judged = self.runtime.judge(None, setting, "val", self.config.eval.val_episodes)
        found, loss = score(judged["score"]), score(judged["loss"])
        better = self.best is None or self.measure.better(found.mean, self.best.score)
        if better:
            self.best = Best(done, found.mean, found.ci95)
        named = {f"val_{self.measure.name}": found.mean, "val_ci95": found.ci95}
        self.journal.row(done, **named, val_loss=loss.mean, val_loss_ci95=loss.ci95)
        self.display.validation(done, found.mean, found.ci95, better)
        self.meters.validation(found.mean)
        return Validation({self.measure.name: found, "loss": loss}, better)

    def _checkpoint(self, later: Callable[[], Snapshot]) -> None:
        best, record = self.best, self._recorded()
        folder, keep = self.folder.checkpoints, self.config.checkpoint.keep

        def save() -> None:
            began, snapshot = now(), later()
            save_checkpoint(folder, snapshot, best, record)
            self.meters.checkpoint(Span("checkpoint", began, now()))
            prune(folder, keep, best, snapshot.step)

        self.journal.later(save)

    def _recorded(self) -> dict[str, Any]:
        return {**self.record, "steps_recomputed": self.recomputed, "seconds": self.seconds}

    def _stop(self, problem: NotFinite) -> None:
        """Divergence: θ was never touched by the bad shard, so the state before the step is good; keep it."""
        snapshot = self.runtime.snapshot()()
        self.journal.flush()  # it may be writing the same checkpoint
        save_checkpoint(self.folder.checkpoints, snapshot, self.best, self._recorded())
        raise Divergence(
            f"diverged at {problem}; the state before it is kept in {self.folder.checkpoints}/step-{snapshot.step}; "
            f"a smaller algorithm.inner_lr or outer.lr, or outer.clip, may help"
        ) from problem

    def _kept(self, end: Preempted) -> Preempted:
        """Write the state as it is now; what to tell the person."""
        try:
            snapshot = self.runtime.snapshot()()
            self.journal.flush()
            self.journal.cut(snapshot.step)
            save_checkpoint(self.folder.checkpoints, snapshot, self.best, self._recorded())
            kept = f"step {snapshot.step} is kept"
        except AggregatorLost:  # it went with its machine
            kept = "the newest checkpoint stands"
        return Preempted(f"{end}; {kept}")

    def _go_back(self, lost: AggregatorLost) -> int:
        """The aggregator is gone: a new one from the newest checkpoint; the steps since are computed again."""
        at = self.journal.rows[-1]["step"] if self.journal.rows else 0
        with contextlib.suppress(AggregatorLost):  # a checkpoint under way met the same loss
            self.journal.flush()
        found = newest_good(self.folder.checkpoints, self.display.note)
        snapshot, self.best = (found[0], found[1]) if found else (None, None)
        step = snapshot.step if snapshot else 0
        self.recomputed += max(0, int(at) - step)
        self._losses = self._losses + 1 if step == self._went_back_to else 1
        self._went_back_to = step
        if self._losses >= MOST_LOSSES:
            raise ClusterError(f"{lost}; {self._losses} times in a row from step {step}")
        self.journal.cut(step)
        self.display.note(f"{lost}; going on from step {step}")
        self.runtime.restart(snapshot)
        return step
