"""Relation networks against the pairs written out, joined along the channels, through F.conv2d."""

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
from plain_reference import ACTIVATIONS, network, stored

from metadist.engine.engine import Blueprint

RELATION = {"name": "relation", "hidden": 5}


def normed(model, theta, name, x, given, seen):
    """Batch norm of [n, channels, …], or a bias, or a layer norm."""
    as_channels = [1, -1] + [1] * (x.ndim - 2)
    if model.norm == "none":
        return x + theta[f"{name}.bias"].view(as_channels)
    scale, shift = (theta[f"{name}.norm.{key}"].view(as_channels) for key in ("scale", "shift"))
    if model.norm == "layer":
        return F.layer_norm(x, x.shape[1:]) * scale + shift
    axes = [0, *range(2, x.ndim)]
    mean, variance = (x.mean(axes), x.var(axes, correction=0)) if given is None else given[name]
    seen[name] = mean, variance
    return (x - mean.view(as_channels)) / torch.sqrt(variance.view(as_channels) + 1e-5) * scale + shift


def embedding(model, theta, x, given=None):
    """Feature maps [n, channels, rows, columns] of the convolutional networks, pooled twice; vectors of the others."""
    if model.name in ("mlp", "conv4-fc"):
        bare = {name: value for name, value in theta.items() if not name.startswith("relation.")}
        return network(model, bare, x, given)
    seen = {}
    for number, block in enumerate(("conv1", "conv2", "conv3", "conv4")):
        weight = theta[f"{block}.weight"].permute(3, 2, 0, 1)
        x = F.conv2d(x, weight, stride=2 if model.name == "stride2" else 1, padding=1)
        x = ACTIVATIONS[model.activation](normed(model, theta, block, x, given, seen))
        if model.name == "conv4" and number < 2:
            x = F.max_pool2d(x, 2)
    return x, seen


def relations(model, theta, classes, queries, given=None):
    """[m, ways], from [ways, channels, …] and [m, channels, …], every pair joined and passed through g."""
    m, ways = len(queries), len(classes)
    pairs = torch.stack([torch.cat([classes[k], queries[j]]) for j in range(m) for k in range(ways)])
    activate, seen, x = ACTIVATIONS[model.activation], {}, pairs
    for name in ("relation.join", "relation.deep"):
        weight = theta[f"{name}.weight"]
        x = F.conv2d(x, weight.permute(3, 2, 0, 1), padding=1) if x.ndim == 4 else x @ weight
        x = activate(normed(model, theta, name, x, given, seen))
        if x.ndim == 4 and min(x.shape[2:]) > 1:
            x = F.max_pool2d(x, 2)
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    x = activate(x.flatten(1) @ theta["relation.fc.weight"] + theta["relation.fc.bias"])
    x = torch.sigmoid(x @ theta["relation.last.weight"] + theta["relation.last.bias"])
    return x.view(m, ways), seen


def sums_of_classes(features, y, ways):
    return torch.stack([sum(f for f, label in zip(features, y, strict=True) if label == k) for k in range(ways)])


def plain_task(config, theta, episode, how):
    model, ways = config.model, config.task.ways
    features, seen = embedding(model, theta, episode.support.x)
    queries, seen_too = embedding(model, theta, episode.query.x, seen if how == "support" else None)
    classes = sums_of_classes(features, episode.support.y, ways)
    given = relations(model, theta, classes, features)[1] if how == "support" else None
    r, seen_of_pairs = relations(model, theta, classes, queries, given)
    wanted = (episode.query.y[:, None] == torch.arange(ways)).double()
    one, two = stored(seen), stored(seen_too)
    statistics = {name: (one[name] + two[name]) / 2 for name in one} | stored(seen_of_pairs)
    return ((r - wanted) ** 2).mean(), r, statistics


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", list(IMAGES))
def test_loss_gradient_and_statistics(model, how):
    assert error_of_sums(configured(RELATION, model, how), IMAGES[model], plain_task) < 1e-12


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("model", list(IMAGES))
def test_other_norms(model, norm):
    config = configured(RELATION, model, norm=norm, activation="softplus")
    assert error_of_sums(config, IMAGES[model], plain_task) < 1e-12


@pytest.mark.parametrize("how", ["together", "support"])
@pytest.mark.parametrize("model", list(IMAGES))
def test_predictions_are_log_relations(model, how):
    config = configured(RELATION, model, how)
    algorithm, theta, state, episode = prepared(config, model)
    _, r, _ = plain_task(config, theta, episode, how)
    found = algorithm.adapt(theta, state, episode.support, 4)(episode.query.x)
    assert (found.exp() - r).abs().max() < 1e-12


def test_predictions_under_running_statistics():
    config = configured(RELATION, "conv4", "running")
    algorithm, theta, state, (support, query, *_) = prepared(config, "conv4")
    names = {name.rsplit(".norm.")[0] for name in state}
    assert names == {"conv1", "conv2", "conv3", "conv4", "relation.join", "relation.deep"}
    given = {name: (state[f"{name}.norm.mean"], state[f"{name}.norm.variance"]) for name in names}
    features, queries = (embedding(config.model, theta, x, given)[0] for x in (support.x, query.x))
    r, _ = relations(config.model, theta, sums_of_classes(features, support.y, 4), queries, given)
    assert (algorithm.adapt(theta, state, support, 4)(query.x).exp() - r).abs().max() < 1e-12


def test_the_papers_network():
    """28 × 28 images: maps of 7 × 7, 3 × 3 and 1 × 1 positions in front of the linear layers."""
    config = configured({"name": "relation"}, "conv4", width=64)
    shapes = {name: tuple(value.shape) for name, value in Blueprint(config, (1, 28, 28)).theta.items()}
    assert shapes["relation.join.weight"] == (3, 3, 128, 64)
    assert shapes["relation.deep.weight"] == (3, 3, 64, 64)
    assert shapes["relation.fc.weight"] == (64, 8)
    assert shapes["relation.last.weight"] == (8, 1)
    assert not any(name.startswith("head.") for name in shapes)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", list(IMAGES))
def test_what_a_prediction_depends_on(model, how):
    config = configured(RELATION, model, how)
    check_queries_are_independent(config, model)
    check_classes_have_no_names(config, model)
    assert moved_by_reordering_the_support_set(config, model) < 1e-10


def test_learning_beats_the_untrained_network_by_half_of_all_answers():
    before, after = learned({"name": "relation"})
    assert after > before + 0.5
