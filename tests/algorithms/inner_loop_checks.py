"""What is asked of every method with gradient steps on the support set: formula, invariances, learning."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from plain_reference import Named, config_of, episodes_of, network, one_of, parameters, relative
from torch import Tensor

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import OBJECTIVES
from metadist.config import Config
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_loop, judge_vectorised, loop, vectorised
from metadist.tasks.episode import Episode, Examples
from metadist.tasks.sinusoid import Sinusoid

SHAPES = {"stride2": (2, 19, 14), "conv4": (1, 19, 17), "conv4-fc": (1, 33, 32), "mlp": (1, 5, 4), "sinusoid": (1,)}
"""Of an input; `sinusoid` is the regression task with an MLP, the others are networks for images."""

HOW = ("together", "support", "running")
CASES = [(what, how) for what in ("stride2", "mlp") for how in HOW] + [("sinusoid", "together")]
"""(what, where the queries' statistics come from)"""

Task = Callable[[Config, Named, Episode, str, int], tuple[Tensor, Tensor, Named]]
"""(config, θ, episode, together or support, meta-step) → loss, outputs, statistics, from torch.nn.functional alone."""


def configured(algorithm, what="stride2", how="together", **more) -> Config:
    """how: the queries' statistics as they are judged; more: of the model."""
    model = {"name": "mlp" if what == "sinusoid" else what, **more}
    if how == "running":
        model["statistics"] = "running"
    task = {"ways": 4, "shots": 2, "queries": 2, "transductive": how == "together"}
    if what == "sinusoid":
        task = {"shots": 6, "queries": 5, "transductive": how == "together"}
        model = {"width": 7, "norm": "none", "activation": "tanh", **model}
    return config_of(
        task=task, model=model, algorithm=algorithm, data={"name": "sinusoid"} if what == "sinusoid" else {}
    )


def episodes(config: Config, shape, tasks=2, seed=1) -> Episode:
    if config.kind == "regression":
        return Sinusoid("train", seed, config.task.shots, config.task.queries, torch.float64).sample(0, 0, tasks)
    return episodes_of(config, shape, tasks, seed)


def ways(config: Config) -> int:
    return 1 if config.kind == "regression" else config.task.ways


# --- the formula ---------------------------------------------------------------


def plain_loss(config: Config, params: Named, examples: Examples, given=None) -> tuple[Tensor, Tensor, Named]:
    """Mean loss, outputs, and the statistics of every batch norm."""
    outputs, seen = network(config.model, params, examples.x, given)
    objective = F.mse_loss if config.kind == "regression" else F.cross_entropy
    return objective(outputs, examples.y), outputs, seen


def plain_queries(config: Config, params: Named, episode: Episode, how: str) -> tuple[Tensor, Tensor, Named]:
    """The same of the queries."""
    given = network(config.model, params, episode.support.x)[1] if how == "support" else None
    return plain_loss(config, params, episode.query, given)


def plain_descent(config: Config, params: Named, support: Examples, rates, steps: int, order: int) -> Named:
    """φ after some steps; the parameters without rate stay. rates: by name, numbers or tensors."""
    params = dict(params)
    for _ in range(steps):
        loss = plain_loss(config, params, support)[0]
        gradient = torch.autograd.grad(loss, [params[name] for name in rates], create_graph=order == 2)
        moved = {n: params[n] - rates[n] * g for n, g in zip(rates, gradient, strict=True)}
        params |= moved
    return params


def plain_sums(config: Config, task: Task, theta: Named, state: Named, batch: Episode, step: int) -> Named:
    """What an engine returns for a batch of episodes."""
    # Running statistics are collected in training and used in evaluation only.
    how = "together" if config.task.transductive or config.model.statistics == "running" else "support"
    total: Named = {}
    for number in range(len(batch.support.y)):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        episode = one_of(batch, number)
        loss, outputs, statistics = task(config, leaves, episode, how, step)
        gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        if config.kind == "regression":
            score = ((outputs - episode.query.y) ** 2).mean().detach()
        else:
            score = (outputs.argmax(-1) == episode.query.y).double().mean()
        one = {f"gradient.{n}": g for n, g in zip(leaves, gradient, strict=True)}
        one |= {f"statistics.{n}": statistics[n] for n in state}
        one |= {"metric.loss": loss.detach(), "metric.score": score}
        total = {n: total[n] + v if total else v for n, v in one.items()}
    return total


def error_of_sums(config: Config, shape, task: Task, step=0, batch=None) -> float:
    """Largest relative error of both engines, and of what is predicted after `adapt`, against a plain loop."""
    theta, state = parameters(config, shape)
    batch = episodes(config, shape) if batch is None else batch
    expected = plain_sums(config, task, theta, state, batch, step)
    algorithm = for_training(config, shape)
    found = [engine(algorithm, theta, state, batch, ways(config), step) for engine in (loop, vectorised)]
    judged = error_of_predictions(config, for_evaluation(config, shape), task, theta, state, batch, step)
    return max(judged, *(relative(one, expected) for one in found))


def error_of_predictions(config: Config, algorithm, task: Task, theta: Named, state: Named, batch, step) -> float:
    """`adapt` as results are judged by it; with running statistics the task knows no answer."""
    if not config.task.transductive and config.model.statistics == "running":
        return 0.0
    worst, how = 0.0, "together" if config.task.transductive else "support"
    for number in range(len(batch.support.y)):
        episode = one_of(batch, number)
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        expected = task(config, leaves, episode, how, step)[1].detach()
        with torch.no_grad():
            found = algorithm.adapt(theta, state, episode.support, ways(config))(episode.query.x)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def engines_disagree(config: Config, shape, step=0) -> float:
    """Loop against vectorised, in training and as judged."""
    theta, state = parameters(config, shape)
    batch, classes = episodes(config, shape), ways(config)
    one, other = (f(for_training(config, shape), theta, state, batch, classes, step) for f in (loop, vectorised))
    judged, objective = for_evaluation(config, shape), OBJECTIVES[config.kind]
    alone, at_once = (f(judged, objective, theta, state, batch, classes) for f in (judge_loop, judge_vectorised))
    return max(relative(one, other), relative(alone, at_once))


def error_of_central_differences(config: Config, shape, step=0) -> float:
    """(f(θ + hv) − f(θ − hv)) / 2h, with h and 2h so that the h² term cancels, in random directions v."""
    theta, state = parameters(config, shape)
    batch = episodes(config, shape, tasks=1)
    algorithm, episode = for_training(config, shape), one_of(batch, 0)
    found = vectorised(algorithm, theta, state, batch, ways(config), step)
    generator, h, worst = torch.Generator().manual_seed(3), 2e-4, 0.0

    def f(direction, size):
        moved = {name: value + size * direction[name] for name, value in theta.items()}
        return float(algorithm.task_loss(moved, state, episode, ways(config), step).loss)

    for _ in range(3):
        v = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
        slope = sum(float((found[f"gradient.{name}"] * v[name]).sum()) for name in theta)
        near, far = ((f(v, size) - f(v, -size)) / (2 * size) for size in (h, 2 * h))
        worst = max(worst, abs((4 * near - far) / 3 - slope) / abs(slope))
    return worst


# --- what a prediction depends on ----------------------------------------------


def prepared(config: Config, shape):
    """The method as it is judged, θ, state and one episode."""
    theta, state = parameters(config, shape)
    if state:  # as training would have left it, so that activations are neither dead nor huge
        seen = one_of(episodes(config, shape, seed=9), 0)
        outcome = for_training(config, shape).task_loss(theta, state, seen, ways(config), 0)
        state = {name: 1.1 * value for name, value in outcome.statistics.items()}
    return for_evaluation(config, shape), theta, state, one_of(episodes(config, shape), 0)


def check_queries_are_independent(config: Config, shape) -> None:
    """Another order permutes the answers; non-transductively the other queries do not matter at all."""
    algorithm, theta, state, (support, query, *_) = prepared(config, shape)
    predict = algorithm.adapt(theta, state, support, ways(config))
    together = predict(query.x)
    order = torch.randperm(len(query.y), generator=torch.Generator().manual_seed(5))
    assert (predict(query.x[order]) - together[order]).abs().max() < 1e-10
    alone = torch.cat([predict(one[None]) for one in query.x])
    among_others = predict(torch.cat([query.x[:2], 5 + 3 * query.x]))[:2]
    if config.task.transductive and config.model.norm == "batch":  # the other assertions could fail
        assert (alone - together).abs().max() > 1e-4
    else:
        assert (alone - together).abs().max() < 1e-10
        assert (among_others - together[:2]).abs().max() < 1e-10


def check_renaming_the_classes(config: Config, shape) -> None:
    """Class k is now called new[k], and so are the rows of the head and of its rates."""
    algorithm, theta, state, (support, query, *_) = prepared(config, shape)
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    new, renamed = torch.tensor([2, 0, 3, 1]), dict(theta)
    of_classes = ["head.weight", "head.bias"]
    if config.algorithm.name == "meta-sgd":
        of_classes += ["rate.head.weight", "rate.head.bias"]
    for name in of_classes:
        renamed[name] = torch.empty_like(theta[name])
        renamed[name][..., new] = theta[name]
    after = algorithm.adapt(renamed, state, Examples(support.x, new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-4


# --- learning ------------------------------------------------------------------

TOLD, UNTOLD = 4, 12


def clusters(tasks: int, seed: int, shots=1, queries=3, classes=5) -> Episode:
    """A class is a point of 4 numbers; an example is near it, and has 12 louder numbers that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    each = shots + queries
    points = torch.randn(tasks, 1, classes, TOLD, generator=generator).expand(-1, each, -1, -1)
    points = points + 0.2 * torch.randn(points.shape, generator=generator)
    rest = 1.5 * torch.randn(tasks, each, classes, UNTOLD, generator=generator)
    x = torch.cat([points, rest], -1).view(tasks, each * classes, 1, 4, 4)
    y = torch.arange(classes).repeat(each).expand(tasks, -1)
    cut = shots * classes
    support, query = Examples(x[:, :cut], y[:, :cut]), Examples(x[:, cut:], y[:, cut:])
    return Episode(support, query, torch.arange(classes).expand(tasks, -1), torch.arange(tasks))


def trained(config: Config, shape, sample, steps: int, lr: float, tasks=16):
    """θ and state after a hand-written outer loop with Adam; sample: (tasks, seed) → episodes."""
    blueprint, algorithm = Blueprint(config, shape), for_training(config, shape)
    theta = {name: value.clone() for name, value in blueprint.theta.items()}
    state, optimizer = blueprint.state, torch.optim.Adam(theta.values(), lr)
    for step in range(steps):
        sums = vectorised(algorithm, theta, state, sample(tasks, step), ways(config), step)
        for name, value in theta.items():
            value.grad = sums[f"gradient.{name}"] / tasks
        optimizer.step()
        state = {name: 0.9 * value + 0.1 * sums[f"statistics.{name}"] / tasks for name, value in state.items()}
    return theta, state


def before_and_after(config: Config, shape, sample, steps: int, lr: float) -> tuple[float, float]:
    """Mean score on 200 new tasks of the untrained and of the trained network."""
    blueprint, judged, new = Blueprint(config, shape), for_evaluation(config, shape), sample(200, 10_000)

    def score(theta, state):
        found = judge_vectorised(judged, OBJECTIVES[config.kind], theta, state, new, ways(config))
        return float(found["score"].mean())

    return score(blueprint.theta, blueprint.state), score(*trained(config, shape, sample, steps, lr))


def learns_clusters(algorithm, how="support", steps=80, lr=1e-2) -> tuple[float, float]:
    """Accuracy before and after, 5-way 1-shot; a fifth is chance."""
    config = config_of(
        engine={"dtype": "float32"},
        task={"ways": 5, "queries": 3, "transductive": how == "together"},
        model={"name": "mlp", "width": 32, "statistics": "running" if how == "running" else "support"},
        algorithm=algorithm,
    )
    return before_and_after(config, (1, 4, 4), clusters, steps, lr)


def learns_sinusoids(algorithm, steps=150, lr=1e-2) -> tuple[float, float]:
    """Mean squared error before and after, 10-shot."""
    config = config_of(
        engine={"dtype": "float32"},
        data={"name": "sinusoid"},
        task={"shots": 10, "queries": 10},
        model={"name": "mlp", "width": 32, "norm": "none"},
        algorithm=algorithm,
    )

    def sample(tasks, seed):
        return Sinusoid("train", seed, 10, 10).sample(0, 0, tasks)

    return before_and_after(config, (1,), sample, steps, lr)
