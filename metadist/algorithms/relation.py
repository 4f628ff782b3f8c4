"""Relation networks (Sung, Yang, Zhang, Xiang, Torr & Hospedales 2018).

The relation of a query x' to class k is

    r_k(x') = g([C_k, f(x')]),    C_k = Σ_{x in S_k} f(x)                 (eq. 1, §3.2)

with feature maps f, joined along the channels, and a second network g whose last unit is a
sigmoid. The loss is the mean over queries and classes of (r_k(x') − 1(y' = k))² (eq. 2).

Over feature maps [rows, columns, channels], g is as in the paper: twice a 3 × 3 convolution, norm,
activation and 2 × 2 maximum (left out where a map has less than two rows or columns), then a
linear layer of `hidden` units, activation, and a linear layer of one unit. The first two blocks
of the embedding are pooled and the others not, so that a map is left for g. A network whose
features are vectors (mlp, conv4-fc) gets linear layers in place of g's convolutions.

g's first layer is linear in what is joined, A C_k + B f(x'), so each image passes it once and
not once for each pair. Its own norms see all pairs of the queries with the classes; for queries
under the support set's statistics they see the pairs of the support set with the classes.

Logits are log r_k, whose softmax divides a relation by their sum.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.embedding import at_test, in_training
from metadist.algorithms.objective import accuracy
from metadist.methods.metric import Relation as Keys
from metadist.models.conv4 import Conv4
from metadist.models.convolution import convolve
from metadist.models.layers import (
    ACTIVATIONS,
    glorot,
    init_linear,
    init_norm,
    init_statistics,
    linear,
    normalise,
    pool,
)
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples

JOIN, DEEP, HIDDEN, LAST = "relation.join", "relation.deep", "relation.fc", "relation.last"
"""The layers of g."""

POOLED_BLOCKS = 2
"""Of the embedding."""


@dataclass(frozen=True)
class RelationModule:
    """g: widths of its first two layers and of its third; norm and activation as in the embedding."""

    width: int
    hidden: int
    norm: str = "batch"
    activation: str = "relu"

    def init(self, generator: torch.Generator, features: tuple[int, ...]) -> dict[str, Tensor]:
        """For features of a shape, [d] or [rows, columns, channels]."""
        *size, channels = features
        window = (3, 3) if size else ()
        params = {f"{JOIN}.weight": glorot(generator, *window, 2 * channels, self.width)}
        params[f"{DEEP}.weight"] = glorot(generator, *window, self.width, self.width)
        flat = self.width * (math.prod(_pooled(*_pooled(*size))) if size else 1)
        for name in (JOIN, DEEP):
            params |= init_norm(name, self.norm, self.width)
        return params | init_linear(HIDDEN, generator, flat, self.hidden) | init_linear(LAST, generator, self.hidden, 1)

    def statistics(self) -> Statistics:
        return {k: v for name in (JOIN, DEEP) for k, v in init_statistics(name, self.norm, self.width).items()}

    def __call__(
        self, params: Params, classes: Tensor, queries: Tensor, given: Statistics | None
    ) -> tuple[Tensor, Statistics]:
        """Log-odds of the relations, [m, ways], of features [ways, …] and [m, …]; and the statistics used."""
        m, ways, channels = queries.shape[0], classes.shape[0], classes.shape[-1]
        used: Statistics = {}
        of_classes, of_queries = torch.split(params[f"{JOIN}.weight"], channels, -2)
        x = _layer(queries, of_queries)[:, None] + _layer(classes, of_classes)[None]
        x = self._block(JOIN, params, x.flatten(0, 1), given, used)
        x = self._block(DEEP, params, _layer(x, params[f"{DEEP}.weight"]), given, used)
        x = ACTIVATIONS[self.activation](linear(HIDDEN, params, x.flatten(1)))
        return linear(LAST, params, x).view(m, ways), used

    def _block(self, name: str, params: Params, x: Tensor, given: Statistics | None, used: Statistics) -> Tensor:
        x = ACTIVATIONS[self.activation](normalise(name, self.norm, params, x, given, used))
        return pool("max", x) if x.ndim == 4 and _pooled(*x.shape[1:3]) != x.shape[1:3] else x


@dataclass(frozen=True)
class Relation:
    """normalisation: of the embedding f, which has no head; module: g; shape: of one input."""

    normalisation: Normalisation
    module: RelationModule
    shape: tuple[int, ...]

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        with torch.no_grad():
            one = self.normalisation.network(theta, torch.zeros(1, *self.shape))[0]
        theta |= self.module.init(generator, tuple(one.shape[1:]))
        state = self.normalisation.initial_state()
        return theta, state | self.module.statistics() if self.normalisation.keep else state

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed_queries = at_test(self.normalisation, theta, state, support)
        classes = class_sums(features, support.y, ways)
        given = self._given(theta, state, classes, features)
        return lambda x: F.logsigmoid(self.module(theta, classes, embed_queries(x), given)[0])

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        of_embedding = {name: value for name, value in state.items() if not name.startswith("relation.")}
        features, queries, statistics = in_training(self.normalisation, theta, of_embedding, episode)
        classes = class_sums(features, episode.support.y, ways)
        given = self._given(theta, state, classes, features)
        odds, used = self.module(theta, classes, queries, given)
        loss = F.mse_loss(odds.sigmoid(), F.one_hot(episode.query.y, ways).to(odds.dtype))
        statistics |= {name: value.detach() for name, value in used.items() if name in state}
        return Outcome(loss, accuracy(odds, episode.query.y), statistics)

    def _given(self, theta: Theta, state: State, classes: Tensor, features: Tensor) -> Statistics | None:
        """The statistics that g gets for the queries; None where they have their own."""
        if self.normalisation.queries == "together":
            return None
        if self.normalisation.queries == "running":
            return dict(state)
        return self.module(theta, classes, features, None)[1]


def class_sums(features: Tensor, y: Tensor, ways: int) -> Tensor:
    """C_k, [ways, …], of features [n, …]; y: int64 [n]."""
    sums = F.one_hot(y, ways).to(features.dtype).T @ features.flatten(1)
    return sums.view(ways, *features.shape[1:])


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    """A 3 × 3 convolution of maps, or a matrix product of vectors."""
    return convolve(x, weight) if weight.ndim == 4 else x @ weight


def _pooled(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a map after g's maximum, which smaller ones than 2 × 2 do not have."""
    return (rows // 2, columns // 2) if min(rows, columns) > 1 else (rows, columns)


def build(method: Keys, context: Context) -> Relation:
    """Of a config."""
    normalisation, model = context.normalisation, context.config.model
    if isinstance(normalisation.network, Conv4) and normalisation.network.hidden is None:
        maps = replace(normalisation.network, maps=True, pools=POOLED_BLOCKS)
        normalisation = normalisation._replace(network=maps)
    return Relation(
        normalisation, RelationModule(model.width, method.hidden, model.norm, model.activation), context.shape
    )
