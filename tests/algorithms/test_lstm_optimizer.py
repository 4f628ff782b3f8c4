"""The coordinate-wise LSTM optimizer against a plain loop with torch's own LSTM cell."""

import math

import pytest
import torch
from inner_loop_checks import (
    SHAPES,
    check_queries_are_independent,
    check_renaming_the_classes,
    configured,
    engines_disagree,
    episodes,
    error_of_sums,
    learns_clusters,
    learns_sinusoids,
    plain_loss,
    plain_queries,
    ways,
)
from plain_reference import method, one_of, parameters, stored

from metadist.algorithms.coordinates import preprocessed
from metadist.config import validate
from metadist.engine.engine import Blueprint
from metadist.engine.shard import vectorised
from metadist.errors import ConfigError

METHOD = {"name": "lstm-optimizer", "inner_lr": 0.2, "inner_steps": 3, "hidden": 5, "layers": 2}
HOW = ("together", "support", "running")
CASES = [(what, how) for what in ("stride2", "mlp") for how in HOW] + [("sinusoid", "together")]


def seen_by_the_optimizer(g):
    """Appendix A of the paper, one number at a time."""
    g = float(g)
    if abs(g) >= math.exp(-10):
        return [math.log(abs(g)) / 10, math.copysign(1.0, g)]
    return [-1.0, math.exp(10) * g]


def constants(config, params, support):
    """Gradient of the support loss as numbers."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    gradient = torch.autograd.grad(plain_loss(config, leaves, support)[0], list(leaves.values()))
    return dict(zip(leaves, gradient, strict=True))


def cell(theta, name, x, memory):
    return torch.lstm_cell(x, memory, theta[f"{name}.input"].T, theta[f"{name}.recurrent"].T, theta[f"{name}.bias"])


def plain(config, theta, episode, how, step, signal=seen_by_the_optimizer):
    """Every tensor by itself: the optimizer is shared by coordinates, and each has a memory of its own."""
    keys, names = config.algorithm, [name for name in theta if not name.startswith("lstm.")]
    fast = {n: theta[n] if keys.start == "learned" else theta[n].detach() for n in names}
    memory = {}
    for name in names:
        blank = torch.zeros(theta[name].numel(), keys.hidden, dtype=torch.float64)
        memory[name] = [(blank, blank)] * keys.layers
    total = 0.0
    for _ in range(keys.inner_steps):
        gradient, moved = constants(config, fast, episode.support), {}
        for name in names:
            x = torch.tensor([signal(g) for g in gradient[name].flatten()], dtype=torch.float64)
            for layer in range(keys.layers):
                state = memory[name][layer]
                memory[name] = list(memory[name])
                memory[name][layer] = cell(theta, f"lstm.{layer + 1}", x, state)
                x = memory[name][layer][0]
            out = x @ theta["lstm.out.weight"] + theta["lstm.out.bias"]
            moved[name] = fast[name] - keys.inner_lr * out.view_as(fast[name])
        fast = moved
        total = total + keys.trajectory * plain_loss(config, fast, episode.support)[0]
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    return loss + total, outputs, stored(seen)


@pytest.mark.parametrize(("what", "how"), CASES)
@pytest.mark.parametrize("further", [{}, {"trajectory": 0.4, "start": "fixed", "layers": 1}], ids=str)
def test_loss_and_gradient(further, what, how):
    assert error_of_sums(configured(METHOD | further, what, how), SHAPES[what], plain) < 1e-12


def test_the_recurrence_is_there():
    """An optimizer that forgets its memory at every step gives another gradient."""

    def forgetful(config, theta, *rest):
        cut = {n: 0 * v if n.endswith(".recurrent") else v for n, v in theta.items()}
        return plain(config, cut, *rest)

    assert error_of_sums(configured(METHOD, "mlp"), SHAPES["mlp"], forgetful) > 0.01


def test_the_preprocessing_is_there():
    raw = configured(METHOD, "mlp")
    assert error_of_sums(raw, SHAPES["mlp"], lambda *task: plain(*task, signal=lambda g: [float(g), 0.0])) > 0.01


def test_preprocessed_numbers():
    least = math.exp(-10)
    values = torch.tensor([1.0, -1.0, math.e**2, -1e-3, least, -least / 2, 0.0, 1e-30], dtype=torch.float64)
    expected = torch.tensor([seen_by_the_optimizer(v) for v in values], dtype=torch.float64)
    assert (preprocessed(values) - expected).abs().max() < 1e-14
    assert preprocessed(values.float().view(2, 4)).shape == (2, 4, 2)


def test_a_fixed_start_stays_and_the_optimizer_moves():
    config, shape = configured(METHOD | {"start": "fixed"}, "mlp"), SHAPES["mlp"]
    theta, _ = parameters(config, shape)
    found = vectorised(method(config, shape), theta, {}, episodes(config, shape), ways(config), 0)
    for name in theta:
        assert bool(found[f"gradient.{name}"].any()) == name.startswith("lstm.")


def test_a_fixed_start_bears_no_weight_decay():
    with pytest.raises(ConfigError, match=r"outer\.weight_decay: .* algorithm\.start=fixed"):
        validate({"algorithm": METHOD | {"start": "fixed"}, "outer": {"weight_decay": 0.01}}, "test")


def test_the_optimizer_does_not_depend_on_the_network():
    """Coordinate-wise: its weights have the same shapes for every network."""

    def shapes(what):
        theta = Blueprint(configured(METHOD, what), SHAPES[what]).theta
        return {name: value.shape for name, value in theta.items() if name.startswith("lstm.")}

    assert shapes("stride2") == shapes("mlp")
    assert len(shapes("mlp")) == 8


@pytest.mark.parametrize(("what", "how"), CASES)
def test_engines_agree(what, how):
    assert engines_disagree(configured(METHOD, what, how), SHAPES[what]) < 1e-12


@pytest.mark.parametrize(("what", "how"), CASES)
def test_queries_are_answered_one_by_one(what, how):
    check_queries_are_independent(configured(METHOD, what, how), SHAPES[what])


@pytest.mark.parametrize(("what", "how"), CASES[:-1])
def test_renaming_the_classes(what, how):
    check_renaming_the_classes(configured(METHOD, what, how), SHAPES[what])


def test_the_path_begins_at_theta():
    config = configured(METHOD, "mlp")
    theta, _ = parameters(config, SHAPES["mlp"])
    support = one_of(episodes(config, SHAPES["mlp"]), 0).support
    algorithm = method(config, SHAPES["mlp"])
    path = algorithm.inner_loop(theta, support)
    assert len(path) == 4
    assert all(torch.equal(path[0][name], theta[name]) for name in path[0])
    assert not torch.equal(path[1]["head.weight"], path[0]["head.weight"])


LEARNER = {"name": "lstm-optimizer", "inner_lr": 0.1, "inner_steps": 3, "hidden": 8, "layers": 1}


def test_it_learns_clusters():
    """Accuracy on new tasks rises by 10 points or more."""
    before, after = learns_clusters(LEARNER, steps=60, lr=1e-2)
    assert after > before + 0.1


def test_it_learns_sinusoids():
    """The squared error on new tasks falls by a seventh or more."""
    before, after = learns_sinusoids(LEARNER | {"trajectory": 0.1}, steps=100, lr=1e-2)
    assert after < before * 0.85


def test_an_optimizer_alone_learns_sinusoids():
    """The network's initialisation stays what it was; the error falls by a tenth or more."""
    before, after = learns_sinusoids(LEARNER | {"start": "fixed", "trajectory": 0.1}, steps=100, lr=1e-2)
    assert after < before * 0.9
