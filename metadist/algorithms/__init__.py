"""One file per method; each is a formula, told in terms of θ, an episode and a network."""

import importlib
from typing import Literal

from metadist.algorithms.algorithm import Algorithm, Normalisation
from metadist.algorithms.context import Context
from metadist.algorithms.objective import OBJECTIVES
from metadist.config import Config
from metadist.models import build as build_network

Queries = Literal["together", "support", "running"]


def for_training(config: Config, shape: tuple[int, ...], classes: int = 0) -> Algorithm:
    """The method as it is meta-trained, for inputs of a shape and a number of meta-train classes."""
    queries: Queries = "together" if config.task.transductive or config.model.statistics == "running" else "support"
    return _build(config, shape, classes, queries, judged=False)


def for_evaluation(config: Config, shape: tuple[int, ...], classes: int = 0) -> Algorithm:
    """The same method as it is judged: `eval` says which steps and which statistics."""
    transductive = config.task.transductive if config.eval.transductive is None else config.eval.transductive
    return _build(config, shape, classes, "together" if transductive else config.model.statistics, judged=True)


def _build(config: Config, shape: tuple[int, ...], classes: int, queries: Queries, judged: bool) -> Algorithm:
    method = config.algorithm
    if judged and config.eval.inner_steps is not None:
        method = method.model_copy(update={"inner_steps": config.eval.inner_steps})
    ways = 1 if config.kind == "regression" else config.task.ways
    network = build_network(config.model, shape, ways if method.class_bound else None)
    context = Context(
        config,
        Normalisation(network, queries, keep=config.model.statistics == "running"),
        OBJECTIVES[config.kind],
        shape,
        ways,
        classes,
        config.eval if judged else None,
    )
    file = importlib.import_module(f"metadist.algorithms.{module_name(method.name)}")
    algorithm: Algorithm = file.build(method, context)
    return algorithm


def module_name(method: str) -> str:
    """The file that a method lives in."""
    return method.replace("++", "_plus_plus").replace("-", "_")
