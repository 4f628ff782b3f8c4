"""Peak memory and time of a shard against inner steps: MAML of both orders, with recomputed inner steps, iMAML.

Each figure comes from a process of its own (`metadist/engine/memory.py`); methods are taken in
turn for every number of steps. A ratio of memory is the growth from one inner step, to be seen
beside √K; a ratio of time is that of recomputed steps to kept ones.
"""

from collections.abc import Callable
from typing import Any

from metadist.bench.record import Point, Row
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.fit import Need, needed

STEPS = (1, 2, 5, 10, 20, 50)
REPEATS = 3

METHODS: dict[str, dict[str, Any]] = {
    "maml": {"name": "maml"},
    "maml, recompute": {"name": "maml", "recompute": True},
    "fomaml": {"name": "maml", "order": 1},
    "imaml": {"name": "imaml"},
}

JOB: dict[str, Any] = {
    "task": {"ways": 5, "shots": 1, "queries": 1, "meta_batch": 2, "shard": 2},
    "model": {"name": "conv4"},
    "cluster": {"workers": 0},
}
"""The pooled Conv4 with 64 channels on the embedded letters, 5-way 1-shot, two tasks at once."""


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some four minutes."""
    return rows(measured(STEPS, REPEATS, say))


def job(method: str, steps: int) -> Config:
    """One of `METHODS`."""
    keys = METHODS[method] | {"inner_lr": 0.05, "inner_steps": steps}
    return resolve(Config.model_validate({**JOB, "algorithm": keys}))


def measured(steps: tuple[int, ...], repeats: int, say: Callable[[str], None]) -> dict[str, dict[int, Need]]:
    """By method and number of inner steps."""
    found: dict[str, dict[int, Need]] = {method: {} for method in METHODS}
    for k in steps:
        for method in METHODS:
            config = job(method, k)
            paths = [str(prepare(source, say).path) for source in config.data.sources]
            found[method][k] = need = needed(config, paths, config.shard, repeats)
            say(f"{_name(method, k)}: {need.bytes / 2**20:,.0f} MiB, {need.seconds:.3f} s")
    return found


def rows(found: dict[str, dict[int, Need]]) -> list[Row]:
    """Memory, then time."""
    memory, spent = [], []
    for method, needs in found.items():
        least = min(needs)
        for k, need in needs.items():
            point = Point("", method, "inner steps", k)
            grown, dearer = point._replace(to=_steps(least)), point._replace(to="maml")
            growth = None if k == least else need.bytes / needs[least].bytes
            of_one = _name(method, least) if growth else None
            memory.append(Row(_name(method, k), need.bytes / 2**20, "MiB", of_one, growth, 1, grown))
            kept = found["maml"][k] if METHODS[method].get("recompute") else None
            baseline = f"{_name('maml', k)}, time" if kept else None
            ratio = need.seconds / kept.seconds if kept else None
            spent.append(Row(f"{_name(method, k)}, time", need.seconds, "s", baseline, ratio, REPEATS, dearer))
    return memory + spent


def _name(method: str, steps: int) -> str:
    return f"{method}, {_steps(steps)}"


def _steps(steps: int) -> str:
    return f"{steps} inner step{'s' if steps > 1 else ''}"
