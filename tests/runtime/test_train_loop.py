"""The training loop when its aggregator is lost, its disk slow or its loss not finite; all in one process."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import metadist.run
from metadist.config import Config
from metadist.errors import Divergence
from metadist.run import train
from metadist.runtime import checkpoint
from metadist.runtime.aggregator import Snapshot
from metadist.runtime.checkpoint import newest_good
from metadist.runtime.in_process import InProcess
from metadist.runtime.journal import read_metrics
from metadist.runtime.runtime import AggregatorLost, Later

Make = Callable[..., Config]


class Losing(InProcess):
    """Loses its aggregator once, at the named place."""

    place, at = "", 0
    lost = False

    def _lose(self, place: str, step: int) -> None:
        if (place, step) == (self.place, self.at) and not self.lost:
            self.lost = True
            raise AggregatorLost(f"step {step}: the aggregator was lost: a test")

    def finish(self, step: int) -> None:
        self._lose("finish", step)
        super().finish(step)

    def apply(self, step: int) -> Later:
        report = super().apply(step)()

        def later() -> Any:
            self._lose("apply", step)
            return report

        return later

    def snapshot(self) -> Callable[[], Snapshot]:
        step, taken = self.aggregator.step, super().snapshot()()

        def later() -> Snapshot:
            self._lose("snapshot", step)
            return taken

        return later

    def judge(self, *arguments: Any) -> Any:
        self._lose("judge", self.aggregator.step)
        return super().judge(*arguments)

    def restart(self, snapshot: Snapshot | None) -> None:
        assert self.lost
        super().restart(snapshot)


PLACES = {
    "before-any-checkpoint": ("finish", 2, 2),
    "in-a-step": ("finish", 9, 1),
    "right-behind-a-checkpoint": ("finish", 8, 0),
    "in-the-outer-step": ("apply", 6, 1),
    "in-the-last-outer-step": ("apply", 11, 3),
    "in-a-checkpoint": ("snapshot", 8, 4),  # checkpoint.every: how far the loop gets meanwhile is the writer's speed
    "in-the-last-checkpoint": ("snapshot", 12, 4),
    "in-a-validation": ("judge", 6, 2),
}


@pytest.mark.parametrize(("place", "at", "most"), PLACES.values(), ids=PLACES)
def test_a_lost_aggregator_costs_steps_but_no_bits(
    place: str, at: int, most: int, tiny: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = type("Losing", (Losing,), {"place": place, "at": at})
    monkeypatch.setattr(metadist.run, "InProcess", losing)
    result = train(tiny(), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"] == tiny_run.result["test"]
    assert 0 <= result["steps_recomputed"] <= most
    rows = read_metrics(tmp_path / "run" / "metrics.parquet")
    before = read_metrics(tiny_run.folder / "metrics.parquet")
    assert [row["step"] for row in rows] == list(range(1, 13))
    same = ("loss", "accuracy", "grad_norm", "val_accuracy")
    assert [[row.get(name) for name in same] for row in rows] == [[row.get(name) for name in same] for row in before]


def test_an_aggregator_lost_while_its_checkpoint_is_taken_is_told_once(
    tiny: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing thread and the loop both meet the loss; the loop goes back once."""

    class Both(InProcess):
        failures = 0
        met = threading.Event()

        def snapshot(self) -> Callable[[], Snapshot]:
            taken = super().snapshot()
            if self.aggregator.step != 8 or self.failures:
                return taken

            def later() -> Snapshot:
                self.met.set()
                raise AggregatorLost("lost")

            return later

        def finish(self, step: int) -> None:
            if step == 8 and not self.failures:
                self.failures += 1
                assert self.met.wait(10)
                time.sleep(0.1)
                raise AggregatorLost("lost")
            super().finish(step)

    monkeypatch.setattr(metadist.run, "InProcess", Both)
    result = train(tiny(), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]


class OnceNaN(InProcess):
    """A worker that gives nonsense once: computed again, and nobody will know."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        compute, calls = self.worker.compute, []

        def sometimes(broadcast: Any, step: int, attempt: int, shards: Sequence[int]) -> Any:
            calls.append(shards)
            if len(calls) != 4:
                return compute(broadcast, step, attempt, shards)
            bad = shards[1]
            receipt, q = compute(broadcast, step, attempt, [shard for shard in shards if shard != bad])
            return receipt._replace(not_finite=(bad,)), q

        self.worker.compute = sometimes  # type: ignore[method-assign]


def test_one_unusable_result_changes_nothing(
    tiny: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadist.run, "InProcess", OnceNaN)
    result = train(tiny(), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["shards_recomputed"] == 1


DIVERGING = {
    "inner": (["algorithm.inner_lr=1e30"], 0),
    "outer": (["outer.lr=1e30", "outer.optimizer=sgd", "checkpoint.every=1"], 1),
}


@pytest.mark.parametrize(("overrides", "step"), DIVERGING.values(), ids=DIVERGING)
def test_divergence_keeps_the_state_before_it(overrides: list[str], step: int, tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(Divergence, match=f"diverged at step {step}:") as told:
        train(tiny(*overrides), "tiny", tmp_path / "run")
    assert str(tmp_path / "run" / "checkpoints" / f"step-{step}") in str(told.value)
    found = newest_good(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step == step
    assert all(np.isfinite(value).all() for value in found[0].values.values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_parameters_that_overflow_in_the_outer_step(tiny: Make, tmp_path: Path) -> None:
    """Every gradient is finite, θ is not: no such state is kept, and the one before it is."""
    overrides = (
        "outer.optimizer=sgd", "outer.lr=1e38", "algorithm.support_loss_weight=1e6", "checkpoint.every=1",
    )  # fmt: skip
    with pytest.raises(Divergence, match="step 0") as told:
        train(tiny(*overrides), "tiny", tmp_path / "run")
    assert "\n" not in str(told.value)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/state.safetensors"):
        assert all(np.isfinite(value).all() for value in load_file(path).values())


def test_checkpoints_are_written_one_after_the_other(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk still writes step 1 when step 1's shards diverge: the last good state must wait for it."""
    real, busy = checkpoint.write_folder, threading.Lock()

    def slow(path: Path, files: dict[str, bytes]) -> None:
        assert busy.acquire(blocking=False), "two threads write checkpoints"
        time.sleep(0.3)
        real(path, files)
        busy.release()

    monkeypatch.setattr(checkpoint, "write_folder", slow)
    with pytest.raises(Divergence):
        train(tiny(*DIVERGING["outer"][0]), "tiny", tmp_path / "run")
    assert newest_good(tmp_path / "run" / "checkpoints", pytest.fail)[0].step == 1


def test_a_second_run_in_the_same_process_is_not_kept_out_by_a_failed_one(tiny: Make, tmp_path: Path) -> None:
    """A search trains many in one process: a lock must not outlive its run."""
    from metadist.runtime.run_folder import RunFolder

    with pytest.raises(Divergence):
        train(tiny(*DIVERGING["inner"][0]), "tiny", tmp_path / "run")
    RunFolder.open(tmp_path / "run").unlock()


OVERFLOWING = ("algorithm.support_loss_weight=1e9", "algorithm.support_loss_weight=1e18")


def test_a_bound_that_is_exceeded_is_met_in_a_real_run(tiny: Make, tmp_path: Path) -> None:
    """Step 0 does not fit its exponents, once or three times; each of its shards is still counted once."""
    recomputed = []
    for number, override in enumerate(OVERFLOWING):
        result = train(tiny(override), "tiny", tmp_path / str(number)).result
        recomputed.append(result["shards_recomputed"])
        assert list(result["shards_by_worker"].values()) == [48]
        assert result["steps_recomputed"] == 0
    assert 0 < recomputed[0] < recomputed[1]
