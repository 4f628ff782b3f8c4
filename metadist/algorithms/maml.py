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
            starts.append(self._walk(network, starts[-1], *support, size)[0])
        left = self.inner_steps - size * (len(starts) - 1)
        kept = left if second else int(self.support_loss_weight > 0)
        fast, walked = self._walk(network, starts[-1], *support, left, kept, products=second)
        back, outcome = self._judged(network, fast, state, episodes.query, together=not second)
        del fast  # memory for the way back
        for k in reversed(range(self.inner_steps if second else 0)):
            if not walked:
                starts.pop()
                walked = self._walk(network, starts[-1], *support, size, size, products=True)[1]
            back = self._through(network, walked.pop() if k else walked[0], back, at_theta=k == 0)
        if self.support_loss_weight:
            before = walked[0] if walked else network.gradient(starts[0], *support, products=False)
            outcome = outcome._replace(loss=outcome.loss + self.support_loss_weight * before.loss)
            of_support = network.summed(before.gradient)
            back = {name: torch.add(g, of_support[name], alpha=self.support_loss_weight) for name, g in back.items()}
        return {name: back[name] for name in theta}, outcome

    def _walk(
        self,
        network: ClosedForm,
        fast: dict[str, Tensor],
        images: Images,
        y: Tensor,
        steps: int,
        kept: int = 0,
        products: bool = False,
    ) -> tuple[dict[str, Tensor], list[Found]]:
        """φ after some steps, and what was found before so many of them; products: as in `ClosedForm.gradient`."""
        walked: list[Found] = []
        for step in range(steps):
            here = network.gradient(fast, images, y, products=products)
            # A large gradient that nobody asks for again makes room for the parameters behind the step.
            asked_again = step < kept and self.support_loss_weight > 0
            used_up = {name: g for name, g in here.gradient.items() if g.ndim == 5 and not asked_again}
            fast = {
                name: torch.sub(fast[name], g, alpha=self.inner_lr, out=used_up.get(name))
                for name, g in here.gradient.items()
            }
            if step < kept:
                walked.append(here)
        return fast, walked

    def _judged(
        self, network: ClosedForm, fast: dict[str, Tensor], state: State, query: Examples, together: bool
    ) -> tuple[dict[str, Tensor], Outcome]:
        """∇_φ L_Q of every task, or summed over them: together; and the outcome."""
        found = network.gradient(fast, network.images(query.x), query.y, together, products=False)
        return found.gradient, Outcome(found.loss, found.score, {name: found.statistics[name] for name in state})

    def _through(self, network: ClosedForm, found: Found, back: dict[str, Tensor], at_theta: bool) -> dict[str, Tensor]:
        """λ_k from λ_{k+1} and what was found at φ_k; at θ summed over the tasks."""
        product = network.hessian_product(found.record, back, together=at_theta)
        back = network.summed(back) if at_theta else back
        return {name: torch.sub(g, product[name], alpha=self.inner_lr) for name, g in back.items()}


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
