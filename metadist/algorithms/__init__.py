"""One file per method; each is a formula, told in terms of θ, an episode and a network."""

from dataclasses import replace
from typing import Literal

from metadist.algorithms.algorithm import Algorithm, Normalisation
from metadist.algorithms.maml import MAML
from metadist.algorithms.protonet import ProtoNet
from metadist.algorithms.reptile import Reptile
from metadist.config import Config, Maml
from metadist.config import ProtoNet as ProtoNetConfig
from metadist.config import Reptile as ReptileConfig
from metadist.errors import ConfigError
from metadist.models import build as build_network

Image = tuple[int, int, int]


def for_training(config: Config, image: Image) -> Algorithm:
    """The method as it is meta-trained, for images (channels, height, width)."""
    queries: Literal["together", "support"] = (
        "together" if config.task.transductive or config.model.statistics == "running" else "support"
    )
    return _build(config, image, queries)


def for_evaluation(config: Config, image: Image) -> Algorithm:
    """The same method as it is judged: `eval` says which steps and which statistics.

    Raises ConfigError for more or fewer ways than a class-bound head has.
    """
    judged = config.eval
    if judged.ways not in (None, config.task.ways) and class_bound(config):
        raise ConfigError(
            f"eval.ways: {config.algorithm.name} learns a head of task.ways={config.task.ways} classes "
            f"and cannot be judged on {judged.ways}; valid is {config.task.ways}, or a metric method such as protonet"
        )
    transductive = config.task.transductive if judged.transductive is None else judged.transductive
    queries: Literal["together", "support", "running"] = "together" if transductive else config.model.statistics
    algorithm = _build(config, image, queries)
    if isinstance(algorithm, ProtoNet):
        return replace(algorithm, finetune_steps=judged.finetune_steps, finetune_lr=judged.finetune_lr)
    if judged.inner_steps is not None and isinstance(algorithm, MAML | Reptile):
        return replace(algorithm, inner_steps=judged.inner_steps)
    return algorithm


def class_bound(config: Config) -> bool:
    """Whether the method's head has a row for each class of the training episodes."""
    return not isinstance(config.algorithm, ProtoNetConfig)


def _build(config: Config, image: Image, queries: Literal["together", "support", "running"]) -> Algorithm:
    method = config.algorithm
    outputs = config.task.ways if class_bound(config) else None
    normalisation = Normalisation(
        build_network(config.model, image, outputs), queries, keep=config.model.statistics == "running"
    )
    match method:
        case Maml():
            return MAML(normalisation, method.inner_lr, method.inner_steps, method.order, method.support_loss_weight)
        case ReptileConfig():
            return Reptile(
                normalisation, method.inner_lr, method.inner_steps, method.inner_optimizer, method.inner_batch
            )
        case ProtoNetConfig():
            return ProtoNet(normalisation, method.distance, method.temperature)
