"""Optimization as a model for few-shot learning (Ravi & Larochelle 2017): the LSTM meta-learner.

Gradient descent is the update of an LSTM's cell state with fixed gates (§3.1). Here the cell state
is the network's parameters φ, its gates are learned, and so is where it starts, φ_0 = θ:

    φ_k = f_k ⊙ φ_{k−1} − r i_k ⊙ ∇L_S(φ_{k−1})
    i_k = σ(w_I · [h_k, φ_{k−1}, i_{k−1}] + b_I),   f_k = σ(w_F · [h_k, φ_{k−1}, f_{k−1}] + b_F)
    h_k = LSTM(h_{k−1}, [preprocessed(∇L_S(φ_{k−1})), preprocessed(L_S(φ_{k−1}))])

for every coordinate, with one set of weights shared by all of them (§3.2); i_0 = 0, f_0 = 1. The
meta-objective is L_Q(φ_K), and as in the paper gradients and losses of the inner loop are constants
to it (§3.3). r (`largest_lr`) is 1 in the paper; b_I is set so that a fresh input gate gives the
rate `inner_lr`, b_F so that a fresh forget gate is σ(5) = 0.993 (the paper's code draws b_I from
[−5, −4] and b_F from [4, 6]).

Batch norms: the paper normalises each set by itself in meta-training, and at test the queries by
statistics of the support set, kept for that task only. Here that is `transductive: true` in
training and `eval.transductive: false` with `model.statistics: support`, whose statistics are those
under the adapted parameters where the paper's are averages over the inner loop.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.coordinates import flatten, preprocessed, unflatten
from metadist.algorithms.descent import last, on_queries, on_support, predictors
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.methods.learned import LstmLearner
from metadist.models.lstm import blank, init_lstm, lstm
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples

PREFIX = "lstm."
"""Of the names in θ that are the meta-learner's and not the network's."""

FRESH_FORGET_BIAS = 5.0
GATE_WEIGHTS = 0.01
"""Gates begin with weights uniform in ± this, so that a fresh meta-learner is gradient descent."""


@dataclass(frozen=True)
class LSTMLearner:
    """inner_lr: rate of a fresh meta-learner; inner_steps: K; hidden: size of h; largest_lr: r."""

    normalisation: Normalisation
    inner_lr: float
    inner_steps: int
    hidden: int = 20
    largest_lr: float = 1.0
    objective: Objective = CLASSIFICATION

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator) | init_lstm(f"{PREFIX}1", generator, 4, self.hidden)
        share = self.inner_lr / self.largest_lr
        for gate, bias in (("input", math.log(share / (1 - share))), ("forget", FRESH_FORGET_BIAS)):
            weight = torch.empty(self.hidden + 2).uniform_(-GATE_WEIGHTS, GATE_WEIGHTS, generator=generator)
            theta |= {f"{PREFIX}{gate}.weight": weight, f"{PREFIX}{gate}.bias": torch.full((1,), bias)}
        return theta, self.normalisation.initial_state()

    def inner_loop(self, theta: Theta, support: Examples) -> Params:
        """φ_K."""
        return last(self.path(theta, support), self.inner_steps)

    def path(self, theta: Theta, support: Examples) -> Iterator[Params]:
        """φ_0, φ_1, …."""
        start = {name: value for name, value in theta.items() if not name.startswith(PREFIX)}
        fast = flatten(start)
        write, keep = torch.zeros_like(fast), torch.ones_like(fast)
        memory = blank(f"{PREFIX}1", theta, fast[:, None])
        loss = on_support(self.normalisation, self.objective, support)
        while True:
            yield unflatten(fast, start)
            at = unflatten(fast.detach(), start)
            gradient, (value, _) = torch.func.grad_and_value(loss, has_aux=True)(at)
            slope = flatten(gradient)
            seen = torch.cat([preprocessed(slope), preprocessed(value.detach()).expand(*slope.shape, 2)], -1)
            memory = lstm(f"{PREFIX}1", theta, seen, memory)
            write = self._gate("input", theta, memory.hidden, fast, write)
            keep = self._gate("forget", theta, memory.hidden, fast, keep)
            fast = keep * fast - self.largest_lr * write * slope

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        return predictors(self.normalisation, self.path(theta, support), state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        fast = self.inner_loop(theta, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode)

    def _gate(self, gate: str, theta: Theta, hidden: Tensor, fast: Tensor, before: Tensor) -> Tensor:
        """hidden: [coordinates, hidden]; fast, before: [coordinates]; the gate, [coordinates] in (0, 1)."""
        weight = theta[f"{PREFIX}{gate}.weight"]
        total = hidden @ weight[:-2] + fast * weight[-2] + before * weight[-1]
        return torch.sigmoid(total + theta[f"{PREFIX}{gate}.bias"])


def build(method: LstmLearner, context: Context) -> LSTMLearner:
    """Of a config."""
    return LSTMLearner(
        context.normalisation,
        method.inner_lr,
        method.inner_steps,
        method.hidden,
        method.largest_lr,
        context.objective,
    )
