"""The same network trained from scratch on each support set: no meta-training at all.

θ stays as it was initialised: its meta-gradient is zero. φ is θ after K full-batch steps of
gradient descent, φ ← φ − α g, or of Adam (Kingma & Ba 2015) on the support loss:

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  φ ← φ − α m̂ / (√v̂ + ε)

with m̂ = m / (1 − β1^k) and v̂ = v / (1 − β2^k) in step k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import last, on_queries, on_support, predictors
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.baseline import Scratch as Keys
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Scratch:
    """inner_lr: α; inner_steps: K; inner_optimizer: `sgd` or `adam`."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    inner_optimizer: str = "adam"
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), {}

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ."""
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """φ after 0, 1, … steps."""
        fast: Params = {name: value.detach() for name, value in theta.items()}
        mean = {name: torch.zeros_like(value) for name, value in fast.items()}
        square = mean
        loss = on_support(self.normalisation, self.objective, support)
        for k in count(1):
            yield fast
            gradient, _ = torch.func.grad(loss, has_aux=True)(fast)
            if self.inner_optimizer == "adam":
                mean = {n: BETA_1 * m + (1 - BETA_1) * gradient[n] for n, m in mean.items()}
                square = {n: BETA_2 * v + (1 - BETA_2) * gradient[n].square() for n, v in square.items()}
                of_mean, of_square = 1 - BETA_1**k, 1 - BETA_2**k
                gradient = {n: m / of_mean / ((square[n] / of_square).sqrt() + EPSILON) for n, m in mean.items()}
            fast = {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """The queries' loss under φ, for the record; nothing descends it."""
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        nowhere = {name: torch.zeros_like(value) for name, value in theta.items()}
        return nowhere, self.task_loss(theta, state, episode, ways, step)


def build(method: Keys, context: Context) -> Scratch:
    """Of a config."""
    return Scratch(
        context.normalisation, method.inner_lr, method.inner_steps, method.inner_optimizer, context.objective
    )
