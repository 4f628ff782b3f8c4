"""A trial is a run: same bits as `metadist train`; whatever happens to it ends in one `End`."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metadist.run
from metadist.config import Config
from metadist.data.sources import prepare
from metadist.durable import lock
from metadist.errors import StorageError
from metadist.methods import every_method
from metadist.runtime.journal import read_metrics
from metadist.runtime.run_folder import RunFolder
from metadist.search.costs import adaptation_mflop, forget_peak, peak_memory
from metadist.search.job import SearchJob, checked
from metadist.search.state import End, Report, Trial
from metadist.search.trial import run_trial, trial_config

SPACE = {"algorithm.inner_lr": {"loguniform": [0.01, 1e38]}, "algorithm.inner_steps": {"choice": [1, 2]}}


@pytest.fixture(scope="module")
def job(tiny: Callable[..., Config]) -> SearchJob:
    raw = tiny("outer.steps=9", "eval.every=3", "eval.val_episodes=4", "task.meta_batch=4").model_dump()
    return checked(raw | {"search": {"space": SPACE, "trials": 4}}, "job")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("trials", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def a_trial(reports: list[Report] | None = None, **values: float) -> Trial:
    point = {key.replace("__", "."): value for key, value in values.items()}
    return Trial("001", 1, "random", point, reports=reports or [])


class Killed(BaseException):
    """What nobody catches."""


class Heard:
    """Answers `go` until a step, then `stop`; dies at one, as the process that waits there would."""

    def __init__(self, stop_at: int = 10**6, die_at: int = 10**6) -> None:
        self.stop_at, self.die_at = stop_at, die_at
        self.told: list[tuple[int, dict[str, float]]] = []

    def __call__(self, step: int, values: dict[str, float]) -> Any:
        if step >= self.die_at:
            raise Killed
        self.told.append((step, values))
        return "stop" if step >= self.stop_at else "go"

    @property
    def scores(self) -> list[tuple[int, float]]:
        return [(step, values["score"]) for step, values in self.told]


@pytest.fixture(scope="module")
def alone(job: SearchJob, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trial's config, trained by itself."""
    return metadist.run.train(
        job.config({"algorithm.inner_lr": 0.3}), "alone", tmp_path_factory.mktemp("alone") / "run"
    )


def test_same_bits_as_training_alone(job: SearchJob, folder: Path, alone: Any) -> None:
    heard = Heard()
    end = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, heard)
    assert (end.how, end.step, end.reason) == ("finished", 9, "")
    assert end.facts["theta_sha256"] == alone.result["theta_sha256"]
    assert end.facts["best"] == alone.result["best"]
    assert end.facts["tasks_per_second"] > 0 and end.facts["seconds"] > 0
    rows = {
        row["step"]: row["val_accuracy"]
        for row in read_metrics(alone.folder / "metrics.parquet")
        if "val_accuracy" in row
    }
    assert heard.scores == sorted(rows.items()) and len(rows) == 3
    assert {"score", "ci95", "seconds", "peak_memory"} <= heard.told[0][1].keys()
    assert alone.result["test"] and not RunFolder(folder / "trials" / "001").result()["test"], "no trial sees meta-test"
    assert "meta-step 9/9" in (folder / "logs" / "001.log").read_text()


def test_the_metric_is_what_is_told(job: SearchJob, folder: Path) -> None:
    """The loss where it is searched by; of a killed process too. The measure is told beside it."""
    by_loss = job._replace(search=job.search.model_copy(update={"metric": "loss"}))
    with pytest.raises(Killed):
        run_trial(by_loss, a_trial(algorithm__inner_lr=0.3), folder, Heard(die_at=3))
    heard = Heard()
    run_trial(by_loss, a_trial(algorithm__inner_lr=0.3), folder, heard)
    rows = [row for row in read_metrics(folder / "trials" / "001" / "metrics.parquet") if "val_loss" in row]
    assert [values["score"] for _, values in heard.told] == [row["val_loss"] for row in rows]
    assert [values["accuracy"] for _, values in heard.told] == [row["val_accuracy"] for row in rows]
    assert len(rows) == 3 and [values["ci95"] for _, values in heard.told] == [row["val_loss_ci95"] for row in rows]


def test_stop_leaves_nothing_behind(job: SearchJob, folder: Path) -> None:
    before = threading.active_count()
    end = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard(stop_at=3))
    assert (end.how, end.step) == ("stopped", 3) and "behind 3 meta-steps" in end.reason
    assert end.facts["best"]["step"] == 3 and end.facts["adaptation_mflop"] > 0
    assert threading.active_count() == before
    with lock(folder / "trials" / "001" / ".lock", wait=False) as free:
        assert free
    assert not (folder / "trials" / "001" / "result.json").exists()


@pytest.mark.parametrize(("reported", "kept"), [(0, 9), (1, 6), (2, 9)])
def test_what_was_not_told_before_a_kill_is_told_first(
    job: SearchJob, folder: Path, alone: Any, reported: int, kept: int
) -> None:
    """Killed between the checkpoint behind step 9 or 6 and the report, with some of the reports in the ledger."""
    first = Heard(die_at=9)
    with pytest.raises(Killed):
        run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, first)
    assert [step for step, _ in first.told] == [3, 6]
    for step in range(kept + 1, 10):
        shutil.rmtree(folder / "trials" / "001" / "checkpoints" / f"step-{step}", ignore_errors=True)
    known = [Report(step, values, "go") for step, values in first.told[:reported]]
    heard = Heard()
    end = run_trial(job, a_trial(known, algorithm__inner_lr=0.3), folder, heard)
    whole = [row for row in read_metrics(alone.folder / "metrics.parquet") if "val_accuracy" in row]
    assert heard.scores == [(row["step"], row["val_accuracy"]) for row in whole][reported:]
    assert end.facts["theta_sha256"] == alone.result["theta_sha256"]


def test_stop_is_decided_on_what_was_not_told(job: SearchJob, folder: Path) -> None:
    with pytest.raises(Killed):
        run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard(die_at=3))
    end = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard(stop_at=3))
    assert (end.how, end.step) == ("stopped", 3), "nothing further was trained"


def test_a_finished_trial_whose_end_was_not_recorded(job: SearchJob, folder: Path) -> None:
    first = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard())
    heard = Heard()
    again = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, heard)
    assert [step for step, _ in heard.told] == [3, 6, 9]
    assert again.how == "finished" and again.facts["theta_sha256"] == first.facts["theta_sha256"]


def test_divergence_is_an_end(job: SearchJob, folder: Path) -> None:
    end = run_trial(job, a_trial(algorithm__inner_lr=1e38, algorithm__inner_steps=2), folder, Heard())
    assert end.how == "diverged" and "not finite" in end.reason and "\n" not in end.reason


def test_what_cannot_be_run_is_refused(job: SearchJob, folder: Path) -> None:
    end = run_trial(job, a_trial(algorithm__inner_lr=-1.0), folder, Heard())
    assert end.how == "refused" and "algorithm.inner_lr" in end.reason and end.step == 0


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (MemoryError("no more"), "memory"),
        (RuntimeError("[enforce fail] can't allocate memory"), "memory"),
        (ValueError("a\nb"), "crashed"),
    ],
)
def test_a_defect_is_an_end_with_its_traceback(error: Exception, how: str, job: SearchJob, folder: Path) -> None:
    def ask(step: int, values: dict[str, float]) -> Any:
        raise error

    end = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, ask)
    assert end == End(how, 3, end.reason, end.facts) and type(error).__name__ in end.reason and "\n" not in end.reason
    assert "Traceback" in (folder / "logs" / "001.log").read_text()


def test_a_full_disk_is_not_the_trials_fault(job: SearchJob, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("disk: cannot be written: No space left on device")

    monkeypatch.setattr("metadist.runtime.train.save_checkpoint", full)
    with pytest.raises(StorageError, match=r"No space left on device$"):
        run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard())


def test_waits_for_a_process_that_is_still_ending(
    job: SearchJob, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard(stop_at=3))
    other = RunFolder.open(folder / "trials" / "001")
    monkeypatch.setattr("metadist.search.trial.OTHERS_SECONDS", 0.1)
    end = run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard())
    assert end.how == "failed" and "still training" in end.reason
    monkeypatch.setattr("metadist.search.trial.OTHERS_SECONDS", 30.0)
    threading.Timer(0.3, other.unlock).start()
    assert run_trial(job, a_trial(algorithm__inner_lr=0.3), folder, Heard()).how == "finished"


def test_a_trial_is_kept_behind_each_validation(job: SearchJob) -> None:
    config = trial_config(job, a_trial(algorithm__inner_lr=0.3))
    assert config.checkpoint.every == config.eval.every == 3
    assert (config.tracking.uri, config.eval.test, config.cluster.linger) == ("off", False, 0.0)


def test_the_peak_is_the_trials_own() -> None:
    """In a process that used much more memory before."""
    forget_peak()
    before = peak_memory()["peak_memory"]
    much = np.ones(2**25)  # 256 MiB
    assert peak_memory()["peak_memory"] >= before + 250
    del much
    forget_peak()
    assert peak_memory()["peak_memory"] < before + 64


def test_arithmetic_of_an_adaptation_grows_with_its_steps(tiny: Callable[..., Config]) -> None:
    config = tiny()
    tables = metadist.run.checked_tables(config, print)
    one, five = (adaptation_mflop(config.with_values(algorithm={"inner_steps": steps}), tables) for steps in (1, 5))
    assert five == pytest.approx(5 * one) and one > 0
    assert adaptation_mflop(config, tables) == one, "the same every time"


FURTHER = {"task-conditioned": ["task.within_group=true"], "imaml": ["algorithm.inner_steps=3"]}


@pytest.mark.parametrize("name", [method.method_name() for method in every_method()])
def test_arithmetic_of_every_method(name: str, tiny: Callable[..., Config]) -> None:
    config = tiny(f"algorithm.name={name}", *FURTHER.get(name, []))
    assert adaptation_mflop(config, [prepare(source) for source in config.data.sources]) >= 0.0
