"""Both sets of an episode as features of a network without head, for methods that read or compare features.

Meta-training normalises the support set by its own statistics, and the queries by their own or
by the support set's, where the code of several papers embeds both as one batch. At test running
statistics serve support set and queries alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, State, Theta
from metadist.algorithms.context import Context
from metadist.models import build
from metadist.models.network import Statistics
from metadist.tasks.episode import Episode, Examples

FLOOR = 1e-8
"""Added to squared lengths: the direction of nothing is 0, and its derivative is finite."""


def without_head(context: Context) -> Normalisation:
    """The run's network, its head left out."""
    return context.normalisation._replace(network=build(context.config.model, context.shape, None))


def features_of(normalisation: Normalisation, theta: Theta, shape: tuple[int, ...]) -> int:
    """How many features the network has for one input of a shape."""
    with torch.no_grad():
        return normalisation.network(theta, torch.zeros(1, *shape))[0].shape[1]


def in_training(
    normalisation: Normalisation, theta: Theta, state: State, episode: Episode
) -> tuple[Tensor, Tensor, Statistics]:
    """Features of the support set [n, d], of the queries [m, d], and this task's value of every state tensor."""
    support, of_support = normalisation.network(theta, episode.support.x)
    given = of_support if normalisation.queries == "support" else None
    queries, of_queries = normalisation.network(theta, episode.query.x, given)
    return support, queries, {name: ((of_support[name] + of_queries[name]) / 2).detach() for name in state}


def at_test(
    normalisation: Normalisation, theta: Theta, state: State, support: Examples
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features of the support set [n, d], and the function that embeds queries."""
    running = dict(state) if normalisation.queries == "running" else None
    features, of_support = normalisation.network(theta, support.x, running)
    given = of_support if normalisation.queries == "support" else running
    return features, lambda x: normalisation.network(theta, x, given)[0]


def unit(x: Tensor, axis: int = -1) -> Tensor:
    """x / ‖x‖ along an axis, for cosine similarities."""
    return x * torch.rsqrt(x.square().sum(axis, keepdim=True) + FLOOR)
