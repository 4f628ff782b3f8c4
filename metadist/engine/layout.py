"""Named tensors as one flat buffer, in name order, and back."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 17
"""Elements of a large buffer that are worked on at a time: what is done to them one after the other finds them in the
processor's cache. The norm of a large tensor is summed block by block: its bits are those of this size."""


def blocks(size: int, start: int = 0) -> Iterator[slice]:
    """Of `size` elements from `start` on."""
    return (slice(first, min(first + BLOCK, start + size)) for first in range(start, start + size, BLOCK))


class Run(NamedTuple):
    """Neighbours in the flat buffer that are worked on together: small tensors, of one block, or a single large one.

    at: where they lie in the buffer; tensors: their indices; starts, parts: where each lies from the run's start on.
    """

    at: slice
    tensors: tuple[int, ...]
    starts: tuple[int, ...]
    parts: tuple[slice, ...]

    def blocks(self) -> Iterator[slice]:
        """Of the flat buffer."""
        return blocks(self.at.stop - self.at.start, self.at.start)


@dataclass(frozen=True)
class Layout:
    """Names in order, with their shapes; `offsets` are element positions in the flat buffer."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        names = tuple(sorted(tensors))
        return cls(names, tuple(tuple(tensors[name].shape) for name in names))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All tensors that have elements: what is done to many small ones at once costs as much as to one of them."""
        ends = list(accumulate(self.sizes))
        runs: list[list[int]] = []
        for index in (index for index, size in enumerate(self.sizes) if size):
            if runs and ends[index] - ends[runs[-1][0]] + self.sizes[runs[-1][0]] <= BLOCK:
                runs[-1].append(index)
            else:
                runs.append([index])
        return tuple(self._run(tensors, ends) for tensors in runs)

    def _run(self, tensors: Sequence[int], ends: Sequence[int]) -> Run:
        first = ends[tensors[0]] - self.sizes[tensors[0]]
        parts = tuple(slice(ends[i] - self.sizes[i] - first, ends[i] - first) for i in tensors)
        return Run(slice(first, ends[tensors[-1]]), tuple(tensors), tuple(part.start for part in parts), parts)

    def only(self, names: Collection[str]) -> "Layout":
        """Those of the tensors that are named."""
        kept = [(name, shape) for name, shape in zip(self.names, self.shapes, strict=True) if name in names]
        return Layout(tuple(name for name, _ in kept), tuple(shape for _, shape in kept))

    def spans(self, names: Collection[str]) -> tuple[slice, ...]:
        """Where the named tensors lie in the flat buffer; neighbours are one span."""
        found: list[slice] = []
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if name in names and found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, start + size)
            elif name in names:
                found.append(slice(start, start + size))
            start += size
        return tuple(found)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One contiguous tensor [total] of the given values."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views into `flat` by name."""
        parts = torch.split(flat, list(self.sizes))
        return {n: part.view(s) for n, part, s in zip(self.names, parts, self.shapes, strict=True)}

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Copies by name, each in memory of its own.

        A view would begin wherever its neighbour ends, and a matrix library may choose
        another order of summation for another alignment: same bits need same alignment.
        """
        return {name: part.clone() for name, part in self.split(flat).items()}


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the little-endian float32 bytes of all tensors in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(
            tensors[name].detach().cpu().to(torch.float32).contiguous().numpy().astype(np.dtype("<f4")).tobytes()
        )
    return digest.hexdigest()
