"""Normalisation written from means and squares.

`torch.nn.functional.batch_norm` with scale and shift gives wrong second-order gradients
under `vmap`, silently (pytorch/functorch issue 534). These formulas are exact under
`vmap` and under repeated differentiation.
"""

import torch
from torch import Tensor

EPSILON = 1e-5


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel over examples and space; x: [n, …, channels]."""
    flat = x.reshape(-1, x.shape[-1])
    variance, mean = torch.var_mean(flat, 0, correction=0)
    return mean, variance


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x − mean) / √(variance + ε) · scale + shift, per channel (Ioffe & Szegedy 2015)."""
    factor = scale * torch.rsqrt(variance + EPSILON)
    return torch.addcmul(shift - mean * factor, x, factor)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each example normalised over space and channels (Ba et al. 2016); scale and shift per channel."""
    axes = tuple(range(1, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPSILON) * scale + shift
