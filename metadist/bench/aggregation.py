"""What a meta-step costs beside its shards, on one machine: sums, their addition, the outer step and θ's way back.

Four workers as Ray actors send sums that they have already, to the aggregators that train, and
the next step's sums are sent when θ is there: the time of such a step is the cost. The first way is what a run on one
machine takes: with a small θ the aggregator is in the driver's process.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metadist.bench.record import Row
from metadist.config import Config, load, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Blueprint, Engine
from metadist.runtime.aggregation import Aggregation, in_the_driver
from metadist.runtime.aggregator import sealed
from metadist.runtime.cluster import connect, disconnect
from metadist.runtime.cut import Topology, assembled, cut, topology
from metadist.runtime.line import Line, Reached, heard
from metadist.runtime.sharing import Published, Shared, Space, Spaces
from metadist.runtime.worker import Receipt

WORKERS, ROUNDS, TURNS, STEPS = 4, 2, 3, 30

LINED, IN_DRIVER = "flat, by lines", "flat, in the driver"

WAYS: dict[str, dict[str, Any]] = {
    IN_DRIVER: {},
    LINED: {"address": "auto", "aggregators": 1, "sums": "flat"},
    "flat, by Ray alone": {"lines": False},
    "tree": {"sums": "tree"},
    "4 aggregators": {"aggregators": 4},
}
"""Keys of `cluster`."""

PLAIN = (IN_DRIVER, LINED, "flat, by Ray alone")


class Size(NamedTuple):
    """Parameters of a real network: name, its keys of `model`, the shape of an image; steps of one measurement."""

    name: str
    model: dict[str, Any]
    shape: tuple[int, int, int]
    steps: int


SIZES = (
    Size("no parameters to speak of", {"name": "mlp", "width": 1, "layers": 2, "norm": "none"}, (1, 1, 1), STEPS),
    Size("0.5 MB", {"name": "stride2"}, (1, 28, 28), STEPS),
    Size("8 MB", {"name": "resnet12", "activation": "leaky-relu", "width": 26}, (3, 84, 84), 8),
    Size("50 MB", {"name": "resnet12", "activation": "leaky-relu"}, (3, 84, 84), 5),
)
"""The first one is what the calls cost; then the MAML paper's network, ResNet-12 at 84 × 84 so narrow that it is just
above the size from which `cluster.aggregators: auto` cuts θ (no paper has it), and as it is."""

RECIPES = {"the quickstart": "quickstart", "the paper's recipe": "omniglot-maml-5w1s"}
"""Jobs whose steps have parameters of 0.5 MB; both computed on the embedded letters."""


class Sender(Reached):
    """A worker that has computed its shard already."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        self.blueprint = Blueprint(config, shape)
        self.pieces = cut(self.blueprint, topology(config.cluster, self.blueprint, 0).aggregators)
        self.q = np.random.default_rng(0).integers(-(2**20), 2**20, self.blueprint.sums.total)
        self.seal = sealed(self.q)
        self._spaces = Spaces()

    @cached_property
    def sums(self) -> list[Space]:
        """Two steps' sums, in shared memory, where a worker writes them."""
        found = [Space(self.q.nbytes) for _ in range(2)]
        for space in found:
            space.array(self.q.dtype.str, len(self.q))[:] = self.q
        return found

    def compute_here(
        self, published: Published, step: int, attempt: int, shards: Sequence[int]
    ) -> tuple[Receipt, Shared]:
        """The same by a line."""
        head, values = self._spaces.read(published.values)
        shared = self.sums[step % 2].shared(self.q.dtype.str, len(self.q))
        current = head[0] == step and bool(np.isfinite(values[:1]).all())
        return Receipt(os.getpid(), tuple(shards), (), (), current, (self.seal,)), shared

    def compute(self, step: int, shard: int, *broadcasts: Any) -> tuple[Any, ...]:
        """A receipt and the sums, once θ is there in one piece."""
        values = assembled(self.pieces, [one.values for one in broadcasts], self.blueprint.values.total)
        sums = [piece.part(self.q) for piece in self.pieces]
        seals = (self.seal,) if len(sums) == 1 else tuple(map(sealed, sums))
        current = bool(np.isfinite(values[:1]).all())
        return Receipt(os.getpid(), (shard,), (), (), current, seals), *sums


class _Contender:
    """Aggregators of one size and way, with senders."""

    def __init__(self, ray: Any, size: Size, keys: dict[str, Any], say: Callable[[str], None]) -> None:
        self.ray, self.steps, self.step = ray, size.steps, 0
        config = job(size.model, keys)
        blueprint = Blueprint(config, size.shape)
        self.sums = Aggregation(ray, config, blueprint, None, say)
        self.sums.start(None)
        actor = ray.remote(Sender).options(num_cpus=0)
        self.senders = [actor.remote(config, size.shape) for _ in range(WORKERS)]
        self.node = ray.get_runtime_context().get_node_id()
        addresses = ray.get([sender.listen.remote() for sender in self.senders]) if self.sums.lined else []
        lines = [Line.to(ray, *to) for to in zip(self.senders, addresses, strict=False)]
        self.lines = [line for line in lines if line is not None]
        if len(self.lines) < WORKERS:
            self.lines.clear()
        self.seconds()  # warm

    def seconds(self) -> float:
        """Of one meta-step, over some, after one that takes what the others left behind."""
        self._take_step()
        began = time.perf_counter()
        for _ in range(self.steps):
            self._take_step()
        return (time.perf_counter() - began) / self.steps

    def _take_step(self) -> None:
        step, self.step = self.step, self.step + 1
        if self.lines:
            self._by_lines(step)
        else:
            self._by_ray(step)
        lost, damaged = self.sums.gather(step, 0)
        report = self.sums.apply(step)()
        assert not lost | damaged | set(report.missing), "every sum arrives"

    def _by_lines(self, step: int) -> None:
        for number, line in enumerate(self.lines):
            line.call("compute_here", self.sums.published, step, 0, (number,))
        waiting = set(self.lines)
        while waiting:
            for line in heard(waiting, 1.0):
                for receipt, shared in line.answers().values():
                    waiting.discard(line)
                    self.sums.add(step, 0, receipt, (shared,), self.node)

    def _by_ray(self, step: int) -> None:
        results = 1 + len(self.sums.pieces)
        sent = [
            sender.compute.options(num_returns=results).remote(step, number, *self.sums.broadcast)
            for number, sender in enumerate(self.senders)
        ]
        waiting = {receipt: sums for receipt, *sums in sent}
        while waiting:
            (receipt,), _ = self.ray.wait(list(waiting), num_returns=1)
            self.sums.add(step, 0, self.ray.get(receipt), waiting.pop(receipt), self.node)

    def close(self) -> None:
        for sender in self.senders:
            self.ray.kill(sender)
        self.sums.end()


def job(model: dict[str, Any], cluster: dict[str, Any]) -> Config:
    """Four shards a step."""
    return resolve(
        Config.model_validate(
            {
                "task": {"meta_batch": WORKERS, "shard": 1},
                "model": model,
                "engine": {"device": "cpu"},
                "cluster": {"workers": WORKERS, **cluster},
            }
        )
    )


def rows(say: Callable[[str], None]) -> list[Row]:
    """Milliseconds a step by size and way, and their share of a whole step."""
    found: list[Row] = []
    largest = max(8 * Blueprint(job(size.model, {}), size.shape).sums.total for size in SIZES)
    ray, _ = connect(job(SIZES[0].model, {}).cluster, largest)
    costs: dict[str, float] = {}
    try:
        for size in SIZES:
            ways = WAYS if size.steps < STEPS or size.name == "0.5 MB" else {way: WAYS[way] for way in PLAIN}
            config = job(size.model, {})
            if not in_the_driver(config, Blueprint(config, size.shape), Topology()):
                ways = {way: keys for way, keys in ways.items() if way != IN_DRIVER}
            spent: dict[str, list[float]] = defaultdict(list)
            for number in range(ROUNDS):
                for way, keys in ways.items():
                    if way in PLAIN or number == 0:
                        spent[way] += _turns(ray, size, way, keys, say)
            ways = {way: keys for way, keys in ways.items() if spent[way]}
            first = next(iter(ways))
            costs[size.name] = statistics.median(spent[first])
            for way in ways:
                each, turns = spent[way], len(spent[way])
                name = f"{size.name}, {way}"
                ratio = statistics.median(each) / statistics.median(spent[first])
                baseline = None if way == first else f"{size.name}, {first}"
                found.append(Row(name, statistics.median(each), "ms", baseline, ratio if baseline else None, turns))
                say(f"{name}: {found[-1].value:.1f} ms a step")
    finally:
        disconnect()
    return found + _shares(costs["0.5 MB"], say)


def _turns(ray: Any, size: Size, way: str, keys: dict[str, Any], say: Callable[[str], None]) -> list[float]:
    """Milliseconds of a step, some times; none by lines where there are none.

    Nothing else is up: beside the memory of the other ways a step of 50 MB takes up to half as long again.
    """
    contender = _Contender(ray, size, keys, say)
    try:
        if way in (LINED, IN_DRIVER) and not contender.lines:
            say(f"{size.name}: there are no lines between processes here")
            return []
        return [1000 * contender.seconds() for _ in range(TURNS)]
    finally:
        contender.close()


def _shares(cost: float, say: Callable[[str], None]) -> list[Row]:
    """Of a step of each recipe with as many workers: the cost, against its shards on the cores that there are."""
    found = []
    for told, name in RECIPES.items():
        config = shards_of(name)
        seconds = 1000 * statistics.median(shard_seconds(config, 5, say))
        found.append(share(f"a step of {told}, 0.5 MB", cost, seconds, config.lanes, say))
    return found


def share(step: str, cost: float, seconds: float, shards: int, say: Callable[[str], None]) -> Row:
    """Of a step with so many shards, ms each, on the cores that there are."""
    cores = min(len(os.sched_getaffinity(0)), WORKERS, shards)
    part = 100 * cost / (cost + seconds * shards / cores)
    say(f"{step}: {shards} shards of {seconds:.1f} ms on {cores} cores; the cost is {part:.1f} % of it")
    return Row(f"share of {step}", part, "%", None, None, ROUNDS * TURNS)


def shards_of(name: str) -> Config:
    """A packaged job on the embedded letters, on a CPU in this process."""
    words = ["data.name=glyphs", "data.split=null", "engine.device=cpu", "cluster.workers=0"]
    return resolve(load(name, words))


def shard_seconds(config: Config, count: int, say: Callable[[str], None]) -> Sequence[float]:
    """Of some shards, one after the other."""
    engine = Engine(config, [prepare(source, say) for source in config.data.sources])
    theta, state = engine.blueprint.named(engine.blueprint.initial(), engine.device)
    engine.sums(theta, state, 0, 0)  # warm
    spent = []
    for step in range(count):
        began = time.perf_counter()
        engine.sums(theta, state, step, 0)
        spent.append(time.perf_counter() - began)
    return spent
