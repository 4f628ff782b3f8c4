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
from metadist.config import Config, resolve, to_yaml
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.engine.packed import vectorised_packed
from metadist.engine.shard import Sums, vectorised
from metadist.engine.sweep import Grid
from metadist.errors import RunError
from metadist.search.ledger import read_ledger
from metadist.tasks.episode import Episode

TURNS = 5
RATES = (0.1, 0.19, 0.37, 0.72, 1.4, 2.7, 5.2, 10.0)
STEPS = (0, 1, 2, 3, 5)
PACKS = (2, 4, 8)
TRIALS = (0.1, 0.3, 1.0, 3.0)
TRIAL_TURNS = 2

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
    """The suite; some seven minutes."""
    rows = [row for name in JOBS for row in (*sweep_rows(name, TURNS, say), *packed_rows(name, TURNS, say))]
    return [*rows, *trial_rows(say), *overhead_rows(say)]


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
    """A shard of several trials that differ in θ and inner rate: together against one after the other."""
    config = job(name)
    engine = Engine(config, [prepare(source, say) for source in config.data.sources])
    episodes, ways, size = engine.tasks.sample(0, 0, engine.shard_tasks), engine.tasks.ways, engine.shard_tasks
    rows: list[Row] = []
    for count in PACKS:
        built = [Engine(config.with_values(algorithm={"inner_lr": rate}), engine.tables) for rate in RATES[:count]]
        methods = [one.algorithms.at(0) for one in built]
        thetas = [{key: value * (1 + 0.01 * n) for key, value in engine.blueprint.theta.items()} for n in range(count)]
        states = [engine.blueprint.state] * count
        given = (methods, thetas, states)
        contenders: dict[str, Callable[[], object]] = {
            "separate": partial(_one_by_one, *given, episodes, ways),
            "packed": partial(vectorised_packed, *given, episodes, ways, 0),
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


def _one_by_one(
    methods: Sequence[Algorithm],
    thetas: Sequence[Theta],
    states: Sequence[State],
    episodes: Episode,
    ways: int,
) -> list[Sums]:
    each = zip(methods, thetas, states, strict=True)
    return [vectorised(method, theta, state, episodes, ways, 0) for method, theta, state in each]


def trial_rows(say: Callable[[str], None]) -> list[Row]:
    """Whole trials on one core, start-up and validations and all: a process for each, or packed in one process."""
    every: dict[str, list[float]] = {"alone": [], "packed": []}
    for turn in range(TRIAL_TURNS):
        with tempfile.TemporaryDirectory() as folder:
            for which, function in (("alone", _processes), ("packed", _packed)):
                began = time.perf_counter()
                function(Path(folder))
                every[which].append(3600 * len(TRIALS) / (time.perf_counter() - began))
        say(f"turn {turn + 1}/{TRIAL_TURNS}: " + ", ".join(f"{k} {v[-1]:,.0f}" for k, v in every.items()) + " trials/h")
    names = "one process per trial", f"packed {len(TRIALS)}, one process"
    return pair(*names, every["alone"], every["packed"], "trials/h")


def overhead_rows(say: Callable[[str], None]) -> list[Row]:
    """Eight equal trials, two at once: from the first one's start to the last one's end, beside half of what they took.

    Without the start of Ray. None where Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        say("without Ray there is no search to measure")
        return []
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name) / "search", Path(name) / "search.yaml"
        path.write_text(yaml.safe_dump({"search": EIGHT, **_trial_job().model_dump(mode="json")}))
        _command("from metadist.cli import main; main()", "search", str(path), "--run-dir", str(folder))
        events = read_ledger(folder / "ledger.jsonl")
    began = next(event["seconds"] for event in events if event["event"] == "trial")
    ends = [event for event in events if event["event"] == "end"]
    half = sum(event["facts"]["seconds"] for event in ends) / 2
    wall = max(event["seconds"] for event in ends) - began
    plain = f"half the time of {len(ends)} trials"
    say(f"{len(ends)} trials two at once: {wall:.1f} s, {plain} {half:.1f} s")
    return [
        Row(plain, half, "s", None, None, 1),
        Row("a search of them, two at once", wall, "s", plain, wall / half, 1),
    ]


EIGHT = {
    "space": {"algorithm.inner_lr": {"loguniform": [0.5, 3]}}, "searcher": "random", "scheduler": "fifo", "trials": 8,
    "concurrent": 2, "finalists": 1, "selection": 20, "fresh": 20,
}  # fmt: skip
"""Of trials that take equally long."""


def _processes(folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_text(to_yaml(_trial_job()))
    for n, rate in enumerate(TRIALS):
        words = [str(path), f"algorithm.inner_lr={rate}", "--run-dir", str(folder / f"alone-{n}")]
        _command("from metadist.cli import main; main()", "train", *words)


def _packed(folder: Path) -> None:
    path = folder / "search.yaml"
    raw = _trial_job().model_dump(mode="json")
    path.write_text(yaml.safe_dump({"search": {"space": {"algorithm.inner_lr": {"choice": list(TRIALS)}}}, **raw}))
    _command(PACKED, str(path), str(folder / "packed"))


PACKED = """
import sys
from pathlib import Path
from metadist.search.job import load_search
from metadist.search.packed import run_packed
from metadist.search.state import Trial
job = load_search(sys.argv[1])
points = [{"algorithm.inner_lr": rate} for rate in job.search.space["algorithm.inner_lr"].choice]
trials = [Trial(f"{n:03}", n, "random", point) for n, point in enumerate(points)]
for end in run_packed(job, trials, Path(sys.argv[2]), lambda *_: "go", lambda line: None).values():
    if isinstance(end, Exception):
        raise end
"""
"""What a packed process does."""


def _command(code: str, *words: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RunError(f"bench search: a trial ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}")


def _trial_job() -> Config:
    """60 meta-steps of the quickstart with one query."""
    return job("stride2").with_values(
        task={"queries": 1, "meta_batch": 16, "shard": 8},
        outer={"steps": 60, "lr": 5e-3},
        cluster={"workers": 0},
        eval={"every": 30, "val_episodes": 80, "test": False},
        tracking={"uri": "off"},
    )


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
