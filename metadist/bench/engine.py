"""The engines beside one another on the same shards: tasks per second, where a shard's time goes, memory.

On one core; where there is a GPU, first of all there (`gpu.py`).
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from metadist.bench import gpu
from metadist.bench.peers import CASES, job
from metadist.bench.record import Row, rates_rows
from metadist.config import Config
from metadist.data.sources import prepare
from metadist.data.table import Table
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents, quantise
from metadist.engine.fit import give_back, status
from metadist.engine.shard import Sums, by_vmap, loop, vectorised

TURNS = 5
SHARD, META_BATCH = 8, 32

ENGINES: dict[str, Callable[..., Sums]] = {"loop": loop, "vmap": by_vmap, "closed form": vectorised}
"""What is compared; with a GPU also the closed form as a CUDA graph."""


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some four minutes on one core."""
    table = prepare(shard_job("c", 2).data.sources[0], say)
    rows: list[Row] = []
    if torch.cuda.is_available():
        rows += gpu.rows(table, say)
    else:
        say("no GPU here: neither the CUDA graph nor the recipe on it is measured")
    for case in CASES:
        for order in (2, 1):
            rows += engine_rows(case, order, table, TURNS, say)
        rows += phase_rows(case, table, TURNS)
        rows += memory_rows(case, say)
    return rows


def shard_job(case: str, order: int, **engine: Any) -> Config:
    """MAML in one of the cases of `peers`, in shards of 8."""
    return job(case, order).with_values(task={"meta_batch": META_BATCH, "shard": SHARD}, engine=engine)


def engine_rows(case: str, order: int, table: Table, turns: int, say: Callable[[str], None]) -> list[Row]:
    """Tasks per second of each engine on one shard."""
    engine = Engine(shard_job(case, order), [table])
    each: dict[str, Callable[[], object]] = {n: partial(one_shard, engine, f) for n, f in ENGINES.items()}
    spent = in_turn(each, turns)
    rates = {name: [SHARD / seconds for seconds in found] for name, found in spent.items()}
    what = f"({case}) order {order}"
    say(f"{what}: " + ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in rates.items()) + " tasks/s")
    return rates_rows(rates, what, "vmap")


def one_shard(engine: Engine, compute: Callable[..., Sums]) -> Sums:
    """Sampled and computed, at initial θ."""
    episodes = engine.tasks.sample(0, 0, engine.shard_tasks)
    theta, state = engine.blueprint.theta, engine.blueprint.state
    return compute(engine.algorithms.at(0), theta, state, episodes, engine.tasks.ways, 0)


def phase_rows(case: str, table: Table, turns: int) -> list[Row]:
    """Milliseconds of one shard of second order: θ from its flat form, sampling, meta-gradient, exact sum."""
    engine = Engine(shard_job(case, 2), [table])
    blueprint, values = engine.blueprint, engine.blueprint.initial()
    exponents = first_exponents(blueprint.sums)
    episodes, sums = engine.tasks.sample(0, 0, SHARD), one_shard(engine, vectorised)
    method = engine.algorithms.at(0)
    gradient = partial(vectorised, method, blueprint.theta, blueprint.state, episodes, engine.tasks.ways, 0)
    phases: dict[str, Callable[[], object]] = {
        "θ by name": partial(blueprint.named, values),
        "sampling": partial(engine.tasks.sample, 0, 0, SHARD),
        "meta-gradient": gradient,
        "exact sum": lambda: quantise(blueprint.sums, sums, exponents, engine.shards),
    }
    return [
        Row(f"{name} ({case}) order 2", 1000 * statistics.median(seconds), "ms/shard", None, None, turns)
        for name, seconds in in_turn(phases, turns).items()
    ]


def memory_rows(case: str, say: Callable[[str], None]) -> list[Row]:
    """What a shard of second order adds to the largest memory of a fresh process, engine by engine."""
    if not sys.platform.startswith("linux"):
        say(f"({case}) memory is left out: no /proc here")
        return []
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in ENGINES:
        here, there = context.Pipe()
        process = context.Process(target=_memory, args=(there, case, name), daemon=True)
        process.start()
        there.close()
        rows.append(Row(f"{name} ({case}) order 2", float(here.recv()), "MiB/shard", None, None, 1))
        process.join()
    say(f"({case}) " + ", ".join(f"{row.name.split(' (')[0]} {row.value:,.0f} MiB" for row in rows))
    return rows


def _memory(pipe: Connection, case: str, name: str) -> None:
    config, compute = shard_job(case, 2), ENGINES[name]
    tables = [prepare(config.data.sources[0])]
    engine = Engine(config, tables)
    # Libraries that any shard needs are there before one is measured.
    one_shard(Engine(config.with_values(task={"meta_batch": 1, "shard": 1}), tables), compute)
    give_back("cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the largest begins anew
    before = status("VmHWM")
    one_shard(engine, compute)
    pipe.send((status("VmHWM") - before) / 2**20)


def in_turn(each: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each, turn by turn, behind one that warms up."""
    spent: dict[str, list[float]] = {name: [] for name in each}
    for turn in range(turns + 1):
        for name, one in each.items():
            began = time.perf_counter()
            one()
            spent[name] += [time.perf_counter() - began] if turn else []
    return spent
