"""One shard of several trials at once: a further `vmap` axis over their θ and inner rates, on the same episodes.

The trials share nothing but the episodes, so the gradient of the sum of their losses with respect to their stacked θ
is each one's own. Sums are taken in another grouping than in `shard.vectorised`: the last bits differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metadist.algorithms.algorithm import Algorithm, Direct, Outcome
from metadist.engine.shard import Sums
from metadist.tasks.episode import Episode

Named = Mapping[str, Tensor]


def vectorised_packed(
    algorithms: Sequence[Algorithm],
    thetas: Sequence[Named],
    states: Sequence[Named],
    episodes: Episode,
    ways: int,
    step: int,
) -> list[Sums]:
    """The sums of every trial, as `shard.vectorised` names them.

    algorithms: of one kind, alike but for `inner_lr`; none that compares tasks.
    """
    first: Any = algorithms[0]
    theta, state = _stacked(thetas), _stacked(states)
    own: dict[str, Tensor] = {}
    if hasattr(first, "inner_lr"):
        rates = [float(algorithm.inner_lr) for algorithm in algorithms if hasattr(algorithm, "inner_lr")]
        some = episodes.support.x
        own = {"inner_lr": torch.tensor(rates, dtype=some.dtype, device=some.device)}

    def over(name: str, theta: Named) -> Any:
        """A method of the algorithm for all trials and tasks, [trials, tasks, …]."""

        def one(own: Named, theta: Named, state: Named) -> Any:
            method = getattr(replace(first, **own), name)
            return vmap(lambda episode: method(theta, state, episode, ways, step))(episodes)

        return vmap(one)(own, theta, state) if own else vmap(lambda t, s: one({}, t, s))(theta, state)

    if isinstance(first, Direct):
        with torch.no_grad():
            each, outcomes = over("meta_gradient", theta)
        gradient = {name: value.sum(1) for name, value in each.items()}
    else:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        outcomes = over("task_loss", leaves)
        taken = torch.autograd.grad(outcomes.loss.sum(), list(leaves.values()), materialize_grads=True)
        gradient = dict(zip(leaves, taken, strict=True))
    return [_of_trial(p, gradient, outcomes) for p in range(len(algorithms))]


def _of_trial(p: int, gradient: Named, outcomes: Outcome) -> Sums:
    sums = {f"gradient.{name}": value[p] for name, value in gradient.items()}
    sums |= {f"statistics.{name}": value[p].sum(0) for name, value in outcomes.statistics.items()}
    return sums | {"metric.loss": outcomes.loss[p].detach().sum(0), "metric.score": outcomes.score[p].sum(0)}


def _stacked(each: Sequence[Named]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}
