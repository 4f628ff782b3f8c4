"""Real signals to workers and aggregator, at chosen steps: the bits stay, and the stalls are told."""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injuries import kill, living_workers, longest_gap, slowed

from metadist.config import Config
from metadist.run import train
from metadist.runtime.journal import read_metrics

pytestmark = pytest.mark.cluster

Make = Callable[..., Config]
SLOW = (
    "task.meta_batch=16", "algorithm.inner_steps=8", "outer.steps=40", "checkpoint.every=20", "eval.every=0",
    "eval.test=false",
)  # fmt: skip
"""Eight shards a step, four for each of two workers."""


@pytest.fixture
def two_workers(cluster: Any) -> tuple[str, str]:
    return ("cluster.workers=2", f"cluster.address={cluster.address}")


@pytest.fixture(scope="module")
def slow_hash(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """θ of the slow run that nobody disturbed."""
    return train(tiny(*SLOW), "slow", tmp_path_factory.mktemp("slow") / "run").result["theta_sha256"]


def test_one_worker_killed_then_all_of_them(
    tiny: Make, long_overrides: tuple[str, ...], long_hash: str, two_workers: tuple[str, str], before_step: Any,
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With one left the run hardly stops; with none it stops for as long as a worker takes to start."""
    from metadist.runtime.pool import Pool

    arrived: list[float] = []
    real = Pool._arrived

    def noted(self: Any, name: str, *introduced: Any) -> None:
        arrived.append(time.time())
        real(self, name, *introduced)

    monkeypatch.setattr(Pool, "_arrived", noted)
    killed: list[int] = []

    def all_of_them(runtime: Any) -> None:
        killed.extend(living_workers(runtime))
        kill(*killed)

    done = before_step(
        {30: lambda runtime: kill(living_workers(runtime)[0]), 80: lambda runtime: None, 90: all_of_them}
    )
    run = tmp_path / "run"
    result = train(tiny(*long_overrides, *two_workers), "long", run).result
    assert result["theta_sha256"] == long_hash
    assert result["steps_recomputed"] == 0, "no step is lost with a worker"
    assert sum(result["shards_by_worker"].values()) == 150 * 4, "each shard is counted once"
    assert [row["step"] for row in read_metrics(run / "metrics.parquet")] == list(range(1, 151))
    assert killed, "there was a second time"
    first = longest_gap(run, done[30], done[80])
    restart = next(at for at in arrived if at > done[90]) - done[90]
    second = longest_gap(run, done[90])
    measured("SIGKILL of one worker of two", first)
    measured("SIGKILL of all workers", second, f"of which a new worker's start took {restart:.2f} s")
    assert second - restart < 3


def test_a_frozen_worker_is_worked_around_and_its_late_results_are_dropped(
    tiny: Make, slow_hash: str, two_workers: tuple[str, str], before_step: Any, measured: Any, tmp_path: Path
) -> None:
    """SIGSTOP with four shards each, SIGCONT twelve steps later."""
    frozen: list[int] = []

    def freeze(runtime: Any) -> None:
        frozen.append(living_workers(runtime)[0])
        os.kill(frozen[0], signal.SIGSTOP)

    def thaw(runtime: Any) -> None:
        os.kill(frozen[0], signal.SIGCONT)

    before_step({16: freeze, 28: thaw})
    run = tmp_path / "run"
    result = train(tiny(*SLOW, *two_workers), "slow", run).result
    assert result["theta_sha256"] == slow_hash
    assert result["duplicates_dropped"] > 0, "what it computed after it was thawed came too late"
    assert sum(result["shards_by_worker"].values()) == 40 * 8
    seconds = [row["seconds"] for row in read_metrics(run / "metrics.parquet")]
    alone, frozen_step = statistics.median(seconds[20:28]), max(seconds[16:18])
    ratio = frozen_step / alone
    measured("SIGSTOP of one worker of two", frozen_step, f"{ratio:.2f} × a step of the other one alone")
    assert frozen_step < max(5.0, 5 * alone), "without copies it would last for ever"


@pytest.mark.chaos
def test_a_worker_ten_times_slower_is_worked_around_and_its_late_results_are_dropped(
    tiny: Make, slow_hash: str, two_workers: tuple[str, str], before_step: Any, measured: Any, tmp_path: Path
) -> None:
    """For fourteen steps it runs for a tenth of the time; for ten more not at all, for what the other needs alone."""
    run = tmp_path / "run"
    with contextlib.ExitStack() as slowing:
        pids: list[int] = []

        def slow_down(runtime: Any) -> None:
            pids.append(living_workers(runtime)[0])
            slowing.enter_context(slowed(pids[0], 0.1))

        def freeze(runtime: Any) -> None:
            slowing.close()
            os.kill(pids[0], signal.SIGSTOP)

        before_step({10: slow_down, 24: freeze, 34: lambda runtime: os.kill(pids[0], signal.SIGCONT)})
        try:
            result = train(tiny(*SLOW, *two_workers), "slow", run).result
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    assert result["theta_sha256"] == slow_hash
    assert result["duplicates_dropped"] > 0, "what others had computed meanwhile came too late"
    assert sum(result["shards_by_worker"].values()) == 40 * 8
    seconds = [row["seconds"] for row in read_metrics(run / "metrics.parquet")]
    alone, slow, longest = statistics.median(seconds[27:34]), statistics.median(seconds[11:24]), max(seconds[11:24])
    told = f"{slow / alone:.2f} × a step of the other one alone at the median, {longest / alone:.2f} × at most"
    measured("one worker of two 10 × slower", longest, told)
    assert slow < 2.5 * alone, "without copies it would be 3.75 times"


@pytest.mark.parametrize("places", [
    {55: "during"}, pytest.param({23: "before", 55: "during", 87: "after"}, marks=pytest.mark.chaos),
], ids=lambda places: "+".join(places.values()))  # fmt: skip
def test_the_aggregator_killed_before_during_and_after_an_outer_step(
    places: dict[int, str],
    tiny: Make, long_overrides: tuple[str, ...], long_hash: str, two_workers: tuple[str, str], cluster: Any,
    find_processes: Callable[..., list[int]], measured: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once each in one run, with ten steps between checkpoints."""
    from metadist.runtime.on_ray import OnRay

    real = OnRay.apply
    killed: dict[int, tuple[str, float]] = {}

    def apply(self: Any, step: int) -> Any:
        place = places.get(step)
        if place is None or step in killed:
            return real(self, step)
        killed[step] = (place, time.time())
        (aggregator,) = find_processes(cluster.pid, "ray::Aggregator")
        if place == "before":
            kill(aggregator)
        if place == "during":  # it is asked, and does not come to an end of it
            os.kill(aggregator, signal.SIGSTOP)
        later = real(self, step)
        if place == "during":
            kill(aggregator)
        if place == "after":
            assert self.ray.get(self._sums.broadcast[0]).step == step + 1, "the step was applied"
            kill(aggregator)
        return later

    monkeypatch.setattr(OnRay, "apply", apply)
    run = tmp_path / "run"
    result = train(tiny(*long_overrides, *two_workers), "long", run).result
    assert len(killed) == len(places)
    assert result["theta_sha256"] == long_hash
    assert [row["step"] for row in read_metrics(run / "metrics.parquet")] == list(range(1, 151)), "once each"
    assert 0 < result["steps_recomputed"] <= len(places) * 10, "at most checkpoint.every for each loss"
    for place, at in killed.values():
        measured(f"aggregator killed {place} an outer step", longest_gap(run, at, at + 0.01))


@pytest.mark.chaos
@pytest.mark.parametrize("sums", ["flat", "tree"])
def test_an_aggregator_that_stands_still_is_replaced(
    sums: str, tiny: Make, long_overrides: tuple[str, ...], long_hash: str, two_workers: tuple[str, str],
    cluster: Any, find_processes: Callable[..., list[int]], before_step: Any, measured: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """SIGSTOP, for ever; with a tree the sum of a node as well, later."""

    def freeze(actor: str) -> Callable[[Any], None]:
        def now(_: Any) -> None:
            (pid,) = find_processes(cluster.pid, actor)
            os.kill(pid, signal.SIGSTOP)

        return now

    deeds = {37: freeze("ray::Aggregator")} | ({95: freeze("ray::Combiner")} if sums == "tree" else {})
    done = before_step(deeds)
    run = tmp_path / "run"
    keys = ("cluster.silence=3", f"cluster.sums={sums}")
    result = train(tiny(*long_overrides, *two_workers, *keys), "long", run).result
    assert capsys.readouterr().err.count("stood still; it is ended") == len(deeds)
    assert result["theta_sha256"] == long_hash
    assert 0 < result["steps_recomputed"] <= 10
    measured(f"aggregator stopped for ever, noticed after 3 s ({sums})", longest_gap(run, done[37], done[37] + 0.01))
