"""Baseline and Baseline++ (Chen, Liu, Kira, Wang & Huang 2019): pre-training, then a head for each support set.

Pre-training: one classifier for all C meta-train classes on top of features f(x), cross-entropy
over the support and query examples of an episode with their global labels.

    linear head    logits = f(x) W + b                      (Baseline)
    cosine head    logits = τ cos(f(x), w_c)                (Baseline++)

At test f is frozen, and a new head is fitted to the support set by K full-batch steps of
gradient descent: a linear one from zeros, a cosine one from the class means, w_k = c_k.
`centroid` fits nothing: logits −‖f(x) − c_k‖², behind a linear pre-training.

Departures: the paper's heads start at random and take 100 epochs of mini-batches of 4 with
momentum and weight decay; with these starts the names of the classes do not matter. A batch
of the pre-training is an episode, and a class that `task.rotate` turns keeps its label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms import embedding
from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.objective import accuracy
from metadist.algorithms.protonet import prototypes
from metadist.methods.baseline import BaselinePlusPlus as Keys
from metadist.models.layers import glorot
from metadist.tasks.episode import Episode, Examples

Head = tuple[Tensor, ...]


@dataclass(frozen=True)
class BaselinePlusPlus:
    """shape: of one input; classes: C; head: `centroid`, `linear` or `cosine`; steps: K; rate: of them; scale: τ."""

    normalisation: Normalisation
    shape: tuple[int, ...]
    classes: int
    head: str = "cosine"
    steps: int = 100
    rate: float = 0.1
    scale: float = 10.0

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        features = embedding.features_of(self.normalisation, theta, self.shape)
        theta["classifier.weight"] = glorot(generator, features, self.classes)
        if self.head != "cosine":
            theta["classifier.bias"] = torch.zeros(self.classes)
        return theta, self.normalisation.initial_state()

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """The score is the accuracy among all C classes."""
        support, query, statistics = embedding.in_training(self.normalisation, theta, state, episode)
        head = (theta["classifier.weight"],) if self.head == "cosine" else _both("classifier", theta)
        logits = self._logits(head, torch.cat([support, query]))
        y = episode.classes[torch.cat([episode.support.y, episode.query.y])]
        n = len(support)
        return Outcome(F.cross_entropy(logits, y), accuracy(logits[n:], y[n:]), statistics)

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed = embedding.at_test(self.normalisation, theta, state, support)
        centres = prototypes(features, support.y, ways)
        if self.head == "centroid":
            return lambda x: self._logits((2 * centres.T, -centres.square().sum(1)), embed(x))
        if self.head == "cosine":
            head = self._fitted((centres.T,), features, support.y)
        else:
            head = self._fitted((torch.zeros_like(centres.T), torch.zeros_like(centres[:, 0])), features, support.y)
        return lambda x: self._logits(head, embed(x))

    def _fitted(self, head: Head, features: Tensor, y: Tensor) -> Head:
        slope: Callable[[Head], Head] = torch.func.grad(lambda h: F.cross_entropy(self._logits(h, features), y))
        for _ in range(self.steps):
            head = tuple(value - self.rate * g for value, g in zip(head, slope(head), strict=True))
        return head

    def _logits(self, head: Head, features: Tensor) -> Tensor:
        if self.head == "cosine":
            return self.scale * embedding.unit(features) @ embedding.unit(head[0], 0)
        # A centroid's −‖f − c‖² is linear too, but for −‖f‖², which all classes share.
        return features @ head[0] + head[1]


def _both(name: str, theta: Theta) -> Head:
    return theta[f"{name}.weight"], theta[f"{name}.bias"]


def build(method: Keys, context: Context) -> BaselinePlusPlus:
    """Of a config."""
    return BaselinePlusPlus(
        context.normalisation, context.shape, context.classes, method.head, method.steps, method.rate, method.scale
    )
