"""MAML's meta-gradients against a plain autograd loop, and against themselves."""

import pytest
import torch
import torch.nn.functional as F
from inner_loop_checks import learns_clusters
from plain_reference import config_of, episodes_of, method, one_of, parameters, relative, sums, support_loss
from plain_reference import network as plain_network

from metadist.engine.shard import loop, vectorised

IMAGES = {"stride2": (2, 19, 14), "conv4": (1, 19, 17), "conv4-fc": (1, 33, 32), "mlp": (1, 5, 4)}
"""Odd sizes, and for conv4-fc more than one position to flatten."""


def maml(model="stride2", order=2, steps=1, transductive=True, weight=0.0, **more):
    return config_of(
        task={"ways": 5, "shots": 2, "queries": 2, "transductive": transductive},
        model={"name": model, **more},
        algorithm={
            "name": "maml",
            "order": order,
            "inner_steps": steps,
            "inner_lr": 0.4,
            "support_loss_weight": weight,
        },
    )


def both_engines(config, image, how):
    theta, state = parameters(config, image)
    episodes = episodes_of(config, image)
    expected = sums(config, theta, episodes, how)
    for engine in (loop, vectorised):
        found = engine(method(config, image), theta, state, episodes, config.task.ways, 0)
        yield engine.__name__, relative(found, expected)


@pytest.mark.parametrize(
    ("transductive", "weight"), [(True, 0.0), (False, 0.7)], ids=["transductive", "support-statistics-and-loss"]
)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("model", list(IMAGES))
def test_equals_a_plain_autograd_loop(model, order, steps, transductive, weight):
    config = maml(model, order, steps, transductive, weight)
    for engine, error in both_engines(config, IMAGES[model], "together" if transductive else "support"):
        assert error < 1e-12, engine


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("model", "changes"), [
    *((model, {"norm": norm}) for model in ("stride2", "conv4-fc", "mlp") for norm in ("layer", "none")),
    *((model, {"statistics": "running"}) for model in ("stride2", "conv4", "mlp")),
    ("stride2", {"activation": "tanh"}), ("conv4", {"activation": "softplus", "pool": "avg"}),
], ids=str)  # fmt: skip
def test_equals_it_with_other_norms_activations_and_pools(model, changes, order):
    config = maml(model, order, 2, not changes.get("statistics"), 0.3, **changes)
    # Running statistics are collected in training and used in evaluation only.
    for engine, error in both_engines(config, IMAGES[model], "together"):
        assert error < 1e-12, engine


def test_without_inner_steps_it_is_the_gradient_of_the_queries_loss():
    config = maml(steps=0)
    for _, error in both_engines(config, IMAGES["stride2"], "together"):
        assert error < 1e-12


@pytest.mark.parametrize("model", list(IMAGES))
def test_first_order_is_maml_with_constant_inner_gradients(model):
    """∇_φ L_Q at φ = θ − α Σ g_k, all g_k numbers: no graph reaches back to θ through them."""
    image, config = IMAGES[model], maml(model, order=1, steps=3)
    theta, state = parameters(config, image)
    episodes = episodes_of(config, image, tasks=1)
    support, query, *_ = one_of(episodes, 0)
    phi = {name: value.clone() for name, value in theta.items()}
    for _ in range(3):
        at = {name: value.clone().requires_grad_() for name, value in phi.items()}
        gradient = torch.autograd.grad(support_loss(config, at, support), list(at.values()))
        phi = {n: v - 0.4 * g for (n, v), g in zip(phi.items(), gradient, strict=True)}
    leaves = {name: value.requires_grad_() for name, value in phi.items()}
    loss = F.cross_entropy(plain_network(config.model, leaves, query.x)[0], query.y)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for engine in (loop, vectorised):
        found = engine(method(config, image), theta, state, episodes, 5, 0)
        assert relative({name: found[f"gradient.{name}"] for name in theta}, expected) < 1e-12


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", list(IMAGES))
def test_the_second_order_term_is_there(model, steps, engine):
    image = IMAGES[model]
    gradients = []
    for order in (1, 2):
        config = maml(model, order, steps)
        theta, state = parameters(config, image)
        found = engine(method(config, image), theta, state, episodes_of(config, image), 5, 0)
        assert found["metric.loss"] > 0
        gradients.append({name: value for name, value in found.items() if name.startswith("gradient.")})
    first, second = gradients
    assert relative(first, second) > 1e-6
    assert all((first[name] - second[name]).abs().max() > 1e-6 for name in first)


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_the_support_loss_is_added_with_its_weight(engine):
    """Linear in λ: the difference of two weights is the support loss's own gradient."""
    image, grads = IMAGES["stride2"], []
    for weight in (0.25, 1.25):
        config = maml(weight=weight)
        theta, state = parameters(config, image)
        grads.append(engine(method(config, image), theta, state, episodes_of(config, image, 1), 5, 0))
    leaves = {name: value.requires_grad_() for name, value in theta.items()}
    loss = support_loss(config, leaves, one_of(episodes_of(config, image, 1), 0).support)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    difference = {name: grads[1][f"gradient.{name}"] - grads[0][f"gradient.{name}"] for name in theta}
    assert relative(difference, expected) < 1e-11


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_an_engine_leaves_theta_and_state_alone(engine):
    image, config = IMAGES["stride2"], maml()
    theta, state = parameters(config, image)
    before = {name: value.clone() for name, value in (theta | state).items()}
    first = engine(method(config, image), theta, state, episodes_of(config, image), 5, 0)
    again = engine(method(config, image), theta, state, episodes_of(config, image), 5, 0)
    assert all(torch.equal(before[name], value) for name, value in (theta | state).items())
    assert not any(value.requires_grad for value in [*theta.values(), *first.values()])
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("order", [1, 2])
def test_learns_to_tell_clusters(order):
    before, after = learns_clusters({"name": "maml", "order": order, "inner_lr": 0.5, "inner_steps": 2})
    assert after > before + 0.3
