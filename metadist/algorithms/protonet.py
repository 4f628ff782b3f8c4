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

from metadist.algorithms import embedding
from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.objective import accuracy
from metadist.methods.metric import ProtoNet as Keys
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
        features, embed = embedding.at_test(self.normalisation, theta, state, support)
        head = self._head(prototypes(features, support.y, ways))
        for _ in range(self.finetune_steps):
            gradient, of_head = torch.func.grad(self._finetune_loss, argnums=(0, 1))(theta, head, state, support)
            theta = {name: value - self.finetune_lr * gradient[name] for name, value in theta.items()}
            head = tuple(value - self.finetune_lr * g for value, g in zip(head, of_head, strict=True))
        if self.finetune_steps:
            _, embed = embedding.at_test(self.normalisation, theta, state, support)
        return lambda x: self._logits(embed(x), head)

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        support, queries, statistics = embedding.in_training(self.normalisation, theta, state, episode)
        logits = self._logits(queries, self._head(prototypes(support, episode.support.y, ways)))
        return Outcome(F.cross_entropy(logits, episode.query.y), accuracy(logits, episode.query.y), statistics)

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

    def _finetune_loss(self, theta: Theta, head: tuple[Tensor, ...], state: State, support: Examples) -> Tensor:
        features, _ = embedding.at_test(self.normalisation, theta, state, support)
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
