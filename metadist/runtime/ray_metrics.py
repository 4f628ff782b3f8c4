"""The way of a run's metrics to Prometheus: Ray's agent on the driver's node."""

from collections.abc import Mapping
from typing import Any

from metadist.runtime.metrics import METRICS, Emit


def through_ray(run: str) -> Emit | None:
    """To Ray's metrics, with the tag `run`; None where this process is not in a cluster, but a client of one."""
    import ray
    from ray.util.metrics import Counter, Gauge

    if not ray.is_initialized() or ray.util.client.ray.is_connected():
        return None
    made: dict[str, Any] = {}
    for name, metric in METRICS.items():
        kind = Gauge if metric.kind == "gauge" else Counter
        made[name] = kind(name, metric.meaning, ("run", *metric.tags)).set_default_tags({"run": run})

    def emit(name: str, value: float, tags: Mapping[str, str]) -> None:
        if METRICS[name].kind == "gauge":
            made[name].set(float(value), dict(tags))
        elif value > 0:
            made[name].inc(float(value), dict(tags))

    return emit
