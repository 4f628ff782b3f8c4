"""Normalisation that is exact under `vmap` and under repeated differentiation.

`torch.nn.functional.batch_norm` with scale and shift gives wrong second-order gradients
under `vmap`, silently (pytorch/functorch issue 534). Here it is written from means and
squares, with a first derivative in closed form whose own derivatives autograd takes.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-5


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x − mean) / √(variance + ε) · scale + shift with given statistics, per channel (Ioffe & Szegedy 2015)."""
    factor = scale * torch.rsqrt(variance + EPSILON)
    return torch.addcmul(shift - mean * factor, x, factor)


def own_batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the statistics of x itself, over examples and space; x: [n, …, channels].

    Returns the normalised x, its mean and its (biased) variance, [channels] each.
    """
    flat = x.reshape(-1, x.shape[-1])
    y, _, mean, variance = _OwnBatchNorm.apply(flat, scale[None], shift[None])
    return y.view(x.shape), mean[0], variance[0]


class _OwnBatchNorm(torch.autograd.Function):
    """(x, scale, shift) → (y, centred x, mean, variance); x: […, n, channels], the others […, 1, channels].

    With c = x − mean, r = 1/√(variance + ε), a = scale · r, and sums over the n rows:

        y = a c + shift
        v̄ = given v̄ − ½ scale r³ Σ c ȳ          (variance, also through r)
        x̄ = (c̄ + a ȳ) − mean(c̄ + a ȳ) + (2 v̄ c + m̄) / n

    The centred x is an output, so that derivatives of the backward formula reach x through it.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        n = x.shape[-2]
        mean = x.sum(-2, keepdim=True) / n
        centred = x - mean
        variance = (centred * centred).sum(-2, keepdim=True) / n
        return torch.addcmul(shift, centred, scale * torch.rsqrt(variance + EPSILON)), centred, mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, centred, _, variance = output
        ctx.save_for_backward(centred, variance, inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, to_y: Tensor | None, to_centred: Tensor | None, to_mean: Tensor | None, to_variance: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        centred, variance, scale = ctx.saved_tensors
        n = centred.shape[-2]
        r = torch.rsqrt(variance + EPSILON)
        to_scale = to_shift = None
        constant = torch.zeros_like(variance) if to_mean is None else to_mean / n
        slope = torch.zeros_like(variance) if to_variance is None else to_variance * (2 / n)
        to_x = None
        if to_y is not None:
            to_shift = to_y.sum(-2, keepdim=True)
            product = (to_y * centred).sum(-2, keepdim=True)
            to_scale = product * r
            a = scale * r
            slope = slope - a * r * r * product / n
            constant = constant - a * to_shift / n
            to_x = torch.addcmul(constant, to_y, a)
        if to_centred is not None:
            remaining = to_centred - to_centred.sum(-2, keepdim=True) / n
            to_x = remaining + (constant if to_x is None else to_x)
        to_x = torch.addcmul(constant if to_x is None else to_x, centred, slope)
        return to_x, to_scale, to_shift

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
        with_tasks = [
            value.expand(info.batch_size, *value.shape) if axis is None else value.movedim(axis, 0)
            for value, axis in zip((x, scale, shift), in_dims, strict=True)
        ]
        return _OwnBatchNorm.apply(*with_tasks), (0, 0, 0, 0)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each example normalised over space and channels (Ba et al. 2016); scale and shift per channel."""
    axes = tuple(range(1, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPSILON) * scale + shift


# torch looks the signature up at every call; found here, it is not put together anew each time.
_OwnBatchNorm.forward.__signature__ = inspect.signature(_OwnBatchNorm.forward)  # type: ignore[attr-defined]
