"""Ridge regression differentiable discriminator, R2-D2 (Bertinetto, Henriques, Torr & Vedaldi 2019).

The head of a task is the ridge regression of its support set, in closed form (§3.2). With X [n, e]
the embedded support examples and a column of ones for the intercept, Y [n, ways] their one-hot
classes (or numbers, [n, outputs]),

    W = argmin 1/n ‖X W − Y‖² + λ ‖W‖² = (XᵀX + nλ I)⁻¹ XᵀY          n > e
                                       = Xᵀ (XXᵀ + nλ I)⁻¹ Y          n ≤ e (Woodbury)

and a query's outputs are α X' W + β. λ, α and β are learned; λ and α are exponentials of the
parameters, so that they stay positive. The mean over n, as in the paper's code, lets one λ serve
any number of shots. The meta-gradient goes through the solution, which costs a system of
min(n, e) equations.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.embedding import at_test, in_training
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods import metric
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class R2D2:
    """ridge: λ, scale: α at the start of meta-training; the network has no head."""

    normalisation: Normalisation
    ridge: float = 1.0
    scale: float = 10.0
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        theta["ridge.log_lambda"] = torch.tensor(math.log(self.ridge))
        theta["ridge.log_alpha"] = torch.tensor(math.log(self.scale))
        theta["ridge.beta"] = torch.tensor(0.0)
        return theta, self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed_queries = at_test(self.normalisation, theta, state, support)
        head = self._head(theta, features, support.y, ways)
        return lambda x: self._outputs(theta, embed_queries(x), head)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        features, queries, statistics = in_training(self.normalisation, theta, state, episode)
        outputs = self._outputs(theta, queries, self._head(theta, features, episode.support.y, ways))
        y = episode.query.y
        return Outcome(self.objective.loss(outputs, y), self.objective.score(outputs, y), statistics)

    def _head(self, theta: Theta, features: Tensor, y: Tensor, ways: int) -> Tensor:
        targets = y if y.is_floating_point() else F.one_hot(y, ways).to(features.dtype)
        return ridge_regression(_with_ones(features), targets, theta["ridge.log_lambda"].exp())

    def _outputs(self, theta: Theta, features: Tensor, head: Tensor) -> Tensor:
        return theta["ridge.log_alpha"].exp() * (_with_ones(features) @ head) + theta["ridge.beta"]


def ridge_regression(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """W [e, outputs] of x [n, e], y [n, outputs] and the scalar λ."""
    n, e = x.shape
    if n <= e:
        return x.T @ _solved(x @ x.T, n * ridge, y)
    return _solved(x.T @ x, n * ridge, x.T @ y)


def _solved(a: Tensor, diagonal: Tensor, b: Tensor) -> Tensor:
    """(a + diagonal · I)⁻¹ b."""
    system = a + diagonal * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    # Without a check, which would wait for the device: what is not finite is found in the shard's sums.
    solution: Tensor = torch.linalg.solve_ex(system, b)[0]
    return solution


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def build(method: metric.R2D2, context: Context) -> R2D2:
    """Of a config."""
    return R2D2(context.normalisation, method.ridge, method.scale, context.objective)
