"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016).

A query's distribution over the classes is an attention over the support set,

    P(y | x', S) = Σ_i a(x', x_i) 1(y_i = y),   a = softmax_i τ cos(f(x'), g(x_i))     (eq. 1, §2.1.1)

and the loss −log P. Logits are log P. The paper has τ = 1, where one support example can outweigh
another by e² at most.

Without full-context embeddings f = g is the network. With them (§2.1.2, appendix A), from the
network's features f'(x') and g'(x_i) of d numbers:

    g(x_i) = h→_i + h←_i + g'(x_i)        h→, h←: LSTMs over the support set, forwards and backwards
    f(x')  = h_K, and for k = 1 … K, from h_0 = 0 and c_0 = 0:
        r_{k−1} = Σ_i softmax_i(h_{k−1} · g(x_i)) g(x_i)
        ĥ_k, c_k = LSTM(f'(x'), [h_{k−1}, r_{k−1}], c_{k−1}),   h_k = ĥ_k + f'(x')

The support set is a sequence then, in the order in which it comes (shot by shot): another order
gives other predictions. Which class is called what does not matter in either form, because no
label reaches the embeddings, and each query is read by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.embedding import at_test, features_of, in_training
from metadist.algorithms.objective import accuracy
from metadist.methods.metric import Matching as Keys
from metadist.models.lstm import Memory, blank, init_lstm, lstm
from metadist.tasks.episode import Episode, Examples

FORWARDS, BACKWARDS, ATTENTION = "context.forwards", "context.backwards", "context.attention"
"""The LSTMs."""


@dataclass(frozen=True)
class Matching:
    """shape: of one input; temperature: τ; attention_steps: K; the network has no head."""

    normalisation: Normalisation
    shape: tuple[int, ...]
    temperature: float = 10.0
    full_context: bool = False
    attention_steps: int = 5

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        if self.full_context:
            d = features_of(self.normalisation, theta, self.shape)
            theta |= init_lstm(FORWARDS, generator, d, d) | init_lstm(BACKWARDS, generator, d, d)
            theta |= init_lstm(ATTENTION, generator, 2 * d, d)
        return theta, self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed_queries = at_test(self.normalisation, theta, state, support)
        return lambda x: self._logits(theta, features, embed_queries(x), support.y, ways)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        features, queries, statistics = in_training(self.normalisation, theta, state, episode)
        logits = self._logits(theta, features, queries, episode.support.y, ways)
        y = episode.query.y
        return Outcome(F.cross_entropy(logits, y), accuracy(logits, y), statistics)

    def _logits(self, theta: Theta, features: Tensor, queries: Tensor, y: Tensor, ways: int) -> Tensor:
        if self.full_context:
            features = in_context(theta, features)
            queries = attending(theta, queries, features, self.attention_steps)
        cosine = F.normalize(queries, dim=-1) @ F.normalize(features, dim=-1).T
        attention = (self.temperature * cosine).log_softmax(-1)
        return (attention[:, :, None] + F.one_hot(y, ways).to(cosine.dtype).log()).logsumexp(1)


def in_context(theta: Theta, features: Tensor) -> Tensor:
    """g(x_i) of all i from g'(x_i), [n, d] each."""
    rows = torch.split(features, 1)
    forwards = _walk(FORWARDS, theta, rows)
    backwards = _walk(BACKWARDS, theta, rows[::-1])[::-1]
    return torch.cat([a + b for a, b in zip(forwards, backwards, strict=True)]) + features


def attending(theta: Theta, queries: Tensor, support: Tensor, steps: int) -> Tensor:
    """f(x') of queries f'(x') [m, d] that read the support set g(x_i) [n, d]."""
    hidden, cell = blank(ATTENTION, theta, queries)
    for _ in range(steps):
        read = (hidden @ support.T).softmax(-1) @ support
        # Beside the input or beside h: r is multiplied by a matrix of its own in either place.
        hidden, cell = lstm(ATTENTION, theta, torch.cat([queries, read], -1), Memory(hidden, cell))
        hidden = hidden + queries
    return hidden


def _walk(name: str, theta: Theta, rows: Sequence[Tensor]) -> list[Tensor]:
    """What an LSTM says at each row of a sequence, [1, d] each."""
    memory, said = blank(name, theta, rows[0]), []
    for row in rows:
        memory = lstm(name, theta, row, memory)
        said.append(memory.hidden)
    return said


def build(method: Keys, context: Context) -> Matching:
    """Of a config."""
    return Matching(
        context.normalisation, context.shape, method.temperature, method.full_context, method.attention_steps
    )
