"""The sum of what the workers of one node have computed, before it leaves the node.

A plain class, run as a Ray actor beside the workers. Integers add exactly, so the sum may be
taken here as well as at the aggregator; over the network goes one sum for each node. Payloads
(`outer.compression`) do not add up without their exponents: they are passed on in one piece.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from metadist.runtime.aggregator import sealed


class Gathered(NamedTuple):
    """What a node's sums are of, and their seals."""

    shards: tuple[int, ...]
    seals: tuple[int, ...]


class Combiner:
    """The sums of the step that its last call was about, one for each piece of the parameters."""

    def __init__(self) -> None:
        self._of: tuple[int, int] = (-1, 0)
        self._shards: list[int] = []
        self._totals: list[np.ndarray] = []

    def add(self, step: int, attempt: int, shards: Collection[int], seals: Sequence[int], *sums: np.ndarray) -> bool:
        """Take in the sum of some shards. A late one, one with a shard that is in, a damaged one is dropped: False."""
        if tuple(seals) != tuple(map(sealed, sums)):
            return False
        if (step, attempt) < self._of or ((step, attempt) == self._of and not set(self._shards).isdisjoint(shards)):
            return False
        if (step, attempt) > self._of or not self._shards:
            self._of, self._shards, self._totals = (step, attempt), list(shards), list(sums)
            return True
        self._shards += shards
        both = zip(self._totals, sums, strict=True)
        self._totals = [np.concatenate(two) if two[0].dtype == np.uint8 else two[0] + two[1] for two in both]
        return True

    def collect(self, step: int, attempt: int, pieces: int) -> tuple[Any, ...]:
        """What is in (Gathered), and the sums, handed over: nothing is in any more. Of another step nothing is in."""
        if (step, attempt) != self._of or not self._shards:
            return Gathered((), ()), *(np.zeros(0, dtype=np.int64) for _ in range(pieces))
        shards, totals = self._shards, self._totals
        self._shards, self._totals = [], []
        return Gathered(tuple(shards), tuple(map(sealed, totals))), *totals
