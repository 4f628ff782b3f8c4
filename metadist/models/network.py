"""Networks as pure functions of explicit parameters.

A network maps (parameters, inputs, statistics) to (outputs, statistics). With
`statistics=None` each batch norm uses the mean and variance of the inputs themselves;
given statistics are used instead. What was used is returned, so that the support set's
statistics can be handed to the queries, or averaged into a running state.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Statistics = dict[str, Tensor]


class Network(Protocol):
    """What an algorithm needs of a backbone."""

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters by name; the last linear layer's names start with `head.`."""
        ...

    def statistics(self) -> Statistics:
        """Initial running statistics by name: means 0, variances 1; empty without batch norm."""
        ...

    def __call__(self, params: Params, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        """Outputs [n, outputs] (or features [n, d] of a network without head) and the statistics used."""
        ...
