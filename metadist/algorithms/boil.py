"""Body only update in the inner loop (Oh, Yoo, Kim & Yun 2021).

θ = (body b, head w). In the inner loop only the body moves (eq. 2 with a head rate of 0),
k = 1 … K, from b_0 = b:

    b_k = b_{k−1} − α ∇_b L_S(b_{k−1}, w)

Meta-objective: L_Q(b_K, w), differentiated in body and head; order 1 takes the inner
gradients as constants. The head moves in the outer loop only, so that adapting means
changing the representation.
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
from metadist.methods.gradient import Boil as Keys
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class BOIL:
    """inner_lr: α; inner_steps: K; order: 1 or 2; recompute: inner graphs are built again."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    order: int = 2
    objective: Objective = CLASSIFICATION
    recompute: bool = False

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """θ with the body b_K."""
        if self.recompute:
            return descend_in_segments(self.support_loss, support, theta, self.rates(theta), self.inner_steps)
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """θ with b_0, b_1, …."""
        return walk(self.support_loss(support), theta, self.rates(theta), self.order)

    def support_loss(self, support: Examples) -> SupportLoss:
        """L_S."""
        return on_support(self.normalisation, self.objective, support)

    def rates(self, theta: Theta) -> Rates:
        """α of the body's parameters."""
        return {name: self.inner_lr for name in theta if not name.startswith("head.")}

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)


def build(method: Keys, context: Context) -> BOIL:
    """Of a config."""
    return BOIL(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.order,
        context.objective,
        method.recompute,
    )
