"""Gradient descent on the support set, as the methods share it that differ in what moves, and how far.

    φ_j ← φ_j − α_j ∇_{φ_j} L_S(φ)      for every parameter j that has a rate α_j; the others stay

α_j is a number, or a tensor that broadcasts against φ_j. Second order differentiates through
the steps; first order takes the gradients as constants, but not the rates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State
from metadist.algorithms.objective import Objective
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples

SupportLoss = Callable[[Params], tuple[Tensor, Statistics]]
"""φ → L_S(φ), a scalar, and the statistics that the norms used."""

Rates = Mapping[str, Tensor | float]
"""α_j by name of the parameter."""

Behind = TypeVar("Behind")
"""What a path has behind each number of steps."""


def step(loss: SupportLoss, params: Params, rates: Rates, order: int) -> tuple[dict[str, Tensor], Statistics]:
    """φ after one step, and the statistics that the norms used before it."""
    at = params if order == 2 else {name: value.detach() for name, value in params.items()}
    moving = {name: at[name] for name in rates}
    gradient, used = torch.func.grad(lambda moving: loss({**at, **moving}), has_aux=True)(moving)
    return {**params, **{name: params[name] - rates[name] * g for name, g in gradient.items()}}, used


def walk(loss: SupportLoss, params: Params, rates: Rates, order: int) -> Iterator[Params]:
    """φ_0, φ_1, φ_2 and so on with the same rates; no step is taken before what lies behind it is asked for."""
    while True:
        yield params
        params, _ = step(loss, params, rates, order)


def descend(loss: SupportLoss, params: Params, rates: Rates, steps: int, order: int) -> Params:
    """φ after some steps with the same rates."""
    return last(walk(loss, params, rates, order), steps)


def last(path: Iterable[Behind], steps: int) -> Behind:
    """What a path has behind some steps; those before it are not kept."""
    return next(islice(path, steps, None))


def predictors(
    normalisation: Normalisation, path: Iterable[Params], state: State, support: Examples, steps: Sequence[int]
) -> list[Predictor]:
    """Those behind some numbers of steps of a path, ascending."""
    at = islice(path, steps[-1] + 1)
    return [normalisation.predictor(params, state, support) for k, params in enumerate(at) if k in steps]


def on_support(normalisation: Normalisation, objective: Objective, support: Examples) -> SupportLoss:
    """L_S of a support set, normalised by its own statistics."""

    def loss(params: Params) -> tuple[Tensor, Statistics]:
        outputs, used = normalisation.network(params, support.x)
        return objective.loss(outputs, support.y), used

    return loss


def on_queries(
    normalisation: Normalisation, objective: Objective, params: Params, state: State, episode: Episode
) -> Outcome:
    """L_Q of adapted parameters, and what the state gets of it."""
    support, query = episode.support, episode.query
    outputs, used = normalisation.network(params, query.x, normalisation.given(params, state, support))
    return Outcome(
        objective.loss(outputs, query.y),
        objective.score(outputs, query.y),
        {name: used[name].detach() for name in state},
    )
