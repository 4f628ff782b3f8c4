"""From scratch: nothing is meta-trained, and a support set is learned as torch.optim would."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import IMAGES, check_queries_are_independent, configured, prepared
from plain_reference import config_of, episodes_of, method, network, one_of, parameters
from tiny_clusters import Clusters

from metadist.algorithms import for_evaluation, for_training
from metadist.engine.shard import loop, vectorised
from metadist.errors import ConfigError
from metadist.tasks.episode import Episode, Examples
from metadist.tasks.sinusoid import Sinusoid

RATES = {"sgd": 0.3, "adam": 0.02}


def scratch(optimizer, steps=4):
    return {"name": "scratch", "inner_optimizer": optimizer, "inner_lr": RATES[optimizer], "inner_steps": steps}


def by_torch(config, theta, support, loss):
    """φ with the optimizers of torch.optim."""
    fast = {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.algorithm.inner_optimizer](
        list(fast.values()), lr=config.algorithm.inner_lr
    )
    for _ in range(config.algorithm.inner_steps):
        optimizer.zero_grad()
        loss(network(config.model, fast, support.x)[0], support.y).backward()
        optimizer.step()
    return {name: value.detach() for name, value in fast.items()}


@pytest.mark.parametrize("how", ["together", "support"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["stride2", "mlp"])
def test_answers_are_those_of_torchs_optimizers(model, optimizer, how):
    config = configured(scratch(optimizer), model, how)
    theta, state = parameters(config, IMAGES[model])
    support, query, *_ = one_of(episodes_of(config, IMAGES[model]), 0)
    fast = by_torch(config, theta, support, F.cross_entropy)
    given = network(config.model, fast, support.x)[1] if how == "support" else None
    expected = network(config.model, fast, query.x, given)[0]
    found = for_evaluation(config, IMAGES[model]).adapt(theta, state, support, 4)(query.x)
    # Adam divides by a gradient's own size, so it shows the last digits of small gradients.
    assert (found - expected).abs().max() < (1e-12 if optimizer == "sgd" else 1e-9) * expected.abs().max()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nothing_is_meta_trained_and_the_engines_agree(optimizer):
    config = configured(scratch(optimizer), "mlp")
    theta, state = parameters(config, IMAGES["mlp"])
    episodes = episodes_of(config, IMAGES["mlp"])
    one, other = (engine(method(config, IMAGES["mlp"]), theta, state, episodes, 4, 0) for engine in (loop, vectorised))
    assert one.keys() == other.keys() == {*(f"gradient.{name}" for name in theta), "metric.loss", "metric.score"}
    assert not any(value.any() for name, value in one.items() if name.startswith("gradient."))
    assert not any(value.any() for name, value in other.items() if name.startswith("gradient."))
    assert float(one["metric.loss"]) == pytest.approx(float(other["metric.loss"]), rel=1e-9)
    assert one["metric.score"] == other["metric.score"]
    expected = 0.0
    for task in range(2):
        support, query, *_ = one_of(episodes, task)
        fast = by_torch(config, theta, support, F.cross_entropy)
        expected += float(F.cross_entropy(network(config.model, fast, query.x)[0], query.y))
    assert float(one["metric.loss"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("how", ["together", "support"])
def test_queries_are_independent(how):
    check_queries_are_independent(configured(scratch("sgd"), "stride2", how), "stride2")


def test_renaming_the_classes_with_the_heads_rows_renames_the_answers():
    algorithm, theta, state, (support, query, *_) = prepared(configured(scratch("sgd"), "stride2"), "stride2")
    new = torch.tensor([2, 0, 3, 1])
    renamed = dict(theta)
    for name in ("head.weight", "head.bias"):
        renamed[name] = torch.empty_like(theta[name])
        renamed[name][..., new] = theta[name]
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    after = algorithm.adapt(renamed, state, Examples(support.x, new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10


def sinusoid(**algorithm):
    return config_of(
        data={"name": "sinusoid"},
        task={"shots": 10, "queries": 5, "meta_batch": 4},
        model={"name": "mlp", "width": 16, "norm": "none"},
        algorithm={"name": "scratch", **algorithm},
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_on_sinusoids(optimizer):
    config = sinusoid(inner_optimizer=optimizer, inner_lr=0.01, inner_steps=5)
    theta, state = parameters(config, (1,))
    episodes: Episode = Sinusoid("train", 0, 10, 5, torch.float64).sample(0, 0, 3)
    one, other = (engine(for_training(config, (1,)), theta, state, episodes, 1, 0) for engine in (loop, vectorised))
    expected = 0.0
    for task in range(3):
        support, query, *_ = one_of(episodes, task)
        fast = by_torch(config, theta, support, F.mse_loss)
        expected += float(F.mse_loss(network(config.model, fast, query.x)[0], query.y))
    assert float(one["metric.loss"]) == pytest.approx(expected, rel=1e-9)
    assert float(other["metric.loss"]) == pytest.approx(expected, rel=1e-9)


def test_meta_training_that_would_be_lost_is_refused():
    with pytest.raises(ConfigError, match=r"outer\.weight_decay: would move what scratch never trains"):
        configured(scratch("sgd"), "mlp").with_values(outer={"weight_decay": 0.1})
    with pytest.raises(ConfigError, match=r"model\.statistics: scratch keeps no running statistics"):
        configured(scratch("sgd"), "mlp", "running")


def test_it_learns_a_support_set():
    """2-way 10-shot from about 0.5 to over 0.8."""
    problem, task = Clusters(told=8, untold=0), {"ways": 2, "shots": 10, "queries": 5}
    config = configured({"name": "scratch"}, "mlp", "support", **task, width=16, layers=1)
    untrained = config.with_values(eval={"inner_steps": 0})
    theta, state = problem.initial(config)
    assert problem.accuracy(untrained, theta, state, 20) < 0.65
    assert problem.accuracy(config, theta, state, 20) > 0.8
