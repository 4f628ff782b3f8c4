"""A shard as one program over buffers that stay: the same bits as the shard by itself."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from device_checks import NoCopies, Operations
from torch.utils._pytree import tree_leaves

from metadist.algorithms import for_evaluation
from metadist.config import resolve, validate
from metadist.data.sources import prepare
from metadist.engine.device import precision
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents
from metadist.errors import ConfigError
from metadist.tasks.samplers import evaluation_tasks, training_tasks

UNCAPTURED = (
    "scatter", "index_put", "put_", "index_add", "embedding_dense", "nonzero", "masked_select", "cumsum", "bincount",
    ".sort", "scalar_dense", "_linalg_check",
)  # fmt: skip
"""Operations that ask the host or, done in a fixed order on a GPU, cannot be part of a CUDA graph."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def engine(mode: str, device: str = "cpu", **sections) -> Engine:
    raw = {
        "engine": {"mode": mode, "device": device, **sections.pop("engine", {})},
        "model": {"width": 8},
        "task": {"meta_batch": 8, "shard": 4},
        "algorithm": {"name": "maml", "inner_steps": 2, "inner_lr": 0.01},
        **sections,
    }
    config = resolve(validate(raw, "test"))
    return Engine(config, [prepare(source) for source in config.data.sources])


def parts(one: Engine, steps=(0, 1, 7, 40, 2)) -> list[np.ndarray]:
    exponents = first_exponents(one.blueprint.sums)
    values = one.blueprint.initial()
    found = [one.part(values * (1 + 0.01 * step), exponents, step, shard) for step in steps for shard in (0, 1)]
    assert all(part.fits for part in found)
    return [part.q for part in found]


@pytest.mark.parametrize("data", [{}, {"data": {"name": "sinusoid"}, "model": {"name": "mlp", "norm": "none"}}])
def test_a_program_gives_the_bits_of_its_shard(data):
    apart = parts(engine("vectorised", **data))
    together = parts(engine("graph", **data))
    assert len({q.tobytes() for q in apart}) == len(apart)
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("steps", [range(20), (0, 1, 7, 8, 40, 2, 2)], ids=["in-order", "in-any"])
def test_the_next_steps_tasks_are_taken_ahead_where_a_step_is_one_shard(steps):
    exponents, found = None, []
    for mode in ("vectorised", "graph"):
        one = engine(mode, task={"meta_batch": 4, "shard": 4})
        exponents = first_exponents(one.blueprint.sums)
        found.append([one.part(one.blueprint.initial(), exponents, step, 0).q for step in steps])
    assert len({q.tobytes() for q in found[0]}) == len(set(steps))
    np.testing.assert_array_equal(*map(np.stack, found))
    assert one.programs.at(0)._taken == (steps[-1] + 1, 0)


JUDGED = {
    "as-trained": {},
    "otherwise": {"eval": {"queries": 2, "draw": 4}},
    "rounded": {"engine": {"precision": "bf16"}},
}


@pytest.mark.parametrize("keys", JUDGED.values(), ids=JUDGED)
def test_judging_as_a_program_gives_the_same(keys):
    found = []
    for mode in ("vectorised", "graph"):
        one = engine(mode, **copy.deepcopy(keys))
        values = one.blueprint.initial()
        each = [one.judge(values * scale, one.config, "val", first, 3) for first in (0, 4, 8) for scale in (1, 1.1)]
        found.append([part[name] for part in each for name in ("score", "loss")])
        assert len(one._judging) == (mode == "graph")
    np.testing.assert_array_equal(*map(np.stack, found))
    assert len({part.tobytes() for part in found[0][1::2]}) == 6


def test_of_programs_that_judge_only_the_last_one_is_kept():
    one = engine("graph")
    other = one.config.with_values(eval={"queries": 2})
    found = [one.judge(one.blueprint.initial(), config, "val", 0, 4)["loss"] for config in (one.config, other) * 2]
    assert len(one._judging) == 1
    np.testing.assert_array_equal(found[:2], found[2:])
    assert not np.array_equal(found[0], found[1])


def test_tasks_that_were_taken_in_part_are_taken_again():
    one = engine("graph")
    program, exponents, values = one.programs.at(0), first_exponents(one.blueprint.sums), one.blueprint.initial()
    right = one.part(values, exponents, 0, 0).q
    drawn = dict(program._ahead[0, 0])
    program._ahead[0, 0] = {"rows": drawn["rows"], "broken": None}
    with pytest.raises(TypeError):
        program.take(1, 0)
    program._ahead[0, 0] = drawn
    np.testing.assert_array_equal(one.part(values, exponents, 0, 0).q, right)


def test_each_stage_has_its_program():
    stages = {"outer": {"steps": 10}, "stages": [{"at": 5, "set": {"outer.lr": 0.01, "algorithm.inner_steps": 1}}]}
    for one, other in zip(parts(engine("vectorised", **stages)), parts(engine("graph", **stages)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_program_says_what_does_not_fit():
    one, other = engine("vectorised"), engine("graph")
    for values, exponent in ((one.blueprint.initial() * np.float32(np.nan), 40), (one.blueprint.initial(), 900)):
        exponents = np.full(len(one.blueprint.sums.names), exponent)
        apart, together = (each.part(values, exponents, 0, 0) for each in (one, other))
        assert not apart.fits
        assert (apart.finite, apart.exceeding) == (together.finite, together.exceeding)


def test_tasks_are_sampled_by_tensors_as_by_numbers():
    tasks = engine("graph", task={"meta_batch": 8, "shard": 4, "rotate": False}).tasks
    by_number = tasks.sample(3, 4, 4)
    by_tensor = tasks.sample(torch.tensor(3), torch.tensor(4), 4)
    of_steps = tasks.draw(torch.tensor([[2], [3]]), torch.tensor(4), 4)
    of_third = tasks.show({name: value[4:] for name, value in of_steps.items()})
    for found in (by_tensor, of_third):
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(by_number), tree_leaves(found), strict=True))


CAPTURED = {
    "closed-form": {},
    "strided": {"model": {"name": "stride2", "width": 8}, "algorithm": {"support_loss_weight": 0.5}},
    "first-order": {"algorithm": {"order": 1}},
    "recompute": {"algorithm": {"inner_steps": 5, "recompute": True}},
    "rotated": {"task": {"rotate": True}},
    "mixture": {"data": {"name": [{"name": "glyphs", "weight": 1}, {"name": "glyphs", "weight": 2}]}},
    "groups": {"task": {"within_group": True}},
    "by-vmap": {"model": {"name": "conv4", "width": 8, "activation": "tanh"}},
    "by-vmap-recompute": {"model": {"activation": "tanh"}, "algorithm": {"inner_steps": 5, "recompute": True}},
    "support-statistics": {"task": {"transductive": False}},
    "resnet": {"model": {"name": "resnet12", "width": 8}},
    "sinusoid": {"data": {"name": "sinusoid"}, "model": {"name": "mlp", "norm": "none"}},
}


@pytest.mark.parametrize("keys", CAPTURED.values(), ids=CAPTURED)
def test_a_program_asks_the_host_nothing(keys):
    """On torch's device without memory, which nothing can be read from, as nothing can be while a graph is captured."""
    algorithm = {"name": "maml", "inner_steps": 2, "inner_lr": 0.01, **keys.get("algorithm", {})}
    task = {"meta_batch": 8, "shard": 4, **keys.get("task", {})}
    one = engine("graph", **{**keys, "algorithm": algorithm, "task": task})
    one.device = torch.device("meta")
    one.tasks = training_tasks(one.config, one.tables, one.device)
    program = one._program(one.config)
    with Operations("meta", scalars=False) as operations, NoCopies():
        program.take(3, 4)
        outputs = program.outputs()
    assert outputs.sent.shape == (one.blueprint.sums.total + 1,)
    assert not [name for name in operations.names if any(word in name for word in UNCAPTURED)]
    sampler = evaluation_tasks(one.config, one.tables, "val", one.device)
    algorithm = for_evaluation(one.config, sampler.shape, one.tasks.classes)
    judging = one._judging_program(one.config, sampler, algorithm)
    with Operations("meta", scalars=False) as operations, NoCopies():
        judged = judging._run()
    assert {name: value.shape for name, value in judged.items()} == {"score": (4,), "loss": (4,)}
    assert not [name for name in operations.names if any(word in name for word in UNCAPTURED)]


def test_graph_is_for_what_one_program_can_hold():
    with pytest.raises(ConfigError, match=r"engine\.mode: graph is for algorithm\.name=maml"):
        engine("graph", algorithm={"name": "protonet"})
    with pytest.raises(ConfigError, match=r"engine\.precision: tf32 is for engine\.device=cuda"):
        engine("vectorised", engine={"precision": "tf32"})


def test_bf16_rounds_factors_and_nothing_else():
    full, rounded = (engine("vectorised", engine={"precision": rounding}) for rounding in ("full", "bf16"))
    theta, state = full.blueprint.named(full.blueprint.initial())
    exact, near = full.sums(theta, state, 0, 0), rounded.sums(theta, state, 0, 0)
    assert all(near[name].dtype == value.dtype for name, value in exact.items())
    difference = max(float((near[n] - v).abs().max() / v.abs().max().clamp(min=1e-3)) for n, v in exact.items())
    assert 1e-6 < difference < 0.5


def test_tf32_is_of_the_block_and_not_of_the_process():
    one = engine("vectorised").config.engine
    found = {}
    for name in ("tf32", "full"):
        with precision(one.model_copy(update={"precision": name})):
            found[name] = torch.backends.cuda.matmul.allow_tf32
    assert found == {"tf32": True, "full": False}
    with contextlib.suppress(ZeroDivisionError), precision(one.model_copy(update={"precision": "tf32"})):
        raise ZeroDivisionError
    assert not torch.backends.cuda.matmul.allow_tf32


PAPER = {"model": {"name": "stride2"}, "task": {"meta_batch": 64, "shard": 32}, "algorithm": {"name": "maml"}}


@needs_gpu
@pytest.mark.parametrize("network", [{}, PAPER], ids=["narrow", "paper"])
@pytest.mark.parametrize("rounding", ["full", "tf32", "bf16"])
def test_a_captured_graph_gives_the_bits_of_its_shard(rounding, network):
    keys = {"engine": {"precision": rounding}, **network}
    apart, together = parts(engine("vectorised", "cuda", **keys)), parts(engine("graph", "cuda", **keys))
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_gpu
def test_a_captured_judge_gives_the_same():
    found = []
    for mode in ("vectorised", "graph"):
        one = engine(mode, "cuda")
        each = [one.judge(one.blueprint.initial(), one.config, "val", first, 4) for first in (0, 4, 8)]
        found.append(np.stack([part["loss"] for part in each]))
    np.testing.assert_array_equal(*found)


@needs_gpu
def test_engines_of_several_precisions_compute_in_one_process():
    three = ("tf32", "bf16", "full")
    modes = {rounding: engine("graph", "cuda", engine={"precision": rounding}) for rounding in three}
    found = {rounding: np.concatenate(parts(one)) for rounding, one in modes.items()}
    alone = np.concatenate(parts(engine("graph", "cuda")))
    np.testing.assert_array_equal(found["full"], alone)
    assert not any(np.array_equal(found[other], alone) for other in ("tf32", "bf16"))


@needs_gpu
def test_gpu_and_cpu_agree_in_float64():
    keys = {"engine": {"dtype": "float64"}}
    here, there = (engine("vectorised", device, **keys) for device in ("cpu", "cuda"))
    flat = [one.flat(one.blueprint.initial(), 0, 0) for one in (here, there)]
    np.testing.assert_allclose(*flat, rtol=1e-9, atol=1e-12)


@needs_gpu
def test_a_mixture_on_the_gpu_draws_the_same_tasks():
    keys = {"data": {"name": [{"name": "glyphs", "weight": 1}, {"name": "glyphs", "weight": 2}]}}
    here, there = (engine("vectorised", device, **keys).tasks.sample(0, 0, 8) for device in ("cpu", "cuda"))
    assert torch.equal(here.support.x, there.support.x.cpu())
