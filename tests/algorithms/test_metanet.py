"""Meta networks against the algorithm of the paper, one example and one query after the other."""

import math

import pytest
import torch
import torch.nn.functional as F
from metric_checks import (
    IMAGES,
    check_queries_are_independent,
    configured,
    error_of_sums,
    moved_by_reordering_the_support_set,
    prepared,
)
from plain_reference import episodes_of, method, network, parameters, relative, stored
from tiny_clusters import Clusters

from metadist.engine.engine import Blueprint
from metadist.engine.shard import vectorised
from metadist.errors import ConfigError

METHOD = {"name": "metanet", "hidden": 6, "generator": 9, "sharpness": 2.0}


# --- the paper's formulas --------------------------------------------------------


def layer(name, weights, x):
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def generated(which, theta, value):
    """Coordinate by coordinate, through the preprocessing of Andrychowicz et al. (2016)."""
    each = value.reshape(-1)
    large = each.abs() >= math.exp(-10)
    logs = torch.where(large, torch.where(large, each, torch.ones_like(each)).abs().log() / 10, -torch.ones_like(each))
    x = torch.stack([logs, torch.where(large, each.sign(), each * math.exp(10))], 1)
    h = F.relu(layer(f"{which}2", theta, F.relu(layer(f"{which}1", theta, x))))
    return (layer(f"{which}3", theta, h)[:, 0] + x @ theta[f"{which}.skip"]).reshape(value.shape)


def fast_weights(which, theta, names, loss, order):
    leaves = [theta[name] if order == 2 else theta[name].detach().requires_grad_() for name in names]
    with torch.enable_grad():
        gradient = torch.autograd.grad(loss(dict(zip(names, leaves, strict=True))), leaves, create_graph=order == 2)
    return {name: generated(which, theta, g) for name, g in zip(names, gradient, strict=True)}


def cosine(one, other):
    return (one @ other) / ((one @ one + 1e-8) * (other @ other + 1e-8)).sqrt()


def answers(config, theta, support, y, queries, without=""):
    """Features in, logits [m, ways] out."""
    algorithm, n = config.algorithm, len(y)
    order = algorithm.order
    held = theta if order == 2 else {name: value.detach() for name, value in theta.items()}
    inputs = support if order == 2 else support.detach()

    def loss_u(q, i):
        return F.cross_entropy(layer("v", held, F.relu(layer("u", q, inputs[i])))[None], y[i : i + 1])

    def loss_b(w, i):
        return F.cross_entropy(layer("b2", w, F.relu(layer("b1", w, inputs[i])))[None], y[i : i + 1])

    of_u, of_b = ["u.weight", "u.bias"], ["b1.weight", "b1.bias", "b2.weight", "b2.bias"]
    each = [fast_weights("d", theta, of_u, lambda q, i=i: loss_u(q, i), order) for i in range(n)]
    fast_u = {name: sum(one[name] for one in each) / n for name in of_u}
    memory = [fast_weights("m", theta, of_b, lambda w, i=i: loss_b(w, i), order) for i in range(n)]

    def represented(x):
        return F.relu(layer("u", theta, x)) + F.relu(layer("u", fast_u, x)) * (without != "fast u")

    told = []
    for x in queries:
        alike = torch.stack([cosine(represented(x), represented(s)) for s in support])
        attention = (algorithm.sharpness * alike * (without != "attention")).softmax(0)
        fast = {name: sum(a * one[name] for a, one in zip(attention, memory, strict=True)) for name in of_b}
        h = F.relu(layer("b1", theta, x)) + F.relu(layer("b1", fast, x)) * (without != "fast b1")
        told.append(layer("b2", theta, h) + layer("b2", fast, h) * (without != "fast b2"))
    return torch.stack(told)


def plain(config, theta, episode, how, without=""):
    support, seen = network(config.model, theta, episode.support.x)
    queries, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    logits = answers(config, theta, support, episode.support.y, queries, without)
    one, two = stored(seen), stored(seen_too)
    return F.cross_entropy(logits, episode.query.y), logits, {n: (one[n] + two[n]) / 2 for n in one}


@pytest.mark.parametrize("how", ["together", "support", "running"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("model", ["stride2", "mlp"])
def test_loss_gradient_and_statistics(model, order, how):
    config = configured({**METHOD, "order": order}, model, how, shots=1, queries=2)
    # The second derivative divides by gradients near zero, whose last digits it shows.
    assert error_of_sums(config, IMAGES[model], plain, judged_alike=True) < (1e-12 if order == 1 else 1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_of_fast_weights_begins_dead(seed):
    """Nothing else would tell: the slow weights learn without them."""
    config = configured({"name": "metanet"}, "stride2").with_values(model={"width": 16})
    blueprint = Blueprint(config.model_copy(update={"seed": seed}), IMAGES["stride2"])
    episodes = episodes_of(config, IMAGES["stride2"])
    found = vectorised(method(config, IMAGES["stride2"]), blueprint.theta, blueprint.state, episodes, 4, 0)
    assert all(value.abs().max() > 1e-8 for name, value in found.items() if name.startswith("gradient."))


@pytest.mark.parametrize("part", ["fast u", "attention", "fast b1", "fast b2"])
def test_each_part_of_the_method_is_there(part):
    config = configured(METHOD, "mlp", shots=1, queries=2)
    assert error_of_sums(config, IMAGES["mlp"], lambda *a: plain(*a, without=part), tasks=1) > 1e-3


def test_the_orders_differ():
    found = []
    for order in (1, 2):
        config = configured({**METHOD, "order": order}, "mlp")
        theta, state = parameters(config, IMAGES["mlp"])
        episodes = episodes_of(config, IMAGES["mlp"])
        found.append(vectorised(method(config, IMAGES["mlp"]), theta, state, episodes, 4, 0))
    assert found[0]["metric.loss"] == found[1]["metric.loss"]
    assert relative(*found) > 1e-3


# --- at test -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["together", "support", "running"])
def test_queries_are_independent(how):
    config = configured(METHOD, "stride2", how)
    check_queries_are_independent(config, "stride2")
    assert moved_by_reordering_the_support_set(config, "stride2") < 1e-10


def test_renaming_the_classes_with_their_weights_renames_the_answers():
    algorithm, theta, state, (support, query, *_) = prepared(configured(METHOD, "mlp"), "mlp")
    new = torch.tensor([2, 0, 3, 1])  # class k is now called new[k]
    renamed = dict(theta)
    for name in ("v.weight", "v.bias", "b2.weight", "b2.bias"):
        renamed[name] = torch.empty_like(theta[name])
        renamed[name][..., new] = theta[name]
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    after = algorithm.adapt(renamed, state, support._replace(y=new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10


def test_other_ways_are_refused():
    with pytest.raises(ConfigError, match=r"eval\.ways: metanet learns a head of task\.ways=4 classes"):
        configured(METHOD, "mlp").with_values(eval={"ways": 3})


def test_adapting_is_what_training_does():
    config = configured(METHOD, "mlp", "support")
    algorithm, theta, state, episode = prepared(config, "mlp")
    support, seen = network(config.model, theta, episode.support.x)
    queries, _ = network(config.model, theta, episode.query.x, seen)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    expected = answers(config, leaves, support, episode.support.y, queries)
    with torch.no_grad():
        found = algorithm.adapt(theta, state, episode.support, 4)(episode.query.x)
    assert (found - expected).abs().max() < 1e-12


def test_it_learns():
    """5-way 1-shot from chance, 0.2, to over 0.6 in 50 meta-steps of 8 tasks."""
    config = configured(
        {"name": "metanet", "hidden": 24}, "mlp", "support",
        ways=5, shots=1, queries=5, width=32, layers=1, norm="none",
    ).with_values(engine={"dtype": "float32"})  # fmt: skip
    problem = Clusters()
    assert problem.accuracy(config, *problem.initial(config)) < 0.3
    assert problem.accuracy(config, *problem.trained(config, 50, 1e-2, 8)) > 0.6
