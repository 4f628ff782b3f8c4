"""Every method computes on the device of its tensors, which need not be the CPU."""

import pytest
import torch
from device_checks import Operations

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import OBJECTIVES
from metadist.config import resolve, validate
from metadist.data.sources import prepare
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_vectorised, vectorised
from metadist.methods import every_method
from metadist.tasks.samplers import training_tasks

REFUSED = (
    "max_pool", "adaptive", "upsample", "reflection_pad", "replication_pad", "cumsum", "histc", "bincount", "median",
    "kthvalue", "grid_sampler",
)  # fmt: skip
"""What has no form on a GPU whose bits are the same each time: torch refuses it under our settings."""


WITH_NUMBERS = ("maml++", "siamese", "lstm-learner", "task-conditioned")
"""Methods some of whose numbers begin on the CPU."""


@pytest.mark.parametrize("method", [method.method_name() for method in every_method()])
def test_every_method_computes_where_its_tensors_are(method):
    task = {"ways": 3, "meta_batch": 4, "shard": 2, "within_group": method == "task-conditioned"}
    algorithm = {"name": method} | ({"inner_steps": 2} if method == "scratch" else {})
    config = resolve(validate({"task": task, "algorithm": algorithm}, "test"))
    tasks = training_tasks(config, [prepare(source) for source in config.data.sources], "meta")
    blueprint = Blueprint(config, tasks.shape, tasks.classes)
    theta, state = ({n: v.to("meta") for n, v in each.items()} for each in (blueprint.theta, blueprint.state))
    learner, judged = (make(config, tasks.shape, tasks.classes) for make in (for_training, for_evaluation))
    episodes = tasks.sample(0, 0, 2)
    with Operations("meta", scalars=method in WITH_NUMBERS) as operations:
        sums = vectorised(learner, theta, state, episodes, tasks.ways, 0)
        scores = judge_vectorised(judged, OBJECTIVES[config.kind], theta, state, episodes, tasks.ways)
    assert {name: tuple(value.shape) for name, value in sums.items()} == dict(
        zip(blueprint.sums.names, blueprint.sums.shapes, strict=True)
    )
    assert all(value.shape == (2,) for value in scores.values())
    assert all(value.device == torch.device("meta") for value in [*sums.values(), *scores.values()])
    assert not [name for name in operations.names if any(word in name for word in REFUSED)]
