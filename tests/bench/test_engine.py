"""The suite measures the same shard with every engine."""

import numpy as np
import pytest
import torch

from metadist.bench import gpu
from metadist.bench.engine import ENGINES, engine_rows, one_shard, phase_rows, shard_job
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.errors import RunError


def test_rows_of_a_case():
    table = prepare(shard_job("c", 1).data.sources[0])
    rows = engine_rows("c", 1, table, 1, lambda line: None)
    assert [row.name for row in rows] == [f"{name} (c) order 1" for name in ENGINES]
    assert all(row.value > 0 for row in rows)
    assert [row.baseline for row in rows] == ["vmap (c) order 1", None, "vmap (c) order 1"]
    phases = {row.name: row.value for row in phase_rows("c", table, 1)}
    assert phases["meta-gradient (c) order 2"] == max(phases.values())


def test_all_engines_compute_the_same():
    config = shard_job("c", 2, dtype="float64").with_values(task={"meta_batch": 4, "shard": 2})
    engine = Engine(config, [prepare(config.data.sources[0])])
    engine.blueprint.theta = {name: value.double() for name, value in engine.blueprint.theta.items()}
    found = {name: one_shard(engine, compute) for name, compute in ENGINES.items()}
    for sums in found.values():
        for name, value in found["loop"].items():
            torch.testing.assert_close(sums[name], value, rtol=1e-9, atol=1e-11)


def test_what_is_measured_on_a_gpu_runs_on_a_cpu_too():
    told, mode = [], torch.get_deterministic_debug_mode()
    table = prepare(shard_job("c", 1).data.sources[0])
    rows = gpu.rows(table, told.append, "cpu", ("full", "bf16"), calls=1, steps=6, turns=1, meta_batch=4)
    names = [row.name for row in rows]
    for order in (2, 1):
        for contender in ("plain loop", "graph, full", "graph, bf16", "closed form"):
            assert f"{contender} (c) order {order}, cpu, meta-batch 4" in names
    assert names[-2:] == ["meta-step of the recipe, cpu", "60,000 of them in a run, by 3"]
    assert all(row.value > 0 for row in rows)
    assert rows[-1].value >= rows[-2].value
    assert torch.get_deterministic_debug_mode() == mode == 2, "an error, as engines have it"


def test_a_loop_of_a_library_may_use_what_our_engines_may_not():
    config = shard_job("c", 1).with_values(task={"meta_batch": 1, "shard": 1})
    seen = []

    def one_task(config, network):
        def found(support, query):
            seen.append(torch.get_deterministic_debug_mode())
            return network(query.x).sum()

        return found

    gpu._each_task(one_task, config, prepare(config.data.sources[0]))()
    assert (seen, torch.get_deterministic_debug_mode()) == ([0], 2)


def test_what_cannot_be_measured_is_told_with_its_cause_and_the_rest_is_measured():
    def failed():
        try:
            raise ValueError("the cause")
        except ValueError:
            raise RuntimeError("a capture failed") from None

    def once():
        calls = iter([None, None, None])  # one that warms up, and the first turn
        return lambda: next(calls)

    def missing():
        raise ImportError("no such library")

    told = []
    each = {
        "at its making": gpu.Contender(failed, 1),
        "in its shard": gpu.Contender(lambda: failed, 1),
        "a library": gpu.Contender(missing, 1),
        "in a later turn": gpu.Contender(once, 2),
        "the rest": gpu.Contender(lambda: lambda: None, 2),
    }
    rates = gpu._measured(each, 4, 3, "here", told.append)
    assert {name: len(found) for name, found in rates.items()} == {"the rest": 3}
    cause = "RuntimeError: a capture failed, after ValueError: the cause"
    assert told[:2] == [f"here: {name} is left out: {cause}" for name in ("at its making", "in its shard")]
    assert told[3].startswith("here: in a later turn is left out: StopIteration")
    assert told[2] == "here: a library is left out: ImportError: no such library; `make peers` installs it"


def test_sums_that_do_not_fit_are_no_result(monkeypatch):
    config = shard_job("c", 1).with_values(task={"meta_batch": 2, "shard": 2})
    monkeypatch.setattr(gpu, "first_exponents", lambda layout: np.full(len(layout.names), 900))
    with pytest.raises(RunError, match="not finite, or beyond"):
        gpu._shards(config, prepare(config.data.sources[0]))()
