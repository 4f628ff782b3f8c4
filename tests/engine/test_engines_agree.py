"""Loop and vectorised engine give the same numbers, for every method and network."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import CLASSIFICATION
from metadist.config import validate
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_loop, judge_vectorised, loop, vectorised
from metadist.methods import every_method
from metadist.methods.method import InnerLoop
from metadist.tasks.episode import Episode, Examples

METHODS = {
    "maml-1": {"name": "maml", "order": 1, "inner_steps": 2, "support_loss_weight": 0.3},
    "maml-2": {"name": "maml", "order": 2, "inner_steps": 2, "support_loss_weight": 0.3},
    "reptile-sgd": {"name": "reptile", "inner_optimizer": "sgd", "inner_lr": 0.3, "inner_steps": 3, "inner_batch": 4},
    "reptile-adam": {"name": "reptile", "inner_optimizer": "adam", "inner_lr": 0.01, "inner_steps": 3},
    "protonet": {"name": "protonet", "temperature": 0.5},
    "cosine": {"name": "protonet", "distance": "cosine", "temperature": 10.0},
}
MODELS = ("stride2", "conv4", "conv4-fc", "resnet12", "mlp")


def agree(algorithm, model=None, task=None, evaluation=None, tasks=2, image=(1, 16, 17), seed=0):
    """The largest difference of any sum, relative to the largest element of all sums of its kind."""
    config = validate(
        {
            "engine": {"dtype": "float64", "device": "cpu"},
            "model": {
                "width": 4,
                **({"hidden": 5} if (model or {}).get("name") == "conv4-fc" else {}),
                **(model or {}),
            },
            "task": {"ways": 4, "shots": 2, "queries": 2, **(task or {})},
            "algorithm": algorithm,
            "eval": evaluation or {},
        },
        "test",
    )
    generator = torch.Generator().manual_seed(seed)

    def shaken(values):
        return {n: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in values.items()}

    ways = config.task.ways
    blueprint = Blueprint(config, image, ways + 2)
    theta, state = shaken(blueprint.theta), {n: v.abs() for n, v in shaken(blueprint.state).items()}

    def examples(each):
        x = torch.rand(tasks, ways * each, *image, generator=generator, dtype=torch.float64)
        return Examples(x, torch.arange(ways).repeat(each).expand(tasks, -1))

    classes = torch.arange(ways).expand(tasks, -1)
    episodes = Episode(examples(config.task.shots), examples(config.task.queries), classes, torch.arange(tasks))
    one, all_at_once = (
        f(for_training(config, image, ways + 2), theta, state, episodes, ways, 0) for f in (loop, vectorised)
    )
    assert list(one) == list(all_at_once)
    assert set(one) == set(blueprint.sums.names)
    errors = [compare(one, all_at_once)]
    learner = for_evaluation(config, image, ways + 2)
    judged = (f(learner, CLASSIFICATION, theta, state, episodes, ways) for f in (judge_loop, judge_vectorised))
    errors.append(compare(*judged))
    return max(errors)


def compare(one, other):
    assert all(one[name].shape == other[name].shape for name in one)
    assert all(value.isfinite().all() for value in one.values())
    assert all(value.dtype == torch.float64 for value in [*one.values(), *other.values()])
    kinds = {name.split(".")[0] for name in one}
    return max(
        max(float((one[n] - other[n]).abs().max()) for n in one if n.startswith(kind))
        / max(1e-300, *(float(one[n].abs().max()) for n in one if n.startswith(kind)))
        for kind in kinds
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_and_model(method, model):
    # Where a gradient is as small as Adam's ε, as some of resnet12's are, its rounding is divided by ε.
    bound = 1e-9 if (method, model) == ("reptile-adam", "resnet12") else 1e-12
    assert agree(METHODS[method], {"name": model}) < bound


@pytest.mark.parametrize("changes", [
    {"model": {"norm": "layer"}}, {"model": {"norm": "none"}}, {"task": {"transductive": False}},
    {"task": {"transductive": False}, "model": {"statistics": "running"}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_and_norm(method, changes):
    if changes.get("model", {}).get("statistics") == "running" and method.startswith("reptile"):
        changes = {"task": {"transductive": False, "shots": 1}}  # reptile keeps no running statistics
    assert agree(METHODS[method], **changes) < 1e-12


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_fine_tuning(distance):
    algorithm = {"name": "protonet", "distance": distance}
    assert agree(algorithm, evaluation={"finetune_steps": 2, "finetune_lr": 0.01}) < 1e-12


SMALL = {
    "imaml": {"inner_steps": 3, "cg_steps": 2},
    "mann": {"hidden": 6, "slots": 9, "cell": 4, "reads": 2},
    "metanet": {"hidden": 5, "generator": 3},
    "lstm-optimizer": {"hidden": 4, "layers": 1, "inner_steps": 2},
    "lstm-learner": {"hidden": 4, "inner_steps": 3},
    "task-conditioned": {"embedding": 4, "encoder_width": 4, "inner_steps": 1},
    "relation": {"hidden": 4},
    "scratch": {"inner_steps": 2, "inner_optimizer": "sgd"},
    "baseline++": {"steps": 2},
}
"""Keys that keep a method small, and Adam out of it, which divides a gradient by its own size and so shows rounding."""


RUNNING = ("maml", "maml++", "protonet", "matching", "siamese", "relation", "r2d2", "mann", "metanet", "baseline++")
"""Methods that keep running statistics; what asks the others for them is refused."""

AT_LEAST_ONE = ("maml++", "scratch", "lstm-optimizer", "lstm-learner")
"""Inner steps, of methods that are none without them."""

ROUNDING = {"metanet": 1e-9, "r2d2": 1e-9}
"""One divides gradients by their own size, as Adam does, the other solves equations of nearly equal images; the others
agree to 1e-12."""


def refused(name, model, task):
    """Whether a problem that can be drawn is none."""
    running = model.get("statistics") == "running" and not task["transductive"]
    return running and name not in RUNNING


@st.composite
def problems(draw, method):
    name = method.method_name()
    task = {
        "ways": draw(st.integers(3, 5)),
        "shots": draw(st.integers(1, 3)),
        "queries": draw(st.integers(1, 3)),
        "transductive": draw(st.booleans()),
    }
    model = {
        "name": draw(st.sampled_from(MODELS)),
        "norm": draw(st.sampled_from(["batch", "layer", "none"])),
        "activation": draw(st.sampled_from(["relu", "softplus", "tanh"])),
    }
    if model["name"].startswith("conv4"):
        model["pool"] = draw(st.sampled_from(["max", "avg"]))
    if model["norm"] == "batch":
        model["statistics"] = draw(st.sampled_from(["support", "running"]))
    assume(not refused(name, model, task))
    algorithm = {"name": name, **SMALL.get(name, {})}
    if issubclass(method, InnerLoop):
        algorithm |= {"inner_steps": draw(st.integers(1 if name in AT_LEAST_ONE else 0, 3))}
    if name in ("maml", "anil", "boil", "meta-sgd", "reptile", "maml++"):
        algorithm |= {"inner_lr": draw(st.sampled_from([0.03, 0.4]))}
    if "order" in method.model_fields:
        algorithm |= {"order": draw(st.sampled_from([1, 2]))}
    if name == "protonet":
        algorithm |= {"distance": draw(st.sampled_from(["euclidean", "cosine"]))}
    if name == "maml":
        algorithm |= {"support_loss_weight": draw(st.sampled_from([0.0, 0.5]))}
    if name == "reptile":
        algorithm |= {"inner_optimizer": "sgd", "inner_batch": draw(st.sampled_from([None, 3, 4]))}
    if name == "mann":
        algorithm |= {"labels": draw(st.sampled_from(["late", "beside"]))}
    if name == "task-conditioned":
        task["within_group"] = True
    return {
        "algorithm": algorithm, "model": model, "task": task,
        "tasks": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 100)),
    }  # fmt: skip


@pytest.mark.parametrize("method", every_method(), ids=lambda method: method.method_name())
@given(data=st.data())
@settings(deadline=None, max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_problem(method, data):
    problem = data.draw(problems(method))
    assert agree(**problem, image=(1, 16, 16)) < ROUNDING.get(method.method_name(), 1e-12)
