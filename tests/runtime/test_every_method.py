"""Every method's shards are the same bits in whichever process they are computed, and their order does not count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.methods import every_method
from metadist.runtime.aggregator import Aggregator
from metadist.runtime.checkpoint import load_checkpoint, save_checkpoint
from metadist.runtime.worker import Worker

pytestmark = pytest.mark.cluster

STEPS = 2
FURTHER = {"task-conditioned": ("task.within_group=true",), "imaml": ("algorithm.inner_steps=3",)}
RUNNING = ("model.statistics=running", "task.transductive=false")
KEEP_STATISTICS = ("maml", "maml++", "protonet", "relation", "baseline++")

CASES = [(method.method_name(), FURTHER.get(method.method_name(), ())) for method in every_method()]
CASES += [(name, RUNNING) for name in KEEP_STATISTICS]
CASES += [("reptile", ("algorithm.moments=kept",)), ("mann", ("algorithm.labels=beside",))]
CASES += [
    (method.method_name(), ("data.name=sinusoid", "task.ways=5", "model.norm=none"))
    for method in every_method()
    if method.regression
]


@pytest.fixture(scope="module")
def hosts(connected: Any) -> Any:
    """Two other processes, in which workers of any number of runs live."""
    import ray

    class Host:  # here, so that it travels by value: another process cannot import this file
        def compute(self, config: Config, paths: list[str], *call: Any) -> Any:
            from metadist.runtime.worker import Worker

            return Worker(config, paths).compute(*call)

    actors = [ray.remote(Host).options(num_cpus=1).remote() for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param(
            name, more, id=f"{name} {' '.join(more)}".strip(),
            marks=pytest.mark.chaos if "data.name=sinusoid" in more and name != "maml" else (),
        )
        for name, more in CASES
    ],
)  # fmt: skip
def test_same_bits(
    name: str, overrides: tuple[str, ...], tiny: Callable[..., Config], cluster: Any, hosts: Any, tmp_path: Path
) -> None:
    import ray

    config = resolve(tiny(f"algorithm.name={name}", "task.meta_batch=4", *overrides))
    paths = [str(prepare(source).path) for source in config.data.sources]
    here = Worker(config, paths)
    tasks = here.engine.tasks
    alone, apart = (Aggregator(config, tasks.shape, None, tasks.classes) for _ in range(2))
    for step in range(STEPS):
        broadcast = alone.broadcast()
        moved = [
            hosts[shard].compute.remote(config, paths, broadcast, step, broadcast.attempt, [shard]) for shard in (0, 1)
        ]
        receipt, q = here.compute(broadcast, step, broadcast.attempt, (0, 1))
        assert receipt.current
        assert receipt.summed == (0, 1)
        assert alone.add(step, broadcast.attempt, receipt.summed, q)
        for shard in (1, 0):
            assert apart.add(step, broadcast.attempt, [shard], ray.get(moved[shard])[1])
        reports = [aggregator.apply(step)[0]._replace(bytes=0, spans=()) for aggregator in (alone, apart)]
        assert reports[0] == reports[1], "but for bytes and time: one call here, two there"
        assert not reports[0].missing
    one, other = alone.snapshot(), apart.snapshot()
    assert all(np.array_equal(value, other.values[key]) for key, value in one.values.items())
    assert all(np.array_equal(value, other.memory[key]) for key, value in one.memory.items())

    # And what a checkpoint holds is all of it: an aggregator made from it takes the next step to the same bits.
    one, _, _ = load_checkpoint(save_checkpoint(tmp_path, one, None, {}))
    resumed = Aggregator(config, tasks.shape, one, tasks.classes)
    broadcast = alone.broadcast()
    receipt, q = here.compute(broadcast, STEPS, broadcast.attempt, (0, 1))
    while receipt.exceeding:  # the step is done again with coarser exponents, like any other
        broadcast = alone.redo(STEPS, broadcast.attempt, receipt.exceeding)
        resumed.redo(STEPS, resumed.attempt, receipt.exceeding)
        receipt, q = here.compute(broadcast, STEPS, broadcast.attempt, (0, 1))
    for aggregator in (alone, resumed):
        assert aggregator.add(STEPS, broadcast.attempt, receipt.summed, q)
    went_on, began_again = (one.apply(STEPS)[0]._replace(spans=()) for one in (alone, resumed))
    assert went_on == began_again
    assert np.array_equal(alone.broadcast().values, resumed.broadcast().values)
