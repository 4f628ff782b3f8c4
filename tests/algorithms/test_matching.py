"""Matching networks against attention written as a loop over the support set and torch.nn's LSTMs."""

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
from plain_reference import config_of, network, parameters, stored
from torch.func import functional_call

from metadist.errors import ConfigError

PLAIN = {"name": "matching", "temperature": 3.0}
FULL = {"name": "matching", "temperature": 3.0, "full_context": True, "attention_steps": 3}
FORMS = {"plain": PLAIN, "full-context": FULL}


def said_by_lstm(theta, name, rows):
    """What torch.nn.LSTM says at each row of a sequence [n, d]."""
    d = rows.shape[1]
    weights = {
        "weight_ih_l0": theta[f"context.{name}.input"].T,
        "weight_hh_l0": theta[f"context.{name}.recurrent"].T,
        "bias_ih_l0": theta[f"context.{name}.bias"],
        "bias_hh_l0": torch.zeros(4 * d, dtype=torch.float64),
    }
    return functional_call(torch.nn.LSTM(d, d, dtype=torch.float64), weights, (rows,))[0]


def in_full_context(theta, features, query, steps):
    """g(x_i) of all i, [n, d], and f(x') of one query [d], as in the paper's appendix A."""
    forwards = said_by_lstm(theta, "forwards", features)
    backwards = said_by_lstm(theta, "backwards", features.flip(0)).flip(0)
    g = forwards + backwards + features
    h = c = torch.zeros_like(query)
    weight = torch.cat([theta["context.attention.input"], theta["context.attention.recurrent"]])
    for _ in range(steps):
        a = torch.stack([torch.exp(h @ one) for one in g])
        r = sum(share * one for share, one in zip(a / a.sum(), g, strict=True))
        i, f, o_in, o = (torch.cat([query, r, h]) @ weight + theta["context.attention.bias"]).view(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(o_in)
        h = torch.sigmoid(o) * torch.tanh(c) + query
    return g, h


def plain_probabilities(config, theta, episode, how):
    """P(y | x', S) [m, ways] and statistics."""
    algorithm, ways = config.algorithm, config.task.ways
    bare = {name: value for name, value in theta.items() if not name.startswith("context.")}
    features, seen = network(config.model, bare, episode.support.x)
    queries, seen_too = network(config.model, bare, episode.query.x, seen if how == "support" else None)
    rows = []
    for query in queries:
        g, f = in_full_context(theta, features, query, algorithm.attention_steps) if algorithm.full_context else (
            features, query
        )  # fmt: skip
        a = torch.stack([torch.exp(algorithm.temperature * F.cosine_similarity(f, one, dim=0)) for one in g])
        a = a / a.sum()
        rows.append(torch.stack([a[episode.support.y == k].sum() for k in range(ways)]))
    one, two = stored(seen), stored(seen_too)
    return torch.stack(rows), {name: (one[name] + two[name]) / 2 for name in one}


def plain_task(config, theta, episode, how):
    probabilities, statistics = plain_probabilities(config, theta, episode, how)
    loss = -torch.log(probabilities[torch.arange(len(probabilities)), episode.query.y]).mean()
    return loss, probabilities, statistics


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("model", list(IMAGES))
def test_loss_gradient_and_statistics(model, form, how):
    assert error_of_sums(configured(FORMS[form], model, how, queries=2), IMAGES[model], plain_task) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_attention_steps(steps):
    config = configured({**FULL, "attention_steps": steps}, "mlp", activation="tanh", shots=1)
    assert error_of_sums(config, IMAGES["mlp"], plain_task) < 1e-12


@pytest.mark.parametrize("how", ["together", "support"])
@pytest.mark.parametrize("form", list(FORMS))
def test_predictions_are_log_probabilities(form, how):
    config = configured(FORMS[form], "stride2", how)
    algorithm, theta, state, episode = prepared(config, "stride2")
    expected, _ = plain_probabilities(config, theta, episode, how)
    found = algorithm.adapt(theta, state, episode.support, 4)(episode.query.x)
    assert (found.exp() - expected).abs().max() < 1e-13
    assert (found.exp().sum(-1) - 1).abs().max() < 1e-13


def test_only_full_context_has_lstms():
    for form, has in (("plain", False), ("full-context", True)):
        theta, _ = parameters(configured(FORMS[form], "mlp"), IMAGES["mlp"])
        assert any(name.startswith("context.") for name in theta) is has


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("model", list(IMAGES))
def test_what_a_prediction_depends_on(model, form, how):
    config = configured(FORMS[form], model, how)
    check_queries_are_independent(config, model)
    check_classes_have_no_names(config, model)
    moved = moved_by_reordering_the_support_set(config, model)
    assert moved < 1e-10 if form == "plain" else moved > 1e-6  # a sequence, with full context


def test_attention_steps_without_full_context_are_refused():
    with pytest.raises(ConfigError, match=r"attention_steps: is read with algorithm\.full_context=true only"):
        config_of(algorithm={**PLAIN, "attention_steps": 3})


@pytest.mark.parametrize("algorithm", [
    {"name": "matching"}, {"name": "matching", "temperature": 1.0}, {"name": "matching", "full_context": True},
], ids=["plain", "paper", "full-context"])  # fmt: skip
def test_learning_beats_the_untrained_network_by_half_of_all_answers(algorithm):
    before, after = learned(algorithm)
    assert after > before + 0.5
