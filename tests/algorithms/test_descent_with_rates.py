"""ANIL, BOIL and Meta-SGD: MAML's inner loop, φ ← φ − α ∘ ∇L_S(φ), with an α for each tensor or element.

ANIL has none for the body, BOIL none for the head, Meta-SGD learns all of them.
"""

from collections.abc import Callable

import pytest
from inner_loop_checks import (
    CASES,
    SHAPES,
    check_queries_are_independent,
    check_renaming_the_classes,
    configured,
    engines_disagree,
    episodes,
    error_of_central_differences,
    error_of_sums,
    learns_clusters,
    learns_sinusoids,
    plain_descent,
    plain_queries,
)
from plain_reference import parameters, relative, stored

from metadist.algorithms import for_training
from metadist.engine.shard import vectorised

Rates = Callable[[dict, float], dict]
RATES: dict[str, Rates] = {
    "anil": lambda theta, lr: dict.fromkeys(("head.weight", "head.bias"), lr),
    "boil": lambda theta, lr: {name: lr for name in theta if name.split(".")[0] != "head"},
    "meta-sgd": lambda theta, _: {name: theta[f"rate.{name}"] for name in theta if f"rate.{name}" in theta},
}
method = pytest.mark.parametrize("name", list(RATES))


def of(name, steps=2, order=2, rate=0.4):
    return {"name": name, "inner_steps": steps, "order": order, "inner_lr": rate}


def task(config, theta, episode, how, step):
    """L_Q(φ_K), written with the whole network."""
    algorithm = config.algorithm
    start = {name: value for name, value in theta.items() if not name.startswith("rate.")}
    rates = RATES[algorithm.name](theta, algorithm.inner_lr)
    fast = plain_descent(config, start, episode.support, rates, algorithm.inner_steps, algorithm.order)
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    return loss, outputs, stored(seen)


@pytest.mark.parametrize(("what", "how"), CASES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
@method
def test_equals_a_plain_autograd_loop(name, steps, order, what, how):
    assert error_of_sums(configured(of(name, steps, order), what, how), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["conv4", "conv4-fc"])
@method
def test_equals_it_with_other_networks(name, what):
    assert error_of_sums(configured(of(name), what), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
@method
def test_the_second_order_term_is_there(name, what):
    found = []
    for order in (1, 2):
        config = configured(of(name, order=order), what)
        theta, state = parameters(config, SHAPES[what])
        batch = episodes(config, SHAPES[what])
        found.append(vectorised(for_training(config, SHAPES[what]), theta, state, batch, config.task.ways, 0))
    first, second = ({n: v for n, v in one.items() if n.startswith("gradient.")} for one in found)
    assert relative(first, second) > 1e-3


@pytest.mark.parametrize(
    ("what", "model"),
    [("mlp", {"activation": "tanh"}), ("sinusoid", {}), ("stride2", {"activation": "softplus"})],
)
@method
def test_central_differences_on_a_smooth_net(name, what, model):
    assert error_of_central_differences(configured(of(name), what, "support", **model), SHAPES[what]) < 1e-6


@pytest.mark.parametrize(("what", "how"), CASES)
@method
def test_what_a_prediction_depends_on(name, what, how):
    config = configured(of(name), what, how)
    assert engines_disagree(config, SHAPES[what]) < 1e-12
    check_queries_are_independent(config, SHAPES[what])
    if what != "sinusoid":
        check_renaming_the_classes(config, SHAPES[what])


@pytest.mark.parametrize("how", ["support", "running"])
@pytest.mark.parametrize(("name", "rate", "lr"), [("anil", 1.0, 1e-2), ("boil", 3.0, 2e-2), ("meta-sgd", 0.3, 1e-2)])
def test_learns_to_tell_clusters(name, rate, lr, how):
    before, after = learns_clusters(of(name, steps=1, rate=rate), how, lr=lr)
    assert after > before + 0.3


@pytest.mark.parametrize(("name", "steps"), [("anil", 3), ("boil", 1), ("meta-sgd", 1)])
def test_learns_sinusoids(name, steps):
    before, after = learns_sinusoids(of(name, steps, rate=0.05))
    assert after < 0.75 * before
