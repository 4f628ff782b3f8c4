"""Meta-SGD: a learned rate for every element."""

import pytest
import torch
from inner_loop_checks import SHAPES, clusters, configured, episodes, plain_loss, trained, ways
from plain_reference import config_of, maml_task, one_of, parameters, relative

from metadist.algorithms import for_training
from metadist.engine.shard import loop, vectorised


def meta_sgd(steps=2, order=2, rate=0.4):
    return {"name": "meta-sgd", "inner_steps": steps, "order": order, "inner_lr": rate}


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
def test_closed_form_of_the_gradient_of_a_rate(what, order, engine):
    """After one step ∂L_Q/∂α = −∇L_Q(φ_1) ∘ ∇L_S(φ_0), in either order."""
    config = configured(meta_sgd(1, order), what)
    theta, state = parameters(config, SHAPES[what])
    batch = episodes(config, SHAPES[what], tasks=1)
    support, query, *_ = one_of(batch, 0)

    def gradient(params, examples):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = plain_loss(config, leaves, examples)[0]
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    start = {name: value for name, value in theta.items() if f"rate.{name}" in theta}
    of_support = gradient(start, support)
    after = {name: value - theta[f"rate.{name}"] * of_support[name] for name, value in start.items()}
    of_queries = gradient(after, query)
    expected = {f"gradient.rate.{name}": -of_queries[name] * of_support[name] for name in start}
    found = engine(for_training(config, SHAPES[what]), theta, state, batch, ways(config), 0)
    assert relative({name: found[name] for name in expected}, expected) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_with_equal_rates_it_is_maml(order):
    """And the rates' gradients sum up to that of MAML's one rate: by θ they are untouched."""
    config = configured(meta_sgd(2, order))
    theta, state = parameters(config, SHAPES["stride2"])
    theta |= {name: torch.full_like(value, 0.4) for name, value in theta.items() if name.startswith("rate.")}
    batch = episodes(config, SHAPES["stride2"], tasks=1)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items() if "rate." not in name}
    as_maml = {"name": "maml", "inner_steps": 2, "order": order, "inner_lr": 0.4}
    maml = config_of(task=config.task.model_dump(), model=config.model.model_dump(), algorithm=as_maml)
    loss, *_ = maml_task(maml, leaves, one_of(batch, 0), "together")
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = vectorised(for_training(config, SHAPES["stride2"]), theta, state, batch, 4, 0)
    assert relative({name: found[f"gradient.{name}"] for name in expected}, expected) < 1e-12


def test_every_element_has_a_rate_that_begins_as_told():
    theta, _ = for_training(configured(meta_sgd(rate=0.07)), SHAPES["stride2"]).init(torch.Generator().manual_seed(0))
    for name in [name for name in theta if not name.startswith("rate.")]:
        assert torch.equal(theta[f"rate.{name}"], torch.full_like(theta[name], 0.07))


def test_the_rates_learn():
    """They spread, around the rate that they began with."""
    config = config_of(
        engine={"dtype": "float32"},
        task={"ways": 5, "queries": 3},
        model={"name": "mlp", "width": 32},
        algorithm=meta_sgd(steps=1, rate=0.3),
    )
    theta, _ = trained(config, (1, 4, 4), clusters, 60, 5e-3)
    rates = torch.cat([value.flatten() for name, value in theta.items() if name.startswith("rate.")])
    assert rates.min() < 0.25
    assert rates.max() > 0.35
