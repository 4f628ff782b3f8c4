"""What a search costs beside its trials; and what is cheaper than brute force: a sweep, and packed trials.

The contenders are measured in turn, so that a machine whose speed drifts favours none of them, and each ratio is the
median of the ratios within a turn. All but the search itself is on one core, without Ray.
"""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metadist.algorithms.algorithm import Algorithm, State, Theta
from metadist.bench.record import Row
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.engine.packed import vectorised_packed
from metadist.engine.shard import Sums, vectorised
from metadist.engine.sweep import Grid
from metadist.errors import RunError
from metadist.search.ledger import read_ledger
from metadist.tasks.samplers import Sampler

TURNS = 5
RATES = (0.1, 0.19, 0.37, 0.72, 1.4, 2.7, 5.2, 10.0)
STEPS = (0, 1, 2, 3, 5)
PACKS = (2, 4, 8)
SEARCH_TURNS = 2

METHOD = {"name": "maml", "inner_lr": 0.5}
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
    return resolve(Config.model_validate({"algorithm": METHOD, "engine": {"device": "cpu"}, **JOBS[name]}))


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; seven to eight minutes."""
    rows = [row for name in JOBS for row in (*sweep_rows(name, TURNS, say), *packed_rows(name, TURNS, say))]
    return [*rows, *search_rows(say)]


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


def packed_rows(name: str, turns: int, say: Callable[[str], None]) -> list[Row]:
    """A shard of several trials that differ in θ and inner rate, tasks sampled: together against each by itself."""
    config = job(name)
    engine = Engine(config, [prepare(source, say) for source in config.data.sources])
    tasks, size = engine.tasks, engine.shard_tasks
    rows: list[Row] = []
    for count in PACKS:
        built = [Engine(config.with_values(algorithm={"inner_lr": rate}), engine.tables) for rate in RATES[:count]]
        methods = [one.algorithms.at(0) for one in built]
        thetas = [{key: value * (1 + 0.01 * n) for key, value in engine.blueprint.theta.items()} for n in range(count)]
        states = [engine.blueprint.state] * count
        given = (methods, thetas, states)
        contenders: dict[str, Callable[[], object]] = {
            "separate": partial(_each_by_itself, *given, tasks, size),
            "packed": partial(_together, *given, tasks, size),
        }
        for contender in contenders.values():  # warm
            contender()
        spent = in_turn(contenders, turns)
        rates = {which: [count * size / seconds for seconds in values] for which, values in spent.items()}
        told = ", ".join(f"{which} {statistics.median(found):,.0f}" for which, found in rates.items())
        say(f"{name}, {count} trials: {told} tasks/s")
        names = f"{count} trials' shards in turn, {name}", f"packed {count}, {name}"
        rows += pair(*names, rates["separate"], rates["packed"], "tasks/s")
    return rows


def _each_by_itself(
    methods: Sequence[Algorithm], thetas: Sequence[Theta], states: Sequence[State], tasks: Sampler, size: int
) -> list[Sums]:
    each = zip(methods, thetas, states, strict=True)
    return [vectorised(method, theta, state, tasks.sample(0, 0, size), tasks.ways, 0) for method, theta, state in each]


def _together(
    methods: Sequence[Algorithm], thetas: Sequence[Theta], states: Sequence[State], tasks: Sampler, size: int
) -> list[Sums]:
    return vectorised_packed(methods, thetas, states, tasks.sample(0, 0, size), tasks.ways, 0)


def search_rows(say: Callable[[str], None]) -> list[Row]:
    """Searches of eight equal trials on two cores: a process of Tune's for each trial, or packed in two processes.

    Wall time is from the first trial's start to the last one's end, without the start of Ray and the conclusion. Of
    the unpacked ones also what the search cost beside half of what its trials took. None where Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        say("without Ray there is no search to measure")
        return []
    rows = []
    for name in JOBS:
        walls: dict[str, list[float]] = {"alone": [], "packed": []}
        for turn in range(SEARCH_TURNS):
            for which, search in (("alone", {"concurrent": 2}), ("packed", {"concurrent": 8, "pack": 4})):
                wall, half = _searched(name, search)
                walls[which].append(3600 * EIGHT["trials"] / wall)
                if (name, which, turn) == ("stride2", "alone", 0):
                    plain = f"half the time of {EIGHT['trials']} trials"
                    rows = [
                        Row(plain, half, "s", None, None, 1),
                        Row("a search of them, two at once", wall, "s", plain, wall / half, 1),
                    ]
                    say(f"{EIGHT['trials']} trials two at once: {wall:.1f} s, {plain} {half:.1f} s")
            told = ", ".join(f"{k} {v[-1]:,.0f}" for k, v in walls.items())
            say(f"{name}, turn {turn + 1}/{SEARCH_TURNS}: {told} trials/h")
        names = f"search, a process per trial, {name}", f"search, packs of 4, {name}"
        rows += pair(*names, walls["alone"], walls["packed"], "trials/h")
    return rows


EIGHT: dict[str, Any] = {
    "searcher": "random", "scheduler": "fifo", "trials": 8,
    "baseline": False, "finalists": 1, "selection": 20, "fresh": 20,
}  # fmt: skip
"""Of trials that take equally long."""

BETWEEN = {"stride2": [0.5, 3], "regression": [0.003, 0.03]}
"""Inner rates at which nothing diverges."""


def _searched(name: str, search: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a search's trials, and half of what they took each by itself, added up."""
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place) / "search", Path(place) / "search.yaml"
        path.write_text(yaml.safe_dump(search_job(name, search)))
        words = [str(path), "--run-dir", str(folder)]
        code = "from metadist.cli import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", code, "search", *words], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise RunError(
                f"bench search: a search ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}"
            )
        events = read_ledger(folder / "ledger.jsonl")
    began = next(event["seconds"] for event in events if event["event"] == "trial")
    ends = [event for event in events if event["event"] == "end"]
    half = sum(event["facts"]["seconds"] for event in ends) / 2
    return max(event["seconds"] for event in ends) - began, half


def search_job(name: str, search: dict[str, Any]) -> dict[str, Any]:
    """A job file of eight trials. search: how many at once."""
    space = {"algorithm.inner_lr": {"loguniform": BETWEEN[name]}}
    return {"search": {**EIGHT, "space": space, **search}, **trial_job(name).model_dump(mode="json")}


def trial_job(name: str) -> Config:
    """Some meta-steps of one of `JOBS`: of the network with one query, of the sinusoids as they are."""
    few = {"queries": 1, "meta_batch": 16, "shard": 8} if name == "stride2" else {}
    return job(name).with_values(
        task=few,
        outer={"steps": STEPS_OF[name], "lr": 5e-3},
        cluster={"workers": 0},
        eval={"every": STEPS_OF[name] // 2, "val_episodes": 80, "test": False},
        tracking={"uri": "off"},
    )


STEPS_OF = {"stride2": 60, "regression": 400}


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
