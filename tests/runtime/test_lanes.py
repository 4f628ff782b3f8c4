"""What lanes carry: handed over, kept, put back; and with it the same bits, whatever happens."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import metadist.run
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.run import resume, train
from metadist.runtime.in_process import InProcess
from metadist.runtime.journal import read_metrics
from metadist.runtime.lanes import Lanes, carried
from metadist.runtime.runtime import AggregatorLost

Make = Callable[..., Config]

DILOCO = (
    "task.meta_batch=2", "task.shard=1", "outer.local={steps: 2, replicas: 3, optimizer: adamw, lr: 0.003}",
    "outer.optimizer=sgd", "outer.lr=0.7", "outer.momentum=0.9", "outer.nesterov=true",
)  # fmt: skip
MODES = {
    "bf16": ("outer.compression=bf16",),
    "int8": ("outer.compression=int8",),
    "topk": ("outer.compression=topk", "outer.topk=0.05"),
    "local": DILOCO,
    "local-bf16": (*DILOCO, "outer.compression=bf16"),
    "local-topk": (*DILOCO, "outer.compression=topk", "outer.topk=0.1"),
}
SHORT = ("eval.every=0", "eval.test=false", "checkpoint.every=4")


@pytest.fixture(scope="session")
def calm(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The undisturbed run of a mode in one process; computed once."""
    known: dict[tuple[str, ...], Any] = {}

    def run(*overrides: str) -> Any:
        if overrides not in known:
            known[overrides] = train(tiny(*SHORT, *overrides), "calm", tmp_path_factory.mktemp("calm") / "run")
        return known[overrides]

    return run


def runtime_of(config: Config) -> InProcess:
    config = resolve(config)
    return InProcess(config, [prepare(config.data.sources[0])], None)


# --- bookkeeping -----------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5))
def test_a_lane_goes_one_step_at_a_time(order: list[list[int]]) -> None:
    """Results in any order, some of them repeated: the state behind step t is that of t steps."""
    lanes = Lanes([(lane, 0) for lane in range(4)])
    for step, results in enumerate(order):
        for lane in [*results, 0, 1, 2, 3]:
            ((_, before),) = lanes.of([lane])
            assert before == step, "what is computed for a step that is not taken changes nothing"
            lanes.computed([lane], [(lane, before + 1)])
        lanes.advance()
    assert lanes.of(range(4)) == [(lane, len(order)) for lane in range(4)]


def test_a_step_is_taken_with_all_its_lanes() -> None:
    lanes = Lanes(["a", "b"])
    lanes.computed([1], ["c"])
    with pytest.raises(KeyError):
        lanes.advance()


def test_lanes_that_carry_nothing_cost_nothing(tiny: Make) -> None:
    for mode in ((), MODES["bf16"]):
        lanes = Lanes(carried(resolve(tiny(*mode)), None))
        assert lanes.of([0, 1]) == []
        lanes.computed([0, 1], [])
        lanes.advance()
        assert lanes.states == []


# --- runs in one process -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["bf16", "int8", "local", "local-topk"])
def test_a_resumed_run(mode: str, calm: Any, tmp_path: Path) -> None:
    """As a kill behind step 8 would have left it: to the same bits, and lanes that are lost would show."""
    done = calm(*MODES[mode])
    run = Path(shutil.copytree(done.folder, tmp_path / "run"))
    for gone in ("result.json", "theta.safetensors"):
        (run / gone).unlink()
    shutil.rmtree(run / "checkpoints" / "step-12")
    kept = load_file(run / "checkpoints" / "step-8" / "state.safetensors")
    lanes = {name for name in kept if name.startswith("lane.")}
    assert bool(lanes) is (mode != "bf16")
    if "topk" in mode:
        assert {"lane.0.residual.fc1.weight", "lane.2.residual.head.bias"} <= lanes
    if "local" in mode:
        assert {"lane.0.memory.exp_avg.fc1.weight", "lane.2.memory.step"} <= lanes
    found = resume(run, []).result
    assert found["theta_sha256"] == done.result["theta_sha256"]
    assert found["bytes_per_step"] == done.result["bytes_per_step"]


@pytest.mark.parametrize("mode", ["int8", "local"])
def test_lanes_that_are_forgotten_would_show(
    mode: str, calm: Any, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(InProcess):
        def begin(self, step: int) -> None:
            self._lanes = Lanes(carried(self.config, None))

    expected = calm(*MODES[mode]).result
    monkeypatch.setattr(metadist.run, "InProcess", Forgetful)
    found = train(tiny(*SHORT, *MODES[mode]), "tiny", tmp_path / "run").result
    assert found["theta_sha256"] != expected["theta_sha256"]


@pytest.mark.parametrize("mode", ["topk", "local-topk"])
def test_a_lost_aggregator(mode: str, calm: Any, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(InProcess):
        lost = False

        def finish(self, step: int) -> None:
            super().finish(step)
            if step == 10 and not self.lost:
                self.lost = True
                raise AggregatorLost("a test")

    expected = calm(*MODES[mode]).result
    monkeypatch.setattr(metadist.run, "InProcess", Losing)
    found = train(tiny(*SHORT, *MODES[mode]), "tiny", tmp_path / "run").result
    assert found["theta_sha256"] == expected["theta_sha256"]
    assert found["steps_recomputed"] == 2


def test_an_unusable_result_and_its_lane_are_computed_again(
    calm: Any, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnceNaN(InProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            compute, calls = self.worker.compute, []

            def sometimes(broadcast: Any, step: int, attempt: int, shards: Sequence[int], *lanes: Any) -> Any:
                calls.append(shards)
                if len(calls) != 4:
                    return compute(broadcast, step, attempt, shards, *lanes)
                bad = shards[-1]
                receipt, q, *after = compute(broadcast, step, attempt, shards[:-1], *lanes[:-1])
                return receipt._replace(not_finite=(bad,)), q, *after, {"residual.fc1.weight": np.float32(np.nan)}

            self.worker.compute = sometimes  # type: ignore[method-assign]

    expected = calm(*MODES["int8"]).result
    monkeypatch.setattr(metadist.run, "InProcess", OnceNaN)
    found = train(tiny(*SHORT, *MODES["int8"]), "tiny", tmp_path / "run").result
    assert found["theta_sha256"] == expected["theta_sha256"]
    assert found["shards_recomputed"] == 1


@pytest.mark.parametrize("mode", ["int8", "local"])
def test_a_step_done_again_moves_its_lanes_once(mode: str, tiny: Make) -> None:
    """Step 0 exceeds its bound and begins again: every lane carries what one computation of the step leaves."""
    config = tiny(
        *MODES[mode], "algorithm.support_loss_weight=1e18", "outer.local.lr=1e9" if mode == "local" else "seed=1"
    )
    runtime = runtime_of(config)
    values = runtime.aggregator.broadcast().values.copy()
    runtime.begin(0)
    runtime.finish(0)
    assert runtime.counts().recomputed > 0
    before = runtime.snapshot()().lanes
    assert before == ({},) * len(before), "and they move with the step only"
    runtime.apply(0)
    engine: Engine = runtime.worker.engine
    coarse = np.full(len(engine.blueprint.sums.names), -100)
    for number, lane in enumerate(runtime.snapshot()().lanes):
        _, expected = engine.sent(values, coarse, 0, number, {})
        assert lane.keys() == expected.keys()
        assert all(lane[name].tobytes() == value.tobytes() for name, value in expected.items())


def test_bytes_are_those_that_were_sent(calm: Any, tiny: Make) -> None:
    """In one process the sum of all shards is one buffer; payloads are one for each shard or replica."""
    blueprint = runtime_of(tiny()).worker.engine.blueprint
    elements, tensors, rest = sum(v.numel() for v in blueprint.theta.values()), len(blueprint.theta), 2
    expected = {
        (): 8 * (elements + rest),
        MODES["bf16"]: 4 * (2 * elements + 4 * rest),
        MODES["int8"]: 4 * (elements + 4 * tensors + 4 * rest),
        MODES["local"]: 8 * (elements + rest),
    }
    for mode, size in expected.items():
        done = calm(*mode)
        assert done.result["bytes_per_step"] == size
        assert [row["bytes"] for row in read_metrics(done.folder / "metrics.parquet")] == [size] * 12
    topk, local_topk = (calm(*MODES[mode]).result["bytes_per_step"] for mode in ("topk", "local-topk"))
    assert topk == pytest.approx(4 * 0.05 * 8 * elements, rel=0.05)
    assert local_topk == pytest.approx(3 * 0.1 * 8 * elements, rel=0.05)


@pytest.mark.chaos
def test_a_killed_driver(
    start_cli: Callable[..., Any], tiny_job: Path, calm: Any, cli: Callable[..., Any], tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    """Begun, killed with SIGKILL, gone on with in another process."""
    run, long = tmp_path / "run", ("outer.steps=40", *MODES["local-topk"])
    first = start_cli("train", tiny_job, "--run-dir", run, *SHORT, *long)
    wait_until(lambda: (run / "checkpoints" / "step-8").exists(), 60, "a checkpoint")
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it was killed before its end"
    assert not (run / "result.json").exists()
    assert resume(run, []).result["theta_sha256"] == calm(*long).result["theta_sha256"]


# --- on a cluster ------------------------------------------------------------------


@pytest.fixture
def on_cluster(tiny: Make, cluster: Any) -> Make:
    def make(workers: int, *overrides: str) -> Config:
        return tiny(f"cluster.workers={workers}", f"cluster.address={cluster.address}", *SHORT, *overrides)

    return make


IN_PIECES = ("cluster.aggregators=3", "cluster.sums=tree")
MORE = [
    pytest.param(*case, marks=pytest.mark.chaos)
    for case in (("int8", 2, IN_PIECES), ("topk", 1, ()), ("local-bf16", 2, ()))
]


@pytest.mark.cluster
@pytest.mark.parametrize(("mode", "workers", "way"), [("int8", 2, ()), *MORE])
def test_any_number_of_workers(
    mode: str, workers: int, way: tuple[str, ...], on_cluster: Make, calm: Any, tmp_path: Path
) -> None:
    """One of them with θ in pieces and payloads that go by way of their node."""
    found = train(on_cluster(workers, *MODES[mode], *way), "tiny", tmp_path / "run").result
    expected = calm(*MODES[mode]).result
    assert found["theta_sha256"] == expected["theta_sha256"]
    assert found["bytes_per_step"] == expected["bytes_per_step"]


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_killed_worker_and_a_lane_that_is_lost(
    on_cluster: Make, calm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    """A worker dies with what it computes; later a lane's object is lost with the process that held it."""
    import ray

    from metadist.runtime.on_ray import OnRay

    @ray.remote(num_cpus=0)
    class Holder:
        def put(self, lane: Any) -> list[Any]:
            return [ray.put(lane)]

    def lost(lane: Any) -> Any:
        holder = Holder.remote()
        (held,) = ray.get(holder.put.remote(lane))
        ray.kill(holder)
        wait_until(lambda: is_gone(held), 30, "the loss")
        return held

    def is_gone(held: Any) -> bool:
        try:
            ray.get(held)
        except ray.exceptions.ObjectLostError:
            return True
        return False

    real, done = OnRay.begin, set[int]()

    def begin(self: OnRay, step: int) -> None:
        if step == 14 and step not in done:
            done.add(step)
            self._lanes.states[1] = lost(self._lanes.states[1])
        real(self, step)
        if step == 6:
            os.kill(next(iter(self.pool.pids.values())), signal.SIGKILL)

    long = ("outer.steps=20", *MODES["local-topk"])
    expected = calm(*long).result
    monkeypatch.setattr(OnRay, "begin", begin)
    found = train(on_cluster(2, *long), "tiny", tmp_path / "run").result
    out, err = capsys.readouterr()
    assert "computed again" in err
    assert "what a worker was to compute from is lost with its process" in out
    assert found["theta_sha256"] == expected["theta_sha256"]
    assert 0 < found["steps_recomputed"] <= 4
