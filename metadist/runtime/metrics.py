"""What a run tells Prometheus: every metric with its kind and meaning. All of them carry the tag `run`.

Ray exports `metadist_NAME` as `ray_metadist_NAME`, a counter with `_total` behind it.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Emit = Callable[[str, float, Mapping[str, str]], None]
"""A metric's name, its value or, of a counter, what it grows by, and its further tags."""


class Metric(NamedTuple):
    """tags: beside `run`."""

    kind: Literal["gauge", "counter"]
    meaning: str
    tags: tuple[str, ...] = ()


METRICS = {
    "metadist_alive_timestamp_seconds": Metric("gauge", "unix time, set every second while the run's driver lives"),
    "metadist_ended_timestamp_seconds": Metric(
        "gauge", "unix time of the end: finished, stopped, diverged, failed", ("how",)
    ),
    "metadist_step": Metric("gauge", "meta-steps done"),
    "metadist_steps_planned": Metric("gauge", "outer.steps"),
    "metadist_step_timestamp_seconds": Metric(
        "gauge", "unix time of the newest meta-step; of the start before the first"
    ),
    "metadist_loss": Metric("gauge", "mean loss of the newest meta-step's tasks"),
    "metadist_validation_score": Metric(
        "gauge", "of the newest validation: accuracy (0 to 1), or squared error", ("measure",)
    ),
    "metadist_tasks_per_second": Metric("gauge", "of the newest meta-step"),
    "metadist_workers": Metric("gauge", "workers alive"),
    "metadist_staleness": Metric(
        "gauge", "of async: outer steps that the newest one's gradients were late, their mean"
    ),
    "metadist_checkpoint_timestamp_seconds": Metric(
        "gauge", "unix time of the newest checkpoint; of the start before the first"
    ),
    "metadist_checkpoint_seconds": Metric(
        "gauge", "how long the newest checkpoint took to write, off the training path"
    ),
    "metadist_steps": Metric("counter", "meta-steps taken, those taken again among them"),
    "metadist_phase_seconds": Metric(
        "counter", "time by phase, mean over the workers; all phases add up to the time", ("phase",)
    ),
    "metadist_shards": Metric("counter", "shards that count"),
    "metadist_shards_recomputed": Metric("counter", "shards computed more than once"),
    "metadist_duplicates_dropped": Metric("counter", "results of shards that came late, twice or damaged"),
    "metadist_bytes": Metric("counter", "bytes of sums that reached the aggregator"),
}
"""By name."""
