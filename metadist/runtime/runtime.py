"""What a training loop needs of whatever computes for it, in one process or on Ray."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from metadist.engine.sweep import Setting
from metadist.errors import MetadistError
from metadist.runtime.aggregator import Report, Snapshot
from metadist.runtime.timeline import Timeline

Later = Callable[[], Report]
"""A report that may still be on its way; calling it waits."""

Say = Callable[[str], None]
"""Where notes for a person go."""


class AggregatorLost(MetadistError):
    """The aggregator died; the run goes back to its last checkpoint."""

    exit_code = 4


class NotFinite(MetadistError):
    """A shard was not finite, twice, on two workers where there are two."""

    exit_code = 5

    def __init__(self, step: int, shard: int) -> None:
        super().__init__(f"step {step}: the loss or gradient of shard {shard} is not finite, computed twice")
        self.step, self.shard = step, shard


class Transport(NamedTuple):
    """How driver, workers and aggregator talk: by `lines` (`line.py`) or by `Ray`, and why, in words."""

    by: str
    why: str


class Counts(NamedTuple):
    """What happened so far, for progress and result.

    shards: by worker, as `PID` on the driver's host, `PID@HOST` on others; recomputed: shards
    computed more than once; duplicates: results dropped; staleness: of async, how many outer steps
    the newest one's gradients were late, their mean; transport: now, where it is one or the other.
    """

    shards: dict[str, int]
    recomputed: int
    duplicates: int
    staleness: float | None = None
    transport: Transport | None = None


class Runtime(Protocol):
    """Workers and an aggregator. A step is `begin`, `finish`, `apply`, in this order.

    step: the first to take; earlier: reports of steps since the checkpoint that need not be taken again, because
    the aggregator outlived the driver that took them; exact: whether its bits are those of any other that computes
    the same config; timeline: where the workers' and the aggregator's time goes.
    """

    step: int
    earlier: list[Report]
    exact: bool
    timeline: Timeline

    def begin(self, step: int) -> None:
        """Let the workers start on a step; waits for no shard. Raises AggregatorLost."""
        ...

    def finish(self, step: int) -> None:
        """Wait until every shard of the step is counted. Raises NotFinite, AggregatorLost, Preempted; the state is
        that before the step then."""
        ...

    def apply(self, step: int) -> Later:
        """Take the outer step."""
        ...

    def snapshot(self) -> Callable[[], Snapshot]:
        """The state between two steps; calling what is returned waits for it."""
        ...

    def restart(self, snapshot: Snapshot | None) -> None:
        """A new aggregator from a checkpoint, after AggregatorLost; None: from initial θ."""
        ...

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]:
        """Accuracy and loss of evaluation tasks 0 … episodes−1, float64; values None: the current θ."""
        ...

    @property
    def workers(self) -> int:
        """Workers alive now."""
        ...

    @property
    def fingerprint(self) -> dict[str, str]:
        """The numeric fingerprint all workers share, with `probe`, the hash of the probe shard."""
        ...

    @property
    def hardware(self) -> dict[str, Any]:
        """What the first worker runs on."""
        ...

    def counts(self) -> Counts: ...

    def close(self) -> None:
        """End workers and, where it is ours, the cluster."""
        ...
