"""A convolution over images of few channels together with its batch norm, as one matrix product.

A convolution maps patches p (9 · channels numbers) to wᵀp. So its outputs' mean and variance
follow from those of the patches, p̄ and the covariance C:

    mean = wᵀ p̄,   variance = diag(wᵀ C w),   y = (w · a)ᵀ (p − p̄) + shift,   a = scale / √(variance + ε)

With 9 or 27 numbers a patch, C costs little, and nothing is left to do on the outputs, which
are the largest tensors of the whole network: neither their statistics, nor the
normalisation, nor the derivatives of either. A column of ones carries the shift.
"""

import torch
from torch import Tensor

from metadist.models.convolution import patches
from metadist.models.norm import EPSILON


def convolve_and_normalise(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, with its own statistics or given ones, of `convolve(x, weight, stride)`.

    x: [n, height, width, in]; weight: [3, 3, in, out]; scale, shift: [out]; given: mean and
    variance, [out] each. Returns the outputs [n, rows, columns, out] and the mean and variance used.
    """
    taken = patches(x, stride)
    rows = taken.flatten(0, 2)
    kernel = weight.flatten(0, 2)
    if given is None:
        centre = rows.mean(0)
        rows = rows - centre
        covariance = rows.T @ rows / rows.shape[0]
        mean, variance = centre @ kernel, ((covariance @ kernel) * kernel).sum(0)
        factor = scale * torch.rsqrt(variance + EPSILON)
    else:
        mean, variance = given
        factor = scale * torch.rsqrt(variance + EPSILON)
        shift = shift - mean * factor
    with_ones = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    y = with_ones @ torch.cat([kernel * factor, shift[None]])
    return y.view(*taken.shape[:3], -1), mean, variance
