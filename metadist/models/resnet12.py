"""ResNet-12, as few-shot classification uses it (Oreshkin, Rodríguez López & Lacoste 2018; Lee et al. 2019).

Four residual blocks; each is three 3 × 3 convolutions with batch norm, and a 1 × 1 convolution
with batch norm around them, added in front of the last activation; then 2 × 2 max pooling. The
mean over space are the features. Channels are 64, 160, 320 and 640 (Lee et al. 2019, MetaOptNet:
12.4 million parameters), and other `width`s in proportion. The papers' activation is a leaky ReLU
with slope 0.1 (`activation: leaky-relu`); MetaOptNet's DropBlock is left out, since a
forward pass here draws no random numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metadist.models.convolution import convolve
from metadist.models.layers import ACTIVATIONS, glorot, init_head, init_norm, init_statistics, linear, normalise, pool
from metadist.models.network import Params, Statistics

BLOCKS = ("block1", "block2", "block3", "block4")
WIDER = (1.0, 2.5, 5.0, 10.0)
"""Channels of the blocks, in widths."""

PARTS = ("conv1", "conv2", "conv3", "around")


@dataclass(frozen=True)
class ResNet12:
    """image: (channels, height, width); outputs: units of the head, None for features; width: channels of block 1."""

    image: tuple[int, int, int]
    outputs: int | None
    width: int = 64
    norm: str = "batch"
    activation: str = "leaky-relu"

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        channels = self.image[0]
        for block, wide in self._channels():
            for part in PARTS:
                window, inputs = (1, channels) if part == "around" else (3, channels if part == "conv1" else wide)
                params[f"{block}.{part}.weight"] = glorot(generator, window, window, inputs, wide)
                params |= init_norm(f"{block}.{part}", self.norm, wide)
            channels = wide
        if self.outputs is not None:
            params |= init_head(generator, channels, self.outputs)
        return params

    def statistics(self) -> Statistics:
        each = ((f"{block}.{part}", wide) for block, wide in self._channels() for part in PARTS)
        return {k: v for name, wide in each for k, v in init_statistics(name, self.norm, wide).items()}

    def __call__(self, params: Params, x: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Statistics]:
        activate = ACTIVATIONS[self.activation]
        used: Statistics = {}
        x = x.permute(0, 2, 3, 1)
        for block in BLOCKS:

            def layer(part: str, x: Tensor, block: str = block) -> Tensor:
                name = f"{block}.{part}"
                weight = params[f"{name}.weight"]
                x = x @ weight[0, 0] if part == "around" else convolve(x, weight)
                return normalise(name, self.norm, params, x, statistics, used)

            inner = layer("conv3", activate(layer("conv2", activate(layer("conv1", x)))))
            # A maximum and a rising function commute; a quarter of the activations is enough.
            x = activate(pool("max", inner + layer("around", x)))
        x = x.mean((1, 2))
        return (x if self.outputs is None else linear("head", params, x)), used

    def _channels(self) -> list[tuple[str, int]]:
        return [(block, round(times * self.width)) for block, times in zip(BLOCKS, WIDER, strict=True)]
