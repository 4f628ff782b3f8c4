"""The parameter aggregator: every shard's integers once, then one outer step.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import torch

from metadist.config import Config
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint, Lane
from metadist.engine.exact import coarser, dequantise, first_exponents, next_exponents, quantise, scales
from metadist.engine.outer import OuterStep, learning_rate, moved_state


class Broadcast(NamedTuple):
    """What a worker needs for the shards of one step: θ and state as one flat buffer, and the exponents."""

    step: int
    attempt: int
    values: np.ndarray
    exponents: np.ndarray


class Snapshot(NamedTuple):
    """The whole state of a run before meta-step `step`: what a checkpoint holds.

    values: θ and state by name; memory: the optimizer's tensors by name; exponents: int64
    per summed tensor; lanes: what each of them carries, where they carry something.
    """

    step: int
    values: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    exponents: np.ndarray
    lanes: tuple[Lane, ...] = ()


class Report(NamedTuple):
    """What one meta-step says: means over its tasks, the gradient's norm, the rate, the bytes of all sums that came."""

    step: int
    loss: float
    score: float
    grad_norm: float
    lr: float
    finite: bool
    missing: tuple[int, ...]
    duplicates: int
    bytes: int = 0


class Aggregator:
    """θ, the running state, the optimizer and the sum of the current step."""

    def __init__(
        self, config: Config, shape: tuple[int, ...], snapshot: Snapshot | None = None, classes: int = 0
    ) -> None:
        self.config, self.blueprint = config, Blueprint(config, shape, classes)
        self.shards = config.lanes
        theta, state = self.blueprint.theta, self.blueprint.state
        self.step, self.exponents = 0, first_exponents(self.blueprint.sums)
        if snapshot is not None:
            values = {name: torch.from_numpy(np.array(value)) for name, value in snapshot.values.items()}
            theta, state = {n: values[n] for n in theta}, {n: values[n] for n in state}
            self.step, self.exponents = snapshot.step, np.array(snapshot.exponents)
        self.state = dict(state)
        self.total = np.zeros(self.blueprint.sums.total, dtype=np.int64)
        self.outer = OuterStep(config.outer, theta)
        if snapshot is not None:
            self.outer.remember({name: torch.from_numpy(np.array(value)) for name, value in snapshot.memory.items()})
        self.bytes = 0
        self._open(attempt=0)

    def _open(self, attempt: int) -> None:
        self.attempt, self.duplicates = attempt, 0
        self.added: set[int] = set()
        self.total.fill(0)

    def broadcast(self) -> Broadcast:
        """θ_t for the workers."""
        values = self.blueprint.values.flatten(self.outer.theta | self.state)
        return Broadcast(self.step, self.attempt, values.numpy(), self.exponents)

    def add(self, step: int, attempt: int, shards: Collection[int], q: np.ndarray) -> bool:
        """Count the sum of some shards. A late one, or one with a shard that is counted, is dropped: False.

        q: int64 [total], or their payloads one behind the other, uint8.
        """
        self.bytes += q.nbytes
        if (step, attempt) != (self.step, self.attempt) or not self.added.isdisjoint(shards):
            self.duplicates += len(shards)
            return False
        self.added.update(shards)
        for part in self._integers(q, len(shards)):
            self.total += part
        return True

    def _integers(self, q: np.ndarray, shards: int) -> list[np.ndarray]:
        """What is added: the sum as it came, or what each payload decompresses to, which the worker has seen to fit."""
        layout, compression = self.blueprint.sums, self.blueprint.compression
        if compression is None:
            return [q]
        scale = scales(layout, self.exponents)
        each = (compression.decompress(payload) for payload in np.split(q, shards))
        return [quantise(layout, tensors, scale, self.shards).q for tensors in each]

    def redo(self, step: int, attempt: int, exceeding: Iterable[int]) -> Broadcast:
        """Begin the step again with coarser exponents for the tensors in which some shard exceeded its bound."""
        if (step, attempt) == (self.step, self.attempt):
            self.exponents = coarser(self.exponents, exceeding)
            self._open(attempt + 1)
        return self.broadcast()

    def apply(self, step: int) -> tuple[Report, Broadcast]:
        """One outer step from the complete sum; without it nothing moves and the report says what is missing."""
        missing = (
            tuple(sorted(set(range(self.shards)) - self.added)) if step == self.step else tuple(range(self.shards))
        )
        if missing:
            return Report(step, float("nan"), float("nan"), float("nan"), 0.0, True, missing, 0), self.broadcast()
        layout = self.blueprint.sums
        with one_thread():
            mean = layout.split(dequantise(layout, self.total, self.exponents) / self.config.averaged)
            norm = self.outer.step({name: mean[f"gradient.{name}"] for name in self.blueprint.theta}, step)
            statistics = {name: mean[f"statistics.{name}"] for name in self.state}
            if self.config.outer.local is None:
                self.state = moved_state(self.state, statistics)
            else:  # replicas moved it themselves
                self.state = {name: statistics[name].to(value.dtype) for name, value in self.state.items()}
        self.exponents = next_exponents(layout, self.total, self.exponents)
        duplicates, received = self.duplicates, self.bytes
        self.step += 1
        self.bytes = 0
        self._open(attempt=0)
        broadcast = self.broadcast()
        report = Report(
            step,
            float(mean["metric.loss"]),
            float(mean["metric.score"]),
            norm,
            learning_rate(self.config.outer, step),
            bool(np.isfinite(broadcast.values).all()),
            (),
            duplicates,
            received,
        )
        return report, broadcast

    def snapshot(self) -> Snapshot:
        """The state now; copies, so that the next step does not move them."""
        return Snapshot(
            self.step,
            {name: value.clone().numpy() for name, value in (self.outer.theta | self.state).items()},
            {name: value.numpy() for name, value in self.outer.memory().items()},
            self.exponents.copy(),
        )
