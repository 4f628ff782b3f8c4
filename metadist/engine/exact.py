"""Sums that do not depend on their order.

A value x becomes the integer q = round(x · 2^e). Integers add exactly, so partial sums may
be taken in any grouping. The exponent e is one per tensor and a function of the previous
step's sum alone, so that everybody agrees on it beforehand.

Casting NaN, an infinity or a value beyond 2^63 to int64 is silent, and whether a partial
sum overflows depends on the grouping. So every part is checked before it is added: finite,
and |q| ≤ 2^62 / parts. Where parts exceed the bound, the whole step is done again with
coarser exponents for the tensors in which any of them did, once all parts have been seen,
so that this too depends on no order.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.engine.layout import Layout, blocks

HEADROOM_BITS = 62
TARGET_BITS = 45
"""A step's largest sum is expected near 2^45: 2^17 below the limit, and 2^-45 of it is resolved."""

FIRST_EXPONENT = 40
"""Of every tensor at step 0."""

COARSER_BITS = 16
"""How much coarser a tensor becomes for doing a step again after a part exceeded its bound."""

FINER_BITS = 20
"""How much finer a tensor becomes after a step in which it summed to zero, until `FINEST`."""

FINEST = 130
"""Nothing above float32's smallest normal number rounds to zero; a few redos lead back from here."""

LOWEST, HIGHEST = -900, 900


class Part(NamedTuple):
    """A quantised summand: q int64 [total], and what is wrong with it, if anything.

    exceeding: indices of the tensors that are beyond the bound; q is zero then.
    """

    q: np.ndarray
    finite: bool
    exceeding: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether it may be added."""
        return self.finite and not self.exceeding


def first_exponents(layout: Layout) -> np.ndarray:
    """int64 [tensors], those of step 0."""
    exponents: np.ndarray = np.full(len(layout.names), FIRST_EXPONENT, dtype=np.int64)
    return exponents


def coarser(exponents: np.ndarray, exceeding: Iterable[int]) -> np.ndarray:
    """For doing a step again."""
    result = exponents.copy()
    for index in exceeding:
        result[index] = max(result[index] - COARSER_BITS, LOWEST)
    return result


def scales(layout: Layout, exponents: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """2^e for every element, float64 [total]; exact, as powers of two are."""
    each = torch.from_numpy(np.ldexp(1.0, exponents.astype(np.int32)))
    return each.repeat_interleave(torch.tensor(layout.sizes)).to(device)


def quantise(layout: Layout, tensors: Mapping[str, Tensor], scale: Tensor, parts: int) -> Part:
    """round(x · 2^e) of all tensors in one flat buffer; `parts` is how many such buffers will be added."""
    return rounded(layout, tensors, scale).part(layout, scale, parts)


class Rounded(NamedTuple):
    """values: float64 [total], unscaled; q: round(x · 2^e) as int64; largest: its greatest magnitude in float64, NaN
    where one is."""

    values: Tensor
    q: Tensor
    largest: Tensor

    def part(self, layout: Layout, scale: Tensor, parts: int) -> Part:
        """The part, if it fits; else what is wrong with it."""
        bound = 2.0**HEADROOM_BITS / parts
        if float(self.largest) <= bound:  # false for NaN
            return Part(self.q.cpu().numpy(), True, ())
        finite = bool(self.values.isfinite().all())
        each = layout.split((self.values * scale).round_().abs())
        exceeding = tuple(index for index, name in enumerate(layout.names) if not float(each[name].max()) <= bound)
        return Part(np.zeros(layout.total, dtype=np.int64), finite, exceeding)


def rounded(layout: Layout, tensors: Mapping[str, Tensor], scale: Tensor) -> Rounded:
    """All tensors in one flat buffer, on their device; nothing is asked of it."""
    values = layout.flatten(tensors).detach().double()
    found = (values * scale).round_()
    return Rounded(values, found.long(), found.abs().max())


def dequantise(layout: Layout, total: np.ndarray, exponents: np.ndarray, parts: int = 1) -> Tensor:
    """The sum, or the mean over so many, float64 [total]."""
    mean: np.ndarray = np.empty(layout.total)
    start = 0
    for size, factor in zip(layout.sizes, np.ldexp(1.0, -exponents.astype(np.int32)), strict=True):
        for block in blocks(size, start):
            # 2^-e is exact, and int64 → float64 rounds once, to nearest, the same everywhere.
            mean[block] = total[block]
            mean[block] *= factor
            if parts != 1:
                np.divide(mean[block], parts, out=mean[block])
        start += size
    return torch.from_numpy(mean)


def next_exponents(layout: Layout, total: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Exponents of the next step, from this step's sum: its largest element comes to 2^45.

    A tensor whose sum is zero was zero, or too small for its exponent: it becomes finer.
    """
    result = exponents.copy()
    sizes = np.array(layout.sizes)
    starts = np.cumsum(sizes) - sizes
    some = sizes > 0
    highest, lowest = (f.reduceat(total, starts[some]) for f in (np.maximum, np.minimum))
    for index, high, low in zip(np.flatnonzero(some), highest.tolist(), lowest.tolist(), strict=True):
        # Python integers: the magnitude of the most negative int64 is no int64.
        largest = max(high, -low)
        if largest:
            result[index] += TARGET_BITS - largest.bit_length()
        else:
            result[index] = max(result[index], min(result[index] + FINER_BITS, FINEST))
    np.clip(result, LOWEST, HIGHEST, out=result)
    return result
