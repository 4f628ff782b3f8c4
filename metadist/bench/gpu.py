"""On a GPU: case (c) at meta-batch 32 in one shard, in every precision, beside learn2learn; and the MAML paper's
Omniglot recipe, as a run is, with its validations, checkpoints and journal.

What fails is told and left out, so that the rest is measured. A GPU is waited for before a clock is read.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from metadist.bench.contenders import learn2learn, meta_gradient, peer
from metadist.bench.peers import job
from metadist.bench.record import Row, rates_rows
from metadist.config import Config, load
from metadist.data.table import Table
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents

TURNS = 5
META_BATCH = 32
PRECISIONS = ("full", "tf32", "bf16")

RECIPE, RECIPE_STEPS = "omniglot-maml-5w1s", 60_000
STEPS = 3_000
"""Meta-steps of it that are run; those behind the first third are timed."""


class Contender(NamedTuple):
    """shard: computes one, until it is done; calls: of it in one measurement."""

    shard: Callable[[], object]
    calls: int


def rows(
    table: Table,
    say: Callable[[str], None],
    device: str = "cuda",
    precisions: Sequence[str] = PRECISIONS,
    calls: int = 50,
    steps: int = STEPS,
    turns: int = TURNS,
) -> list[Row]:
    """Those of the suite; some three minutes."""
    found: list[Row] = []
    for order in (2, 1):
        what = f"(c) order {order}, {device}, meta-batch {META_BATCH}"
        rates = _measured(_contenders(order, table, device, precisions, calls, say), turns, what, say)
        found += rates_rows(rates, what, "learn2learn" if "learn2learn" in rates else "closed form")
    try:
        return [*found, *recipe_rows(device, steps, say)]
    except Exception as error:  # noqa: BLE001
        say(f"the recipe is left out: {_told(error)}")
        return found


def _contenders(
    order: int, table: Table, device: str, precisions: Sequence[str], calls: int, say: Callable[[str], None]
) -> dict[str, Contender]:
    config = job("c", order).with_values(task={"meta_batch": META_BATCH, "shard": META_BATCH})
    there = config.with_values(engine={"device": device}, cluster={"gpus": float(device == "cuda")})
    found = {}
    for precision in precisions:
        engine = Engine(there.with_values(engine={"mode": "graph", "precision": precision}), [table])
        found[f"graph, {precision}"] = Contender(_shards(engine), calls)
    found["closed form"] = Contender(_shards(Engine(there, [table])), max(1, calls // 10))
    try:
        peer("learn2learn")
    except ImportError as error:
        say(f"learn2learn is left out: {error}; `make peers` installs it")
        return found
    own = _learn2learn(there, table)

    def in_tf32() -> None:
        with _everything_in_tf32():
            own()

    return found | {"learn2learn": Contender(own, 1), "learn2learn, tf32": Contender(in_tf32, 1)}


def _shards(engine: Engine) -> Callable[[], object]:
    """One after the other, each from flat θ to integers on the host, for which the host waits."""
    values, exponents = engine.blueprint.initial(), first_exponents(engine.blueprint.sums)
    steps = itertools.count()
    return lambda: engine.part(values, exponents, next(steps), 0)


def _learn2learn(config: Config, table: Table) -> Callable[[], None]:
    engine = Engine(config, [table])
    theta = {name: value.to(engine.device) for name, value in engine.blueprint.theta.items()}
    gradient, episodes = meta_gradient(learn2learn, config, theta), engine.tasks.sample(0, 0, META_BATCH)

    def found() -> None:
        gradient(episodes)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    return found


@contextmanager
def _everything_in_tf32() -> Iterator[None]:
    """Convolutions as well as products."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _measured(each: dict[str, Contender], turns: int, what: str, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Tasks per second of each, turn by turn, behind one that warms up."""
    rates: dict[str, list[float]] = {}
    for name, contender in each.items():
        try:
            contender.shard()
            rates[name] = []
        except Exception as error:  # noqa: BLE001, whatever a library raises on a GPU
            say(f"{what}: {name} is left out: {_told(error)}")
    for _ in range(turns):
        for name in rates:
            shard, calls = each[name]
            began = time.perf_counter()
            for _ in range(calls):
                shard()
            rates[name].append(META_BATCH * calls / (time.perf_counter() - began))
    told = (f"{name} {statistics.median(found):,.0f}" for name, found in rates.items())
    say(f"{what}: {', '.join(told)} tasks/s")
    return rates


def recipe_rows(device: str, steps: int, say: Callable[[str], None]) -> list[Row]:
    """The MAML paper's Omniglot 5-way 1-shot on the embedded letters, a meta-batch as one shard, in this process."""
    from metadist.run import train
    from metadist.runtime.journal import read_metrics

    words = [
        "data.name=glyphs", "data.split=null", "task.shard=32", f"outer.steps={steps}", f"eval.every={2 * steps // 3}",
        "eval.test=false", f"engine.device={device}", "engine.mode=graph", "cluster.workers=0", "tracking.uri=off",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train(load(RECIPE, words), RECIPE, Path(folder) / "run").folder
        timed = read_metrics(run / "metrics.parquet")[steps // 3 - 1 :]
    alone = statistics.median(row["seconds"] for row in timed[1:])
    each = (timed[-1]["time"] - timed[0]["time"]) / (len(timed) - 1)
    minutes = each * RECIPE_STEPS / 60
    say(f"the recipe: {1000 * alone:.2f} ms a meta-step, {RECIPE_STEPS:,} of them in a run {minutes:.2f} minutes")
    return [
        Row(f"meta-step of the recipe, {device}", 1000 * alone, "ms", None, None, len(timed) - 1),
        Row(f"{RECIPE_STEPS:,} of them in a run, by {len(timed) - 1:,}", minutes, "minutes", None, None, 1),
    ]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
