"""One shard of several trials, on the same episodes: one after the other in closed form, else at once by `vmap`.

A closed form leaves little to gain by a further axis, and one trial after the other has the bits that it has alone.
By `vmap` there is an axis over their θ and inner rates. The trials share nothing but the episodes, so the gradient of
the sum of their losses with respect to their stacked θ is each one's own. Sums are taken in another grouping than in
`shard.vectorised`: the last bits differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metadist.algorithms.algorithm import Algorithm, Closed, Direct, Outcome
from metadist.engine.shard import Sums, vectorised
from metadist.tasks.episode import Episode

Named = Mapping[str, Tensor]


def one_by_one(algorithm: Algorithm, episodes: Episode) -> bool:
    """Whether trials are computed one after the other: each then has the bits that it has alone."""
    return isinstance(algorithm, Closed) and algorithm.at_once(episodes) > 0


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
    if one_by_one(algorithms[0], episodes):
        each = zip(algorithms, thetas, states, strict=True)
        return [vectorised(algorithm, theta, state, episodes, ways, step) for algorithm, theta, state in each]
    return _by_vmap(algorithms, thetas, states, episodes, ways, step)


def _by_vmap(
    algorithms: Sequence[Algorithm],
    thetas: Sequence[Named],
    states: Sequence[Named],
    episodes: Episode,
    ways: int,
    step: int,
) -> list[Sums]:
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
