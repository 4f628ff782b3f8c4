"""A multi-layer perceptron over flattened inputs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.models.layers import ACTIVATIONS, glorot, init_head, init_norm, init_statistics, linear, normalise
from metadist.models.network import Params, Statistics


@dataclass(frozen=True)
class MLP:
    """shape: of one input; outputs: units of the head, None for features."""

    shape: tuple[int, ...]
    outputs: int | None
    width: int = 64
    layers: int = 2
    norm: str = "batch"
    activation: str = "relu"

    def _names(self) -> list[str]:
        return [f"fc{number}" for number in range(1, self.layers + 1)]

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        inputs = math.prod(self.shape)
        for name in self._names():
            params[f"{name}.weight"] = glorot(generator, inputs, self.width)
            params |= init_norm(name, self.norm, self.width)
            inputs = self.width
        if self.outputs is not None:
            params |= init_head(generator, inputs, self.outputs)
        return params

    def statistics(self) -> Statistics:
        return {k: v for name in self._names() for k, v in init_statistics(name, self.norm, self.width).items()}

    def __call__(self, params: Params, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        used: Statistics = {}
        x = x.flatten(1)
        for name in self._names():
            x = normalise(name, self.norm, params, x @ params[f"{name}.weight"], statistics, used)
            x = ACTIVATIONS[self.activation](x)
        return (x if self.outputs is None else linear("head", params, x)), used
