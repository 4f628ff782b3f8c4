"""What is asked of every method that compares embeddings: formula, invariances, learning."""

from collections.abc import Callable

import torch
from inner_loop_checks import check_queries_are_independent as check_queries
from inner_loop_checks import learns_clusters
from inner_loop_checks import prepared as prepared_for
from plain_reference import Named, config_of, episodes_of, method, one_of, parameters, relative
from torch import Tensor

from metadist.algorithms import for_evaluation
from metadist.config import Config
from metadist.engine.shard import loop, vectorised
from metadist.tasks.episode import Episode, Examples

IMAGES = {"stride2": (1, 15, 14), "conv4": (2, 19, 17), "conv4-fc": (1, 16, 16), "mlp": (1, 5, 4)}
HOW = ("together", "support", "running")

Task = Callable[[Config, Named, Episode, str], tuple[Tensor, Tensor, Named]]
"""(config, θ, episode, together or support) → loss, logits, statistics, from torch.nn.functional alone."""


def configured(algorithm, model="stride2", how="together", ways=4, shots=2, queries=3, **more) -> Config:
    """how: the queries' statistics as they are judged."""
    model = {"name": model, **more}
    if how == "running":
        model["statistics"] = "running"
    task = {"ways": ways, "shots": shots, "queries": queries, "transductive": how == "together"}
    return config_of(task=task, model=model, algorithm=algorithm)


def error_of_sums(
    config: Config, image: tuple[int, int, int], task: Task, tasks: int = 2, judged_alike: bool = False
) -> float:
    """Both engines' loss, gradient, score and statistics against a plain loop over tasks.

    judged_alike: `adapt` predicts what the task's own logits are, unless running statistics are judged by.
    """
    theta, state = parameters(config, image)
    episodes = episodes_of(config, image, tasks)
    # Running statistics are collected in training and used in evaluation only.
    how = "together" if config.task.transductive or config.model.statistics == "running" else "support"
    total: Named = {}
    worst, judged = 0.0, for_evaluation(config, image)
    judged_alike &= config.task.transductive or config.model.statistics == "support"
    for number in range(tasks):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        episode = one_of(episodes, number)
        loss, logits, statistics = task(config, leaves, episode, how)
        if judged_alike:
            predicted = judged.adapt(theta, state, episode.support, config.task.ways)(episode.query.x).detach()
            worst = max(worst, float((predicted - logits.detach()).abs().max() / logits.detach().abs().max()))
        gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        right = (logits.argmax(-1) == episode.query.y).double().mean()
        one = {f"gradient.{n}": g for n, g in zip(leaves, gradient, strict=True)}
        one |= {f"statistics.{n}": statistics[n] for n in state}
        one |= {"metric.loss": loss.detach(), "metric.score": right}
        total = {n: total[n] + v if total else v for n, v in one.items()}
    found = [
        engine(method(config, image), theta, state, episodes, config.task.ways, 0) for engine in (loop, vectorised)
    ]
    return max(worst, *(relative(one, total) for one in found))


def prepared(config: Config, model: str):
    """The method as it is judged, θ, state and one episode."""
    return prepared_for(config, IMAGES[model])


def check_queries_are_independent(config: Config, model: str) -> None:
    """Another order permutes the answers; non-transductively the other queries do not matter at all."""
    check_queries(config, IMAGES[model])


def check_classes_have_no_names(config: Config, model: str) -> None:
    """Class k is now called new[k]."""
    algorithm, theta, state, (support, query, *_) = prepared(config, model)
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    new = torch.tensor([2, 0, 3, 1])
    after = algorithm.adapt(theta, state, Examples(support.x, new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-4


def moved_by_reordering_the_support_set(config: Config, model: str) -> float:
    algorithm, theta, state, (support, query, *_) = prepared(config, model)
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    order = torch.randperm(len(support.y), generator=torch.Generator().manual_seed(5))
    after = algorithm.adapt(theta, state, Examples(support.x[order], support.y[order]), 4)(query.x)
    return float((after - before).abs().max())


# --- learning ------------------------------------------------------------------


def learned(algorithm: dict[str, object], steps: int = 150, lr: float = 5e-3) -> tuple[float, float]:
    """Accuracy on 200 new tasks before and after meta-training; 5-way 1-shot, 3 queries per class."""
    return learns_clusters(algorithm, how="together", steps=steps, lr=lr)
