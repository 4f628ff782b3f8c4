"""On a GPU: case (c) at meta-batch 32 in one shard, in every precision, beside learn2learn and a plain loop; and the
MAML paper's Omniglot recipe, as a run is, with its validations, checkpoints and journal.

What fails is told and left out, so that the rest is measured. A GPU is waited for before a clock is read.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from metadist.bench.contenders import OneTask, learn2learn, meta_gradient, peer, plain
from metadist.bench.peers import job
from metadist.bench.record import Row, rates_rows
from metadist.config import Config, load
from metadist.data.table import Table
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents
from metadist.errors import RunError

TURNS = 5
META_BATCH = 32
PRECISIONS = ("full", "tf32", "bf16")

RECIPE, RECIPE_STEPS = "omniglot-maml-5w1s", 60_000
STEPS = 3_000
"""Meta-steps of it that are run; those behind the first third are timed, with one validation, as the recipe has."""


Shard = Callable[[], object]
"""Computes one, until it is done."""


class Contender(NamedTuple):
    """made: sets up what is measured; calls: of it in one measurement."""

    made: Callable[[], Shard]
    calls: int


def rows(
    table: Table,
    say: Callable[[str], None],
    device: str = "cuda",
    precisions: Sequence[str] = PRECISIONS,
    calls: int = 50,
    steps: int = STEPS,
    turns: int = TURNS,
    meta_batch: int = META_BATCH,
) -> list[Row]:
    """Those of the suite; some three minutes."""
    found: list[Row] = []
    for order in (2, 1):
        what = f"(c) order {order}, {device}, meta-batch {meta_batch}"
        each = _contenders(order, table, device, precisions, calls, meta_batch)
        rates = _measured(each, meta_batch, turns, what, say)
        found += rates_rows(rates, what, "learn2learn" if "learn2learn" in rates else "plain loop")
    try:
        return [*found, *recipe_rows(device, steps, say)]
    except Exception as error:  # noqa: BLE001
        say(f"the recipe is left out: {_told(error)}")
        return found


def _contenders(
    order: int, table: Table, device: str, precisions: Sequence[str], calls: int, meta_batch: int
) -> dict[str, Contender]:
    """Graphs last: what follows a capture that failed may fail for it."""
    config = job("c", order).with_values(task={"meta_batch": meta_batch, "shard": meta_batch})
    there = config.with_values(engine={"device": device}, cluster={"gpus": float(device == "cuda")})

    def in_library() -> Shard:
        peer("learn2learn")
        return _each_task(learn2learn, there, table)

    found = {
        "learn2learn": Contender(in_library, 1),
        "learn2learn, tf32": Contender(lambda: _everything_in_tf32(in_library()), 1),
        "plain loop": Contender(lambda: _each_task(plain, there, table), 1),
        "closed form": Contender(lambda: _shards(there, table), max(1, calls // 10)),
    }
    for precision in precisions:
        graph = there.with_values(engine={"mode": "graph", "precision": precision})
        found[f"graph, {precision}"] = Contender(partial(_shards, graph, table), calls)
    return found


def _shards(config: Config, table: Table) -> Shard:
    """One after the other, each from flat θ to integers on the host, for which the host waits."""
    engine = Engine(config, [table])
    values, exponents = engine.blueprint.initial(), first_exponents(engine.blueprint.sums)
    steps = itertools.count()

    def shard() -> None:
        if not engine.part(values, exponents, next(steps), 0).fits:
            raise RunError("its sums are not finite, or beyond their bound")

    return shard


def _each_task(one_task: Callable[[Config, nn.Sequential], OneTask], config: Config, table: Table) -> Shard:
    """By the loop of a library, or of nobody's; its kernels may be of those whose bits vary."""
    engine = Engine(config, [table])
    theta = {name: value.to(engine.device) for name, value in engine.blueprint.theta.items()}
    gradient = meta_gradient(one_task, config, theta)
    episodes = engine.tasks.sample(0, 0, config.task.meta_batch)

    def shard() -> None:
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        try:
            gradient(episodes)
        finally:
            torch.set_deterministic_debug_mode(before)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    return shard


def _everything_in_tf32(shard: Shard) -> Shard:
    """Convolutions as well as products."""

    def found() -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        try:
            shard()
        finally:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    return found


def _measured(
    each: Mapping[str, Contender], tasks: int, turns: int, what: str, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Tasks per second of each, turn by turn, behind one that warms up; of all that can be measured."""
    rates: dict[str, list[float]] = {}
    shards: dict[str, Shard] = {}

    def measure(name: str, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            shards[name]()
        return tasks * calls / (time.perf_counter() - began)

    for turn in range(turns + 1):
        for name, contender in each.items():
            if turn and name not in shards:
                continue
            try:
                if turn:
                    rates[name].append(measure(name, contender.calls))
                else:
                    shards[name], rates[name] = contender.made(), []
                    measure(name, 1)
            except Exception as error:  # noqa: BLE001, whatever a library raises on a GPU
                hint = "; `make peers` installs it" if isinstance(error, ImportError) else ""
                say(f"{what}: {name} is left out: {_told(error)}{hint}")
                shards.pop(name, None)  # with the memory that it has
                rates.pop(name, None)
    told = (f"{name} {statistics.median(found):,.0f}" for name, found in rates.items())
    say(f"{what}: {', '.join(told) or 'nothing'} tasks/s")
    return rates


def recipe_rows(device: str, steps: int, say: Callable[[str], None]) -> list[Row]:
    """The MAML paper's Omniglot 5-way 1-shot on the embedded letters, a meta-batch as one shard, in this process."""
    from metadist.run import train
    from metadist.runtime.journal import read_metrics

    words = [
        "data.name=glyphs", "data.split=null", "task.shard=32", f"outer.steps={steps}", f"eval.every={steps // 3}",
        "eval.test=false", f"engine.device={device}", "engine.mode=graph", "cluster.workers=0", "tracking.uri=off",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train(load(RECIPE, words), RECIPE, Path(folder) / "run").folder
        # From behind the first validation, in which a GPU's libraries are loaded, to before the last one.
        timed = read_metrics(run / "metrics.parquet")[steps // 3 :]
    alone = statistics.median(row["seconds"] for row in timed[1:])
    each = (timed[-1]["time"] - timed[0]["time"]) / (len(timed) - 1)
    minutes = each * RECIPE_STEPS / 60
    say(f"the recipe: {1000 * alone:.2f} ms a meta-step, {RECIPE_STEPS:,} of them in a run {minutes:.2f} minutes")
    return [
        Row(f"meta-step of the recipe, {device}", 1000 * alone, "ms", None, None, len(timed) - 1),
        Row(f"{RECIPE_STEPS:,} of them in a run, by {len(timed) - 1:,}", minutes, "minutes", None, None, 1),
    ]


def _told(error: BaseException) -> str:
    """And what it came from: where a capture fails, torch's last word is that it failed."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return _named(error) if first is error else f"{_named(error)}, after {_named(first)}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
