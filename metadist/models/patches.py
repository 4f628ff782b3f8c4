"""A 3 × 3 convolution as a matrix product of image patches.

Gathering patches and adding them back are linear and adjoint to one another, so each is
the other's derivative, to any order; and both act on every image alone, so a task axis
is just more images. What remains of the convolution is a matrix product, which `vmap`
turns into a batched one. The grouped convolution that `vmap` makes of `conv2d` runs at
about two thirds of that speed on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _out(size: int, stride: int) -> int:
    """Positions of a 3-wide window along `size` pixels with one pixel of padding."""
    return (size - 1) // stride + 1


def _gather(x: Tensor, stride: int) -> Tensor:
    n, height, width, channels = x.shape
    rows, columns = _out(height, stride), _out(width, stride)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    patches = x.new_empty(n, rows, columns, 3, 3, channels)
    for i in range(3):
        for j in range(3):
            patches[:, :, :, i, j] = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
    return patches.view(n, rows, columns, 9 * channels)


def _scatter(patches: Tensor, height: int, width: int, stride: int) -> Tensor:
    n, rows, columns, depth = patches.shape
    patches = patches.reshape(n, rows, columns, 3, 3, depth // 9)
    padded = patches.new_zeros(n, height + 2, width + 2, depth // 9)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride] += patches[:, :, :, i, j]
    return padded[:, 1:-1, 1:-1]


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:  # type: ignore[override]
        return _gather(x, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.stride = inputs
        ctx.size = x.shape[1:3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Images.apply(grad, *ctx.size, ctx.stride), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, stride: int) -> tuple[Tensor, int]:
        tasks = x.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        return _Patches.apply(tasks.flatten(0, 1), stride).unflatten(0, tasks.shape[:2]), 0


class _Images(torch.autograd.Function):
    @staticmethod
    def forward(patches: Tensor, height: int, width: int, stride: int) -> Tensor:  # type: ignore[override]
        return _scatter(patches, height, width, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.stride = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Patches.apply(grad, ctx.stride), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], patches: Tensor, height: int, width: int, stride: int
    ) -> tuple[Tensor, int]:
        tasks = patches.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        images = _Images.apply(tasks.flatten(0, 1), height, width, stride)
        return images.unflatten(0, tasks.shape[:2]), 0


def convolve(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3 × 3 convolution with one pixel of zero padding.

    x: [n, height, width, in]; weight: [3, 3, in, out]; returns [n, ⌈height/stride⌉, ⌈width/stride⌉, out].
    Exact under `vmap` and under repeated differentiation.
    """
    return _Patches.apply(x, stride) @ weight.flatten(0, 2)
