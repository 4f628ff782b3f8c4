"""The LSTM meta-learner of Ravi & Larochelle against a plain loop with torch's own LSTM cell."""

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
)
from plain_reference import method, one_of, stored

from metadist.config import validate
from metadist.engine.engine import Blueprint
from metadist.errors import ConfigError

METHOD = {"name": "lstm-learner", "inner_lr": 0.3, "largest_lr": 0.8, "inner_steps": 3, "hidden": 5}
HOW = ("together", "support", "running")
CASES = [(what, how) for what in ("stride2", "mlp") for how in HOW] + [("sinusoid", "together")]


def preprocessed(g):
    g = float(g)
    if abs(g) >= math.exp(-10):
        return [math.log(abs(g)) / 10, math.copysign(1.0, g)]
    return [-1.0, math.exp(10) * g]


def plain(config, theta, episode, how, step, forget=True, previous_gates=True, second_derivatives=False):
    """Every tensor by itself; gates by torch.sigmoid of one product with everything they see."""
    keys, names = config.algorithm, [name for name in theta if not name.startswith("lstm.")]
    fast = {name: theta[name] for name in names}
    memory, gates = {}, {}
    for name in names:
        count = theta[name].numel()
        blank = torch.zeros(count, keys.hidden, dtype=torch.float64)
        memory[name] = (blank, blank)
        gates[name] = {"input": torch.zeros(count, 1).double(), "forget": torch.ones(count, 1).double()}
    for _ in range(keys.inner_steps):
        leaves = fast if second_derivatives else {n: v.detach().requires_grad_() for n, v in fast.items()}
        loss = plain_loss(config, leaves, episode.support)[0]
        gradient = torch.autograd.grad(loss, [leaves[n] for n in names], create_graph=second_derivatives)
        moved = {}
        for name, g in zip(names, gradient, strict=True):
            x = torch.tensor(
                [preprocessed(v) + preprocessed(loss.detach()) for v in g.detach().flatten()], dtype=torch.float64
            )
            weights = (theta["lstm.1.input"].T, theta["lstm.1.recurrent"].T, theta["lstm.1.bias"])
            memory[name] = torch.lstm_cell(x, memory[name], *weights)
            cell = fast[name].reshape(-1, 1)
            for gate in ("input", "forget"):
                before = gates[name][gate] if previous_gates else 0 * gates[name][gate]
                sees = torch.cat([memory[name][0], cell, before], 1)
                gates[name][gate] = torch.sigmoid(
                    sees @ theta[f"lstm.{gate}.weight"][:, None] + theta[f"lstm.{gate}.bias"]
                )
            kept = gates[name]["forget"] * cell if forget else cell
            new = kept - keys.largest_lr * gates[name]["input"] * g.reshape(-1, 1)
            moved[name] = new.view_as(fast[name])
        fast = moved
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    return loss, outputs, stored(seen)


@pytest.mark.parametrize(("what", "how"), CASES)
def test_loss_and_gradient(what, how):
    assert error_of_sums(configured(METHOD, what, how), SHAPES[what], plain) < 1e-12


@pytest.mark.parametrize(
    "missing", [{"forget": False}, {"previous_gates": False}, {"second_derivatives": True}], ids=str
)
def test_every_term_is_there(missing):
    """The forget gate, the gates' own memory, and inner gradients that are constants."""
    config = configured(METHOD, "mlp")
    assert error_of_sums(config, SHAPES["mlp"], lambda *task: plain(*task, **missing)) > 1e-3


def test_a_fresh_one_is_gradient_descent():
    """With gate weights of zero: rate inner_lr, and σ(5) of every parameter kept."""
    config, shape = configured(METHOD, "mlp"), SHAPES["mlp"]
    theta = dict(Blueprint(config, shape).theta)
    assert all(theta[f"lstm.{gate}.weight"].abs().max() <= 0.01 for gate in ("input", "forget"))
    for gate in ("input", "forget"):
        theta[f"lstm.{gate}.weight"] = torch.zeros_like(theta[f"lstm.{gate}.weight"])
    support = one_of(episodes(config, shape), 0).support
    fast = {name: value for name, value in theta.items() if not name.startswith("lstm.")}
    for _ in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in fast.items()}
        gradient = torch.autograd.grad(plain_loss(config, leaves, support)[0], list(leaves.values()))
        keep = 1 / (1 + math.exp(-5))
        fast = {n: keep * v - 0.3 * g for (n, v), g in zip(fast.items(), gradient, strict=True)}
    found = method(config, shape).inner_loop(theta, support)
    assert found.keys() == fast.keys()
    # The biases were float32 when they were drawn.
    assert all((found[name] - fast[name]).abs().max() < 1e-6 for name in fast)


@pytest.mark.parametrize(("what", "how"), CASES)
def test_engines_agree(what, how):
    assert engines_disagree(configured(METHOD, what, how), SHAPES[what]) < 1e-12


@pytest.mark.parametrize(("what", "how"), CASES)
def test_queries_are_answered_one_by_one(what, how):
    check_queries_are_independent(configured(METHOD, what, how), SHAPES[what])


@pytest.mark.parametrize(("what", "how"), CASES[:-1])
def test_renaming_the_classes(what, how):
    check_renaming_the_classes(configured(METHOD, what, how), SHAPES[what])


def test_a_rate_beyond_the_open_gate_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm\.inner_lr: 2 is a share of algorithm\.largest_lr=1"):
        validate({"algorithm": {"name": "lstm-learner", "inner_lr": 2.0}}, "test")


LEARNER = {"name": "lstm-learner", "inner_lr": 0.5, "largest_lr": 2.0, "inner_steps": 2, "hidden": 8}


def test_it_learns_clusters():
    """Accuracy on new tasks rises by 10 points or more."""
    before, after = learns_clusters(LEARNER, steps=50, lr=1e-2)
    assert after > before + 0.1


def test_it_learns_sinusoids():
    """The squared error on new tasks falls by a fifth or more."""
    before, after = learns_sinusoids(LEARNER | {"inner_lr": 0.01, "largest_lr": 1.0}, steps=100, lr=1e-2)
    assert after < before * 0.8
