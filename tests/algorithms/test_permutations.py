"""What a prediction depends on, and what it must not depend on."""

import pytest
import torch
from plain_reference import config_of, episodes_of, one_of, parameters

from metadist.algorithms import for_evaluation
from metadist.tasks.episode import Examples

IMAGES = {"stride2": (1, 15, 14), "conv4": (1, 16, 17), "conv4-fc": (1, 16, 16), "mlp": (1, 5, 4)}
METHODS = {
    "maml": {"name": "maml", "inner_steps": 2, "inner_lr": 0.3},
    "reptile": {"name": "reptile", "inner_steps": 3, "inner_optimizer": "sgd", "inner_lr": 0.3},
    "protonet": {"name": "protonet", "temperature": 0.5},
    "cosine": {"name": "protonet", "distance": "cosine", "temperature": 10.0},
    "fine-tuned": {"name": "protonet", "temperature": 0.5},
}
WAYS, QUERIES = 4, 3


def prepared(name, model, statistics):
    """The method as it is judged, θ, state and one episode."""
    config = config_of(
        task={"ways": WAYS, "shots": 2, "queries": QUERIES, "transductive": statistics == "transductive"},
        model={"name": model, "statistics": "running" if statistics == "running" else "support"},
        algorithm=METHODS[name],
        eval={"finetune_steps": 2, "finetune_lr": 0.01} if name == "fine-tuned" else {},
    )
    image = IMAGES[model]
    theta, state = parameters(config, image)
    algorithm, seen = for_evaluation(config, image), one_of(episodes_of(config, image, seed=9), 0).query
    if statistics == "running":  # as training would have left it, so that activations are neither dead nor huge
        state = {name: 1.1 * value for name, value in algorithm.normalisation.network(theta, seen.x)[1].items()}
    return algorithm, theta, state, one_of(episodes_of(config, image), 0)


CASES = [
    (name, model, statistics)
    for name in METHODS
    for model in IMAGES
    for statistics in ("support", "running")
    if not (name == "reptile" and statistics == "running")
]


@pytest.mark.parametrize(("name", "model", "statistics"), CASES)
def test_a_query_is_answered_whichever_queries_stand_beside_it(name, model, statistics):
    algorithm, theta, state, (support, query, *_) = prepared(name, model, statistics)
    predict = algorithm.adapt(theta, state, support, WAYS)
    together = predict(query.x)
    order = torch.randperm(len(query.y), generator=torch.Generator().manual_seed(5))
    assert (predict(query.x[order]) - together[order]).abs().max() < 1e-10
    alone = torch.cat([predict(one[None]) for one in query.x])
    assert (alone - together).abs().max() < 1e-10
    among_others = predict(torch.cat([query.x[:2], 5 + 3 * query.x]))[:2]
    assert (among_others - together[:2]).abs().max() < 1e-10


@pytest.mark.parametrize("model", list(IMAGES))
@pytest.mark.parametrize("name", list(METHODS))
def test_a_transductive_answer_depends_on_the_other_queries(name, model):
    """The other test could fail."""
    algorithm, theta, state, (support, query, *_) = prepared(name, model, "transductive")
    predict = algorithm.adapt(theta, state, support, WAYS)
    together = predict(query.x)
    order = torch.randperm(len(query.y), generator=torch.Generator().manual_seed(5))
    assert (predict(query.x[order]) - together[order]).abs().max() < 1e-10  # their order does not matter
    assert (predict(query.x[:5]) - together[:5]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "model", "statistics"),
    [(name, model, statistics) for name, model, statistics in CASES if model != "conv4"]
    + [(name, model, "transductive") for name in METHODS for model in ("stride2", "mlp")],
)
def test_renaming_the_classes_renames_the_predictions(name, model, statistics):
    algorithm, theta, state, (support, query, *_) = prepared(name, model, statistics)
    before = algorithm.adapt(theta, state, support, WAYS)(query.x)
    new = torch.tensor([2, 0, 3, 1])  # class k is now called new[k]
    renamed = dict(theta)
    if "head.weight" in theta:
        for key in ("head.weight", "head.bias"):
            renamed[key] = torch.empty_like(theta[key])
            renamed[key][..., new] = theta[key]
    after = algorithm.adapt(renamed, state, Examples(support.x, new[support.y]), WAYS)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", list(METHODS))
def test_the_order_of_the_support_set_does_not_matter(name):
    algorithm, theta, state, (support, query, *_) = prepared(name, "stride2", "support")
    before = algorithm.adapt(theta, state, support, WAYS)(query.x)
    order = torch.randperm(len(support.y), generator=torch.Generator().manual_seed(5))
    after = algorithm.adapt(theta, state, Examples(support.x[order], support.y[order]), WAYS)(query.x)
    assert (after - before).abs().max() < 1e-10


@pytest.mark.parametrize("name", list(METHODS))
def test_adapting_needs_no_gradient_mode(name):
    algorithm, theta, state, (support, query, *_) = prepared(name, "stride2", "transductive")
    with torch.no_grad():
        quiet = algorithm.adapt(theta, state, support, WAYS)(query.x)
    assert torch.equal(quiet, algorithm.adapt(theta, state, support, WAYS)(query.x))
