"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017).

Inner loop, k = 1 … K, from φ_0 = θ:   φ_k = φ_{k−1} − α ∇_φ L_S(φ_{k−1})
Meta-objective:                        L_Q(φ_K(θ)) + λ L_S(θ)

Second order differentiates through the inner loop. First order (FOMAML, §5.2) takes the
inner gradients as constants, so that the meta-gradient is ∇_φ L_Q(φ_K). L_S and L_Q are
mean cross-entropies over the support and the query set, or mean squared errors; the paper's
code sums over the classes instead, so that its α = 0.4 (5-way) is 2.0 here.
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
from metadist.methods.gradient import Maml
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class MAML:
    """inner_lr: α; inner_steps: K; order: 1 or 2; support_loss_weight: λ; recompute: inner graphs are
    built again."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    order: int = 2
    support_loss_weight: float = 0.0
    objective: Objective = CLASSIFICATION
    recompute: bool = False

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ_K."""
        if self.recompute:
            return descend_in_segments(self.support_loss, support, theta, self.rates(theta), self.inner_steps)
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """φ_0, φ_1, …."""
        return walk(self.support_loss(support), theta, self.rates(theta), self.order)

    def support_loss(self, support: Examples) -> SupportLoss:
        """L_S."""
        return on_support(self.normalisation, self.objective, support)

    def rates(self, theta: Theta) -> Rates:
        """α of every parameter."""
        return dict.fromkeys(theta, self.inner_lr)

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        fast = self.inner_loop(theta, episode.support)
        outcome = on_queries(self.normalisation, self.objective, fast, state, episode)
        if self.support_loss_weight:
            before, _ = self.support_loss(episode.support)(theta)
            outcome = outcome._replace(loss=outcome.loss + self.support_loss_weight * before)
        return outcome


def build(method: Maml, context: Context) -> MAML:
    """Of a config."""
    return MAML(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.order,
        method.support_loss_weight,
        context.objective,
        method.recompute,
    )
