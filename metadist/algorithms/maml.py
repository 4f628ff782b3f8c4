"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017).

Inner loop, k = 1 … K, from φ_0 = θ:   φ_k = φ_{k−1} − α ∇_φ L_S(φ_{k−1})
Meta-objective:                        L_Q(φ_K(θ)) + λ L_S(θ)

Second order differentiates through the inner loop. First order (FOMAML, §5.2) takes the
inner gradients as constants, so that the meta-gradient is ∇_φ L_Q(φ_K). L_S and L_Q are
mean cross-entropies over the support and the query set, unless `loss` says otherwise; the
paper's code sums over the classes instead, so that its α = 0.4 (5-way) is 2.0 here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta, accuracy
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class MAML:
    """inner_lr: α; inner_steps: K; order: 1 or 2; support_loss_weight: λ; loss: of (outputs, targets), a scalar."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    order: int = 2
    support_loss_weight: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ_K."""
        fast: Params = theta
        for _ in range(self.inner_steps):
            at = fast if self.order == 2 else {name: value.detach() for name, value in fast.items()}
            gradient = torch.func.grad(self._support_loss)(at, support)
            fast = {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}
        return fast

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.normalisation.predictor(self.inner_loop(theta, support), state, support)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        support, query = episode
        fast = self.inner_loop(theta, support)
        logits, statistics = self.normalisation.network(fast, query.x, self.normalisation.given(fast, state, support))
        loss = self.loss(logits, query.y)
        if self.support_loss_weight:
            loss = loss + self.support_loss_weight * self._support_loss(theta, support)
        return Outcome(loss, accuracy(logits, query.y), {name: statistics[name].detach() for name in state})

    def _support_loss(self, params: Params, support: Examples) -> Tensor:
        return self.loss(self.normalisation.network(params, support.x)[0], support.y)
