"""Almost no inner loop (Raghu, Raghu, Bengio & Vinyals 2020).

θ = (body, head). In the inner loop only the head w moves (§4.1), k = 1 … K, from w_0 = w:

    w_k = w_{k−1} − α ∇_w L_S(body, w_{k−1})

Meta-objective: L_Q(body, w_K), differentiated in body and head; order 1 takes the inner
gradients as constants. Since the body stays, the support set passes it once: the inner loop
is that of a linear model over its features f(x_S).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import last, on_queries, predictors, walk
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.gradient import Anil as Keys
from metadist.models.layers import linear
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples

HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class ANIL:
    """inner_lr: α; inner_steps: K; order: 1 or 2."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    order: int = 2
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """θ with the head w_K."""
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """θ with w_0, w_1, …."""

        def loss(linear_model: Params) -> tuple[Tensor, Statistics]:
            outputs = linear("head", linear_model, linear_model["features"])
            return self.objective.loss(outputs, support.y), {}

        # The features are an input like the head, so that first order holds both constant.
        start = {"features": self.features(theta, support.x)} | {name: theta[name] for name in HEAD}
        for adapted in walk(loss, start, dict.fromkeys(HEAD, self.inner_lr), self.order):
            yield {**theta, **{name: adapted[name] for name in HEAD}}

    def features(self, theta: Theta, x: Tensor) -> Tensor:
        """What the head gets, [n, d]: the outputs of the network that has the identity for a head."""
        weight = theta["head.weight"]
        identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        transparent = {"head.weight": identity, "head.bias": torch.zeros_like(identity[0])}
        return self.normalisation.network({**theta, **transparent}, x)[0]

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)


def build(method: Keys, context: Context) -> ANIL:
    """Of a config."""
    return ANIL(context.normalisation, method.inner_lr, method.inner_steps, method.order, context.objective)
