"""Reptile's direction against an independent loop with torch.optim's optimizers."""

import pytest
import torch
import torch.nn.functional as F
from plain_reference import config_of, episodes_of, method, network, one_of, parameters, relative, reptile_direction

from metadist.engine.shard import loop, vectorised

IMAGES = {"stride2": (1, 15, 14), "conv4": (2, 16, 17), "conv4-fc": (1, 16, 16), "mlp": (1, 5, 4)}


def reptile(model="stride2", optimizer="adam", batch=None, steps=4, transductive=True, rate=None):
    return config_of(
        task={"ways": 5, "shots": 3, "queries": 2, "transductive": transductive},
        model={"name": model},
        algorithm={
            "name": "reptile", "inner_optimizer": optimizer, "inner_batch": batch, "inner_steps": steps,
            "inner_lr": rate or {"adam": 1e-2, "sgd": 0.3}[optimizer],
        },
    )  # fmt: skip


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("batch", [None, 5, 7, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", list(IMAGES))
def test_direction(model, optimizer, batch, engine):
    config, image = reptile(model, optimizer, batch), IMAGES[model]
    theta, _ = parameters(config, image)
    episodes = episodes_of(config, image)
    found = engine(method(config, image), theta, {}, episodes, 5, 0)
    each = [reptile_direction(config, theta, one_of(episodes, task).support) for task in range(2)]
    expected = {f"gradient.{name}": each[0][name] + each[1][name] for name in theta}
    loss = 0.0
    for task, direction in enumerate(each):
        query = one_of(episodes, task).query
        phi = {name: theta[name] - direction[name] for name in theta}
        loss += float(F.cross_entropy(network(config.model, phi, query.x)[0], query.y))
    assert found.pop("metric.loss") == pytest.approx(loss, rel=1e-10)
    del found["metric.score"]
    # Adam divides by a gradient's own size, so it shows the last digits of small gradients.
    assert relative(found, expected) < (1e-12 if optimizer == "sgd" else 1e-9)


def test_mini_batches_walk_through_the_support_set_and_around():
    config, image = reptile(batch=7, steps=5), IMAGES["stride2"]
    support = one_of(episodes_of(config, image), 0).support  # 15 examples
    numbered = support._replace(y=torch.arange(15))
    rows = [method(config, image)._mini_batch(numbered, k).y.tolist() for k in range(4)]
    assert rows == [[*range(7)], [*range(7, 14)], [14, *range(6)], [*range(6, 13)]]


def test_a_batch_of_one_shot_holds_every_class():
    config, image = reptile(batch=5), IMAGES["stride2"]
    support = one_of(episodes_of(config, image), 0).support
    for k in range(6):
        assert sorted(method(config, image)._mini_batch(support, k).y.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_one_step_of_sgd_is_the_gradient_of_the_support_loss(engine):
    """θ − φ = α ∇L_S(θ)."""
    image = IMAGES["stride2"]
    config = reptile(optimizer="sgd", steps=1, rate=0.25)
    theta, _ = parameters(config, image)
    episodes = episodes_of(config, image, tasks=1)
    found = engine(method(config, image), theta, {}, episodes, 5, 0)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    support = one_of(episodes, 0).support
    loss = F.cross_entropy(network(config.model, leaves, support.x)[0], support.y)
    gradient = torch.autograd.grad(loss, list(leaves.values()))
    expected = {f"gradient.{n}": 0.25 * g for n, g in zip(leaves, gradient, strict=True)}
    assert relative({name: found[name] for name in expected}, expected) < 1e-12


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_no_steps_no_direction(engine):
    config, image = reptile(steps=0), IMAGES["stride2"]
    theta, _ = parameters(config, image)
    found = engine(method(config, image), theta, {}, episodes_of(config, image), 5, 0)
    assert all(not value.any() for name, value in found.items() if name.startswith("gradient."))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_zero_gradient_moves_nothing(optimizer):
    """Adam's root at zero: a blank image has no gradient in the first convolution, and no NaN."""
    config, image = reptile(optimizer=optimizer), IMAGES["stride2"]
    theta, _ = parameters(config, image)
    episodes = episodes_of(config, image)
    support, query, *_ = episodes
    blank = episodes._replace(
        support=support._replace(x=torch.zeros_like(support.x)), query=query._replace(x=torch.zeros_like(query.x))
    )
    found = vectorised(method(config, image), theta, {}, blank, 5, 0)
    assert all(value.isfinite().all() for value in found.values())
    assert not found["gradient.conv1.weight"].any()
