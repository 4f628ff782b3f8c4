"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017).

Inner loop, k = 1 … K, from φ_0 = θ:   φ_k = φ_{k−1} − α ∇_φ L_S(φ_{k−1})
Meta-objective:                        L_Q(φ_K(θ)) + λ L_S(θ)

Second order differentiates through the inner loop. First order (FOMAML, §5.2) takes the
inner gradients as constants, so that the meta-gradient is ∇_φ L_Q(φ_K). L_S and L_Q are
mean cross-entropies over the support and the query set, or mean squared errors; the paper's
code sums over the classes instead, so that its α = 0.4 (5-way) is 2.0 here.

With λ_K = ∇_φ L_Q(φ_K) and the Hessians H_k = ∇²L_S(φ_k), the meta-gradient is λ_0 of

    λ_k = λ_{k+1} − α H_k λ_{k+1},   k = K−1 … 0

(plus λ ∇L_S(θ)), and λ_K itself in first order. Networks that have these products in closed form
(`models/closed_form.py`) are trained by this recursion (`gradient_of_all`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import Rates, SupportLoss, last, on_queries, on_support, predictors, walk
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.algorithms.recompute import descend_in_segments, segment
from metadist.methods.gradient import Maml
from metadist.models.closed_form import ClosedForm, Found, Images, closed_form
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class MAML:
    """inner_lr: α; inner_steps: K; order: 1 or 2; support_loss_weight: λ; recompute: what inner steps keep for
    the way back is made again."""

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

    @cached_property
    def closed_form(self) -> ClosedForm | None:
        """Of the network; queries with statistics of the support set are not of that form."""
        if self.normalisation.queries != "together" or self.objective is not CLASSIFICATION:
            return None
        return closed_form(self.normalisation.network)

    def at_once(self, episodes: Episode) -> int:
        if self.closed_form is None:
            return 0
        return min(self.closed_form.at_once(part.x) for part in (episodes.support, episodes.query))

    def gradient_of_all(
        self, theta: Theta, state: State, episodes: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        network = self.closed_form
        assert network is not None
        support = network.images(episodes.support.x), episodes.support.y
        second = self.order == 2 and self.inner_steps > 0
        # Only φ in front of every segment is kept; what was found within the last one is kept as well.
        size = segment(self.inner_steps) if self.recompute else max(1, self.inner_steps)
        starts = [network.laid_out(theta)]
        for _ in range(size, self.inner_steps, size):
            starts.append(self._walk(network, starts[-1], *support, size, keep=False)[0])
        fast, walked = self._walk(
            network, starts[-1], *support, self.inner_steps - size * (len(starts) - 1), keep=second
        )
        judged = network.gradient(
            fast, network.images(episodes.query.x), episodes.query.y, together=not second, products=False
        )
        back, loss = judged.gradient, judged.loss
        for k in reversed(range(self.inner_steps if second else 0)):
            if not walked:
                starts.pop()
                _, walked = self._walk(network, starts[-1], *support, size, keep=True)
            here = walked.pop() if k else walked[0]
            product = network.hessian_product(here.record, back, together=k == 0)
            back = back if k else network.summed(back)
            back = {name: torch.sub(g, product[name], alpha=self.inner_lr) for name, g in back.items()}
        if self.support_loss_weight:
            before = walked[0] if walked else network.gradient(starts[0], *support, products=False)
            loss = loss + self.support_loss_weight * before.loss
            of_support = network.summed(before.gradient)
            back = {name: torch.add(g, of_support[name], alpha=self.support_loss_weight) for name, g in back.items()}
        return {name: back[name] for name in theta}, Outcome(
            loss, judged.score, {name: judged.statistics[name] for name in state}
        )

    def _walk(
        self, network: ClosedForm, fast: dict[str, Tensor], images: Images, y: Tensor, steps: int, keep: bool
    ) -> tuple[dict[str, Tensor], list[Found]]:
        """φ after some steps, and what was found before each: keep; else before the first, if it will be asked for."""
        walked: list[Found] = []
        for _ in range(steps):
            here = network.gradient(fast, images, y, products=keep)
            # A large gradient that nobody asks for again makes room for the parameters behind the step.
            used_up = {name: g for name, g in here.gradient.items() if g.ndim == 5 and not self.support_loss_weight}
            fast = {
                name: torch.sub(fast[name], g, alpha=self.inner_lr, out=used_up.get(name))
                for name, g in here.gradient.items()
            }
            if keep or (self.support_loss_weight and not walked):
                walked.append(here)
        return fast, walked


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
