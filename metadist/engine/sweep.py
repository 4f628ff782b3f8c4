"""A grid of inner rates and steps on one batch of evaluation tasks, in one pass.

One inner loop serves all numbers of steps: φ_k is passed on the way to φ_K. Rates are a further `vmap` axis around
the tasks' own, so that what does not depend on them, such as the first gradient at θ, is computed once for all.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from metadist.algorithms.algorithm import Algorithm, State, Stepping, Theta
from metadist.algorithms.objective import Objective
from metadist.config import Config
from metadist.engine.shard import Judged
from metadist.tasks.episode import Episode

AT_ONCE = 8
"""Rates of one `vmap`: beyond some, memory grows and time does not fall."""


class Grid(NamedTuple):
    """What an evaluation tries: judged, a run's config with the evaluation's own `eval`, with other rates and steps.

    rates: of the inner loop, () for the method's own; steps: numbers of inner steps, ascending.
    """

    judged: Config
    rates: tuple[float, ...]
    steps: tuple[int, ...]


Setting = Config | Grid
"""What tasks are judged under: one setting, or a grid of them."""


def judge_grid(
    algorithm: Algorithm, objective: Objective, theta: Theta, state: State, episodes: Episode, ways: int, grid: Grid
) -> Judged:
    """Score and loss of every episode's queries in every cell, each [tasks, rates, steps]; one rate for ()."""
    assert isinstance(algorithm, Stepping)
    given: Any = algorithm
    over = vmap if grid.judged.engine.mode != "loop" else _looped

    def cells(method: Any, episode: Episode) -> Judged:
        after = method.after(theta, state, episode.support, ways, grid.steps)
        outputs = [predictor(episode.query.x) for predictor in after]
        return {
            "score": torch.stack([objective.score(one, episode.query.y) for one in outputs]),
            "loss": torch.stack([objective.loss(one, episode.query.y) for one in outputs]),
        }

    with torch.no_grad():
        if not grid.rates:
            found: Judged = over(lambda episode: cells(given, episode))(episodes)
            return {name: value[:, None] for name, value in found.items()}
        every = torch.tensor(grid.rates, dtype=episodes.support.x.dtype, device=episodes.support.x.device)
        # Rates outside, so that tasks are batched as in an evaluation of one rate.
        tried = over(lambda rate: over(lambda episode: cells(replace(given, inner_lr=rate), episode))(episodes))
        parts = [tried(rates) for rates in torch.split(every, AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]).transpose(0, 1) for name in parts[0]}


def _looped(function: Callable[[Any], Judged]) -> Callable[[Any], Judged]:
    """What `vmap` does, one after the other."""

    def over(batch: Any) -> Judged:
        size = tree_leaves(batch)[0].shape[0]
        each = [function(tree_map(lambda value, i=i: value[i], batch)) for i in range(size)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    return over
