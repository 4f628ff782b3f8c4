"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine 2019).

Inner problem (eq. 3):     φ* = argmin_φ L_S(φ) + λ/2 ‖φ − θ‖²
by K gradient steps:       φ ← φ − α (∇L_S(φ) + λ (φ − θ)), from φ = θ
Meta-gradient (eq. 6):     x = (I + H/λ)⁻¹ ∇L_Q(φ),   H = ∇²L_S(φ)

The optimality of φ* says how it moves with θ, dφ*/dθ = (I + H/λ)⁻¹, however it was found: nothing
is differentiated through the inner loop, and the memory does not grow with K. The linear system is
solved by a fixed number of conjugate gradient steps from zero; each needs one product of H with a
vector, the derivative of a gradient that is taken once. `damping` d solves ((1 + d) I + H/λ) x = ∇L_Q
instead (the paper's code has d = 1). A direction without positive curvature ends the solution
where it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.coordinates import flatten, unflatten
from metadist.algorithms.descent import last, on_queries, on_support, predictors
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.gradient import Imaml
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class IMAML:
    """inner_lr: α; inner_steps: K; proximal: λ; cg_steps: of the linear system; damping: d."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    proximal: float
    cg_steps: int
    damping: float = 0.0
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ after K steps."""
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """φ after 0, 1, … steps."""
        start = {name: value.detach() for name, value in theta.items()}
        fast: Params = start
        loss = on_support(self.normalisation, self.objective, support)
        while True:
            yield fast
            gradient, _ = torch.func.grad(loss, has_aux=True)(fast)
            fast = {
                name: value - self.inner_lr * (gradient[name] + self.proximal * (value - start[name]))
                for name, value in fast.items()
            }

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """L_Q(φ), for the record; its dependence on θ is `meta_gradient`'s."""
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        fast = self.inner_loop(theta, episode.support)
        support_loss = on_support(self.normalisation, self.objective, episode.support)

        def query_loss(fast: Params) -> tuple[Tensor, Outcome]:
            outcome = on_queries(self.normalisation, self.objective, fast, state, episode)
            return outcome.loss, outcome

        def slope(coordinates: Tensor) -> Tensor:
            return flatten(torch.func.grad(support_loss, has_aux=True)(unflatten(coordinates, fast))[0])

        gradient, outcome = torch.func.grad(query_loss, has_aux=True)(fast)

        hessian = torch.func.vjp(slope, flatten(fast))[1]
        x = conjugate_gradient(
            lambda v: (1 + self.damping) * v + hessian(v)[0] / self.proximal,  # H is symmetric
            flatten(gradient),
            self.cg_steps,
        )
        return unflatten(x, fast), outcome


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with A x ≈ b, a fixed number of steps from zero (Hestenes & Stiefel 1952); product: v → A v, A symmetric."""
    x, residual, direction = torch.zeros_like(b), b, b
    square = residual @ residual
    going = torch.ones_like(square, dtype=torch.bool)
    for _ in range(steps):
        image = product(direction)
        curvature = direction @ image
        # No branch on data: a solution that has converged, or met curvature ≤ 0, takes steps of length zero.
        going = going & (curvature > 0)
        length = torch.where(going, square / curvature, 0.0)
        x, residual = x + length * direction, residual - length * image
        before, square = square, residual @ residual
        direction = residual + torch.where(going, square / before, 0.0) * direction
    return x


def build(method: Imaml, context: Context) -> IMAML:
    """Of a config."""
    return IMAML(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.proximal,
        method.cg_steps,
        method.damping,
        context.objective,
    )
