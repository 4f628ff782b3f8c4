"""One shard's sums on one device: a loop over its tasks, or all of them at once, by `vmap` or in closed form.

All give the same numbers within rounding; which one runs is fixed per run, because the
last bits differ. The sums of a shard are named tensors:

- `gradient.NAME`: Σ over the tasks of the meta-gradient (or of the method's direction);
- `statistics.NAME`: Σ of every state tensor's value in each task;
- `metric.loss`, `metric.score`: Σ of the scalars.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from metadist.algorithms.algorithm import Algorithm, Closed, Comparing, Direct, Outcome, State, Theta
from metadist.algorithms.objective import Objective
from metadist.tasks.episode import Episode

Sums = dict[str, Tensor]
Judged = dict[str, Tensor]


def vectorised(algorithm: Algorithm, theta: Theta, state: State, episodes: Episode, ways: int, step: int) -> Sums:
    """Sums over a batch of episodes with a leading task axis: in closed form if the method has one, else by `vmap`."""
    if isinstance(algorithm, Closed) and (size := algorithm.at_once(episodes)):
        return _in_closed_form(algorithm, theta, state, episodes, ways, step, size)
    return by_vmap(algorithm, theta, state, episodes, ways, step)


def by_vmap(algorithm: Algorithm, theta: Theta, state: State, episodes: Episode, ways: int, step: int) -> Sums:
    """The same of any method."""
    if isinstance(algorithm, Direct):
        with torch.no_grad():
            each, outcomes = vmap(lambda e: algorithm.meta_gradient(theta, state, e, ways, step))(episodes)
        return _named({name: value.sum(0) for name, value in each.items()}, outcomes)
    leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
    # The gradient is taken outside of `vmap`: the sum over tasks happens inside the backward
    # pass, and what all tasks share (the first forward pass with θ) is one large product.
    if isinstance(algorithm, Comparing):
        outcomes, compared = vmap(lambda e: algorithm.compared(leaves, state, e, ways, step))(episodes)
        total = outcomes.loss.sum() + algorithm.comparison(compared, episodes.family)
    else:
        outcomes = vmap(lambda e: algorithm.task_loss(leaves, state, e, ways, step))(episodes)
        total = outcomes.loss.sum()
    gradient = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return _named(dict(zip(leaves, gradient, strict=True)), outcomes)


def _in_closed_form(
    algorithm: Closed, theta: Theta, state: State, episodes: Episode, ways: int, step: int, size: int
) -> Sums:
    """Some tasks after the other, as many as a cache holds."""
    total: Sums = {}
    with torch.no_grad():
        for first in range(0, episodes.family.shape[0], size):
            part: Episode = tree_map(lambda value, first=first: value[first : first + size], episodes)
            one = _named(*algorithm.gradient_of_all(theta, state, part, ways, step))
            total = {name: total[name] + value if total else value for name, value in one.items()}
    return total


def loop(algorithm: Algorithm, theta: Theta, state: State, episodes: Episode, ways: int, step: int) -> Sums:
    """The same, one task after the other."""
    if isinstance(algorithm, Comparing):
        return _compared_in_a_loop(algorithm, theta, state, episodes, ways, step)
    total: Sums = {}
    for episode in _each(episodes):
        if isinstance(algorithm, Direct):
            with torch.no_grad():
                gradient, outcome = algorithm.meta_gradient(theta, state, episode, ways, step)
        else:
            leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
            outcome = algorithm.task_loss(leaves, state, episode, ways, step)
            taken = torch.autograd.grad(outcome.loss, list(leaves.values()), materialize_grads=True)
            gradient = dict(zip(leaves, taken, strict=True))
        one = _named(gradient, _stacked([outcome]))
        total = {name: total[name] + value if total else value for name, value in one.items()}
    return total


def _compared_in_a_loop(
    algorithm: Comparing, theta: Theta, state: State, episodes: Episode, ways: int, step: int
) -> Sums:
    """A loss that compares tasks has one gradient, of all of them."""
    leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
    each = [algorithm.compared(leaves, state, episode, ways, step) for episode in _each(episodes)]
    outcomes = _stacked([outcome for outcome, _ in each])
    total = outcomes.loss.sum() + algorithm.comparison(torch.stack([vector for _, vector in each]), episodes.family)
    gradient = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return _named(dict(zip(leaves, gradient, strict=True)), outcomes)


def judge_vectorised(
    algorithm: Algorithm, objective: Objective, theta: Theta, state: State, episodes: Episode, ways: int
) -> Judged:
    """Score and loss of every episode's queries after adaptation, each [tasks]."""
    with torch.no_grad():
        return vmap(lambda e: _judge(algorithm, objective, theta, state, e, ways))(episodes)


def judge_loop(
    algorithm: Algorithm, objective: Objective, theta: Theta, state: State, episodes: Episode, ways: int
) -> Judged:
    """The same, one task after the other."""
    with torch.no_grad():
        each = [_judge(algorithm, objective, theta, state, episode, ways) for episode in _each(episodes)]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


ENGINES: dict[str, Callable[[Algorithm, Theta, State, Episode, int, int], Sums]] = {
    "loop": loop,
    "vectorised": vectorised,
    "graph": vectorised,
}
JUDGES: dict[str, Callable[[Algorithm, Objective, Theta, State, Episode, int], Judged]] = {
    "loop": judge_loop,
    "vectorised": judge_vectorised,
    "graph": judge_vectorised,
}


def _judge(
    algorithm: Algorithm, objective: Objective, theta: Theta, state: State, episode: Episode, ways: int
) -> Judged:
    outputs = algorithm.adapt(theta, state, episode.support, ways)(episode.query.x)
    return {"score": objective.score(outputs, episode.query.y), "loss": objective.loss(outputs, episode.query.y)}


def _named(gradient: Sums, outcomes: Outcome) -> Sums:
    sums = {f"gradient.{name}": value for name, value in gradient.items()}
    sums |= {f"statistics.{name}": value.sum(0) for name, value in outcomes.statistics.items()}
    return sums | {"metric.loss": outcomes.loss.detach().sum(0), "metric.score": outcomes.score.sum(0)}


def _stacked(outcomes: list[Outcome]) -> Outcome:
    """With a leading task axis."""
    found: Outcome = tree_map(lambda *values: torch.stack(values), *outcomes)  # type: ignore[misc]
    return found


def _each(episodes: Episode) -> list[Episode]:
    tasks = episodes.family.shape[0]
    return [tree_map(lambda value, i=i: value[i], episodes) for i in range(tasks)]  # type: ignore[misc]
