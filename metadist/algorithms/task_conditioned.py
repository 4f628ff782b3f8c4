"""MAML from an initialisation, and with rates, that a Siamese task encoder conditions on the task.

The encoder g, a network of its own, maps a support set S to a unit vector, whatever the order
or the labels' names of its examples:

    e(S) = u / ‖u‖,  u = W mean_i g(x_i) + b         (of a regression: g(x_i, y_i))

Two copies of it compare the tasks of one shard (Bromley et al. 1993), so that tasks of one
family (alphabet, quarter of the phase) lie together and others apart, with the contrastive loss
of Hadsell, Chopra & LeCun (2006) and the margin m:

    C = mean over pairs of one family of D²  +  mean over other pairs of max(0, m − D)²,  D = ‖e − e'‖

Distances alone would all be zero for an encoder that says nothing; the second mean holds them apart.

The embedding conditions every parameter j of the network and its rate,

    φ_0,j = θ_j (1 + e A_j) column by column for a weight,  θ_j + e A_j for a vector
    α_j = α exp(e · r_j)
    φ_k = φ_{k−1} − α_j ∇_j L_S(φ_{k−1})

with A_j and r_j zero to begin with: a run begins as MAML (Finn et al. 2017), `order` as there.
Meta-objective: Σ over the tasks of a shard of L_Q(φ_K), plus λ C for each task of the shard.

The encoder has layer norm where the network has batch norm, under which all support sets would
look alike; without norm it has none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.descent import Rates, SupportLoss, last, on_queries, on_support, predictors, walk
from metadist.algorithms.objective import CLASSIFICATION, Objective
from metadist.algorithms.recompute import descend_in_segments
from metadist.methods.conditioned import TaskConditioned as Keys
from metadist.models import build as build_network
from metadist.models.layers import init_linear, linear
from metadist.models.network import Network, Params
from metadist.tasks.episode import Episode, Examples

FLOOR = 1e-12
"""Added to squared lengths, whose roots are differentiated."""

OWN = ("encoder.", "init.", "rate.")
"""What the names of θ begin with that are not the adapted network's."""


@dataclass(frozen=True)
class TaskConditioned:
    """encoder: g; shape: of its inputs; size: of an embedding; inner_lr: α; weight: λ; margin: m;
    recompute: inner graphs are built again."""

    normalisation: Normalisation
    encoder: Network
    shape: tuple[int, ...]
    size: int
    inner_lr: float
    inner_steps: int
    order: int = 2
    weight: float = 1.0
    margin: float = 1.0
    objective: Objective = CLASSIFICATION
    recompute: bool = False

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start, encoder = self.normalisation.network.init(generator), self.encoder.init(generator)
        with torch.no_grad():
            features = self.encoder(encoder, torch.zeros(1, *self.shape))[0].shape[1]
        encoder |= init_linear("embedding", generator, features, self.size)
        theta = start | {f"encoder.{name}": value for name, value in encoder.items()}
        theta |= {f"init.{name}": torch.zeros(self.size, value.shape[-1]) for name, value in start.items()}
        theta |= {f"rate.{name}": torch.zeros(self.size) for name in start}
        return theta, self.normalisation.initial_state()

    def embed(self, theta: Theta, support: Examples) -> Tensor:
        """e, a unit vector [size]."""
        x = support.x if support.y.ndim == 1 else torch.cat([support.x, support.y], 1)
        params = {name.removeprefix("encoder."): value for name, value in theta.items() if name.startswith("encoder.")}
        u = linear("embedding", params, self.encoder(params, x)[0].mean(0, keepdim=True))[0]
        return u * torch.rsqrt(u.square().sum() + FLOOR)

    def inner_loop(self, theta: Theta, e: Tensor, support: Examples) -> Params:
        """φ_K."""
        if self.recompute:
            return descend_in_segments(self.support_loss, support, *self.conditioned(theta, e), self.inner_steps)
        return last(self.path(theta, e, support), self.inner_steps)

    def path(self, theta: Theta, e: Tensor, support: Examples) -> Iterator[Params]:
        """φ_0, φ_1, …."""
        return walk(self.support_loss(support), *self.conditioned(theta, e), self.order)

    def support_loss(self, support: Examples) -> SupportLoss:
        """L_S."""
        return on_support(self.normalisation, self.objective, support)

    def conditioned(self, theta: Theta, e: Tensor) -> tuple[Params, Rates]:
        """φ_0 and α of a task."""
        start = {name: value for name, value in theta.items() if not name.startswith(OWN)}
        shift = {name: e @ theta[f"init.{name}"] for name in start}
        start = {n: value * (1 + shift[n]) if value.ndim > 1 else value + shift[n] for n, value in start.items()}
        return start, {name: self.inner_lr * torch.exp(e @ theta[f"rate.{name}"]) for name in start}

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        return self.after(theta, state, support, ways, (self.inner_steps,))[0]

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        path = self.path(theta, self.embed(theta, support), support)
        return predictors(self.normalisation, path, state, support, steps)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """L_Q of one task; what tasks say about one another is in `comparison`."""
        return self.compared(theta, state, episode, ways, step)[0]

    def compared(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> tuple[Outcome, Tensor]:
        e = self.embed(theta, episode.support)
        fast = self.inner_loop(theta, e, episode.support)
        return on_queries(self.normalisation, self.objective, fast, state, episode), e

    def comparison(self, compared: Tensor, family: Tensor) -> Tensor:
        """λ C for each task. compared: embeddings [tasks, size]."""
        return self.weight * len(compared) * contrastive(compared, family, self.margin)


def contrastive(embeddings: Tensor, family: Tensor, margin: float) -> Tensor:
    """C of embeddings [tasks, d] and families int64 [tasks]; a kind of pair that is not there counts nothing."""
    square = (embeddings[:, None] - embeddings[None]).square().sum(-1)
    alike = (family[:, None] == family[None]).to(square.dtype)
    pairs = torch.ones_like(square).triu(1)
    together, apart = pairs * alike, pairs * (1 - alike)
    short = (margin - (square + FLOOR).sqrt()).clamp(min=0)
    return (together * square).sum() / together.sum().clamp(min=1) + (apart * short.square()).sum() / apart.sum().clamp(
        min=1
    )


def build(method: Keys, context: Context) -> TaskConditioned:
    """Of a config."""
    model = context.config.model
    norm = "layer" if model.norm == "batch" else model.norm
    model = model.model_copy(update={"width": method.encoder_width, "norm": norm})
    shape = context.shape if context.config.kind == "classification" else (context.shape[0] + context.ways,)
    return TaskConditioned(
        context.normalisation,
        build_network(model, shape, None),
        shape,
        method.embedding,
        method.inner_lr,
        method.inner_steps,
        method.order,
        method.contrastive_weight,
        method.margin,
        context.objective,
        method.recompute,
    )
