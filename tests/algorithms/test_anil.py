"""ANIL: only the head adapts."""

import pytest
import torch
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
from plain_reference import one_of, parameters, relative, stored

from metadist.algorithms import for_training
from metadist.engine.shard import vectorised


def anil(steps=2, order=2, rate=0.4):
    return {"name": "anil", "inner_steps": steps, "order": order, "inner_lr": rate}


def task(config, theta, episode, how, step):
    """w ← w − α ∇_w L_S(body, w), written with the whole network; L_Q(body, w_K)."""
    method = config.algorithm
    rates = dict.fromkeys(("head.weight", "head.bias"), method.inner_lr)
    fast = plain_descent(config, theta, episode.support, rates, method.inner_steps, method.order)
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    return loss, outputs, stored(seen)


@pytest.mark.parametrize(("what", "how"), CASES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_a_plain_autograd_loop(what, steps, order, how):
    assert error_of_sums(configured(anil(steps, order), what, how), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["conv4", "conv4-fc"])
def test_equals_it_with_other_networks(what):
    assert error_of_sums(configured(anil(), what), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
def test_the_second_order_term_is_there(what):
    found = []
    for order in (1, 2):
        config = configured(anil(order=order), what)
        theta, state = parameters(config, SHAPES[what])
        batch = episodes(config, SHAPES[what])
        found.append(vectorised(for_training(config, SHAPES[what]), theta, state, batch, config.task.ways, 0))
    first, second = ({n: v for n, v in one.items() if n.startswith("gradient.")} for one in found)
    assert relative(first, second) > 1e-3


@pytest.mark.parametrize("steps", [1, 4])
def test_the_body_stays_and_the_head_is_that_of_least_squares(steps):
    """With squared error w_k = w − (2α/n) FᵀF (w − w*), so (I − (2α/n) FᵀF)^K shrinks w_0 − w*; F: features and 1."""
    config = configured(anil(steps, rate=0.05), "sinusoid")
    theta, _ = parameters(config, (1,))
    support = one_of(episodes(config, (1,)), 0).support
    found = for_training(config, (1,)).inner_loop(theta, support)
    assert all(found[name] is theta[name] for name in theta if not name.startswith("head."))
    x = torch.tanh(support.x @ theta["fc1.weight"] + theta["fc1.bias"])
    x = torch.tanh(x @ theta["fc2.weight"] + theta["fc2.bias"])
    features = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    start, ended = (torch.cat([w["head.weight"], w["head.bias"][None]]) for w in (theta, found))
    shrink = torch.eye(len(start), dtype=torch.float64) - 2 * 0.05 / len(features) * features.T @ features
    best = torch.linalg.pinv(features) @ support.y
    # What the features do not span stays where it was.
    expected = best + torch.linalg.matrix_power(shrink, steps) @ (start - best)
    assert (ended - expected).abs().max() < 1e-11 * expected.abs().max()


def test_central_differences_on_a_smooth_net():
    for what, model in (("mlp", {"activation": "tanh"}), ("sinusoid", {}), ("stride2", {"activation": "softplus"})):
        assert error_of_central_differences(configured(anil(), what, "support", **model), SHAPES[what]) < 1e-6


@pytest.mark.parametrize(("what", "how"), CASES)
def test_what_a_prediction_depends_on(what, how):
    config = configured(anil(), what, how)
    assert engines_disagree(config, SHAPES[what]) < 1e-12
    check_queries_are_independent(config, SHAPES[what])
    if what != "sinusoid":
        check_renaming_the_classes(config, SHAPES[what])


@pytest.mark.parametrize("how", ["support", "running"])
def test_learns_to_tell_clusters(how):
    before, after = learns_clusters(anil(steps=1, rate=1.0), how)
    assert after > before + 0.3


def test_learns_sinusoids():
    before, after = learns_sinusoids(anil(steps=3, rate=0.05))
    assert after < 0.75 * before
