"""Reptile (Nichol, Achiam & Schulman 2018).

φ is θ after k steps of SGD or of Adam with β1 = 0 on mini-batches of the support set;
the outer direction is θ − φ (§2), averaged over the meta-batch (batched version).

With Adam, v ← β2 v + (1 − β2) g²,  φ ← φ − α g / (√v̂ + ε), v̂ = v / (1 − β2^k), v fresh for
each task. ε outside the root keeps a zero gradient at zero, and nothing is differentiated
through the root. Mini-batch k holds the next `inner_batch` examples of the support set,
shot by shot and around again, so that every class is in it as evenly as its size allows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta, accuracy
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples

BETA_2, EPSILON = 0.999, 1e-8


@dataclass(frozen=True)
class Reptile:
    """inner_lr: α; inner_steps: k; inner_batch: examples per inner step, None for the whole support set."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    inner_optimizer: str = "adam"
    inner_batch: int | None = None

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), {}

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ."""
        fast: Params = {name: value.detach() for name, value in theta.items()}
        square = {name: torch.zeros_like(value) for name, value in fast.items()}
        for k in range(self.inner_steps):
            gradient = torch.func.grad(self._loss)(fast, self._mini_batch(support, k))
            if self.inner_optimizer == "adam":
                square = {n: BETA_2 * v + (1 - BETA_2) * gradient[n].square() for n, v in square.items()}
                unbias = 1 - BETA_2 ** (k + 1)
                gradient = {n: g / ((square[n] / unbias).sqrt() + EPSILON) for n, g in gradient.items()}
            fast = {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}
        return fast

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.normalisation.predictor(self.inner_loop(theta, support), state, support)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """The queries' loss under φ, for the record; Reptile itself never descends it."""
        logits = self.adapt(theta, state, episode.support, ways)(episode.query.x)
        return Outcome(F.cross_entropy(logits, episode.query.y), accuracy(logits, episode.query.y), {})

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        fast = self.inner_loop(theta, episode.support)
        logits = self.normalisation.predictor(fast, state, episode.support)(episode.query.x)
        outcome = Outcome(F.cross_entropy(logits, episode.query.y), accuracy(logits, episode.query.y), {})
        return {name: value - fast[name] for name, value in theta.items()}, outcome

    def _mini_batch(self, support: Examples, k: int) -> Examples:
        size = support.y.shape[0]
        if self.inner_batch is None or self.inner_batch >= size:
            return support
        rows = (torch.arange(self.inner_batch, device=support.y.device) + k * self.inner_batch) % size
        return Examples(support.x[rows], support.y[rows])

    def _loss(self, params: Params, examples: Examples) -> Tensor:
        return F.cross_entropy(self.normalisation.network(params, examples.x)[0], examples.y)
