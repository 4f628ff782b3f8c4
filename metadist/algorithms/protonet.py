"""Prototypical networks (Snell, Swersky & Zemel 2017).

c_k = mean of the embedded support examples of class k (eq. 1);
logits −τ ‖f(x) − c_k‖² (eq. 2, euclidean), or τ cos(f(x), c_k).

No inner loop. At test the embedding can be fine-tuned on the support set
(`finetune_steps`): with the linear head that equals the prototypes, weight 2τ c_k and bias
−τ ‖c_k‖², gradient steps on the support set's cross-entropy (the initialisation of
Proto-MAML, Triantafillou et al. 2020, §3); a cosine head keeps its prototypes' directions
as weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.objective import accuracy
from metadist.methods.metric import ProtoNet as Keys
from metadist.models.network import Params, Statistics
from metadist.tasks.episode import Episode, Examples


@dataclass(frozen=True)
class ProtoNet:
    """distance: `euclidean` or `cosine`; temperature: τ; the network has no head."""

    normalisation: Normalisation
    distance: str = "euclidean"
    temperature: float = 1.0
    finetune_steps: int = 0
    finetune_lr: float = 0.01

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.normalisation.network.init(generator), self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        normalisation = self.normalisation
        # Prototypes and queries share their statistics where these are running ones (§3.1 of the
        # paper's code: one network in evaluation mode embeds both).
        running = dict(state) if normalisation.queries == "running" else None
        features, _ = normalisation.network(theta, support.x, running)
        head = self._head(prototypes(features, support.y, ways))
        embedding: Params = theta
        for _ in range(self.finetune_steps):
            gradient, gradient_head = torch.func.grad(self._finetune_loss, argnums=(0, 1))(
                embedding, head, support, running
            )
            embedding = {name: value - self.finetune_lr * gradient[name] for name, value in embedding.items()}
            head = tuple(value - self.finetune_lr * g for value, g in zip(head, gradient_head, strict=True))
        given = normalisation.given(embedding, state, support)
        return lambda x: self._logits(normalisation.network(embedding, x, given)[0], head)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        support, query = episode.support, episode.query
        network = self.normalisation.network
        features, of_support = network(theta, support.x)
        given = of_support if self.normalisation.queries == "support" else None
        embedded, of_query = network(theta, query.x, given)
        logits = self._logits(embedded, self._head(prototypes(features, support.y, ways)))
        statistics = {name: ((of_support[name] + of_query[name]) / 2).detach() for name in state}
        return Outcome(F.cross_entropy(logits, query.y), accuracy(logits, query.y), statistics)

    def _head(self, centres: Tensor) -> tuple[Tensor, ...]:
        if self.distance == "cosine":
            return (F.normalize(centres, dim=-1),)
        return 2 * self.temperature * centres, -self.temperature * centres.square().sum(-1)

    def _logits(self, features: Tensor, head: tuple[Tensor, ...]) -> Tensor:
        if self.distance == "cosine":
            return self.temperature * F.normalize(features, dim=-1) @ F.normalize(head[0], dim=-1).T
        weight, bias = head
        # −τ ‖f − c‖² without −τ ‖f‖², which all classes share and the softmax does not see.
        return features @ weight.T + bias

    def _finetune_loss(
        self, embedding: Params, head: tuple[Tensor, ...], support: Examples, running: Statistics | None
    ) -> Tensor:
        features, _ = self.normalisation.network(embedding, support.x, running)
        return F.cross_entropy(self._logits(features, head), support.y)


def prototypes(features: Tensor, y: Tensor, ways: int) -> Tensor:
    """Mean feature per class; features: [n, d]; y: int64 [n]; returns [ways, d]."""
    member = (y == torch.arange(ways, device=y.device)[:, None]).to(features.dtype)
    return member @ features / member.sum(1, keepdim=True)


def build(method: Keys, context: Context) -> ProtoNet:
    """Of a config."""
    return ProtoNet(
        context.normalisation,
        method.distance,
        method.temperature,
        context.evaluation.finetune_steps if context.evaluation else 0,
        context.evaluation.finetune_lr if context.evaluation else 0.0,
    )
