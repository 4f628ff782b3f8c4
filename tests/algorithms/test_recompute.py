"""Inner steps whose graphs are built again: the same meta-gradient, for less memory."""

import math

import pytest
import torch
from inner_loop_checks import episodes, ways
from plain_reference import config_of, parameters, relative

from metadist.algorithms import for_training
from metadist.bench.memory import job
from metadist.config import ConfigError
from metadist.data.sources import prepare
from metadist.engine.fit import needed
from metadist.engine.packed import one_by_one, vectorised_packed
from metadist.engine.shard import by_vmap, loop, vectorised

METHODS = ("maml", "boil", "meta-sgd", "task-conditioned")
IMAGE = (1, 16, 16)


def both(name, steps, **algorithm):
    task = {"ways": 3, "shots": 2, "within_group": True}
    keys = {"name": name, "inner_steps": steps, "inner_lr": 0.1, **algorithm}
    return [
        config_of(task=task, model={"name": "stride2", "width": 4}, algorithm={**keys, "recompute": which})
        for which in (False, True)
    ]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 10])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_sums_in_both_engines(name, steps):
    kept, recomputed = both(name, steps)
    theta, state = parameters(kept, IMAGE)
    batch = episodes(kept, IMAGE)
    expected = loop(for_training(kept, IMAGE), theta, state, batch, ways(kept), 0)
    for engine in (loop, vectorised, *([by_vmap] if name == "maml" else [])):  # the others have no closed form
        found = engine(for_training(recomputed, IMAGE), theta, state, batch, ways(kept), 0)
        assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("model", ["stride2", "conv4"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 10])
def test_the_same_bits_in_closed_form(steps, weight, model):
    kept, recomputed = (
        config_of(
            task={"ways": 3, "shots": 2},
            model={"name": model, "width": 4},
            algorithm={
                "name": "maml",
                "inner_steps": steps,
                "inner_lr": 0.1,
                "support_loss_weight": weight,
                "recompute": which,
            },
        )
        for which in (False, True)
    )
    theta, state = parameters(kept, IMAGE)
    batch = episodes(kept, IMAGE)
    each = [for_training(config, IMAGE) for config in (kept, recomputed)]
    assert all(algorithm.at_once(batch) for algorithm in each)
    expected, found = (vectorised(algorithm, theta, state, batch, ways(kept), 0) for algorithm in each)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert relative(found, loop(each[0], theta, state, batch, ways(kept), 0)) < 1e-12


def test_the_same_sums_of_packed_trials():
    kept, recomputed = (config.with_values(model={"activation": "tanh"}) for config in both("maml", 5))
    theta, state = parameters(kept, IMAGE)
    batch, classes = episodes(kept, IMAGE), ways(kept)
    trials = [for_training(recomputed.with_values(algorithm={"inner_lr": rate}), IMAGE) for rate in (0.03, 0.2)]
    assert not one_by_one(trials[0], batch)
    packed = vectorised_packed(trials, [theta] * 2, [state] * 2, batch, classes, 0)
    for rate, found in zip((0.03, 0.2), packed, strict=True):
        alone = for_training(kept.with_values(algorithm={"inner_lr": rate}), IMAGE)
        assert relative(found, loop(alone, theta, state, batch, classes, 0)) < 1e-12


def test_first_order_keeps_no_graphs_to_recompute():
    with pytest.raises(ConfigError, match=r"algorithm\.recompute: with algorithm\.order=1"):
        both("maml", 3, order=1)


def test_memory_grows_with_the_root_of_the_steps():
    """Measured in processes of their own, as the bench does."""
    torch.set_num_threads(1)
    path = str(prepare(job("maml", 1).data.sources[0]).path)
    kept, few, many = (
        needed(job(method, k), [path], 2).bytes
        for method, k in (("maml", 16), ("maml, recompute", 1), ("maml, recompute", 16))
    )
    assert many < 0.6 * kept
    assert many < math.sqrt(16) * few
