"""MAML beside learn2learn, TorchOpt and higher: one CPU core, the same tasks, the same θ, in turn.

All run in this process under our settings (one thread, freed memory kept), which do the peers no harm. Before
anything is timed, all of them compute the same meta-gradient in float64. Floating-point operations are counted by
`torch.utils.flop_counter` on a plain autograd loop over one task, padding included; the core's peak is the largest
rate of a matrix product and of a convolution without padding, measured in every turn. Their quotient with what a
contender took is its share of the core's limit; it may skip operations that are counted (padding, derivatives that
nobody needs).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metadist.algorithms import for_training
from metadist.bench.contenders import CONTENDERS, meta_gradient, peer, plain
from metadist.bench.record import Row, rates_rows
from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.data.table import Table
from metadist.engine.device import settle
from metadist.engine.engine import Blueprint
from metadist.engine.shard import loop, vectorised
from metadist.errors import RunError
from metadist.tasks.episode import Episode
from metadist.tasks.samplers import training_tasks

TURNS = 9
SHARD, FEW = 16, 4
"""Tasks of one measurement: of the vectorised engine, and of whoever takes one after the other."""

CASES: dict[str, dict[str, Any]] = {
    "a": {"model": "conv4", "ways": 5, "queries": 15, "inner_steps": 1},
    "b": {"model": "conv4", "ways": 5, "queries": 1, "inner_steps": 5},
    "c": {"model": "stride2", "ways": 5, "queries": 1, "inner_steps": 1},
    "d": {"model": "stride2", "ways": 20, "queries": 1, "inner_steps": 1},
}
"""1-shot, on the embedded letters."""

VECTORISED, LOOP, BASELINE = "metadist", "metadist, loop", "learn2learn"

Gradient = Callable[[Episode], dict[str, Tensor]]


class Contender(NamedTuple):
    """tasks: of one measurement; gradient: their meta-gradient's sum, by θ's names."""

    tasks: int
    gradient: Gradient


def job(case: str, order: int, dtype: str = "float32") -> Config:
    """MAML in one of `CASES`."""
    keys = dict(CASES[case])
    steps, model = keys.pop("inner_steps"), keys.pop("model")
    raw = {
        "model": {"name": model},
        "task": {"shots": 1, "meta_batch": 2 * SHARD, "shard": SHARD, **keys},
        "algorithm": {"name": "maml", "order": order, "inner_lr": 0.4, "inner_steps": steps},
        "engine": {"device": "cpu", "dtype": dtype},
    }
    return resolve(Config.model_validate(raw))


def run(say: Callable[[str], None]) -> list[Row]:
    """The suite; some six minutes on one core."""
    config = job("c", 2)
    settle(config.engine)
    table = prepare(config.data.sources[0], say)
    installed = _installed(say)
    return [row for case in CASES for order in (2, 1) for row in case_rows(case, order, installed, table, TURNS, say)]


def case_rows(
    case: str, order: int, installed: list[str], table: Table, turns: int, say: Callable[[str], None]
) -> list[Row]:
    """One case in one order."""
    what = f"({case}) order {order}"
    _check_alike(job(case, order, "float64"), installed, table)
    config = job(case, order)
    contenders = _contenders(config, installed, table)
    flops = operations(config, table)
    episodes = {n: training_tasks(config, [table], "cpu").sample(0, 0, n) for n in (SHARD, FEW)}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[float] = []
    for turn in range(turns + 1):
        peak = peak_flops()
        for name, (tasks, gradient) in contenders.items():
            began = time.perf_counter()
            gradient(episodes[tasks])
            spent[name] += [(time.perf_counter() - began) / tasks] if turn else []  # the first one warms up
        peaks += [peak] if turn else []
    rates = {name: [1 / seconds for seconds in each] for name, each in spent.items()}
    say(f"{what}: " + ", ".join(f"{name} {statistics.median(each):.1f}" for name, each in rates.items()) + " tasks/s")
    rows = rates_rows(rates, what, BASELINE)
    shares = [flops * rate / peak for rate, peak in zip(rates[VECTORISED], peaks, strict=True)]
    rows.append(Row(f"share of the core's limit {what}", statistics.median(shares), "of peak", None, None, turns))
    rows.append(Row(f"operations {what}", flops / 1e9, "GFLOP/task", None, None, 1))
    rows.append(Row(f"peak beside {what}", statistics.median(peaks) / 1e9, "GFLOP/s", None, None, turns))
    return rows


def operations(config: Config, table: Table) -> float:
    """Floating-point operations of one task, in convolutions and matrix products."""
    blueprint = Blueprint(config, tuple(table.images.shape[1:]))
    gradient = meta_gradient(plain, config, blueprint.theta)
    episode = training_tasks(config, [table], "cpu").sample(0, 0, 1)
    with FlopCounterMode(display=False) as counter:
        gradient(episode)
    return float(counter.get_total_flops())


def peak_flops() -> float:
    """Of this thread, per second: the larger of a matrix product's and a convolution's."""
    a, x, weight = torch.randn(768, 768), torch.randn(64, 64, 16, 16), torch.randn(64, 64, 3, 3)
    x = x.to(memory_format=torch.channels_last)
    probes: list[tuple[int, Callable[[], Tensor]]] = [
        (2 * 768**3, lambda: a @ a),
        (2 * 64 * 14 * 14 * 9 * 64 * 64, lambda: F.conv2d(x, weight)),
    ]
    best = 0.0
    for flops, probe in probes:
        probe()
        for _ in range(3):
            began = time.perf_counter()
            probe()
            best = max(best, flops / (time.perf_counter() - began))
    return best


def _contenders(config: Config, installed: list[str], table: Table) -> dict[str, Contender]:
    blueprint = Blueprint(config, tuple(table.images.shape[1:]))
    method, ways = for_training(config, blueprint.shape), config.task.ways

    def own(engine: Callable[..., dict[str, Tensor]], episodes: Episode) -> dict[str, Tensor]:
        sums = engine(method, blueprint.theta, blueprint.state, episodes, ways, 0)
        return {name: sums[f"gradient.{name}"] for name in blueprint.theta}

    assert config.algorithm.name == "maml"
    found = {VECTORISED: Contender(SHARD, partial(own, vectorised)), LOOP: Contender(FEW, partial(own, loop))}
    for name in installed:
        contender, orders = CONTENDERS[name]
        if config.algorithm.order in orders:
            found[name] = Contender(FEW, meta_gradient(contender, config, blueprint.theta))
    return found


def _check_alike(config: Config, installed: list[str], table: Table) -> None:
    """Raises RunError where a contender computes something else."""
    episodes = training_tasks(config, [table], "cpu").sample(0, 0, 2)
    found = {name: one.gradient(episodes) for name, one in _contenders(config, installed, table).items()}
    for contender, gradient in found.items():
        for name, value in gradient.items():
            right = found[LOOP][name]
            difference = float((value - right).abs().max() / right.abs().max().clamp(min=1e-6))
            if difference > TOLERANCE:
                raise RunError(f"bench peers: {contender} and {LOOP} differ in {name} by {difference:.1e}")


TOLERANCE = 1e-7
"""Of a tensor's largest element, in float64: what is left of a ReLU or a maximum at a tie is far more."""


def _installed(say: Callable[[str], None]) -> list[str]:
    found = []
    for name in CONTENDERS:
        try:
            peer(name.lower())
            found.append(name)
        except ImportError as error:
            say(f"{name} is left out: {error}; `make peers` installs it")
    return found
