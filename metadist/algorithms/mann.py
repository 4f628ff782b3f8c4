"""Memory-augmented neural network (Santoro, Bartunov, Botvinick, Wierstra & Lillicrap 2016).

An episode is a sequence of inputs (f(x_t), y_{t−1}): each label comes one step late, so that
it has to be bound to its example in a memory M [slots, cell]. With heads j = 1 … R, step t is

    controller          h_t, c_t = LSTM((f(x_t), y_{t−1}, r_{t−1}), h_{t−1}, c_{t−1}),  k_t^j = tanh(W_k h_t + b_k)^j
    reading             w^r_t(i) ∝ exp(β cos(k_t, M_{t−1}(i)));  r_t = Σ_i w^r_t(i) M_{t−1}(i)
    classifier          logits = W_o (h_t, r_t) + b_o
    writing             w^w_t = σ(α) w^r_{t−1} + (1 − σ(α)) w^lu_{t−1},  α learned, one for each head
                        M_t(i) = (1 − w^lu_{t−1}(i)) M_{t−1}(i) + Σ_j w^w_t(i) k_t
    usage               w^u_t = γ w^u_{t−1} + Σ_j (w^r_t + w^w_t);  w^lu_t is 1 in the R slots of least usage, else 0

The loss is the mean cross-entropy of all steps of a training sequence: the support set, then
the queries, each in an order that step and classes draw, since labels in their fixed order
could be told from the position alone. At test the support set is the sequence, and each query
is the next step by itself, so that no query sees another.

`labels: beside` is an easier variant: inputs of the support set are (f(x_t), y_t), those of
queries (f(x), 0), and nothing but the memory's content has to tell labels. Training is then
like the test: the loss is the queries', each the next step behind the support set.

Departures: f is the run's network where the paper feeds pixels to the controller; support
examples stand before queries where the paper mixes all; memory is read before it is written,
because the key that has just been stored would find itself; β is 1 in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms import embedding
from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.objective import accuracy
from metadist.methods.memory import Mann
from metadist.models.layers import init_linear, linear
from metadist.models.lstm import Memory as LSTMMemory
from metadist.models.lstm import init_lstm, lstm
from metadist.tasks.counter import key, mix
from metadist.tasks.episode import Episode, Examples

FIRST_USE = 1e-3
"""Initial usage rises by this over the slots, so that untouched ones are filled in their order."""


class Memory(NamedTuple):
    """What a step leaves to the next.

    cells: M [slots, cell]; usage: w^u [slots]; least: w^lu [slots], 0 or 1; weights: w^r [reads, slots];
    read: r [reads · cell]; controller: its h and c, [1, hidden] each.
    """

    cells: Tensor
    usage: Tensor
    least: Tensor
    weights: Tensor
    read: Tensor
    controller: LSTMMemory


class Answer(NamedTuple):
    """What the controller makes of m inputs, each as if it alone came next.

    logits: [m, ways]; keys: [m, reads, cell]; weights: w^r [m, reads, slots]; read: [m, reads · cell];
    controller: [m, hidden] each.
    """

    logits: Tensor
    keys: Tensor
    weights: Tensor
    read: Tensor
    controller: LSTMMemory


@dataclass(frozen=True)
class MANN:
    """shape: of one input; ways: labels; hidden: units of the controller; reads: R; decay: γ; sharpness: β."""

    normalisation: Normalisation
    shape: tuple[int, ...]
    ways: int
    hidden: int = 200
    slots: int = 128
    cell: int = 40
    reads: int = 4
    decay: float = 0.99
    sharpness: float = 1.0
    labels: Literal["late", "beside"] = "late"

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        inputs = embedding.features_of(self.normalisation, theta, self.shape) + self.ways + self.reads * self.cell
        theta |= init_lstm("lstm", generator, inputs, self.hidden)
        theta |= init_linear("key", generator, self.hidden, self.reads * self.cell)
        theta["write.alpha"] = torch.zeros(self.reads)
        theta |= init_linear("classifier", generator, self.hidden + self.reads * self.cell, self.ways)
        return theta, self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed = embedding.at_test(self.normalisation, theta, state, support)
        answer = self._read_in(theta, features, support.y)
        return lambda x: answer(embed(x))

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        support, query, statistics = embedding.in_training(self.normalisation, theta, state, episode)
        n = len(support)
        first, then = (shuffled(len(x), step, episode.classes, s) for s, x in enumerate((support, query)))
        if self.labels == "beside":
            told = self._read_in(theta, support[first], episode.support.y[first])(query)
            return Outcome(F.cross_entropy(told, episode.query.y), accuracy(told, episode.query.y), statistics)
        x = torch.cat([support[first], query[then]])
        y = torch.cat([episode.support.y[first], episode.query.y[then]])
        labels, memory, logits = self._told(y, x), self._empty(x), []
        for t in range(len(x)):
            answer = self._answer(theta, memory, x[t : t + 1], labels[t])
            memory = self._write(theta, memory, answer)
            logits.append(answer.logits)
        told = torch.cat(logits)
        return Outcome(F.cross_entropy(told, y), accuracy(told[n:], y[n:]), statistics)

    def _read_in(self, theta: Theta, features: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """features [n, d], y int64 [n] → (query features [m, d] → logits [m, ways])."""
        labels, memory = self._told(y, features), self._empty(features)
        for t in range(len(features)):
            memory = self._write(theta, memory, self._answer(theta, memory, features[t : t + 1], labels[t]))
        return lambda queries: self._answer(theta, memory, queries, labels[-1]).logits

    def _told(self, y: Tensor, like: Tensor) -> Tensor:
        """The labels that stand beside each input of a sequence and beside the one after it, one-hot or nothing;
        [n + 1, ways]."""
        told = (y[:, None] == torch.arange(self.ways, device=y.device)).to(like.dtype)
        nothing = torch.zeros_like(told[:1])
        return torch.cat([nothing, told] if self.labels == "late" else [told, nothing])

    def _empty(self, like: Tensor) -> Memory:
        usage = torch.arange(self.slots, dtype=like.dtype, device=like.device) * (FIRST_USE / self.slots)
        return Memory(
            cells=like.new_zeros(self.slots, self.cell),
            usage=usage,
            least=self._least_used(usage),
            weights=like.new_zeros(self.reads, self.slots),
            read=like.new_zeros(self.reads * self.cell),
            controller=LSTMMemory(like.new_zeros(1, self.hidden), like.new_zeros(1, self.hidden)),
        )

    def _answer(self, theta: Theta, memory: Memory, x: Tensor, label: Tensor) -> Answer:
        """x: features [m, d]; label: what stands beside them [ways], the same for all."""
        beside = torch.cat([label, memory.read]).expand(len(x), -1)
        controller = lstm("lstm", theta, torch.cat([x, beside], 1), memory.controller)
        h = controller.hidden
        keys = torch.tanh(linear("key", theta, h)).view(-1, self.reads, self.cell)
        weights = torch.softmax(self.sharpness * (embedding.unit(keys) @ embedding.unit(memory.cells).T), -1)
        read = (weights @ memory.cells).flatten(1)
        return Answer(linear("classifier", theta, torch.cat([h, read], 1)), keys, weights, read, controller)

    def _write(self, theta: Theta, memory: Memory, answer: Answer) -> Memory:
        """The memory behind a step; `answer` is that of its only input."""
        keys, weights = answer.keys[0], answer.weights[0]
        gate = torch.sigmoid(theta["write.alpha"])[:, None]
        write = gate * memory.weights + (1 - gate) * memory.least
        cells = (1 - memory.least)[:, None] * memory.cells + write.T @ keys
        usage = self.decay * memory.usage + weights.sum(0) + write.sum(0)
        return Memory(cells, usage, self._least_used(usage), weights, answer.read[0], answer.controller)

    def _least_used(self, usage: Tensor) -> Tensor:
        rank = usage.detach().argsort().argsort()
        return (rank < self.reads).to(usage.dtype)


def shuffled(size: int, step: int, classes: Tensor, stream: int) -> Tensor:
    """An order of `size` examples, int64 [size]: a pure function of the meta-step and the episode's classes."""
    drawn = key(0, stream, step, *classes.unbind(), device=classes.device)
    return mix(drawn + torch.arange(size, device=classes.device)).argsort()


def build(method: Mann, context: Context) -> MANN:
    """Of a config."""
    return MANN(
        embedding.without_head(context),
        context.shape,
        context.ways,
        method.hidden,
        method.slots,
        method.cell,
        method.reads,
        method.decay,
        method.sharpness,
        method.labels,
    )
