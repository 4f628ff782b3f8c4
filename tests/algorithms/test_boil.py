"""BOIL: only the body adapts."""

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
from plain_reference import one_of, parameters, relative, stored

from metadist.algorithms import for_training
from metadist.engine.shard import vectorised


def boil(steps=2, order=2, rate=0.4):
    return {"name": "boil", "inner_steps": steps, "order": order, "inner_lr": rate}


def task(config, theta, episode, how, step):
    """b ← b − α ∇_b L_S(b, w); L_Q(b_K, w)."""
    method = config.algorithm
    body = [name for name in theta if name.split(".")[0] != "head"]
    fast = plain_descent(
        config, theta, episode.support, dict.fromkeys(body, method.inner_lr), method.inner_steps, method.order
    )
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    return loss, outputs, stored(seen)


@pytest.mark.parametrize(("what", "how"), CASES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_a_plain_autograd_loop(what, steps, order, how):
    assert error_of_sums(configured(boil(steps, order), what, how), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["conv4", "conv4-fc"])
def test_equals_it_with_other_networks(what):
    assert error_of_sums(configured(boil(), what), SHAPES[what], task) < 1e-12


@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
def test_the_head_stays_and_everything_else_moves(what):
    config = configured(boil(steps=1), what)
    theta, _ = parameters(config, SHAPES[what])
    adapted = for_training(config, SHAPES[what]).inner_loop(theta, one_of(episodes(config, SHAPES[what]), 0).support)
    for name, value in theta.items():
        moved = (adapted[name] - value).abs().max()
        assert moved == 0 if name.startswith("head.") else moved > 1e-6, name


@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
def test_the_second_order_term_is_there(what):
    found = []
    for order in (1, 2):
        config = configured(boil(order=order), what)
        theta, state = parameters(config, SHAPES[what])
        batch = episodes(config, SHAPES[what])
        found.append(vectorised(for_training(config, SHAPES[what]), theta, state, batch, config.task.ways, 0))
    first, second = ({n: v for n, v in one.items() if n.startswith("gradient.")} for one in found)
    assert relative(first, second) > 1e-3


def test_central_differences_on_a_smooth_net():
    for what, model in (("mlp", {"activation": "tanh"}), ("sinusoid", {}), ("stride2", {"activation": "softplus"})):
        assert error_of_central_differences(configured(boil(), what, "support", **model), SHAPES[what]) < 1e-6


@pytest.mark.parametrize(("what", "how"), CASES)
def test_what_a_prediction_depends_on(what, how):
    config = configured(boil(), what, how)
    assert engines_disagree(config, SHAPES[what]) < 1e-12
    check_queries_are_independent(config, SHAPES[what])
    if what != "sinusoid":
        check_renaming_the_classes(config, SHAPES[what])


@pytest.mark.parametrize("how", ["support", "running"])
def test_learns_to_tell_clusters(how):
    before, after = learns_clusters(boil(steps=1, rate=3.0), how, lr=2e-2)
    assert after > before + 0.3


def test_learns_sinusoids():
    before, after = learns_sinusoids(boil(steps=1, rate=0.05))
    assert after < 0.75 * before
