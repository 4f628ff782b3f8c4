"""Same config, same seed, same bits: for any number of workers on a real cluster, and through what happens to them."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.errors import ClusterError, Divergence
from metadist.run import resume, train
from metadist.runtime.checkpoint import newest_good

pytestmark = pytest.mark.cluster

Make = Callable[..., Config]


@pytest.fixture
def on_cluster(tiny: Make, cluster: Any) -> Make:
    def make(workers: int, *overrides: str) -> Config:
        return tiny(f"cluster.workers={workers}", f"cluster.address={cluster.address}", *overrides)

    return make


def test_now_by_lines_now_by_ray(
    on_cluster: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls and sums of one step go either way, as where a worker on another machine comes and goes."""
    from metadist.runtime.pool import Pool

    drawn, ways, real = random.Random(0), list[bool](), Pool.lined
    assert real.fget is not None

    def some(self: Pool) -> bool:
        assert real.fget(self), "one machine: there are lines"
        ways.append(drawn.random() < 0.5)
        return ways[-1]

    monkeypatch.setattr(Pool, "lined", property(some))
    result = train(on_cluster(2), "tiny", tmp_path / "run").result
    assert {True, False} == set(ways)
    said = [line.split("talk by ")[1] for line in capsys.readouterr().err.splitlines() if "talk by" in line]
    assert {line.partition(":")[0] for line in said} == {"lines", "Ray"}
    assert all(before != after for before, after in pairwise(said)), "once for each change"
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["duplicates_dropped"] == result["shards_recomputed"] == 0
    assert sum(result["shards_by_worker"].values()) == 12 * 4


@pytest.mark.chaos
def test_by_ray_alone(on_cluster: Make, tiny_run: Any, tmp_path: Path) -> None:
    """Without lines."""
    result = train(on_cluster(2, "cluster.lines=false"), "tiny", tmp_path / "run").result
    assert result["transport"] == {"by": "Ray", "why": "cluster.lines=false"}
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"] == tiny_run.result["test"]


def test_a_large_theta_on_a_cluster_of_one_machine(on_cluster: Make, tiny: Make, tmp_path: Path) -> None:
    """Of 8 MB or more: by auto it is cut for several aggregators, but not where an only one is called by a line."""
    large = ("model.width=1500", "model.layers=2", "outer.steps=3", "eval.every=0", "eval.test=false")
    alone = train(tiny(*large), "large", tmp_path / "alone").result
    finished = train(on_cluster(2, *large), "large", tmp_path / "here")
    assert finished.result["transport"] == {"by": "lines", "why": "all of them are on this machine"}
    assert finished.result["theta_sha256"] == alone["theta_sha256"]
    assert alone["transport"] is None, "one process"
    assert "aggregators: auto" in (finished.folder / "config.yaml").read_text(), "wherever it ran"


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(workers: int, on_cluster: Make, tiny_run: Any, tmp_path: Path) -> None:
    result = train(on_cluster(workers), "tiny", tmp_path / "run").result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"] == tiny_run.result["test"]
    assert result["untrained"] == tiny_run.result["untrained"]
    assert result["best"] == tiny_run.result["best"]
    assert result["numeric_fingerprint"] == tiny_run.result["numeric_fingerprint"]
    assert result["workers"] == workers
    assert result["steps_recomputed"] == 0
    shards = result["shards_by_worker"]
    assert len(shards) == workers
    assert sum(shards.values()) == 12 * 4
    assert all(count > 0 for count in shards.values()), "every worker has some"
    assert all(int(pid) != os.getpid() for pid in shards)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


@pytest.mark.parametrize(
    "keys",
    [
        ("aggregators=2", "sums=tree"),
        *(pytest.param((k,), marks=pytest.mark.chaos) for k in ("sums=tree", "aggregators=3")),
    ],
    ids="+".join,
)
def test_any_way_of_the_sums(
    keys: tuple[str, ...], on_cluster: Make, half_run: Path, tiny_run: Any, cluster: Any
) -> None:
    """In pieces, or added on the node first; from where a run got in another way."""
    overrides = [f"cluster.{key}" for key in keys]
    result = resume(half_run, ["cluster.workers=2", f"cluster.address={cluster.address}", *overrides]).result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"] == tiny_run.result["test"]
    assert sum(result["shards_by_worker"].values()) == 4 * 4


@pytest.mark.chaos
def test_a_bound_that_is_exceeded(on_cluster: Make, tiny: Make, tmp_path: Path) -> None:
    """Step 0 begins again with coarser exponents, three times, while shards of the first attempts are on their way."""
    override = "algorithm.support_loss_weight=1e18"
    alone = train(tiny(override), "tiny", tmp_path / "alone").result
    assert alone["shards_recomputed"] > 0
    pieces = ("cluster.aggregators=2", "cluster.sums=tree")
    together = train(on_cluster(2, override, *pieces), "tiny", tmp_path / "together").result
    assert together["shards_recomputed"] > 0
    assert together["theta_sha256"] == alone["theta_sha256"]
    assert together["test"] == alone["test"]
    assert sum(together["shards_by_worker"].values()) == 12 * 4


@pytest.mark.chaos
def test_many_shards_in_several_calls_and_a_worker_killed_with_two(
    on_cluster: Make, tiny: Make, cluster: Any, find_processes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve shards a step: some calls are computed, some wait, some are handed out later; one worker dies with two."""
    many = ("task.meta_batch=24", "outer.steps=40", "checkpoint.every=5", "eval.every=0", "eval.test=false")
    alone = train(tiny(*many), "tiny", tmp_path / "alone").result
    run = tmp_path / "run"
    killer = kill_actor(cluster, find_processes, "Worker", lambda: (run / "checkpoints" / "step-10").exists())
    result = train(on_cluster(2, *many), "tiny", run).result
    killer.join(1)
    assert "of its shards are computed again" in capsys.readouterr().err, "it was killed while it was needed"
    assert result["theta_sha256"] == alone["theta_sha256"]
    assert sum(result["shards_by_worker"].values()) == 40 * 12


def test_a_call_of_which_one_shard_is_unusable(
    on_cluster: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the call counts, the shard is computed again, and nobody will know."""
    from metadist.runtime.on_ray import OnRay
    from metadist.runtime.pool import Shard

    real, changed = OnRay._take, []

    def take(self: OnRay, step: int, came: Any) -> None:
        if not changed and isinstance(came.items[0], Shard) and step == 3 and len(came.items) > 1:
            bad, *rest = came.items
            changed.append(bad)
            shards = [item.shard for item in rest]
            compute = self.pool.actor(came.worker).compute.options(num_returns=2)
            receipt, q = compute.remote(self._sums.broadcast[0], 3, 0, shards)
            came = came._replace(value=self.ray.get(receipt)._replace(not_finite=(bad.shard,)), sent=[q])
        real(self, step, came)

    monkeypatch.setattr(OnRay, "_take", take)
    result = train(on_cluster(2), "tiny", tmp_path / "run").result
    assert len(changed) == 1
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["shards_recomputed"] == 1
    assert sum(result["shards_by_worker"].values()) == 12 * 4


def test_a_loss_that_is_not_finite_is_computed_by_two_workers(on_cluster: Make, tmp_path: Path) -> None:
    with pytest.raises(Divergence, match="diverged at step 1:"):
        train(on_cluster(2, "outer.lr=1e30", "outer.optimizer=sgd"), "tiny", tmp_path / "run")
    found = newest_good(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step == 1


def test_a_defect_in_the_aggregator_is_no_loss_of_it(on_cluster: Make, tmp_path: Path) -> None:
    """What fails for a reason of its own fails again: it is told, and not tried for ever."""
    with pytest.raises(Exception, match="overflow"):
        train(on_cluster(1, "outer.weight_decay=1e300", "outer.optimizer=rmsprop"), "tiny", tmp_path / "run")


@pytest.mark.chaos
def test_a_resume_with_workers(on_cluster: Make, half_run: Path, tiny_run: Any, cluster: Any) -> None:
    """Begun in one process, ended by three workers."""
    result = resume(half_run, ["cluster.workers=3", f"cluster.address={cluster.address}"]).result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"] == tiny_run.result["test"]
    assert result["workers"] == 3
    assert result["reproducible"] is True


def kill_actor(cluster: Any, find: Callable[..., Any], name: str, when: Callable[[], Any]) -> threading.Thread:
    """Ends an actor's process as soon as a condition holds; one that is there already is another run's."""
    others = set(find(cluster.pid, f"ray::{name}"))

    def work() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if when() and (pids := [pid for pid in find(cluster.pid, f"ray::{name}") if pid not in others]):
                os.kill(pids[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.chaos
def test_a_killed_aggregator(
    on_cluster: Make, long_hash: str, long_overrides: tuple[str, ...], cluster: Any, find_processes: Any,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    killer = kill_actor(cluster, find_processes, "Aggregator", lambda: (run / "checkpoints" / "step-30").exists())
    result = train(on_cluster(2, *long_overrides), "long", run).result
    killer.join(1)
    assert "the aggregator" in capsys.readouterr().out, "it was killed while it was needed"
    assert result["theta_sha256"] == long_hash
    assert result["meta_steps"] == 150
    assert result["steps_recomputed"] >= 0


def test_each_worker_sees_its_own_gpu(tiny: Make, cluster: Any) -> None:
    """Logical GPUs: the devices that two workers see are one each, and different."""
    from metadist.runtime.on_ray import OnRay

    config = resolve(tiny("cluster.workers=2", f"cluster.address={cluster.address}"))
    config = config.with_values(cluster={"gpus": 1.0})  # engine.device stays cpu: there may be no real GPU here
    table = prepare(config.data.sources[0])
    runtime = OnRay(config, [table], None, print)
    try:
        seen = [runtime.ray.get(actor.introduce.remote()).gpus for actor in runtime.pool.actors.values()]
    finally:
        runtime.close()
    assert sorted(seen) == [("0",), ("1",)]


def test_more_workers_than_the_cluster_can_hold(on_cluster: Make, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.workers: 9 workers.*at most 3 workers are valid"):
        train(on_cluster(9), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workers_with_other_bits_than_before_the_resume_are_told(
    on_cluster: Make, half_run: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe shard of the run's record is another one: the run goes on, and promises nothing any more."""
    import metadist.run

    real = metadist.run.newest_good

    def other(*arguments: Any) -> Any:
        snapshot, best, record = real(*arguments)
        return snapshot, best, {**record, "fingerprint": {**record["fingerprint"], "probe": "0" * 64}}

    monkeypatch.setattr(metadist.run, "newest_good", other)
    result = resume(half_run, ["cluster.workers=1", f"cluster.address={cluster.address}"]).result
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(told) == 1
    assert f"probe {result['numeric_fingerprint']['probe']} instead of {'0' * 64}" in told[0]
    assert result["reproducible"] is False


def test_a_worker_with_other_bits_than_its_run_is_refused(on_cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker to introduce itself shows another probe: it gets no work, and the line says why."""
    from metadist.data.sources import prepare
    from metadist.runtime.on_ray import OnRay
    from metadist.runtime.pool import Pool

    real, arrived, said = Pool._arrived, [], []

    def other(self: Pool, name: str, introduction: Any, *place: Any) -> None:
        arrived.append(name)
        real(self, name, introduction._replace(probe="0" * 64) if len(arrived) == 2 else introduction, *place)

    monkeypatch.setattr(Pool, "_arrived", other)
    config = resolve(on_cluster(2))
    runtime = OnRay(config, [prepare(config.data.sources[0])], None, said.append)
    try:
        assert len(arrived) == 2
        assert runtime.workers == 1
        said = [line for line in said if not line.startswith("waiting for workers")]  # a busy machine takes its time
        assert len(said) == 1
        assert said[0].startswith("refused a worker on")
        assert f"probe {'0' * 64} instead of" in said[0]
        runtime.begin(0)
        runtime.finish(0)
        assert len(runtime.counts().shards) == 1
    finally:
        runtime.close()


def test_nothing_stays_on_the_cluster(cluster: Any, find_processes: Any, wait_until: Any) -> None:
    """After all the runs of this file, the ones that failed too."""
    for name in ("ray::Worker", "ray::Aggregator"):
        wait_until(lambda name=name: not find_processes(cluster.pid, name), 20, f"the end of every {name}")
