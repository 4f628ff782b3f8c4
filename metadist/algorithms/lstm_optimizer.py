"""Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016).

For every coordinate of the network's parameters φ, with one recurrent network shared by all of
them, from φ_0 = θ and a blank memory (§2.1, appendix A):

    g_k = ∇L_S(φ_{k−1}),   h_k = LSTM(h_{k−1}, preprocessed(g_k)),   φ_k = φ_{k−1} − α out(h_k)

Meta-objective: L_Q(φ_K) + w Σ_k L_S(φ_k), k = 1 … K; the second sum alone is the paper's (eq. 3),
which trains an optimizer and asks nothing of other examples. As in the paper, ∂g_k/∂(everything)
is dropped: no second derivatives of the network. The paper draws θ at random for every run of the
optimizer; here it is learned along with the optimizer (`start: learned`), or stays the run's one
random initialisation (`start: fixed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.coordinates import flatten, preprocessed, unflatten
from metadist.algorithms.descent import on_queries, on_support, predictors
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.learned import LstmOptimizer
from metadist.models.layers import init_linear, linear
from metadist.models.lstm import blank, init_lstm, lstm
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples

PREFIX = "lstm."
"""Of the names in θ that are the optimizer's and not the network's."""


@dataclass(frozen=True)
class LSTMOptimizer:
    """inner_lr: α; inner_steps: K; hidden, layers: of the LSTM; learned_start: whether θ moves; trajectory: w."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    hidden: int = 20
    layers: int = 2
    learned_start: bool = True
    trajectory: float = 0.0
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        inputs = 2
        for name in self._cells():
            theta |= init_lstm(name, generator, inputs, self.hidden)
            inputs = self.hidden
        return theta | init_linear("lstm.out", generator, inputs, 1), self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> list[Params]:
        """φ_0 … φ_K."""
        start = {name: value for name, value in theta.items() if not name.startswith(PREFIX)}
        if not self.learned_start:
            start = {name: value.detach() for name, value in start.items()}
        path: list[Params] = [start]
        fast = flatten(start)
        seen = fast[:, None]
        memories = {name: blank(name, theta, seen) for name in self._cells()}
        loss = on_support(self.normalisation, self.objective, support)
        for _ in range(self.inner_steps):
            at = {name: value.detach() for name, value in path[-1].items()}
            signal = preprocessed(flatten(torch.func.grad(loss, has_aux=True)(at)[0]))
            for name in self._cells():
                memories[name] = lstm(name, theta, signal, memories[name])
                signal = memories[name].hidden
            fast = fast - self.inner_lr * linear("lstm.out", theta, signal)[:, 0]
            path.append(unflatten(fast, start))
        return path

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        path = replace(self, inner_steps=steps[-1]).inner_loop(theta, support)
        return predictors(self.normalisation, path, state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        path = self.inner_loop(theta, episode.support)
        outcome = on_queries(self.normalisation, self.objective, path[-1], state, episode)
        if self.trajectory:
            loss = on_support(self.normalisation, self.objective, episode.support)
            outcome = outcome._replace(loss=outcome.loss + self.trajectory * sum(loss(fast)[0] for fast in path[1:]))
        return outcome

    def _cells(self) -> list[str]:
        return [f"{PREFIX}{number}" for number in range(1, self.layers + 1)]


def build(method: LstmOptimizer, context: Context) -> LSTMOptimizer:
    """Of a config."""
    return LSTMOptimizer(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.hidden,
        method.layers,
        method.start == "learned",
        method.trajectory,
        context.objective,
    )
