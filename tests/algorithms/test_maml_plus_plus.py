"""MAML++: each of its changes, alone and together."""

import pytest
import torch
from inner_loop_checks import (
    CASES,
    SHAPES,
    check_queries_are_independent,
    check_renaming_the_classes,
    configured,
    engines_disagree,
    episodes,
    error_of_central_differences,
    error_of_sums,
    learns_clusters,
    learns_sinusoids,
    plain_descent,
    plain_loss,
    plain_queries,
    prepared,
    ways,
)
from plain_reference import config_of, maml_task, one_of, parameters, relative, stored

from metadist.algorithms import for_training
from metadist.engine.shard import loop, vectorised
from metadist.errors import ConfigError

OFF = {
    "learned_rates": False,
    "multi_step_loss": 0,
    "first_order_steps": 0,
    "per_step_affine": False,
    "per_step_statistics": False,
}
ALONE = {
    "learned_rates": {"learned_rates": True},
    "multi_step_loss": {"multi_step_loss": 10},
    "first_order_steps": {"first_order_steps": 5},
    "per_step_affine": {"per_step_affine": True},
    "per_step_statistics": {"per_step_statistics": True},
}
ALL = {name: value for switch in ALONE.values() for name, value in switch.items()}


def maml_pp(steps=3, rate=0.3, **switches):
    return {"name": "maml++", "inner_steps": steps, "inner_lr": rate, **OFF, **switches}


def task(config, theta, episode, how, step):
    """Σ_k v_k L_Q(φ_k), the rows of rates, norms and statistics picked by hand."""
    method, count = config.algorithm, config.algorithm.inner_steps
    by_step = [name for name in theta if ".norm." in name and "rate." not in name and method.per_step_affine]
    params = {name: value for name, value in theta.items() if "rate." not in name and name not in by_step}
    order = 1 if step < method.first_order_steps else 2
    weights = [0.0] * (count - 1) + [1.0]
    if step < method.multi_step_loss:
        weights = [(1 - step / method.multi_step_loss) / count] * (count - 1)
        weights.append(1 - sum(weights))
    total, rows = 0.0, []
    for k in range(count):
        at = {**params, **{name: theta[name][k] for name in by_step}}
        rows.append(stored(plain_loss(config, at, episode.support)[2]))
        rates = {name: theta[f"rate.{name}"][k] if method.learned_rates else method.inner_lr for name in params}
        moved = plain_descent(config, at, episode.support, rates, 1, order)
        params = {name: moved[name] for name in params}
        after = {**params, **{name: theta[name][k + 1] for name in by_step}}
        loss, outputs, seen = plain_queries(config, after, episode, how)
        total = total + weights[k] * loss
    statistics = stored(seen)
    if method.per_step_statistics:
        statistics = {name: torch.stack([row[name] for row in [*rows, statistics]]) for name in statistics}
    return total, outputs, statistics


@pytest.mark.parametrize("step", [0, 7, 20], ids=["first-order", "annealing", "annealed"])
@pytest.mark.parametrize(("what", "how"), CASES)
def test_equals_a_plain_autograd_loop(what, how, step):
    config = configured(maml_pp(**ALL), what, how)
    assert error_of_sums(config, SHAPES[what], task, step) < 1e-12


@pytest.mark.parametrize("step", [0, 7, 20], ids=["first-order", "annealing", "annealed"])
@pytest.mark.parametrize(("what", "how"), [("stride2", "support"), ("mlp", "running")])
@pytest.mark.parametrize("switch", list(ALONE))
def test_equals_it_with_each_switch_alone(switch, what, how, step):
    config = configured(maml_pp(**ALONE[switch]), what, how)
    assert error_of_sums(config, SHAPES[what], task, step) < 1e-12


@pytest.mark.parametrize("model", [{"norm": "layer"}, {"norm": "none"}, {"activation": "tanh"}], ids=str)
def test_equals_it_with_other_norms(model):
    config = configured(maml_pp(**ALL), "mlp", "support", **model)
    assert error_of_sums(config, SHAPES["mlp"], task, 7) < 1e-12


@pytest.mark.parametrize("what", ["conv4", "conv4-fc"])
def test_equals_it_with_other_networks(what):
    assert error_of_sums(configured(maml_pp(**ALL), what), SHAPES[what], task, 7) < 1e-12


def sums(config, shape, step):
    theta, state = parameters(config, shape)
    found = vectorised(for_training(config, shape), theta, state, episodes(config, shape), ways(config), step)
    return {name: value for name, value in found.items() if name.startswith("gradient.")}


def test_with_everything_off_it_is_maml():
    config, shape = configured(maml_pp()), SHAPES["stride2"]
    theta, _ = parameters(config, shape)
    maml = config_of(
        task=config.task.model_dump(),
        model=config.model.model_dump(),
        algorithm={"name": "maml", "inner_steps": 3, "inner_lr": 0.3},
    )
    total = {f"gradient.{name}": torch.zeros_like(value) for name, value in theta.items()}
    for number in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss, *_ = maml_task(maml, leaves, one_of(episodes(config, shape), number), "together")
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[f"gradient.{name}"] += g
    assert relative(sums(config, shape, 0), total) < 1e-12


# --- the switches, one by one --------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_the_importance_of_the_steps_anneals_to_the_last(steps):
    algorithm = for_training(configured(maml_pp(steps, multi_step_loss=10)), SHAPES["stride2"])
    early = {0: 0.25, 5: 0.125, 9: 0.025, 10: 0.0, 1000: 0.0}
    for step, weight in early.items():
        expected = [weight] * (steps - 1) + [1 - (steps - 1) * weight]
        assert algorithm.importance(step) == pytest.approx(expected, abs=1e-15)
    assert for_training(configured(maml_pp(4)), SHAPES["stride2"]).importance(0) == [0, 0, 0, 1]


def test_multi_step_loss_is_the_weighted_mean_of_fewer_steps():
    """With all else off, L_Q(φ_k) is MAML's loss after k steps."""
    shape, gradients = SHAPES["stride2"], []
    for steps in (1, 2, 3):
        gradients.append(sums(configured(maml_pp(steps)), shape, 0))
    expected = {
        name: 0.2 * gradients[0][name] + 0.2 * gradients[1][name] + 0.6 * gradients[2][name] for name in gradients[0]
    }
    assert relative(sums(configured(maml_pp(multi_step_loss=10)), shape, 4), expected) < 1e-12


def test_the_order_changes_at_its_meta_step():
    shape, changing = SHAPES["stride2"], configured(maml_pp(first_order_steps=5))
    always_second, always_first = configured(maml_pp()), configured(maml_pp(first_order_steps=10**9))
    for step in (0, 4):
        assert relative(sums(changing, shape, step), sums(always_first, shape, 0)) == 0
    for step in (5, 100):
        assert relative(sums(changing, shape, step), sums(always_second, shape, 0)) == 0
    assert relative(sums(always_first, shape, 0), sums(always_second, shape, 0)) > 1e-3


def test_there_is_a_rate_for_every_tensor_and_step():
    theta, _ = for_training(configured(maml_pp(3, 0.07, **ALL)), SHAPES["stride2"]).init(
        torch.Generator().manual_seed(0)
    )
    rates = {name.removeprefix("rate."): value for name, value in theta.items() if name.startswith("rate.")}
    assert sorted(rates) == [*(f"conv{block}.weight" for block in (1, 2, 3, 4)), "head.bias", "head.weight"]
    assert all(torch.equal(value, torch.full((3,), 0.07)) for value in rates.values())
    alone, _ = for_training(configured(maml_pp(learned_rates=True)), SHAPES["stride2"]).init(torch.Generator())
    assert "rate.conv1.norm.scale" in alone  # which adapt, unless they have a row for every step


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_every_row_of_a_norm_is_learned(row):
    """Row 0 by the gradients of the inner loop only."""
    found = sums(configured(maml_pp(per_step_affine=True)), SHAPES["stride2"], 0)
    assert all(
        found[f"gradient.conv{block}.norm.{what}"][row].abs().max() > 1e-6
        for block in (2, 4)
        for what in ("scale", "shift")
    )


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_queries_get_the_running_statistics_of_the_steps_taken(steps):
    shape = SHAPES["stride2"]
    config = configured(maml_pp(**ALL), how="running").with_values(eval={"inner_steps": steps})
    algorithm, theta, state, (support, query, *_) = prepared(config, shape)
    assert all(len(value) == 4 for value in state.values())
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    for row in range(4):
        other = {name: torch.cat([v[:row], 2 * v[row : row + 1], v[row + 1 :]]) for name, v in state.items()}
        moved = (algorithm.adapt(theta, other, support, 4)(query.x) - before).abs().max()
        assert moved > 1e-4 if row == steps else moved == 0


def test_without_rows_there_is_one_set_of_running_statistics():
    config = configured(maml_pp(), how="running")
    _, state = parameters(config, SHAPES["stride2"])
    assert all(value.shape == (4,) for value in state.values())


# --- evaluation ----------------------------------------------------------------


@pytest.mark.parametrize("switch", ["learned_rates", "per_step_affine", "per_step_statistics"])
def test_more_steps_than_were_learned_are_refused(switch):
    how = "running" if switch == "per_step_statistics" else "support"
    config = configured(maml_pp(**ALONE[switch]), how=how)
    config.with_values(eval={"inner_steps": 3})
    with pytest.raises(ConfigError, match=r"eval.inner_steps: .* 3 inner steps .* 4; valid is 0 to 3$"):
        config.with_values(eval={"inner_steps": 4})
    with pytest.raises(ConfigError, match=r"eval.also.1.inner_steps: .* cannot take 9; valid is 0 to 3$"):
        config.with_values(eval={"also": [{"inner_steps": 1}, {"inner_steps": 9}]})


@pytest.mark.parametrize("switch", ["multi_step_loss", "first_order_steps", "per_step_statistics"])
def test_more_steps_are_fine_where_nothing_belongs_to_a_step(switch):
    config = configured(maml_pp(**ALONE[switch])).with_values(eval={"inner_steps": 4})
    assert engines_disagree(config, SHAPES["stride2"]) < 1e-12


@pytest.mark.parametrize("engine", [loop, vectorised])
def test_without_inner_steps_it_is_the_gradient_of_the_queries_loss(engine):
    config, shape = configured(maml_pp(0, **ALL), "mlp"), SHAPES["mlp"]
    theta, state = parameters(config, shape)
    batch = episodes(config, shape, tasks=1)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items() if "rate." not in name}
    picked = {name: value[0] if ".norm." in name else value for name, value in leaves.items()}
    loss, *_ = plain_queries(config, picked, one_of(batch, 0), "together")
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = engine(for_training(config, shape), theta, state, batch, 4, 0)
    assert relative({name: found[f"gradient.{name}"] for name in expected}, expected) < 1e-12


def test_central_differences_on_a_smooth_net():
    for what, model in (("mlp", {"activation": "tanh"}), ("sinusoid", {}), ("stride2", {"activation": "softplus"})):
        config = configured(maml_pp(**ALL), what, "support", **model)
        assert error_of_central_differences(config, SHAPES[what], step=7) < 1e-6


@pytest.mark.parametrize(("what", "how"), CASES)
def test_what_a_prediction_depends_on(what, how):
    config = configured(maml_pp(**ALL), what, how)
    for step in (0, 7):
        assert engines_disagree(config, SHAPES[what], step) < 1e-12
    check_queries_are_independent(config, SHAPES[what])
    if what != "sinusoid":
        check_renaming_the_classes(config, SHAPES[what])


# --- learning ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["support", "running"])
def test_learns_to_tell_clusters(how):
    switches = ALL | {"multi_step_loss": 50, "first_order_steps": 20}
    before, after = learns_clusters(maml_pp(2, 0.3, **switches), how)
    assert after > before + 0.3


def test_learns_sinusoids():
    switches = ALL | {"multi_step_loss": 50, "first_order_steps": 20}
    before, after = learns_sinusoids(maml_pp(2, 0.02, **switches), lr=3e-3)  # the rates bear no larger one
    assert after < 0.75 * before
