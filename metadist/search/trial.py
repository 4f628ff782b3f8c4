"""A trial is a run: the same code as `metadist train`, watched at its validations. Knows no Ray."""

import errno
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from metadist import run
from metadist.config import Config
from metadist.durable import lock
from metadist.errors import ConfigError, DataError, Divergence, Interrupted, MetadistError, RunError, StorageError
from metadist.evaluation.protocol import Score
from metadist.measure import MEASURES
from metadist.runtime.checkpoint import newest_good
from metadist.runtime.journal import read_metrics
from metadist.runtime.preemption import Preempted
from metadist.runtime.run_folder import RunFolder
from metadist.runtime.train import Stopped
from metadist.search.costs import adaptation_mflop, forget_peak, peak_memory
from metadist.search.job import SearchJob
from metadist.search.state import Decision, End, How, Trial

Ask = Callable[[int, dict[str, float]], Decision]
"""Tells of a validation behind so many meta-steps, and waits for what is decided."""

FULL = {errno.ENOSPC, errno.EDQUOT}

OTHERS_SECONDS = 60.0
"""How long a trial waits for the process that computed it before, which may still be ending."""


def trial_config(job: SearchJob, trial: Trial) -> Config:
    """The run of a trial. Raises ConfigError.

    Behind every validation stands a checkpoint, so that what has been decided never has to be computed again.
    """
    config = job.run_of(trial)
    place = {"address": "auto"} if config.cluster.most else {}
    quiet = {"linger": 0.0} if config.cluster.strategy == "aggregator" else {}
    return config.with_values(
        eval={"test": False},
        tracking={"uri": "off"},
        checkpoint={"every": config.eval.every},
        cluster={**place, **quiet, "placement": "any"},
    )


def run_trial(job: SearchJob, trial: Trial, folder: Path, ask: Ask) -> End:
    """Begin a trial of the search in `folder`, or go on with it, until it ends in some way.

    What the run says goes to its log. Raises StorageError: a full disk is not the trial's fault.
    """
    with log_of(folder, trial).open("a", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        return attempt(job, trial, folder, ask)


def attempt(job: SearchJob, trial: Trial, folder: Path, ask: Ask, begin: run.Begin | None = None) -> End:
    """The same with what it says left where it goes. begin: makes its runtime, where it computes with others."""
    return _Attempt(job, trial, folder / "trials" / trial.id, ask, begin).end()


def log_of(folder: Path, trial: Trial) -> Path:
    """`logs/ID.log` of a search's folder."""
    return folder / "logs" / f"{trial.id}.log"


class _Ended(NamedTuple):
    how: How
    reason: str


class _Attempt:
    """One process's part of a trial."""

    def __init__(self, job: SearchJob, trial: Trial, path: Path, ask: Ask, begin: run.Begin | None) -> None:
        self.job, self.trial, self.path, self.ask, self.begin = job, trial, path, ask, begin
        self.began, self.before, self._waits = time.time(), 0.0, False

    def end(self) -> End:
        if self.begin is None:
            forget_peak()
        ended = self._ended()
        if ended.reason:
            print(f"{ended.how}: {ended.reason}", flush=True)
        step, facts = self._facts()
        if ended.how in ("finished", "stopped"):
            with suppress(MemoryError, RuntimeError):  # it is a fact less, no other end
                config = trial_config(self.job, self.trial)
                facts["adaptation_mflop"] = adaptation_mflop(config, run.checked_tables(config, print))
        return End(ended.how, step, ended.reason, facts)

    def _ended(self) -> _Ended:
        try:
            config = trial_config(self.job, self.trial)
            _wait_for_others(self.path)
            if (self.path / "config.yaml").is_file():
                self._hand_in(config)
                if self._waits:
                    return _Ended("paused", "")
                run.resume(self.path, _cluster_of(config), self.began, self._watch, self.begin)
            else:
                run.train(config, self.trial.id, self.path, self.began, self._watch, self.begin)
        except Stopped as end:
            return _Ended("paused" if self._waits else "stopped", str(end))
        except Divergence as error:
            return _Ended("diverged", str(error))
        except (ConfigError, DataError) as error:
            return _Ended("refused", str(error))
        except StorageError as error:
            raise StorageError(str(error.__cause__ or error)) from error  # without how to resume a single run
        except (Interrupted, Preempted):
            raise
        except MetadistError as error:
            return _Ended("failed", str(error))
        except Exception as error:
            traceback.print_exc()
            if isinstance(error, OSError) and error.errno in FULL:
                raise StorageError(str(error)) from error
            line = " ".join(str(error).split())[:300]
            return _Ended("memory" if _out_of_memory(error) else "crashed", f"{type(error).__name__}: {line}")
        return _Ended("finished", "")

    @property
    def seconds(self) -> float:
        """Of this process, and of those before it up to their last checkpoint."""
        return self.before + time.time() - self.began

    def _memory(self) -> dict[str, float]:
        """The peak where the trial is this process; that of workers, or of one trial of a pack, is not known here."""
        return {} if self.job.base.cluster.most or self.begin else peak_memory()

    def _watch(self, step: int, found: Mapping[str, Score]) -> None:
        score = found[self.job.measure.name]
        if not math.isfinite(score.mean):
            raise Divergence(f"the validation behind step {step} is {score.mean}")
        interval = {"ci95": score.ci95} if math.isfinite(score.ci95) else {}
        others = {name: one.mean for name, one in found.items() if math.isfinite(one.mean)}
        values = {"score": score.mean, **interval, **others, "seconds": self.seconds, **self._memory()}
        decision = self.ask(step, values)
        self._waits = decision == "pause"
        if decision != "go":
            raise Stopped(f"by {self.job.search.scheduler} behind {step} meta-steps")

    def _hand_in(self, config: Config) -> None:
        """Tell of the validations that a killed process had not told: the run goes on behind them."""
        there = newest_good(self.path / "checkpoints", print)
        if there is None:
            return
        snapshot, _, record = there
        self.before = record["seconds"]
        own = MEASURES[config.kind].name
        told = {report.step for report in self.trial.reports}
        for row in read_metrics(self.path / "metrics.parquet"):
            if f"val_{own}" in row and row["step"] <= snapshot.step and row["step"] not in told:
                mine = Score(row[f"val_{own}"], row.get("val_ci95", math.nan))
                loss = Score(row.get("val_loss", math.nan), row.get("val_loss_ci95", math.nan))
                self._watch(int(row["step"]), {own: mine, "loss": loss})
        paused = {report.step for report in self.trial.reports if report.decision == "pause"}
        self._waits = self.trial.released < snapshot.step and snapshot.step in paused

    def _facts(self) -> tuple[int, dict[str, Any]]:
        """Meta-steps that are kept, and what they were like."""
        rows = [row for row in read_metrics(self.path / "metrics.parquet") if "seconds" in row]
        config = self.job.base
        facts: dict[str, Any] = {"seconds": self.seconds, **self._memory()}
        if rows:
            facts["tasks_per_second"] = sum(row["seconds"] * row["tasks_per_second"] for row in rows) / sum(
                row["seconds"] for row in rows
            )
        found = newest_good(self.path / "checkpoints", print)
        if found is None:
            return 0, facts
        snapshot, best, record = found
        facts |= {name: record[name] for name in ("seconds", "reproducible")}
        if best is not None:
            facts["best"] = {"step": best.step, MEASURES[config.kind].name: best.score, "ci95": best.ci95}
        result = RunFolder(self.path).result()
        if result is not None:
            facts |= {"seconds": result["wall_seconds"]}
            facts |= {name: result[name] for name in ("theta_sha256", "numeric_fingerprint")}
        return snapshot.step, facts


def _wait_for_others(path: Path) -> None:
    """Until nobody trains in a run folder. Raises RunError."""
    until = time.monotonic() + OTHERS_SECONDS
    while (path / ".lock").is_file():
        with lock(path / ".lock", wait=False) as free:
            if free:
                return
        if time.monotonic() > until:
            raise RunError(f"{path}: another process is still training in it after {OTHERS_SECONDS:g} s")
        time.sleep(0.2)


def _cluster_of(config: Config) -> list[str]:
    """Where the trial computes now, as overrides: it may have begun elsewhere."""
    return [f"cluster.{key}={dumps(value)}" for key, value in config.cluster.model_dump(mode="json").items()]


def _out_of_memory(error: BaseException) -> bool:
    """Python's, torch's on a GPU and on the CPU, and Ray's of a worker."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
