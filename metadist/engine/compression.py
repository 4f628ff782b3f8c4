"""Fewer bytes for what a shard or a replica sends to the aggregator (`outer.compression`).

Every tensor of the gradient, or of the difference, becomes bytes of a size that depends on
its shape alone:

- bf16: every element rounded to bfloat16; 2 bytes each.
- int8: every element as a multiple of max|x| / 127, rounded to nearest; 1 byte each, and
  4 for the tensor's scale (Seide et al. 2014 with one bit; Dettmers 2016 with eight).
- topk: the largest elements by magnitude, of equal ones the first; an int32 index and the
  value each (Aji & Heafield 2017; Lin et al. 2018).

With int8 and topk what was left out, e' = g + e − decompressed(compressed(g + e)), is the
lane's residual and goes into its next gradient: over all steps nothing is lost (error
feedback; Karimireddy et al. 2019). Statistics and metrics travel as they are.

The aggregator decompresses and adds in the integer grid of the exact sum, so the order of
arrival is as irrelevant as without compression. All of it runs on the CPU in float64.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.config import Outer
from metadist.engine.layout import Layout

GRADIENT = "gradient."
"""What names of the compressed tensors begin with."""


class Codec(NamedTuple):
    """One tensor's elements as bytes and back.

    encode: float64 [n] → uint8 [size(n)]; decode: the bytes and n → float64 [n]; feedback:
    whether what is left out is kept for the next step.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    size: Callable[[int], int]
    feedback: bool


def plain(dtype: torch.dtype) -> Codec:
    """Elements of a dtype as they are."""
    return Codec(
        lambda x: x.to(dtype).view(torch.uint8),
        lambda payload, n: payload.view(dtype).double(),
        lambda n: n * dtype.itemsize,
        feedback=False,
    )


def _int8() -> Codec:
    def encode(x: Tensor) -> Tensor:
        scale = (x.abs().amax() / 127).float() if x.numel() else torch.zeros(())
        # A scale may round to zero, or down: then 127.000004 is 127 all the same.
        steps = torch.round(x / scale.double()).clamp_(-127, 127) if scale > 0 else torch.zeros_like(x)
        return torch.cat([scale.reshape(1).view(torch.uint8), steps.to(torch.int8).view(torch.uint8)])

    def decode(payload: Tensor, n: int) -> Tensor:
        # 24 bits times 7: exact in float64.
        return payload[4:].view(torch.int8).double() * payload[:4].view(torch.float32).double()

    return Codec(encode, decode, lambda n: n + 4, feedback=True)


def _topk(fraction: float, dtype: torch.dtype) -> Codec:
    def kept(n: int) -> int:
        return math.ceil(fraction * n)

    def encode(x: Tensor) -> Tensor:
        magnitude, k = x.abs(), kept(x.numel())
        # Which of equal elements `topk` returns is nobody's promise; the least value among them is one.
        least = magnitude.topk(k, sorted=False).values.min() if k else torch.tensor(math.inf)
        above, equal = (magnitude > least).nonzero()[:, 0], (magnitude == least).nonzero()[:, 0]
        index, _ = torch.cat([above, equal[: k - above.numel()]]).sort()
        return torch.cat([index.to(torch.int32).view(torch.uint8), x[index].to(dtype).view(torch.uint8)])

    def decode(payload: Tensor, n: int) -> Tensor:
        ends = 4 * kept(n)
        index, values = payload[:ends].view(torch.int32).long(), payload[ends:].clone().view(dtype)
        return torch.zeros(n, dtype=torch.float64).index_copy_(0, index, values.double())

    return Codec(encode, decode, lambda n: kept(n) * (4 + dtype.itemsize), feedback=True)


def _codec(outer: Outer, dtype: torch.dtype) -> Codec:
    match outer.compression:
        case "bf16":
            return plain(torch.bfloat16)
        case "int8":
            return _int8()
        case "topk":
            return _topk(outer.fraction, dtype)
    raise AssertionError(f"{outer.compression} compresses nothing")


class Compression:
    """The payloads of one run. sums: the layout of what a shard returns; dtype: of θ."""

    def __init__(self, outer: Outer, sums: Layout, dtype: torch.dtype) -> None:
        self.outer, self.sums, self.dtype = outer, sums, dtype
        codec = _codec(outer, dtype)
        self._codecs = [codec if name.startswith(GRADIENT) else plain(dtype) for name in sums.names]

    def only(self, sums: Layout) -> "Compression":
        """Of some of the tensors: their bytes are the same by themselves."""
        return Compression(self.outer, sums, self.dtype)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every tensor's part of a payload, in name order."""
        return tuple(codec.size(n) for codec, n in zip(self._codecs, self.sums.sizes, strict=True))

    def compress(
        self, tensors: Mapping[str, Tensor], residual: Mapping[str, Tensor]
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """A shard's finite sums by name as uint8 [sum of sizes], and the new residual by name of θ.

        residual: that of the lane, empty in its first step; of the dtype of θ.
        """
        payload, left = [], {}
        for codec, name in zip(self._codecs, self.sums.names, strict=True):
            value, own = tensors[name].detach().double().cpu(), name.removeprefix(GRADIENT)
            keeps = codec.feedback and name.startswith(GRADIENT)
            if keeps and own in residual:
                value = value + residual[own].double()
            flat = value.reshape(-1)
            payload.append(codec.encode(flat))
            if keeps:
                left[own] = (flat - codec.decode(payload[-1], flat.numel())).to(self.dtype).view(value.shape)
        return torch.cat(payload).numpy(), left

    def decompress(self, payload: np.ndarray) -> dict[str, Tensor]:
        """The sums of one payload by name, float64."""
        parts = torch.split(torch.from_numpy(np.array(payload)), list(self.sizes))
        return {
            # A copy begins where any dtype may begin.
            name: codec.decode(part.clone(), math.prod(shape)).view(shape)
            for codec, part, name, shape in zip(self._codecs, parts, self.sums.names, self.sums.shapes, strict=True)
        }
