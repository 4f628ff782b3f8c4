"""The parameter aggregator: every shard's integers once, then one outer step.

A plain class. It runs in the driver's process or, unchanged, as a Ray actor.
"""

import zlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import torch

from metadist.config import Config
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint
from metadist.engine.exact import coarser, dequantise, first_exponents, next_exponents
from metadist.runtime.outer import OuterStep, learning_rate, moved_state


class Broadcast(NamedTuple):
    """What a worker needs for the shards of one step: θ and state as one flat buffer, and the exponents."""

    step: int
    attempt: int
    values: np.ndarray
    exponents: np.ndarray


class Snapshot(NamedTuple):
    """The whole state of a run before meta-step `step`: what a checkpoint holds.

    values: θ and state by name; memory: the optimizer's tensors by name; exponents: int64
    per summed tensor.
    """

    step: int
    values: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    exponents: np.ndarray


class Report(NamedTuple):
    """What one meta-step says: means over its tasks, the gradient's norm, the rate."""

    step: int
    loss: float
    score: float
    grad_norm: float
    lr: float
    finite: bool
    missing: tuple[int, ...]
    duplicates: int


def sealed(q: np.ndarray) -> int:
    """CRC-32 of a sum's bytes: what a worker says that it sent."""
    return zlib.crc32(np.ascontiguousarray(q).data)


class Aggregator:
    """θ, the running state, the optimizer and the sum of the current step."""

    def __init__(
        self, config: Config, shape: tuple[int, ...], snapshot: Snapshot | None = None, classes: int = 0
    ) -> None:
        self.config, self.blueprint = config, Blueprint(config, shape, classes)
        self.shards = config.task.meta_batch // config.shard
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
        self._open(attempt=0)

    def _open(self, attempt: int) -> None:
        self.attempt, self.duplicates = attempt, 0
        self.added: set[int] = set()
        self.total.fill(0)

    def broadcast(self) -> Broadcast:
        """θ_t for the workers."""
        values = self.blueprint.values.flatten(self.outer.theta | self.state)
        return Broadcast(self.step, self.attempt, values.numpy(), self.exponents)

    def add(self, step: int, attempt: int, shards: Collection[int], q: np.ndarray, seal: int | None = None) -> bool:
        """Count the sum of some shards. A late one, or one with a shard that is counted, is dropped: False.

        So is one that is not what its worker sent: of another size or type, or without its `seal`.
        """
        late = (step, attempt) != (self.step, self.attempt) or not self.added.isdisjoint(shards)
        same_kind = q.shape == self.total.shape and q.dtype == self.total.dtype
        if late or not same_kind or (seal is not None and seal != sealed(q)):
            self.duplicates += len(shards)
            return False
        self.added.update(shards)
        self.total += q
        return True

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
            nan = float("nan")
            return Report(step, nan, nan, nan, 0.0, True, missing, self.duplicates), self.broadcast()
        tasks, layout = self.config.task.meta_batch, self.blueprint.sums
        with one_thread():
            mean = layout.split(dequantise(layout, self.total, self.exponents) / tasks)
            norm = self.outer.step({name: mean[f"gradient.{name}"] for name in self.blueprint.theta}, step)
            self.state = moved_state(self.state, {name: mean[f"statistics.{name}"] for name in self.state})
        self.exponents = next_exponents(layout, self.total, self.exponents)
        duplicates = self.duplicates
        self.step += 1
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
