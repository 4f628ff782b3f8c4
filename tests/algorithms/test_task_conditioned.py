"""The task encoder and the MAML that it conditions, against the formula; what an embedding depends on; learning."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import check_queries_are_independent, prepared
from plain_reference import config_of, episodes_of, method, network, one_of, parameters, relative, stored

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import REGRESSION
from metadist.algorithms.task_conditioned import contrastive
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_vectorised, loop, vectorised
from metadist.errors import ConfigError
from metadist.tasks.episode import Examples
from metadist.tasks.sinusoid import Sinusoid

IMAGES = {"stride2": (1, 15, 14), "mlp": (1, 5, 4)}
METHOD = {
    "name": "task-conditioned", "inner_steps": 2, "inner_lr": 0.3, "embedding": 3, "encoder_width": 5,
    "contrastive_weight": 0.7, "margin": 1.3,
}  # fmt: skip


def configured(model="stride2", how="together", order=2, **more):
    return config_of(
        task={"ways": 4, "shots": 2, "queries": 3, "transductive": how == "together", "within_group": True},
        model={"name": model, "statistics": "running" if how == "running" else "support", **more},
        algorithm={**METHOD, "order": order},
    )


def sinusoid(tasks=6, **algorithm):
    config = config_of(
        data={"name": "sinusoid"},
        task={"shots": 10, "queries": 8, "meta_batch": 16, "shard": 8},
        model={"name": "mlp", "width": 6, "norm": "none"},
        algorithm={**METHOD, "inner_lr": 0.02, **algorithm},
    )
    return config, Sinusoid("train", 0, 10, 8, torch.float64).sample(0, 0, tasks)


# --- the formula -----------------------------------------------------------------


def embedded(config, theta, support):
    norm = "none" if config.model.norm == "none" else "layer"
    model = config.model.model_copy(update={"norm": norm, "width": config.algorithm.encoder_width})
    encoder = {name[len("encoder.") :]: value for name, value in theta.items() if name.startswith("encoder.")}
    x = torch.cat([support.x, support.y], 1) if config.kind == "regression" else support.x
    u = network(model, encoder, x)[0].mean(0) @ encoder["embedding.weight"] + encoder["embedding.bias"]
    return u / (u @ u + 1e-12).sqrt()


def task_by_formula(config, theta, episode, how, without=""):
    """Loss, outputs, statistics and embedding of one task."""
    loss_of = F.mse_loss if config.kind == "regression" else F.cross_entropy
    algorithm, e = config.algorithm, embedded(config, theta, episode.support)
    names = [name for name in theta if name.split(".")[0] not in ("encoder", "init", "rate")]
    fast, rates = {}, {}
    for name in names:
        change = e @ theta[f"init.{name}"] * (without != "initialisation")
        rates[name] = algorithm.inner_lr * torch.exp((e * theta[f"rate.{name}"]).sum() * (without != "rates"))
        fast[name] = theta[name] + change if theta[name].ndim == 1 else theta[name] + theta[name] * change
    for _ in range(algorithm.inner_steps):
        loss = loss_of(network(config.model, fast, episode.support.x)[0], episode.support.y)
        gradient = torch.autograd.grad(loss, list(fast.values()), create_graph=algorithm.order == 2)
        fast = {n: v - rates[n] * g for (n, v), g in zip(fast.items(), gradient, strict=True)}
    given = network(config.model, fast, episode.support.x)[1] if how == "support" else None
    outputs, seen = network(config.model, fast, episode.query.x, given)
    return loss_of(outputs, episode.query.y), outputs, stored(seen), e


def contrast_by_formula(config, embeddings, family, without=""):
    kinds = {"together": [], "apart": []}
    for i in range(len(family)):
        for j in range(i):
            square = ((embeddings[i] - embeddings[j]) ** 2).sum()
            if family[i] == family[j]:
                kinds["together"].append(square)
            else:
                kinds["apart"].append((config.algorithm.margin - (square + 1e-12).sqrt()).clamp(min=0) ** 2)
    return sum(torch.stack(kind).mean() for name, kind in kinds.items() if kind and name != without)


def shard_by_formula(config, theta, state, episodes, how, without=""):
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    tasks = len(episodes.family)
    found = [task_by_formula(config, leaves, one_of(episodes, task), how, without) for task in range(tasks)]
    contrast = contrast_by_formula(config, [one[3] for one in found], episodes.family, without)
    loss = sum(one[0] for one in found)
    total = loss + config.algorithm.contrastive_weight * tasks * contrast * (without != "contrast")
    gradient = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    sums = {f"gradient.{n}": g for n, g in zip(leaves, gradient, strict=True)}
    sums |= {f"statistics.{n}": sum(one[2][n] for one in found) for n in state}
    return sums | {"metric.loss": loss.detach()}


def error(config, shape, episodes, how="together", without=""):
    theta, state = parameters(config, shape)
    expected = shard_by_formula(config, theta, state, episodes, how, without)
    worst = 0.0
    for engine in (loop, vectorised):
        found = engine(method(config, shape), theta, state, episodes, config.task.ways, 0)
        assert found.pop("metric.score").isfinite()
        worst = max(worst, relative(found, expected))
    if config.task.transductive or config.model.statistics == "support":  # running statistics are another answer
        episode = one_of(episodes, 0)
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        outputs = task_by_formula(config, leaves, episode, how, without)[1].detach()
        judged = for_evaluation(config, shape).adapt(theta, state, episode.support, config.task.ways)
        worst = max(worst, float((judged(episode.query.x) - outputs).abs().max()))
    return worst


def families(config, model, tasks=4):
    return episodes_of(config, IMAGES[model], tasks)._replace(family=torch.tensor([3, 1, 3, 1, 0][:tasks]))


@pytest.mark.parametrize("how", ["together", "support", "running"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("model", ["stride2", "mlp"])
def test_meta_gradient(model, order, how):
    config = configured(model, how, order)
    as_trained = "support" if how == "support" else "together"
    assert error(config, IMAGES[model], families(config, model), as_trained) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_on_sinusoids(order):
    config, episodes = sinusoid(order=order)
    assert len(set(episodes.family.tolist())) > 1
    assert error(config, (1,), episodes) < 1e-12


@pytest.mark.parametrize("part", ["initialisation", "rates", "contrast", "together", "apart"])
def test_each_part_of_the_method_is_there(part):
    config = configured("mlp")
    assert error(config, IMAGES["mlp"], families(config, "mlp"), without=part) > 1e-3


def objective(learner, theta, state, episodes):
    """Σ L_Q + λ C for each task."""
    each = [learner.compared(theta, state, one_of(episodes, number), 4, 0) for number in range(len(episodes.family))]
    compared = torch.stack([e for _, e in each])
    return sum(outcome.loss for outcome, _ in each) + learner.comparison(compared, episodes.family)


def test_central_differences_on_a_smooth_net():
    config = configured("mlp", activation="tanh")
    theta, state = parameters(config, IMAGES["mlp"])
    episodes, learner = families(config, "mlp"), method(config, IMAGES["mlp"])

    def f(direction, h):
        with torch.no_grad():
            moved = {name: value + h * direction[name] for name, value in theta.items()}
            return float(objective(learner, moved, state, episodes))

    found, generator = vectorised(learner, theta, state, episodes, 4, 0), torch.Generator().manual_seed(3)
    for _ in range(3):
        v = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
        h = 1e-4
        difference = (8 * (f(v, h) - f(v, -h)) - (f(v, 2 * h) - f(v, -2 * h))) / (12 * h)
        slope = sum(float((found[f"gradient.{n}"] * v[n]).sum()) for n in theta)
        assert slope == pytest.approx(difference, rel=1e-6)


def test_it_begins_as_maml():
    config = configured("stride2")
    blueprint = Blueprint(config, IMAGES["stride2"])
    maml = config_of(algorithm={"name": "maml", "inner_steps": 2, "inner_lr": 0.3}, task={"ways": 4})
    start = {name: blueprint.theta[name] for name in Blueprint(maml, IMAGES["stride2"]).theta}
    support, query, *_ = one_of(families(config, "stride2"), 0)
    one = for_evaluation(config, IMAGES["stride2"]).adapt(blueprint.theta, {}, support, 4)(query.x)
    other = for_evaluation(maml, IMAGES["stride2"]).adapt(start, {}, support, 4)(query.x)
    assert (one - other).abs().max() < 1e-12


def test_the_contrastive_loss():
    """Everything in one point costs margin²; nothing where families are apart; also with only one kind of pair."""
    point, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    family = torch.tensor([0, 0, 1, 1])
    assert contrastive(torch.stack([point] * 4), family, 1.0) == pytest.approx(1.0, abs=1e-5)
    assert contrastive(torch.stack([point, point, other, other]), family, 1.0) == 0
    assert contrastive(torch.stack([point, other, point, other]), family, 1.0) == pytest.approx(2 + 0.5, abs=1e-5)
    assert contrastive(torch.stack([point, other]), torch.tensor([5, 5]), 1.0) == 2
    assert contrastive(torch.stack([point, point]), torch.tensor([5, 6]), 1.0) == pytest.approx(1.0, abs=1e-5)


# --- what depends on what --------------------------------------------------------


@pytest.mark.parametrize("how", ["together", "support", "running"])
def test_queries_are_independent(how):
    check_queries_are_independent(configured("stride2", how), "stride2")


def test_renaming_the_classes_with_the_heads_rows_renames_the_answers():
    algorithm, theta, state, (support, query, *_) = prepared(configured("stride2"), "stride2")
    new = torch.tensor([2, 0, 3, 1])
    renamed = dict(theta)
    for name in ("head.weight", "head.bias", "init.head.weight", "init.head.bias"):
        renamed[name] = torch.empty_like(theta[name])
        renamed[name][..., new] = theta[name]
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    after = algorithm.adapt(renamed, state, Examples(support.x, new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10


def test_an_embedding_is_a_unit_vector_whatever_the_order_and_the_labels():
    algorithm, theta, _, (support, *_) = prepared(configured("stride2"), "stride2")
    e = algorithm.embed(theta, support)
    assert e.shape == (3,)
    assert float(e.norm()) == pytest.approx(1, abs=1e-9)
    order = torch.randperm(len(support.y), generator=torch.Generator().manual_seed(5))
    assert (algorithm.embed(theta, Examples(support.x[order], support.y)) - e).abs().max() < 1e-12
    assert (algorithm.embed(theta, Examples(support.x**2, support.y)) - e).abs().max() > 1e-4


def test_an_embedding_of_a_regression_depends_on_its_targets():
    config, episodes = sinusoid()
    theta, _ = parameters(config, (1,))
    algorithm, support = for_evaluation(config, (1,)), one_of(episodes, 0).support
    e = algorithm.embed(theta, support)
    assert (algorithm.embed(theta, Examples(support.x, support.y + 1)) - e).abs().max() > 1e-4


def test_a_run_without_negatives_is_refused():
    for changes, line in (
        ({"shard": 1}, r"task\.shard: task-conditioned compares the tasks of a shard; 1 leaves none"),
        ({"within_group": False}, r"task\.within_group: task-conditioned tells families of tasks apart"),
        ({"meta_batch": 2, "shard": "auto"}, r"task\.shard: .* 1 leaves none"),
    ):
        with pytest.raises(ConfigError, match=line):
            configured("mlp").with_values(task=changes)


# --- learning --------------------------------------------------------------------


def test_it_learns_sinusoids_and_tells_their_families_apart():
    """Squared error under a third of the untrained network's, and neighbours of the same family far more often
    than the quarter that chance gives."""
    config, _ = sinusoid(inner_steps=1, margin=1.0, embedding=8, encoder_width=24)
    config = config.with_values(engine={"dtype": "float32"}, model={"width": 24})
    blueprint, ways = Blueprint(config, (1,)), 1
    theta = blueprint.theta
    algorithm, judged = for_training(config, (1,)), for_evaluation(config, (1,))
    new = Sinusoid("test", 0, 10, 20).sample(0, 0, 200)

    def error_and_neighbours():
        found = judge_vectorised(judged, REGRESSION, theta, {}, new, ways)["score"].mean()
        with torch.no_grad():
            e = torch.func.vmap(lambda support: judged.embed(theta, support))(new.support)
        nearest = (torch.cdist(e, e) + 9 * torch.eye(len(e))).argmin(1)
        return float(found), float((new.family[nearest] == new.family).double().mean())

    before = error_and_neighbours()
    optimizer, tasks = torch.optim.Adam(list(theta.values()), 5e-3), Sinusoid("train", 0, 10, 10)
    for step in range(200):
        found = vectorised(algorithm, theta, {}, tasks.sample(step, 0, 32), ways, step)
        for name, value in theta.items():
            value.grad = found[f"gradient.{name}"] / 32
        optimizer.step()
    after = error_and_neighbours()
    assert after[0] < before[0] / 3
    assert after[1] > 0.55
