"""Prototypical networks against the plain formula, and their fine-tuning."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import learned
from plain_reference import (
    config_of,
    episodes_of,
    method,
    network,
    one_of,
    parameters,
    protonet_task,
    relative,
    stored,
    sums,
)

from metadist.algorithms import for_evaluation
from metadist.algorithms.protonet import prototypes
from metadist.engine.shard import loop, vectorised

IMAGES = {"stride2": (1, 15, 14), "conv4": (2, 19, 17), "conv4-fc": (1, 16, 16), "mlp": (1, 5, 4)}


def protonet(model="stride2", distance="euclidean", temperature=1.0, transductive=True, evaluation=None):
    return config_of(
        task={"ways": 4, "shots": 3, "queries": 2, "transductive": transductive},
        model={"name": model},
        algorithm={"name": "protonet", "distance": distance, "temperature": temperature},
        eval=evaluation or {},
    )


@pytest.mark.parametrize("transductive", [True, False], ids=["transductive", "support-statistics"])
@pytest.mark.parametrize(("distance", "temperature"), [("euclidean", 1.0), ("euclidean", 0.3), ("cosine", 10.0)])
@pytest.mark.parametrize("model", list(IMAGES))
def test_loss_gradient_and_statistics(model, distance, temperature, transductive):
    config, image = protonet(model, distance, temperature, transductive), IMAGES[model]
    theta, state = parameters(config, image)
    assert not any(name.startswith("head.") for name in theta)
    episodes = episodes_of(config, image)
    expected = sums(config, theta, episodes, "together" if transductive else "support")
    for engine in (loop, vectorised):
        found = engine(method(config, image), theta, state, episodes, 4, 0)
        assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("transductive", [True, False])
def test_adapting_without_steps_is_plain_prototypes(distance, transductive):
    config, image = protonet(distance=distance, temperature=0.7, transductive=transductive), IMAGES["stride2"]
    theta, state = parameters(config, image)
    episode = one_of(episodes_of(config, image), 0)
    how = "together" if transductive else "support"
    _, logits, _ = protonet_task(config, theta, episode, how)
    found = for_evaluation(config, image).adapt(theta, state, episode.support, 4)(episode.query.x)
    assert (found.softmax(-1) - logits.softmax(-1)).abs().max() < 1e-13


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.05), (3, 0.02)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("transductive", [True, False])
def test_fine_tuning_is_gradient_descent_from_the_prototype_head(transductive, distance, steps, rate):
    config = protonet(
        distance=distance, temperature=0.7, transductive=transductive,
        evaluation={"finetune_steps": steps, "finetune_lr": rate},
    )  # fmt: skip
    image = IMAGES["stride2"]
    theta, state = parameters(config, image)
    support, query, *_ = one_of(episodes_of(config, image), 0)

    def logits_of(embedding, head, x, given=None):
        features, seen = network(config.model, embedding, x, given)
        if distance == "cosine":
            return 0.7 * F.cosine_similarity(features[:, None], head[0][None], dim=-1), seen
        return features @ head[0].T + head[1], seen

    features, _ = network(config.model, theta, support.x)
    centres = torch.stack([features[support.y == k].mean(0) for k in range(4)]).detach()
    if distance == "cosine":
        head = [centres / centres.norm(dim=-1, keepdim=True)]
    else:
        head = [2 * 0.7 * centres, -0.7 * (centres**2).sum(-1)]
    embedding = {name: value.clone() for name, value in theta.items()}
    for _ in range(steps):
        leaves = [value.requires_grad_() for value in [*embedding.values(), *head]]
        loss = F.cross_entropy(logits_of(embedding, head, support.x)[0], support.y)
        moved = [(v - rate * g).detach() for v, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True)]
        embedding, head = dict(zip(embedding, moved, strict=False)), moved[len(embedding) :]
    given = None if transductive else logits_of(embedding, head, support.x)[1]
    expected = logits_of(embedding, head, query.x, given)[0]
    found = for_evaluation(config, image).adapt(theta, state, support, 4)(query.x)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("model", list(IMAGES))
def test_fine_tuning_lowers_the_support_loss(model, distance):
    image, losses = IMAGES[model], []
    for steps in (0, 3, 20):
        config = protonet(
            model, distance, 10.0 if distance == "cosine" else 0.1,
            evaluation={"finetune_steps": steps, "finetune_lr": 0.003},
        )  # fmt: skip
        theta, state = parameters(config, image)
        support = one_of(episodes_of(config, image), 0).support
        # Transductive: the support set as queries is normalised as it was in the inner loop.
        logits = for_evaluation(config, image).adapt(theta, state, support, 4)(support.x)
        losses.append(float(F.cross_entropy(logits, support.y)))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("ways", [2, 6])
def test_any_number_of_ways_may_be_judged(ways):
    image = IMAGES["stride2"]
    config = protonet(evaluation={"ways": ways})
    theta, state = parameters(config, image)
    other = protonet().with_values(task={"ways": ways})
    episode = one_of(episodes_of(other, image), 0)
    logits = for_evaluation(config, image).adapt(theta, state, episode.support, ways)(episode.query.x)
    _, expected, _ = protonet_task(other, theta, episode, "together")
    assert (logits.softmax(-1) - expected.softmax(-1)).abs().max() < 1e-13


def test_prototypes_of_unequal_classes_in_any_order():
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([2, 0, 2, 1, 2, 0])
    expected = torch.stack([features[[1, 5]].mean(0), features[3], features[[0, 2, 4]].mean(0)])
    assert torch.allclose(prototypes(features, y, 3), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("model", ["stride2", "conv4"])
def test_running_statistics_are_collected_and_judged_by(model):
    """In training the mean of both sets' own; at test every image by the state's."""
    image = IMAGES[model]
    config = protonet(model, transductive=False).with_values(model={"statistics": "running"})
    theta, state = parameters(config, image)
    assert state
    episode = one_of(episodes_of(config, image), 0)
    sets = [stored(network(config.model, theta, examples.x)[1]) for examples in (episode.support, episode.query)]
    expected = {name: (sets[0][name] + sets[1][name]) / 2 for name in state}
    found = method(config, image).task_loss(theta, state, episode, 4, 0).statistics
    assert relative(found, expected) < 1e-12

    layers = [name.removesuffix(".norm.mean") for name in state if name.endswith(".norm.mean")]
    given = {layer: (state[f"{layer}.norm.mean"], state[f"{layer}.norm.variance"]) for layer in layers}
    support, query = (network(config.model, theta, x, given)[0] for x in (episode.support.x, episode.query.x))
    centres = torch.stack([support[episode.support.y == k].mean(0) for k in range(4)])
    logits = -((query[:, None] - centres) ** 2).sum(-1)
    judged = for_evaluation(config, image).adapt(theta, state, episode.support, 4)(episode.query.x)
    assert (judged.softmax(-1) - logits.softmax(-1)).abs().max() < 1e-12


def test_it_learns():
    before, after = learned({"name": "protonet"})
    assert after > before + 0.3
