"""MAML++ (Antoniou, Edwards & Storkey 2019): MAML with five changes, each a switch of its own.

Inner loop, k = 1 … K, from φ_0 = θ:   φ_k = φ_{k−1} − α_k ∘ ∇_φ L_S(φ_{k−1})
Meta-objective at meta-step t:          Σ_k v_k(t) L_Q(φ_k),   Σ_k v_k = 1

- `learned_rates`: α_k is part of θ, a number for every parameter tensor and step (LSLR):
  `rate.conv1.weight` has shape [K].
- `multi_step_loss` M: v_k(t) = (1 − t/M) / K for k < K, the rest for v_K; from t = M on only
  the last step's queries count (MSL).
- `first_order_steps`: before that meta-step the inner gradients are constants, then not (DA).
- `per_step_affine`: a norm's scale and shift have a row for every number of steps taken, 0 … K,
  which both sets see (BNWB); like in the authors' code only the outer loop moves them.
- `per_step_statistics`: so have the running statistics of `model.statistics=running` (BNRS).
  Row k holds those of the support set under φ_k, the last row those of the queries.

The authors' code has K rows and gives the queries under φ_k those of φ_{k−1}'s support set.
The cosine schedule of the outer rate is `outer.schedule=cosine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import Rates, on_queries, on_support
from metadist.algorithms.descent import step as one_step
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.gradient import MamlPlusPlus as Keys
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class MAMLPlusPlus:
    """inner_lr: α_k, or where it starts; inner_steps: steps taken; rows: K of meta-training, which θ has rows for."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    rows: int
    learned_rates: bool = True
    multi_step_loss: int = 0
    first_order_steps: int = 0
    per_step_affine: bool = True
    per_step_statistics: bool = True
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = self.normalisation.network.init(generator)
        theta = {name: self._repeated(value) if self._per_step(name) else value for name, value in start.items()}
        if self.learned_rates:
            theta |= {f"rate.{name}": torch.full((self.rows,), self.inner_lr) for name in self._moving(start)}
        state = self.normalisation.initial_state()
        if self.per_step_statistics:
            state = {name: self._repeated(value) for name, value in state.items()}
        return theta, state

    def inner_loop(self, theta: Theta, support: Examples, order: int) -> tuple[list[Params], list[Statistics]]:
        """φ_0 … φ_K as the network gets them, and the statistics of the support set under φ_0 … φ_{K−1}."""
        loss = on_support(self.normalisation, self.objective, support)
        start = {name: value for name, value in theta.items() if not name.startswith("rate.")}
        path: list[Params] = [start | self._norms(theta, 0)]
        seen = []
        for k in range(self.inner_steps):
            rates: Rates = {
                name: theta[f"rate.{name}"][k] if self.learned_rates else self.inner_lr for name in self._moving(start)
            }
            params, used = one_step(loss, path[k], rates, order)
            path.append(params | self._norms(theta, k + 1))
            seen.append(used)
        return path, seen

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        path, _ = replace(self, inner_steps=steps[-1]).inner_loop(theta, support, order=2)
        return [self.normalisation.predictor(path[k], self._row(state, k), support) for k in steps]

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        path, seen = self.inner_loop(theta, episode.support, order=1 if step < self.first_order_steps else 2)
        weights = self.importance(step)
        judged = {k: w for k, w in enumerate(weights, len(path) - len(weights)) if w}
        each = [on_queries(self.normalisation, self.objective, path[k], self._row(state, k), episode) for k in judged]
        loss = torch.stack([w * outcome.loss for w, outcome in zip(judged.values(), each, strict=True)]).sum()
        statistics = each[-1].statistics
        if self.per_step_statistics:
            rows = [*seen, statistics]
            statistics = {name: torch.stack([row[name].detach() for row in rows]) for name in state}
        return Outcome(loss, each[-1].score, statistics)

    def importance(self, step: int) -> list[float]:
        """v_1 … v_K at a meta-step; without inner steps that of φ_0."""
        steps = max(1, self.inner_steps)
        early = max(0.0, 1 - step / self.multi_step_loss) / steps if self.multi_step_loss else 0.0
        return [early] * (steps - 1) + [1 - early * (steps - 1)]

    def _per_step(self, name: str) -> bool:
        return self.per_step_affine and name.endswith((".norm.scale", ".norm.shift"))

    def _moving(self, start: Params) -> list[str]:
        return [name for name in start if not self._per_step(name)]

    def _norms(self, theta: Theta, k: int) -> dict[str, Tensor]:
        return {name: value[k] for name, value in theta.items() if self._per_step(name)}

    def _row(self, state: State, k: int) -> State:
        return {name: value[k] for name, value in state.items()} if self.per_step_statistics else state

    def _repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.rows + 1, *[1] * value.ndim)


def build(method: Keys, context: Context) -> MAMLPlusPlus:
    """Of a config."""
    trained = context.config.algorithm
    assert isinstance(trained, Keys)
    return MAMLPlusPlus(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        trained.inner_steps,
        method.learned_rates,
        method.multi_step_loss,
        method.first_order_steps,
        method.per_step_affine,
        method.per_step_statistics,
        context.objective,
    )
