"""Siamese networks (Koch, Zemel & Salakhutdinov 2015).

Two images are of one class with probability

    p(x, x') = σ(b − Σ_j w_j |f_j(x) − f_j(x')|)                       (§3.1)

with learned weights w and bias b: a weighted L1 distance of the embeddings. The loss is the binary
cross-entropy of same and different over all pairs of an episode's images, support and query
together; same and different pairs have half of the weight each, as in the paper's batches.

A query belongs to the class whose support examples are most alike: its logits are
log 1/|S_k| Σ_{x' in S_k} p(x, x'), whose softmax divides a class's mean probability by their sum.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.embedding import at_test, features_of, in_training
from metadist.algorithms.objective import accuracy
from metadist.methods.metric import Siamese as Keys
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class Siamese:
    """shape: of one input; the network has no head."""

    normalisation: Normalisation
    shape: tuple[int, ...]

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        features = features_of(self.normalisation, theta, self.shape)
        # Log-odds of both signs, and a distance that already tells the embedding where to go.
        theta["distance.weight"] = torch.full((features,), features**-0.5)
        theta["distance.bias"] = torch.tensor(1.0)
        return theta, self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed_queries = at_test(self.normalisation, theta, state, support)
        return lambda x: class_logits(alike(theta, embed_queries(x), features), support.y, ways)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        features, queries, statistics = in_training(self.normalisation, theta, state, episode)
        every, y = torch.cat([features, queries]), torch.cat([episode.support.y, episode.query.y])
        alikeness = alike(theta, every, every)
        logits = class_logits(alikeness.detach()[len(features) :, : len(features)], episode.support.y, ways)
        return Outcome(pair_loss(alikeness, y), accuracy(logits, episode.query.y), statistics)


def alike(theta: Theta, one: Tensor, other: Tensor) -> Tensor:
    """Log-odds that two images are of one class, [m, n], of features [m, d] and [n, d]."""
    return theta["distance.bias"] - (one[:, None] - other[None]).abs() @ theta["distance.weight"]


def pair_loss(alikeness: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy over the pairs i < j, half of it from same pairs; alikeness: [n, n]; y: int64 [n]."""
    same = (y[:, None] == y[None]).to(alikeness.dtype)
    pair = torch.ones_like(same).triu(1)
    loss = F.binary_cross_entropy_with_logits(alikeness, same, reduction="none")
    weight = pair * same / (pair * same).sum() + pair * (1 - same) / (pair * (1 - same)).sum()
    return (weight * loss).sum() / 2


def class_logits(alikeness: Tensor, y: Tensor, ways: int) -> Tensor:
    """log of each class's mean probability, [m, ways]; alikeness: [m, n]; y: int64 [n], of the n support examples."""
    member = F.one_hot(y, ways).to(alikeness.dtype)
    return (F.logsigmoid(alikeness)[:, :, None] + member.log()).logsumexp(1) - member.sum(0).log()


def build(method: Keys, context: Context) -> Siamese:
    """Of a config."""
    return Siamese(context.normalisation, context.shape)
