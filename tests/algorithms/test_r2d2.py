"""R2-D2 against ridge regression written with an explicit inverse, and against what defines a ridge regression."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import (
    HOW,
    IMAGES,
    check_classes_have_no_names,
    check_queries_are_independent,
    configured,
    error_of_sums,
    learned,
    moved_by_reordering_the_support_set,
)
from plain_reference import config_of, episodes_of, method, network, one_of, parameters, relative, stored

from metadist.algorithms import for_evaluation
from metadist.algorithms.objective import REGRESSION
from metadist.algorithms.r2d2 import ridge_regression
from metadist.config import load, resolve
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_vectorised, loop, vectorised
from metadist.tasks.episode import Episode, Examples
from metadist.tasks.samplers import evaluation_tasks, training_tasks

R2D2 = {"name": "r2d2", "ridge": 0.3, "scale": 4.0}


def plain_outputs(config, theta, episode, how, targets):
    """α [X', 1] ([X, 1]ᵀ[X, 1] + nλ I)⁻¹ [X, 1]ᵀ Y + β, never by Woodbury's identity."""
    features, seen = network(config.model, theta, episode.support.x)
    queries, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    n = len(features)
    x = torch.cat([features, torch.ones(n, 1, dtype=torch.float64)], 1)
    system = x.T @ x + n * torch.exp(theta["ridge.log_lambda"]) * torch.eye(x.shape[1], dtype=torch.float64)
    w = torch.linalg.inv(system) @ x.T @ targets
    outputs = torch.exp(theta["ridge.log_alpha"]) * (queries @ w[:-1] + w[-1]) + theta["ridge.beta"]
    one, two = stored(seen), stored(seen_too)
    return outputs, {name: (one[name] + two[name]) / 2 for name in one}


def plain_task(config, theta, episode, how):
    targets = torch.eye(config.task.ways, dtype=torch.float64)[episode.support.y]
    logits, statistics = plain_outputs(config, theta, episode, how, targets)
    return F.cross_entropy(logits, episode.query.y), logits, statistics


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("model", list(IMAGES))
def test_loss_gradient_and_statistics(model, shots, how):
    """Width 4 gives 5 features with the ones (7 for conv4-fc): more and fewer examples than features."""
    config = configured(R2D2, model, how, ways=3, shots=shots)
    assert error_of_sums(config, IMAGES[model], plain_task, judged_alike=True) < 1e-12


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_regression(engine):
    config = config_of(
        data={"name": "sinusoid"}, task={"shots": 6, "queries": 5}, algorithm=R2D2,
        model={"name": "mlp", "norm": "none", "activation": "tanh"},
    )  # fmt: skip
    theta, _ = parameters(config, (1,))
    generator = torch.Generator().manual_seed(4)

    def points(n):
        x = 3 * torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
        return Examples(x, torch.sin(x) + 1)

    episodes = Episode(points(6), points(5), torch.zeros(2, 1, dtype=torch.int64), torch.arange(2))
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = 0.0
    for episode in (one_of(episodes, 0), one_of(episodes, 1)):
        outputs, _ = plain_outputs(config, leaves, episode, "together", episode.support.y)
        loss = loss + ((outputs - episode.query.y) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(leaves.values()))
    expected = {f"gradient.{name}": g for name, g in zip(leaves, gradient, strict=True)}
    expected |= {"metric.loss": loss.detach(), "metric.score": loss.detach()}
    assert relative(engine(method(config, (1,)), theta, {}, episodes, 1, 0), expected) < 1e-12


@pytest.mark.parametrize("n", [3, 8, 9, 20])
def test_the_solution_is_the_minimum(n):
    """∇ (1/n ‖X W − Y‖² + λ ‖W‖²) = 0 in either form, below and above as many examples as features."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    ridge = torch.tensor(0.7, dtype=torch.float64)
    w = ridge_regression(x, y, ridge)
    slope = 2 / n * x.T @ (x @ w - y) + 2 * ridge * w
    assert slope.abs().max() < 1e-13


def test_central_differences_in_lambda_alpha_and_beta():
    config = configured(R2D2, "mlp", activation="tanh")
    theta, state = parameters(config, IMAGES["mlp"])
    episodes = episodes_of(config, IMAGES["mlp"], tasks=1)
    learner = method(config, IMAGES["mlp"])
    found = vectorised(learner, theta, state, episodes, 4, 0)
    for name in ("ridge.log_lambda", "ridge.log_alpha", "ridge.beta"):

        def f(h, name=name):
            moved = {**theta, name: theta[name] + h}
            return float(learner.task_loss(moved, state, one_of(episodes, 0), 4, 0).loss)

        difference = (8 * (f(1e-4) - f(-1e-4)) - (f(2e-4) - f(-2e-4))) / 12e-4
        # β is added to every class alike, which a softmax does not see.
        assert float(found[f"gradient.{name}"]) == pytest.approx(difference, rel=1e-6, abs=1e-10)
        assert (abs(difference) > 1e-3) is (name != "ridge.beta")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", list(IMAGES))
def test_what_a_prediction_depends_on(model, how):
    config = configured(R2D2, model, how)
    check_queries_are_independent(config, model)
    check_classes_have_no_names(config, model)
    assert moved_by_reordering_the_support_set(config, model) < 1e-10


def test_the_same_bits_again_in_float32():
    config = configured(R2D2, "mlp").with_values(engine={"dtype": "float32"})
    theta, state = parameters(config, IMAGES["mlp"])
    theta = {name: value.float() for name, value in theta.items()}
    (sx, sy), (qx, qy), classes, family = episodes_of(config, IMAGES["mlp"], tasks=8)
    episodes = Episode(Examples(sx.float(), sy), Examples(qx.float(), qy), classes, family)
    one, again = (vectorised(method(config, IMAGES["mlp"]), theta, state, episodes, 4, 0) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(value.isfinite().all() for value in one.values())


def test_a_network_that_is_not_finite_gives_numbers_that_are_not():
    """And no exception of the solver: the run then stops with its own message."""
    config = configured(R2D2, "mlp")
    theta, state = parameters(config, IMAGES["mlp"])
    theta["fc1.weight"] = theta["fc1.weight"] * torch.nan
    found = vectorised(method(config, IMAGES["mlp"]), theta, state, episodes_of(config, IMAGES["mlp"]), 4, 0)
    assert not found["metric.loss"].isfinite()


def test_learning_beats_the_untrained_network_by_half_of_all_answers():
    before, after = learned({"name": "r2d2"})
    assert after > before + 0.5


def test_learning_regression_halves_the_untrained_networks_error():
    config = resolve(load("sinusoid-r2d2", ["engine.device=cpu"]))
    theta = {name: value.clone().requires_grad_() for name, value in Blueprint(config, (1,)).theta.items()}
    optimizer, train = torch.optim.Adam(theta.values(), 2e-3), method(config, (1,))
    tasks, new = training_tasks(config, [], "cpu"), evaluation_tasks(config, [], "test", "cpu").sample(0, 0, 200)

    def error() -> float:
        values = {name: value.detach() for name, value in theta.items()}
        return float(judge_vectorised(for_evaluation(config, (1,)), REGRESSION, values, {}, new, 1)["score"].mean())

    before = error()
    for step in range(150):
        sums = vectorised(train, theta, {}, tasks.sample(step, 0, 25), 1, step)
        for name, value in theta.items():
            value.grad = sums[f"gradient.{name}"] / 25
        optimizer.step()
    assert error() < before / 2
