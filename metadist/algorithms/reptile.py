"""Reptile (Nichol, Achiam & Schulman 2018).

φ is θ after k steps of SGD or of Adam with β1 = 0 on mini-batches of the support set;
the outer direction is θ − φ (§2), averaged over the meta-batch (batched version; a meta-batch
of one task is the serial version).

With Adam, v ← β2 v + (1 − β2) g²,  φ ← φ − α g / (√v̂ + ε), v̂ = v / w, where w is to 1 what v is
to g². v and w are zero for each task; or, as in the paper's code, where the optimizer lives on
from task to task, `moments: kept`: state that every task begins with. The tasks of a meta-step move it once, as
they move running statistics: v → 0.9 v + 0.1 × the mean of g² over their steps, and w so to 1, where
the paper's serial code keeps β2^k of v for each task. ε outside the root keeps a zero gradient at zero, and nothing is
differentiated through the root. Mini-batch k holds the next `inner_batch` examples of the support
set, shot by shot and around again, so that every class is in it as evenly as its size allows (the
paper shuffles the support set for every round; examples of an episode stand in random order).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import last, on_support, predictors
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.gradient import Reptile as Keys
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples

BETA_2, EPSILON = 0.999, 1e-8
SQUARE, WEIGHT = "square.", "square_weight"
"""Names of v and w in the state."""


@dataclass(frozen=True)
class Reptile:
    """inner_lr: α; inner_steps: k; inner_batch: examples per inner step, None for the whole support set."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    inner_optimizer: str = "adam"
    inner_batch: int | None = None
    objective: Objective = CLASSIFICATION
    keep_moments: bool = False

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        if not self.keep_moments:
            return theta, {}
        return theta, {WEIGHT: torch.zeros(1)} | {SQUARE + name: torch.zeros_like(v) for name, v in theta.items()}

    def inner_loop(self, theta: Theta, state: State, support: Examples) -> tuple[Params, Statistics]:
        """φ, and this task's values of the state."""
        fast, seen = last(self.path(theta, state, support), self.inner_steps)
        weight = torch.ones(1, dtype=support.x.dtype, device=support.x.device)
        statistics = {SQUARE + name: value for name, value in seen.items()} | {WEIGHT: weight}
        return fast, {name: statistics[name] for name in state if self.keep_moments}

    def path(self, theta: Theta, state: State, support: Examples) -> Iterator[tuple[Params, Params]]:
        """φ after 0, 1, … steps, and the sum over them of g² / k."""
        fast: Params = {name: value.detach() for name, value in theta.items()}
        kept: State = state if self.keep_moments else {}
        square = {name: kept.get(SQUARE + name, torch.zeros_like(value)) for name, value in fast.items()}
        weight = kept.get(WEIGHT, torch.zeros(1, dtype=support.x.dtype, device=support.x.device))
        seen = {name: torch.zeros_like(value) for name, value in fast.items()}
        for k in count():
            yield fast, seen
            loss = on_support(self.normalisation, self.objective, self._mini_batch(support, k))
            gradient, _ = torch.func.grad(loss, has_aux=True)(fast)
            if self.inner_optimizer == "adam":
                seen = {n: v + gradient[n].square() / self.inner_steps for n, v in seen.items()}
                square = {n: BETA_2 * v + (1 - BETA_2) * gradient[n].square() for n, v in square.items()}
                weight = BETA_2 * weight + (1 - BETA_2)
                gradient = {n: g / ((square[n] / weight).sqrt() + EPSILON) for n, g in gradient.items()}
            fast = {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        path = (fast for fast, _ in self.path(theta, state, support))
        return predictors(self.normalisation, path, state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """The queries' loss under φ, for the record; Reptile itself never descends it."""
        return self.meta_gradient(theta, state, episode, ways, step)[1]

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        support, query = episode.support, episode.query
        fast, statistics = self.inner_loop(theta, state, support)
        outputs = self.normalisation.predictor(fast, state, support)(query.x)
        outcome = Outcome(self.objective.loss(outputs, query.y), self.objective.score(outputs, query.y), statistics)
        return {name: value - fast[name] for name, value in theta.items()}, outcome

    def _mini_batch(self, support: Examples, k: int) -> Examples:
        size = support.y.shape[0]
        if self.inner_batch is None or self.inner_batch >= size:
            return support
        rows = (torch.arange(self.inner_batch, device=support.y.device) + k * self.inner_batch) % size
        return Examples(support.x[rows], support.y[rows])


def build(method: Keys, context: Context) -> Reptile:
    """Of a config."""
    judged_batch = method.judged_batch if context.evaluation else None
    return Reptile(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.inner_optimizer,
        judged_batch or method.inner_batch,
        context.objective,
        method.moments == "kept",
    )
