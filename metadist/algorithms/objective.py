"""What a task's loss and score are: of its outputs and targets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(NamedTuple):
    """loss: what is descended; score: what is reported; each of (outputs [n, …], targets [n, …]), a scalar."""

    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy; logits: [n, ways], y: int64 [n] in [0, ways).

    As `F.cross_entropy`, but the targets are compared and not picked by index: the derivative of that is a scatter,
    which, done in a fixed order, cannot be part of a CUDA graph.
    """
    wrong = y[:, None] != torch.arange(logits.shape[-1], device=logits.device)
    return -F.log_softmax(logits, -1).masked_fill(wrong, 0).sum(-1).mean()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest logit is the target's; a float64 scalar."""
    return (logits.detach().argmax(-1) == y).double().mean()


def mse(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error, a float64 scalar."""
    return (outputs.detach().double() - y.double()).square().mean()


CLASSIFICATION = Objective(cross_entropy, accuracy)
"""Mean cross-entropy and accuracy: logits [n, ways], targets int64 [n]."""

REGRESSION = Objective(F.mse_loss, mse)
"""Mean squared error, twice: outputs and targets [n, outputs]."""

OBJECTIVES = {"classification": CLASSIFICATION, "regression": REGRESSION}
