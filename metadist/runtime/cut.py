"""θ in pieces, one for each aggregator of a run: cut between tensors, in name order.

Every tensor is summed and moved by one aggregator alone, exactly as by the only one, and what
they need of each other, the norm of the whole gradient, is added in name order. So the
number of pieces changes no bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from metadist.config import Cluster
from metadist.engine.compression import Compression
from metadist.engine.engine import Blueprint
from metadist.engine.layout import Layout

MANY_BYTES = 10**8
"""Of all workers' sums of a step: from there on they are added on their hosts first (`sums: auto`),"""

CROWD = 4
"""if a host has so many workers."""

LARGE_BYTES = 8 * 10**6
"""Of θ: from there on it is cut (`aggregators: auto`)."""

PIECES = 4
"""How often."""


@dataclass(frozen=True)
class Topology:
    """Where sums go: `cluster.sums` and `cluster.aggregators`."""

    tree: bool = False
    aggregators: int = 1

    def __str__(self) -> str:
        way = "tree" if self.tree else "flat"
        return way if self.aggregators == 1 else f"{way}, {self.aggregators} aggregators"


def topology(cluster: Cluster, blueprint: Blueprint, crowd: float) -> Topology:
    """By the keys; where they are auto by the rule that `metadist bench scale` has simulated.

    crowd: how many workers a host has; 0: all of them are on the driver's machine, where an only aggregator and lines
    are the quickest.
    """
    many = crowd >= CROWD and blueprint.compression is None and cluster.most * 8 * blueprint.sums.total >= MANY_BYTES
    large = crowd > 0 and 4 * blueprint.values.total >= LARGE_BYTES
    return Topology(
        many if cluster.sums == "auto" else cluster.sums == "tree",
        (PIECES if large else 1) if cluster.aggregators == "auto" else cluster.aggregators,
    )


@dataclass(frozen=True)
class Piece:
    """Names of θ and state, their layouts, and where they lie in the whole run's flat buffers.

    tensors: indices of its summed tensors among those of the run, int64; compression, payload_at: of what is sent
    in payloads, and where its own bytes lie in one.
    """

    theta: tuple[str, ...]
    state: tuple[str, ...]
    values: Layout
    sums: Layout
    tensors: np.ndarray
    values_at: tuple[slice, ...]
    sums_at: tuple[slice, ...]
    compression: Compression | None
    payload_at: tuple[slice, ...]

    def part(self, q: np.ndarray, payloads: int = 1) -> np.ndarray:
        """Its part of a sum int64 [total] of the run; or of so many payloads, uint8, one behind the other."""
        if self.compression is None:
            parts = [q[span] for span in self.sums_at]
        else:
            parts = [payload[span] for payload in np.split(q, payloads) for span in self.payload_at]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@lru_cache(maxsize=8)
def cut(blueprint: Blueprint, pieces: int) -> tuple[Piece, ...]:
    """At most `pieces` pieces of about the same size, each with a tensor of θ; the scalars belong to the first."""
    theta = _runs(Layout.of(blueprint.theta), min(pieces, len(blueprint.theta)))
    state = _runs(Layout.of(blueprint.state), len(theta))
    scalars = [name for name in blueprint.sums.names if name.startswith("metric.")]
    found = []
    for number, (own, moved) in enumerate(zip(theta, state, strict=True)):
        summed = {f"gradient.{name}" for name in own} | {f"statistics.{name}" for name in moved}
        summed |= set(scalars) if number == 0 else set()
        names, kept, sums = blueprint.sums.names, {*own, *moved}, blueprint.sums.only(summed)
        compression = blueprint.compression and blueprint.compression.only(sums)
        payload = blueprint.compression and Layout(names, tuple((size,) for size in blueprint.compression.sizes))
        found.append(
            Piece(
                own, moved, blueprint.values.only(kept), sums,
                np.array([index for index, name in enumerate(names) if name in summed], dtype=np.int64),
                blueprint.values.spans(kept), blueprint.sums.spans(summed),
                compression, payload.spans(summed) if payload else (),
            )
        )  # fmt: skip
    return tuple(found)


def assembled(pieces: Sequence[Piece], parts: Sequence[np.ndarray], total: int) -> np.ndarray:
    """The flat buffer [total] of θ and state from that of every piece."""
    if len(parts) == 1:
        return parts[0]
    whole = np.empty(total, dtype=parts[0].dtype)
    for piece, part in zip(pieces, parts, strict=True):
        start = 0
        for span in piece.values_at:
            whole[span] = part[start : start + span.stop - span.start]
            start += span.stop - span.start
    return whole


def gathered_exponents(pieces: Sequence[Piece], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The exponents of all summed tensors from those of every piece."""
    whole = np.empty(sum(len(part) for part in parts), dtype=np.int64)
    for piece, part in zip(pieces, parts, strict=True):
        whole[piece.tensors] = part
    return whole


def _runs(layout: Layout, pieces: int) -> list[tuple[str, ...]]:
    """The names in `pieces` runs of neighbours: each begins where its share of the elements does."""
    ends = list(accumulate(layout.sizes))
    runs: list[tuple[str, ...]] = []
    first, names = 0, layout.names
    for number in range(pieces):
        last = len(names) - (pieces - 1 - number)  # one is left for each run to come
        share = layout.total * (number + 1) / pieces
        end = next((i for i in range(first, last) if ends[i] >= share), last - 1) + 1 if last > first else first
        end = len(names) if number == pieces - 1 else end
        runs.append(names[first:end])
        first = end
    return runs
