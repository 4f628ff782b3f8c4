"""Sums that do not depend on their order.

A value x becomes the integer q = round(x · 2^e). Integers add exactly, so partial sums may
be taken in any grouping. The exponent e is one per tensor and a function of the previous
step's sum alone, so that everybody agrees on it beforehand.

Casting NaN, an infinity or a value beyond 2^63 to int64 is silent, and whether a partial
sum overflows depends on the grouping. So every part is checked before it is added: finite,
and |q| ≤ 2^62 / parts. Where parts exceed the bound, the whole step is done again with
coarser exponents for the tensors in which any of them did, once all parts have been seen,
so that this too depends on no order.

An array of integers is known by its seal: the elements' sum, around the end of int64. It is as quick as memory, every
flipped bit moves it, and a sum's seal is the sum of its parts' seals.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.engine.layout import BLOCK, Layout, Run

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

SMALL, ROUNDING = 2.0**51, 1.5 * 2.0**52
"""ROUNDING plus a float64 of at most SMALL has no bits left for a fraction: the addition rounds, to nearest and
ties to even. As an integer, the sum's bits are ROUNDING's plus the rounded number: quicker than a cast."""


class Part(NamedTuple):
    """A quantised summand: q int64 [total], and what is wrong with it, if anything.

    exceeding: indices of the tensors that are beyond the bound; q is zero then. seal: of q.
    """

    q: np.ndarray
    finite: bool
    exceeding: tuple[int, ...]
    seal: int = 0

    @property
    def fits(self) -> bool:
        """Whether it may be added."""
        return self.finite and not self.exceeding


def seal_of(q: np.ndarray) -> int:
    """Of integers, int64."""
    return int(np.add.reduce(q))


def seal_of_all(seals: Iterable[int]) -> int:
    """Of the sum of what has these."""
    total = sum(seals) & (2**64 - 1)
    return total - 2**64 if total >> 63 else total


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


def scales(exponents: np.ndarray) -> Tensor:
    """2^e of every tensor, float64 [tensors]; exact, as powers of two are."""
    return torch.from_numpy(np.ldexp(1.0, exponents.astype(np.int32)))


def tensor_of_each(layout: Layout) -> Tensor:
    """Which tensor an element belongs to, int64 [total]."""
    return torch.arange(len(layout.names)).repeat_interleave(torch.tensor(layout.sizes))


def quantise(
    layout: Layout, tensors: Mapping[str, Tensor], exponents: np.ndarray, parts: int, out: np.ndarray | None = None
) -> Part:
    """round(x · 2^e) of all tensors in one flat buffer; `parts` is how many such buffers will be added.

    out: int64 [total], contiguous, where q is written to, if it is to lie in memory that is there.
    """
    q = np.empty(layout.total, dtype=np.int64) if out is None else out
    if all(tensors[name].device.type == "cpu" for name in layout.names):
        largest, seal = _rounded_into(q, layout, tensors, exponents)
        if largest <= 2.0**HEADROOM_BITS / parts:  # false for NaN
            return Part(q, True, (), seal)
    scale = scales(exponents)[tensor_of_each(layout)].to(tensors[layout.names[0]].device)
    found = rounded(layout, tensors, scale).part(layout, parts)
    if out is None:
        return found
    out[:] = found.q
    return found._replace(q=out)


def _rounded_into(
    q: np.ndarray, layout: Layout, tensors: Mapping[str, Tensor], exponents: np.ndarray
) -> tuple[float, int]:
    """Write round(x · 2^e), block by block; returns its greatest magnitude, NaN where one is, and its seal. Then, and
    beyond 2^63, what is written is anything."""
    factors = np.ldexp(1.0, exponents.astype(np.int32)).tolist()
    scaled = torch.empty(min(BLOCK, layout.total), dtype=torch.float64)
    as_integers, rounding = scaled.numpy().view(np.int64), np.float64(ROUNDING).view(np.int64)
    whole, extremes, seals = torch.from_numpy(q), [0.0], list[int]()
    for run in layout.runs:
        every = [tensors[layout.names[index]].detach().reshape(-1) for index in run.tensors]
        values = every[0] if len(every) == 1 else torch.cat(every)
        for block in run.blocks():
            here = scaled[: block.stop - block.start]
            here.copy_(values[block.start - run.at.start : block.stop - run.at.start])
            for index, part in zip(run.tensors, run.parts, strict=True):
                here[part].mul_(factors[index])
            low, high = here.aminmax()
            extremes.append(max(float(high), -float(low)))
            if extremes[-1] <= SMALL:
                here.add_(ROUNDING)
                np.subtract(as_integers[: len(here)], rounding, out=q[block])
            else:
                whole[block] = here.round_()
            seals.append(seal_of(q[block]))
    return float(np.rint(np.max(extremes))), seal_of_all(seals)


class Rounded(NamedTuple):
    """values: float64 [total], unscaled; scale: 2^e for every one of them; sent: int64 [total + 1], round(x · 2^e), and
    behind it the bits of its greatest magnitude in float64, NaN where one is."""

    values: Tensor
    scale: Tensor
    sent: Tensor

    def part(self, layout: Layout, parts: int) -> Part:
        """The part, if it fits; else what is wrong with it."""
        here, bound = to_host(self.sent), 2.0**HEADROOM_BITS / parts
        q, largest = here[:-1], here[-1:].view(np.float64)
        if float(largest[0]) <= bound:  # false for NaN
            return Part(q, True, (), seal_of(q))
        finite = bool(self.values.isfinite().all())
        each = layout.split((self.values * self.scale).round_().abs())
        exceeding = tuple(index for index, name in enumerate(layout.names) if not float(each[name].max()) <= bound)
        return Part(np.zeros(layout.total, dtype=np.int64), finite, exceeding)


def rounded(layout: Layout, tensors: Mapping[str, Tensor], scale: Tensor) -> Rounded:
    """All tensors in one flat buffer, on their device; nothing is asked of it. scale: 2^e of every element."""
    # By type: of several, a GPU would copy each tensor by itself.
    every = (tensors[name].detach().reshape(-1) for name in layout.names)
    values = torch.cat([torch.cat([*same]).double() for _, same in groupby(every, lambda tensor: tensor.dtype)])
    found = (values * scale).round_()
    return Rounded(values, scale, torch.cat([found.long(), found.abs().max().view(1).view(torch.int64)]))


def to_host(sent: Tensor) -> np.ndarray:
    """A tensor's numbers on the host, in memory of their own where they come from a GPU; waits for them."""
    if sent.device.type != "cuda":
        return sent.cpu().numpy()
    here = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)  # of torch's store; what is not pinned goes twice
    here.copy_(sent, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return here.numpy()


class Block(threading.local):
    """Memory for a block, of each thread its own."""

    def __init__(self, size: int, dtype: type) -> None:
        self.array: np.ndarray = np.empty(min(BLOCK, size), dtype=dtype)


class Adding:
    """Sums that are added to a total, block by block, on one core or several: every block goes through memory once.

    total: int64 [total], the sum so far; fresh: of nothing, whatever is there.
    """

    def __init__(self, total: np.ndarray, sums: Sequence[np.ndarray], fresh: bool) -> None:
        self._total, self._sums, self._fresh = total, sums, fresh
        self._own = Block(total.size, np.int64)
        self._seals: list[list[int]] = []

    def block(self, at: slice, kept: bool = True) -> np.ndarray:
        """A block of the new total, once. Unless kept it is not there afterwards, and good until this thread's next."""
        there = self._total[at] if kept else self._own.array[: at.stop - at.start]
        found, seals = None if self._fresh else self._total[at], list[int]()
        for q in self._sums:
            part = q[at]
            seals.append(seal_of(part))  # which brings it into the cache
            found = part if found is None else np.add(found, part, out=there)
        assert found is not None, "a sum of something"
        if kept and found is not there:
            there[:] = found
        self._seals.append(seals)
        return found

    @property
    def seals(self) -> list[int]:
        """Of each sum, in the blocks that were read."""
        return [seal_of_all(each) for each in zip(*self._seals, strict=True)]


class Means:
    """A sum's means, float64, block by block, on one core or several; layout: the sum's."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._own = Block(layout.total, np.float64)
        self._magnitudes: list[tuple[int, int]] = []

    def over(
        self, q: Callable[[slice], np.ndarray], exponents: np.ndarray, parts: int
    ) -> Callable[[Run, slice], Tensor]:
        """How a block of a run is read, good until this thread reads the next; q: how its integers are."""
        # int64 → float64 rounds once, to nearest, the same everywhere. 2^e · parts is exact, and its inverse too if
        # `parts` is a power of two: then the quotient by it is the product, a third of the time.
        divisors = np.ldexp(float(parts), exponents.astype(np.int32))
        exact = parts & (parts - 1) == 0
        scaled, by = (np.multiply, (1 / divisors).tolist()) if exact else (np.divide, divisors.tolist())
        magnitudes = self._magnitudes = []

        def read(run: Run, block: slice) -> Tensor:
            integers, means = q(block), self._own.array[: block.stop - block.start]
            np.copyto(means, integers)
            for index, part in zip(run.tensors, run.parts, strict=True):
                here = means[part]
                scaled(here, by[index], out=here)
            # Python integers: the magnitude of the most negative int64 is no int64.
            ends = (extreme.reduceat(integers, run.starts).tolist() for extreme in (np.maximum, np.minimum))
            magnitudes.extend((index, max(high, -low)) for index, high, low in zip(run.tensors, *ends, strict=True))
            return torch.from_numpy(means)

        return read

    @property
    def largest(self) -> list[int]:
        """Every tensor's greatest magnitude in what was read."""
        found = [0] * len(self._layout.names)
        for index, magnitude in self._magnitudes:
            found[index] = max(found[index], magnitude)
        return found

    def whole(self, q: np.ndarray, exponents: np.ndarray, parts: int) -> Tensor:
        """All of it, float64 [total]."""
        mean, read = torch.empty(self._layout.total, dtype=torch.float64), self.over(q.__getitem__, exponents, parts)
        for run in self._layout.runs:
            for block in run.blocks():
                mean[block] = read(run, block)
        return mean


def next_exponents(layout: Layout, exponents: np.ndarray, largest: Sequence[int]) -> np.ndarray:
    """Exponents of the next step, from each tensor's `largest` in this step's sum: it comes to 2^45.

    A tensor whose sum is zero was zero, or too small for its exponent: it becomes finer.
    """

    def following(exponent: int, size: int, one: int) -> int:
        if one:
            exponent += TARGET_BITS - one.bit_length()
        elif size:
            exponent = max(exponent, min(exponent + FINER_BITS, FINEST))
        return min(max(exponent, LOWEST), HIGHEST)

    each = zip(exponents.tolist(), layout.sizes, largest, strict=True)
    return np.array([following(*tensor) for tensor in each], dtype=np.int64)
