"""Four convolutions: the MAML paper's stride-2 network, the pooled Conv4, and Conv4 with two linear layers.

- `stride2` (Finn et al. 2017, Omniglot): 3 × 3 convolutions of stride 2, mean over space.
- `conv4` (Vinyals et al. 2016, Snell et al. 2017): 3 × 3 convolutions, 2 × 2 pooling.
- `conv4-fc`: conv4 and a linear layer of `hidden` units with activation; the second linear
  layer is the head, or for a network without head an embedding of `hidden` units.

A method that compares positions takes the last block's feature maps instead of one vector an
image (`maps`), and can pool behind the first blocks only, so that maps of some size are left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.models.convolution import convolve
from metadist.models.first_layer import convolve_and_normalise
from metadist.models.layers import (
    ACTIVATIONS,
    glorot,
    init_head,
    init_linear,
    init_norm,
    init_statistics,
    linear,
    normalise,
    pool,
)
from metadist.models.network import Params, Statistics

FEW_CHANNELS = 3
"""Up to which the first layer's statistics are taken from its patches."""

BLOCKS = ("conv1", "conv2", "conv3", "conv4")


@dataclass(frozen=True)
class Conv4:
    """image: (channels, height, width); outputs: units of the head, None for features; pools: blocks
    that are pooled, the first ones, where none is strided; maps: features are [n, rows, columns, width]."""

    image: tuple[int, int, int]
    outputs: int | None
    width: int = 64
    strided: bool = False
    pooling: str = "max"
    norm: str = "batch"
    activation: str = "relu"
    hidden: int | None = None
    pools: int = len(BLOCKS)
    maps: bool = False

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        channels = self.image[0]
        for block in BLOCKS:
            params[f"{block}.weight"] = glorot(generator, 3, 3, channels, self.width)
            params |= init_norm(block, self.norm, self.width)
            channels = self.width
        features = self._flat_features()
        if self.hidden is not None:
            params |= init_linear("fc1", generator, features, self.hidden)
            features = self.hidden
            if self.outputs is None:
                params |= init_linear("fc2", generator, features, self.hidden)
        if self.outputs is not None:
            params |= init_head(generator, features, self.outputs)
        return params

    def statistics(self) -> Statistics:
        return {k: v for block in BLOCKS for k, v in init_statistics(block, self.norm, self.width).items()}

    def __call__(self, params: Params, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        activate = ACTIVATIONS[self.activation]
        used: Statistics = {}
        x = x.permute(0, 2, 3, 1)
        for number, block in enumerate(BLOCKS):
            x = self._normalised_convolution(block, params, x, statistics, used)
            if self.strided or number >= self.pools:
                x = activate(x)
            elif self.pooling == "max":
                # A maximum and a rising function commute; a quarter of the activations is enough.
                x = activate(pool("max", x))
            else:
                x = pool("avg", activate(x))
        if self.maps:
            return x, used
        x = x.mean((1, 2)) if self.strided else x.flatten(1)
        if self.hidden is not None:
            x = activate(linear("fc1", params, x))
            if self.outputs is None:
                x = linear("fc2", params, x)
        return (x if self.outputs is None else linear("head", params, x)), used

    def _normalised_convolution(
        self, block: str, params: Params, x: Tensor, given: Statistics | None, used: Statistics
    ) -> Tensor:
        weight, stride = params[f"{block}.weight"], 2 if self.strided else 1
        if self.norm == "batch" and weight.shape[-2] <= FEW_CHANNELS:
            mean, variance = f"{block}.norm.mean", f"{block}.norm.variance"
            x, used[mean], used[variance] = convolve_and_normalise(
                x,
                weight,
                params[f"{block}.norm.scale"],
                params[f"{block}.norm.shift"],
                stride,
                None if given is None else (given[mean], given[variance]),
            )
            return x
        return normalise(block, self.norm, params, convolve(x, weight, stride), given, used)

    def _flat_features(self) -> int:
        if self.strided:
            return self.width
        _, height, width = self.image
        return self.width * (height >> self.pools) * (width >> self.pools)
