"""Meta-SGD (Li, Zhou, Chen & Li 2017).

θ = (initialisation φ_0, rates α), one rate for every element of φ_0, of either sign (eq. 3):

    φ_k = φ_{k−1} − α ∘ ∇_φ L_S(φ_{k−1}),   k = 1 … K

Meta-objective: L_Q(φ_K), differentiated in φ_0 and α; order 1 takes the inner gradients, but
not α, as constants. The rate of `conv1.weight` is θ's `rate.conv1.weight`, of the same shape.
The paper takes one step and draws each α from [0.005, 0.1] to begin with; here all begin at
`inner_lr`, so that a run begins as MAML.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import Rates, SupportLoss, last, on_queries, on_support, predictors, walk
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.algorithms.recompute import descend_in_segments
from metadist.methods.gradient import MetaSgd as Keys
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class MetaSGD:
    """inner_lr: every α at the start; inner_steps: K; order: 1 or 2; recompute: inner graphs are built again."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    order: int = 2
    objective: Objective = CLASSIFICATION
    recompute: bool = False

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = self.normalisation.network.init(generator)
        rates = {f"rate.{name}": torch.full_like(value, self.inner_lr) for name, value in start.items()}
        return start | rates, self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ_K."""
        if self.recompute:
            return descend_in_segments(self.support_loss, support, *self.parts(theta), self.inner_steps)
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """φ_0, φ_1, …."""
        return walk(self.support_loss(support), *self.parts(theta), self.order)

    def support_loss(self, support: Examples) -> SupportLoss:
        """L_S."""
        return on_support(self.normalisation, self.objective, support)

    def parts(self, theta: Theta) -> tuple[Params, Rates]:
        """φ_0 and α."""
        start = {name: value for name, value in theta.items() if not name.startswith("rate.")}
        return start, {name: theta[f"rate.{name}"] for name in start}

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)


def build(method: Keys, context: Context) -> MetaSGD:
    """Of a config."""
    return MetaSGD(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.order,
        context.objective,
        method.recompute,
    )
