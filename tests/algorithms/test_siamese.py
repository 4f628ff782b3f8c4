"""Siamese networks against loops over pairs."""

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
    prepared,
)
from plain_reference import network, stored

from metadist.algorithms.siamese import alike, class_logits, pair_loss

SIAMESE = {"name": "siamese"}


def probability(theta, one, other):
    """σ(b − Σ_j w_j |f_j − f'_j|) of two embedded images."""
    return torch.sigmoid(theta["distance.bias"] - (theta["distance.weight"] * (one - other).abs()).sum())


def class_means(theta, queries, features, y, ways):
    """Each query's mean probability of being like a class's support examples."""
    rows = [
        [torch.stack([probability(theta, q, f) for f, label in zip(features, y, strict=True) if label == k]).mean()
         for k in range(ways)] for q in queries
    ]  # fmt: skip
    return torch.stack([torch.stack(row) for row in rows])


def plain_task(config, theta, episode, how):
    features, seen = network(config.model, theta, episode.support.x)
    queries, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    every, y = torch.cat([features, queries]), torch.cat([episode.support.y, episode.query.y])
    same, different = [], []
    for i in range(len(y)):
        for j in range(i):
            p = probability(theta, every[i], every[j])
            (same if y[i] == y[j] else different).append(-torch.log(p if y[i] == y[j] else 1 - p))
    loss = (torch.stack(same).mean() + torch.stack(different).mean()) / 2
    one, two = stored(seen), stored(seen_too)
    statistics = {name: (one[name] + two[name]) / 2 for name in one}
    return loss, class_means(theta, queries, features, episode.support.y, config.task.ways), statistics


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", list(IMAGES))
def test_loss_gradient_and_statistics(model, how):
    config = configured(SIAMESE, model, how, queries=1 if model == "conv4" else 2)
    assert error_of_sums(config, IMAGES[model], plain_task) < 1e-12


@pytest.mark.parametrize("shots", [1, 3])
def test_predictions_are_the_classes_mean_probabilities(shots):
    config = configured(SIAMESE, "mlp", "support", shots=shots)
    algorithm, theta, state, (support, query, *_) = prepared(config, "mlp")
    features, seen = network(config.model, theta, support.x)
    queries, _ = network(config.model, theta, query.x, seen)
    found = algorithm.adapt(theta, state, support, 4)(query.x)
    assert (found.exp() - class_means(theta, queries, features, support.y, 4)).abs().max() < 1e-13


def test_far_apart_pairs_have_finite_logits_and_gradients():
    """σ is 0 in float64 there; its logarithm is not."""
    theta = {"distance.weight": torch.ones(2).double(), "distance.bias": torch.tensor(0.0).double()}
    features = torch.tensor([[0.0, 0.0], [2000.0, 0.0], [4000.0, 1.0]], dtype=torch.float64, requires_grad=True)
    alikeness = alike(theta, features, features)
    logits = class_logits(alikeness, torch.tensor([0, 1, 1]), 2)
    assert logits.isfinite().all() and logits.argmax(-1).tolist() == [0, 1, 1]
    loss = pair_loss(alikeness, torch.tensor([0, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, features)
    assert float(loss.detach()) == pytest.approx(2001 / 2, rel=1e-12)
    assert gradient.isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", list(IMAGES))
def test_what_a_prediction_depends_on(model, how):
    config = configured(SIAMESE, model, how)
    check_queries_are_independent(config, model)
    check_classes_have_no_names(config, model)
    assert moved_by_reordering_the_support_set(config, model) < 1e-10


def test_a_task_of_one_example_each_has_no_empty_mean():
    config = configured(SIAMESE, "mlp", shots=1, queries=1)
    assert error_of_sums(config, IMAGES["mlp"], plain_task) < 1e-12


def test_learning_beats_the_untrained_network_by_half_of_all_answers():
    before, after = learned(SIAMESE)
    assert after > before + 0.5


def test_half_of_the_loss_is_of_same_pairs():
    """Whatever the number of ways: the loss of an embedding without distances is log 2 at b = 0."""
    for ways in (2, 5, 20):
        y = torch.arange(ways).repeat(2)
        odds = torch.zeros(2 * ways, 2 * ways, dtype=torch.float64)
        assert float(pair_loss(odds, y)) == pytest.approx(float(torch.log(torch.tensor(2.0).double())), rel=1e-12)
        assert float(pair_loss(odds + 1, y)) == pytest.approx(
            float(F.softplus(torch.tensor(-1.0).double()) + F.softplus(torch.tensor(1.0).double())) / 2, rel=1e-12
        )
