"""What is cheaper than brute force in a search: a sweep, and packed trials.

The contenders are measured in turn, so that a machine whose speed drifts favours none of them, and each ratio is the
median of the ratios within a turn. All of it on one core, in this process, without Ray.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from metadist.bench.record import Row
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.engine.sweep import Grid

TURNS = 5
RATES = (0.1, 0.19, 0.37, 0.72, 1.4, 2.7, 5.2, 10.0)
STEPS = (0, 1, 2, 3, 5)

JOBS: dict[str, dict[str, Any]] = {
    "stride2": {"model": {"name": "stride2"}},
    "regression": {
        "data": {"name": "sinusoid"},
        "model": {"name": "mlp", "width": 40, "layers": 2, "norm": "none"},
        "task": {"shots": 10, "queries": 10, "meta_batch": 16, "shard": 8},
    },
}
"""The quickstart's network on embedded letters, 5-way 1-shot; and sinusoids, where calls cost more than arithmetic."""


def job(name: str) -> Config:
    """MAML of one of `JOBS`."""
    return resolve(Config.model_validate({"algorithm": {"inner_lr": 0.5}, "engine": {"device": "cpu"}, **JOBS[name]}))


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some three minutes."""
    return [row for name in JOBS for row in sweep_rows(name, TURNS, say)]


def sweep_rows(name: str, turns: int, say: Callable[[str], None]) -> list[Row]:
    """A grid of 8 rates and 5 numbers of steps on a shard of tasks: one pass against an evaluation for each cell."""
    config = job(name)
    engine = Engine(config, [prepare(source, say) for source in config.data.sources])
    values, size = engine.blueprint.initial(), engine.shard_tasks
    alone = [
        (Engine(one, engine.tables), one)
        for one in (config.with_values(algorithm={"inner_lr": rate}) for rate in RATES)
    ]
    settings = [(other, one.with_values(eval={"inner_steps": k})) for other, one in alone for k in STEPS]
    grid = Grid(config, RATES, STEPS)

    def each() -> np.ndarray:
        found = [other.judge(values, one, "val", 0, size)["loss"] for other, one in settings]
        return np.stack(found, 1).reshape(size, len(RATES), len(STEPS))

    def together() -> np.ndarray:
        return engine.judge(values, grid, "val", 0, size)["loss"]

    # Also warms both up.
    np.testing.assert_allclose(together(), each(), rtol=1e-2, err_msg="both are the same cells")
    spent = in_turn({"separate": each, "sweep": together}, turns)
    cells = len(RATES) * len(STEPS) * size
    rates = {which: [cells / seconds for seconds in values] for which, values in spent.items()}
    for which, found in rates.items():
        say(f"{name}, {which}: {statistics.median(found):,.0f} cells/s")
    return pair(f"separate evaluations, {name}", f"sweep, {name}", rates["separate"], rates["sweep"], "tasks·cells/s")


def in_turn(contenders: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each, turn by turn."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            spent[name].append(time.perf_counter() - began)
    return spent


def pair(plain: str, better: str, plainly: list[float], betterly: list[float], unit: str) -> list[Row]:
    """Two rows, the second with its ratio to the first."""
    ratio = statistics.median(b / a for a, b in zip(plainly, betterly, strict=True))
    return [
        Row(plain, statistics.median(plainly), unit, None, None, len(plainly)),
        Row(better, statistics.median(betterly), unit, plain, ratio, len(betterly)),
    ]
