"""Baseline and Baseline++ against torch's own layers and optimizers."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import (
    IMAGES,
    check_classes_have_no_names,
    check_queries_are_independent,
    configured,
    moved_by_reordering_the_support_set,
    prepared,
)
from plain_reference import episodes_of, network, one_of, parameters, relative, stored
from tiny_clusters import Clusters

from metadist.algorithms import for_evaluation, for_training
from metadist.engine.engine import Blueprint
from metadist.engine.shard import loop, vectorised
from metadist.errors import ConfigError

CLASSES, HEADS = 9, ("centroid", "linear", "cosine")
FIT = {"centroid": {}, "linear": {"steps": 7, "rate": 0.5}, "cosine": {"steps": 7, "rate": 0.5, "scale": 4.0}}


def baseline(head):
    return {"name": "baseline++", "head": head, **FIT[head]}


def classified(config, weight, bias, features):
    """weight: [d, classes]."""
    if config.algorithm.head == "cosine":
        lengths = ((features**2).sum(1, keepdim=True) + 1e-8) * ((weight**2).sum(0) + 1e-8)
        return config.algorithm.scale * F.linear(features, weight.T) / lengths.sqrt()
    return F.linear(features, weight.T, bias)


def pretraining(config, theta, episode, how):
    support, seen = network(config.model, theta, episode.support.x)
    queries, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    loss, right = 0.0, []
    for (_, y), features in ((episode.support, support), (episode.query, queries)):
        logits = classified(config, theta["classifier.weight"], theta.get("classifier.bias"), features)
        y = torch.tensor([int(episode.classes[k]) for k in y])
        loss = loss + F.cross_entropy(logits, y, reduction="sum")
        right = (logits.argmax(-1) == y).double()
    one, two = stored(seen), stored(seen_too)
    return loss / (len(support) + len(queries)), right.mean(), {n: (one[n] + two[n]) / 2 for n in one}


def problem_of(config, model, tasks=3):
    blueprint, generator = Blueprint(config, IMAGES[model], CLASSES), torch.Generator().manual_seed(4)
    shaken = lambda v: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    episodes = episodes_of(config, IMAGES[model], tasks)
    classes = torch.stack([torch.randperm(CLASSES, generator=generator)[: config.task.ways] for _ in range(tasks)])
    return {n: shaken(v) for n, v in blueprint.theta.items()}, blueprint.state, episodes._replace(classes=classes)


@pytest.mark.parametrize("how", ["together", "support", "running"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("model", ["stride2", "mlp"])
def test_pretraining(model, head, how):
    """Cross-entropy over all classes, with the labels that the classes have in all episodes."""
    config = configured(baseline(head), model, how)
    theta, state, episodes = problem_of(config, model)
    total = {}
    for task in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        trained_as = "support" if how == "support" else "together"
        loss, right, statistics = pretraining(config, leaves, one_of(episodes, task), trained_as)
        gradient = torch.autograd.grad(loss, list(leaves.values()))
        one = {f"gradient.{n}": g for n, g in zip(leaves, gradient, strict=True)}
        one |= {f"statistics.{n}": statistics[n] for n in state}
        one |= {"metric.loss": loss.detach(), "metric.score": right}
        total = {n: total[n] + v if total else v for n, v in one.items()}
    algorithm = for_training(config, IMAGES[model], CLASSES)
    for engine in (loop, vectorised):
        assert relative(engine(algorithm, theta, state, episodes, 4, 0), total) < 1e-12
    # Labels that change their meaning from task to task are another problem.
    other = vectorised(algorithm, theta, state, episodes._replace(classes=episodes.classes.flip(1)), 4, 0)
    assert relative(other, total) > 1e-3


@pytest.mark.parametrize("how", ["together", "support"])
@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_a_support_set(head, how):
    config = configured(baseline(head), "stride2", how)
    algorithm, theta, state, (support, query, *_) = prepared(config, "stride2")
    features, seen = network(config.model, theta, support.x)
    queries, _ = network(config.model, theta, query.x, seen if how == "support" else None)
    centres = torch.stack([features[support.y == k].mean(0) for k in range(4)])
    if head == "centroid":
        expected = -((queries[:, None] - centres[None]) ** 2).sum(-1)
    else:
        weight = (centres.T if head == "cosine" else torch.zeros_like(centres.T)).clone().requires_grad_()
        bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=config.algorithm.rate)
        for _ in range(config.algorithm.steps):
            optimizer.zero_grad()
            F.cross_entropy(classified(config, weight, bias, features), support.y).backward()
            optimizer.step()
        expected = classified(config, weight, bias, queries)
        assert (weight - (centres.T if head == "cosine" else 0)).abs().max() > 1e-2
    found = algorithm.adapt(theta, state, support, 4)(query.x)
    assert (found.softmax(-1) - expected.softmax(-1)).abs().max() < 1e-12


@pytest.mark.parametrize("how", ["together", "support"])
@pytest.mark.parametrize("head", HEADS)
def test_what_an_answer_depends_on(head, how):
    config = configured(baseline(head), "stride2", how)
    check_queries_are_independent(config, "stride2")
    check_classes_have_no_names(config, "stride2")
    assert moved_by_reordering_the_support_set(config, "stride2") < 1e-10


@pytest.mark.parametrize("head", HEADS)
def test_running_statistics_embed_support_set_and_queries_alike(head):
    config = configured(baseline(head), "stride2", "running")
    theta, _, episodes = problem_of(config, "stride2", tasks=1)
    support, query, *_ = one_of(episodes, 0)
    seen = network(config.model, theta, torch.cat([support.x, query.x]))[1]
    state = {name: 1.1 * value for name, value in stored(seen).items()}
    algorithm = for_evaluation(config, IMAGES["stride2"], CLASSES)
    found = algorithm.adapt(theta, state, support, 4)(query.x)
    alone = torch.cat([algorithm.adapt(theta, state, support, 4)(one[None]) for one in query.x])
    assert (found - alone).abs().max() < 1e-10
    if head == "centroid":
        given = {name: (1.1 * mean, 1.1 * variance) for name, (mean, variance) in seen.items()}
        features, queries = (network(config.model, theta, x, given)[0] for x in (support.x, query.x))
        centres = torch.stack([features[support.y == k].mean(0) for k in range(4)])
        expected = -((queries[:, None] - centres[None]) ** 2).sum(-1)
        assert (found.softmax(-1) - expected.softmax(-1)).abs().max() < 1e-12


def test_any_number_of_ways_and_no_classes_at_all_may_be_judged():
    config = configured(baseline("cosine"), "mlp").with_values(eval={"ways": 6})
    algorithm, theta, state, _ = prepared(config, "mlp")
    episode = one_of(episodes_of(config.with_values(task={"ways": 6}), IMAGES["mlp"]), 0)
    assert algorithm.adapt(theta, state, episode.support, 6)(episode.query.x).shape == (18, 6)
    assert parameters(config, IMAGES["mlp"])[0]["classifier.weight"].shape == (4, 0)


@pytest.mark.parametrize(("head", "key"), [("centroid", "steps"), ("centroid", "rate"), ("linear", "scale")])
def test_a_key_that_nothing_would_read_is_refused(head, key):
    with pytest.raises(ConfigError, match=rf"algorithm\.{key}: is read by algorithm\.head="):
        configured({"name": "baseline++", "head": head, key: 3}, "mlp")


@pytest.mark.parametrize("head", HEADS)
def test_it_learns(head):
    """5-way 1-shot of unseen classes: at least 0.1 above the untrained features."""
    problem = Clusters()
    config = configured(
        {"name": "baseline++", "head": head}, "mlp", "support",
        ways=5, shots=1, queries=5, width=32, layers=1, norm="none",
    ).with_values(engine={"dtype": "float32"})  # fmt: skip
    untrained = problem.accuracy(config, *problem.initial(config), 60)
    assert problem.accuracy(config, *problem.trained(config, 150, 1e-2, 8), 60) > untrained + 0.1
