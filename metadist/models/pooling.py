"""ReLU of the largest pixel of a window, and what of a derivative passes it, both ways.

A window's pixels are tensors of one shape, `pixels`, of which there are four, or a single one where nothing is
pooled; then the result may be written over it, `out`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Passed(Protocol):
    """out: the result; nothing else may alter it while this is in use."""

    out: Tensor

    def forwards(self, pixels: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The tangent of `out` from those of the pixels."""
        ...

    def backwards(self, to_out: Tensor, into: Sequence[Tensor]) -> None:
        """The adjoint of that: writes the derivatives towards the pixels."""
        ...


def pool(pixels: Sequence[Tensor], out: Tensor | None = None) -> Passed:
    """The pixels are used up."""
    return Relu(pixels[0], out) if len(pixels) == 1 else Largest(pixels, out)


class Relu:
    """Of one pixel: what passes is seen in the result."""

    def __init__(self, pixel: Tensor, out: Tensor | None = None) -> None:
        self.out: Tensor = torch.clamp_min(pixel, 0, out=out)

    def forwards(self, pixels: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(pixels[0]) if out is None else out
        torch.ops.aten.threshold_backward.grad_input(pixels[0], self.out, 0, grad_input=out)
        return out

    def backwards(self, to_out: Tensor, into: Sequence[Tensor]) -> None:
        self.forwards([to_out], into[0])


class Largest:
    """Of four. They themselves become the masks of what passed, 1 or 0; of equal ones the first passes."""

    def __init__(self, pixels: Sequence[Tensor], out: Tensor | None = None) -> None:
        a, b, c, d = self.masks = pixels
        self.out: Tensor = torch.maximum(torch.maximum(a, b), torch.maximum(c, d), out=out)
        for pixel in pixels:
            pixel.eq_(self.out)
        free = torch.sign(self.out.relu_())
        for pixel in pixels:
            free.sub_(pixel.mul_(free))

    def forwards(self, pixels: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        out = torch.mul(pixels[0], self.masks[0], out=out)
        for pixel, mask in zip(pixels[1:], self.masks[1:], strict=True):
            out.addcmul_(pixel, mask)
        return out

    def backwards(self, to_out: Tensor, into: Sequence[Tensor]) -> None:
        """`into` may be the masks, which are then used up."""
        for pixel, mask in zip(into, self.masks, strict=True):
            torch.mul(to_out, mask, out=pixel)
