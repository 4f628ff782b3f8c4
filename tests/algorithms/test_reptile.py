"""Reptile with Adam's moments kept over tasks, on numbers, serial; the rest is in test_reptile_direction."""

import pytest
import torch
from inner_loop_checks import (
    SHAPES,
    check_queries_are_independent,
    clusters,
    configured,
    engines_disagree,
    episodes,
    error_of_sums,
    learns_sinusoids,
    plain_loss,
    plain_queries,
    ways,
)
from plain_reference import config_of, method, one_of, parameters, relative

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import CLASSIFICATION
from metadist.config import load, resolve, validate
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_vectorised, loop, vectorised
from metadist.errors import ConfigError
from metadist.tasks.episode import Examples

SGD = {"name": "reptile", "inner_optimizer": "sgd", "inner_lr": 0.1, "inner_steps": 3, "inner_batch": 3}
KEPT = {"name": "reptile", "inner_lr": 0.01, "inner_steps": 3, "inner_batch": 3, "moments": "kept"}
CASES = [("mlp", "together"), ("stride2", "support"), ("sinusoid", "together")]


def mini_batch(support, k, size):
    rows = [(k * size + i) % len(support.y) for i in range(size)]
    return Examples(support.x[rows], support.y[rows])


def plain(config, theta, episode, how, step):
    """SGD; a loss of the queries' value whose gradient in θ is θ − φ."""
    keys = config.algorithm
    fast = {name: value.detach().requires_grad_() for name, value in theta.items()}
    for k in range(keys.inner_steps):
        loss = plain_loss(config, fast, mini_batch(episode.support, k, keys.inner_batch))[0]
        gradient = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            n: (v - keys.inner_lr * g).detach().requires_grad_()
            for (n, v), g in zip(fast.items(), gradient, strict=True)
        }
    loss, outputs, _ = plain_queries(config, fast, episode, how)
    surrogate = sum(((theta[n] - fast[n]).detach() * (theta[n] - theta[n].detach())).sum() for n in theta)
    return loss.detach() + surrogate, outputs, {}


@pytest.mark.parametrize(("what", "how"), CASES)
def test_direction_of_sgd(what, how):
    assert error_of_sums(configured(SGD, what, how), SHAPES[what], plain) < 1e-12


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("what", ["mlp", "sinusoid"])
def test_kept_moments_are_adams_own(what, engine):
    """torch.optim.Adam whose memory has been set to that of so many steps before; the state gets the mean of g²."""
    config, shape, before = configured(KEPT, what), SHAPES[what], 40
    theta, state = parameters(config, shape)
    weight = 1 - 0.999**before
    state["square_weight"] = torch.full((1,), weight, dtype=torch.float64)
    episode = one_of(episodes(config, shape, 1), 0)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    adam = torch.optim.Adam(leaves.values(), lr=0.01, betas=(0.0, 0.999), eps=1e-8)
    for name, leaf in leaves.items():
        adam.state[leaf] = {
            "step": torch.tensor(float(before)),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": state[f"square.{name}"].clone(),
        }
    squares = {name: torch.zeros_like(value) for name, value in theta.items()}
    for k in range(3):
        adam.zero_grad()
        plain_loss(config, leaves, mini_batch(episode.support, k, 3))[0].backward()
        squares = {name: squares[name] + leaf.grad**2 / 3 for name, leaf in leaves.items()}
        adam.step()
    expected = {f"gradient.{name}": (theta[name] - leaf).detach() for name, leaf in leaves.items()}
    expected |= {f"statistics.square.{name}": value for name, value in squares.items()}
    expected["statistics.square_weight"] = torch.ones(1, dtype=torch.float64)
    found = engine(method(config, shape), theta, state, episodes(config, shape, 1), ways(config), 0)
    assert relative({name: found[name] for name in expected}, expected) < 1e-9
    judged = for_evaluation(config, shape).adapt(theta, state, episode.support, ways(config))(episode.query.x)
    assert (
        judged - plain_queries(config, leaves, episode, "together" if config.task.transductive else "support")[1]
    ).abs().max() < 1e-9


def test_moments_that_hold_nothing_are_fresh_ones():
    """The first task of a run: v = 0 and w = 0."""
    shape = SHAPES["mlp"]
    found = []
    for moments in ("fresh", "kept"):
        config = configured(KEPT | {"moments": moments}, "mlp")
        theta, _ = parameters(config, shape)
        state = Blueprint(config, shape).state
        assert bool(state) == (moments == "kept")
        assert not any(value.any() for value in state.values())
        sums = vectorised(method(config, shape), theta, state, episodes(config, shape), 4, 0)
        found.append({name: sums[f"gradient.{name}"] for name in theta})
    assert relative(*found) < 1e-14


def test_kept_moments_make_a_difference():
    found = []
    for moments in ("fresh", "kept"):
        config = configured(KEPT | {"moments": moments}, "mlp")
        theta, state = parameters(config, SHAPES["mlp"])
        sums = vectorised(method(config, SHAPES["mlp"]), theta, state, episodes(config, SHAPES["mlp"]), 4, 0)
        found.append({name: sums[f"gradient.{name}"] for name in theta})
    assert relative(*found) > 0.1


@pytest.mark.parametrize(("what", "how"), CASES)
def test_engines_agree(what, how):
    """Moments away from zero: Adam shows the rounding of gradients that it divides by their own size."""
    assert engines_disagree(configured(KEPT, what, how), SHAPES[what]) < 1e-10
    assert engines_disagree(configured(SGD, what, how), SHAPES[what]) < 1e-12


@pytest.mark.parametrize(("what", "how"), CASES)
def test_queries_are_answered_one_by_one(what, how):
    check_queries_are_independent(configured(KEPT | {"inner_batch": None}, what, how), SHAPES[what])


def test_renaming_the_classes():
    """Class k is now called new[k]; the rows of the head and of its moments move along."""
    config, shape = configured(KEPT | {"inner_batch": None}, "mlp", "support"), SHAPES["mlp"]
    theta, state = parameters(config, shape)
    support, query, *_ = one_of(episodes(config, shape), 0)
    new = torch.tensor([2, 0, 3, 1])

    def renamed(values):
        rows = ("head.weight", "head.bias")
        return {n: v[..., new.argsort()] if n.removeprefix("square.") in rows else v for n, v in values.items()}

    algorithm = for_evaluation(config, shape)
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    moved = Examples(support.x, new[support.y])
    after = algorithm.adapt(renamed(theta), renamed(state), moved, 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-4


def test_judged_with_other_shots_and_mini_batches():
    """The paper trains with 10 shots and judges with 1."""
    config = config_of(
        model={"name": "mlp"},
        task={"shots": 10},
        algorithm={"name": "reptile", "inner_batch": 10, "judged_batch": 3},
        eval={"shots": 1, "inner_steps": 50},
    )
    train, judged = for_training(config, SHAPES["mlp"]), for_evaluation(config, SHAPES["mlp"])
    assert (train.inner_batch, train.inner_steps) == (10, 5)
    assert (judged.inner_batch, judged.inner_steps) == (3, 50)
    again = config.with_values(algorithm={"judged_batch": None})
    assert for_evaluation(again, SHAPES["mlp"]).inner_batch == 10


def test_serial_is_a_meta_batch_of_one():
    for job in ("sinusoid-reptile", "omniglot-reptile-5w1s-serial"):
        config = resolve(load(job))
        assert (config.task.meta_batch, config.task.shard) == (1, 1)
    assert resolve(validate({"task": {"meta_batch": 1}, "algorithm": KEPT}, "test")).task.shard == 1


def test_sgd_has_no_moments():
    with pytest.raises(ConfigError, match=r"algorithm\.moments: are adam's"):
        validate({"algorithm": SGD | {"moments": "kept"}}, "test")


@pytest.mark.parametrize("moments", ["fresh", "kept"])
def test_it_learns_clusters(moments):
    """Accuracy on new tasks rises by 10 points or more; trained with 5 shots, judged with 1."""
    config = config_of(
        engine={"dtype": "float32"},
        task={"ways": 5, "shots": 5, "queries": 1, "transductive": False},
        model={"name": "mlp", "width": 32},
        algorithm={"name": "reptile", "inner_lr": 0.01, "inner_steps": 5, "inner_batch": 10, "moments": moments},
        eval={"shots": 1, "inner_steps": 10},
    )
    shape = (1, 4, 4)
    blueprint, train, judged = Blueprint(config, shape), for_training(config, shape), for_evaluation(config, shape)
    theta, state, new = blueprint.theta, blueprint.state, clusters(200, 10_000)

    def score():
        return float(judge_vectorised(judged, CLASSIFICATION, theta, state, new, 5)["score"].mean())

    before = score()
    for step in range(100):
        sums = vectorised(train, theta, state, clusters(5, step, shots=5, queries=1), 5, step)
        theta = {name: value - (1 - step / 100) * sums[f"gradient.{name}"] / 5 for name, value in theta.items()}
        state = {name: 0.9 * value + 0.1 * sums[f"statistics.{name}"] / 5 for name, value in state.items()}
    assert score() > before + 0.1


def test_it_learns_sinusoids():
    before, after = learns_sinusoids({"name": "reptile", "inner_lr": 0.01, "inner_steps": 10})
    assert after < 0.75 * before
