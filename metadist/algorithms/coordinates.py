"""A network's parameters as one vector of coordinates, and what a learned optimizer sees of a number.

Preprocessing (Andrychowicz et al. 2016, appendix A): gradients differ by many powers of ten, so
a learned optimizer gets two numbers for each,

    (log |g| / p, sgn g)   where |g| ≥ e^−p,
    (−1, e^p g)            elsewhere,                p = 10.
"""

import math

import torch
from torch import Tensor

from metadist.models.network import Params

P = 10.0


def flatten(params: Params) -> Tensor:
    """All elements, one tensor after the other: [coordinates]."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def unflatten(coordinates: Tensor, like: Params) -> dict[str, Tensor]:
    """The named tensors again, with the names and shapes of `like`."""
    parts = torch.split(coordinates, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}


def preprocessed(values: Tensor) -> Tensor:
    """values: […]; returns […, 2]."""
    least = math.exp(-P)
    size = values.abs()
    large = size >= least
    return torch.stack(
        [size.clamp(min=least).log() / P, torch.where(large, values.sign(), values / least)],
        -1,
    )
