"""All that one process needs to compute shards of one run."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from metadist import algorithms
from metadist.algorithms.algorithm import Algorithm
from metadist.algorithms.objective import OBJECTIVES
from metadist.config import Config, Staged
from metadist.data.table import Table
from metadist.engine.compression import Compression
from metadist.engine.device import precision, settle
from metadist.engine.exact import Part, quantise
from metadist.engine.fit import out_of_memory, too_large
from metadist.engine.layout import Layout
from metadist.engine.local import descend
from metadist.engine.program import Judging, Program
from metadist.engine.shard import ENGINES, JUDGES
from metadist.engine.sweep import Grid, Setting, judge_grid
from metadist.errors import RunError
from metadist.spans import Spans
from metadist.tasks.episode import Drawn, Episode
from metadist.tasks.samplers import Sampler, evaluation_tasks, training_tasks

Found = TypeVar("Found")

Lane = dict[str, np.ndarray]
"""What a lane carries from one meta-step to the next: `memory.NAME` of a replica's optimizer, `residual.NAME`."""


class Blueprint:
    """Names, shapes and initial values of a run's tensors; the same wherever it is made.

    shape: of one input; classes: how many meta-train has.
    values: θ and state in one buffer; sums: what a shard returns; compression: how it is sent,
    None as integers.
    """

    def __init__(self, config: Config, shape: tuple[int, ...], classes: int = 0) -> None:
        self.shape, self.classes = shape, classes
        dtype = getattr(torch, config.engine.dtype)
        generator = torch.Generator().manual_seed(config.seed)
        theta, state = algorithms.for_training(config, shape, classes).init(generator)
        self.theta = {name: value.to(dtype) for name, value in theta.items()}
        self.state = {name: value.to(dtype) for name, value in state.items()}
        self.values = Layout.of(self.theta | self.state)
        scalar = torch.zeros((), dtype=dtype)
        self.sums = Layout.of(
            {f"gradient.{name}": value for name, value in self.theta.items()}
            | {f"statistics.{name}": value for name, value in self.state.items()}
            | {"metric.loss": scalar, "metric.score": scalar}
        )
        compressed = config.outer.compression != "none"
        self.compression = Compression(config.outer, self.sums, dtype) if compressed else None

    def initial(self) -> np.ndarray:
        """Initial θ and state as one flat buffer."""
        return self.values.flatten(self.theta | self.state).numpy()

    def named(
        self, flat: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """θ and state by name, in memory of their own."""
        return self.by_name(torch.from_numpy(np.array(flat)).to(device))

    def by_name(self, flat: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same of a tensor, on its device."""
        both = self.values.unflatten(flat)
        return {name: both[name] for name in self.theta}, {name: both[name] for name in self.state}


def blueprint(config: Config, tables: Sequence[Table]) -> Blueprint:
    """Of a resolved config and its data."""
    tasks = training_tasks(config, tables, "cpu")
    return Blueprint(config, tasks.shape, tasks.classes)


class Engine:
    """Computes shards and judges episodes for one resolved config on one device."""

    def __init__(self, config: Config, tables: Sequence[Table]) -> None:
        self.config, self.tables = config, tables
        self.device = settle(config.engine)
        self.tasks = training_tasks(config, tables, self.device)
        shape, classes = self.tasks.shape, self.tasks.classes
        self.algorithms = Staged(config, lambda here: algorithms.for_training(here, shape, classes))
        self.blueprint = Blueprint(config, shape, classes)
        self._compute = ENGINES[config.engine.mode]
        self._judge = JUDGES[config.engine.mode]
        self.shard_tasks = config.shard
        self.shards = config.lanes
        self._judged: dict[tuple[str, str], tuple[Sampler, Algorithm]] = {}
        self._judging: dict[tuple[str, str], Judging] = {}
        self.spans = Spans()
        self._ahead: dict[tuple[int, int], Episode] = {}
        self.programs = Staged(config, self._program) if config.engine.mode == "graph" else None

    def sums(self, theta: dict[str, Tensor], state: dict[str, Tensor], step: int, shard: int) -> dict[str, Tensor]:
        """Float sums of one shard of a meta-step, by name. Raises RunError where it does not fit into memory."""
        return self._fitting(lambda: self._sums(theta, state, step, shard))

    def _fitting(self, compute: Callable[[], Found]) -> Found:
        """What a shard's computation returns. Raises RunError where it does not fit into memory."""
        try:
            return compute()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Here the memory of what did not fit is free again, but for what a program holds.
        self.programs = self.programs and Staged(self.config, self._program)
        raise too_large(self.config, [str(table.path) for table in self.tables])

    def _sums(self, theta: dict[str, Tensor], state: dict[str, Tensor], step: int, shard: int) -> dict[str, Tensor]:
        with precision(self.config.engine):
            episodes = self._ahead.pop((step, shard), None) or self._sampled(step, shard)
            self._ahead = {key: kept for key, kept in self._ahead.items() if key[0] >= step}
            found = self._compute(self.algorithms.at(step), theta, state, episodes, self.tasks.ways, step)
            if self.config.tracking.profile and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else its time would be that of whoever waits for it next
            return found

    def sample_ahead(self, step: int, shard: int) -> None:
        """Draw a shard's tasks before it is computed; when that step has gone by, they are let go of.

        Where there is no memory for them, they are drawn when they are asked for.
        """
        if self.programs is not None or self.config.outer.local is not None:  # those draw them themselves, or many
            return
        try:
            self._ahead[step, shard] = self._sampled(step, shard)
        except (MemoryError, RuntimeError) as error:
            self._ahead.clear()
            if not out_of_memory(error):
                raise

    def _sampled(self, step: int, shard: int) -> Episode:
        with self.spans.of("sampling"):
            return self.tasks.sample(step, shard * self.shard_tasks, self.shard_tasks)

    def _program(self, here: Config) -> Program:
        """A stage's shard."""
        algorithm, named = algorithms.for_training(here, self.tasks.shape, self.tasks.classes), self.blueprint.by_name

        def draw(steps: Tensor, first: Tensor) -> Drawn:
            return self.tasks.draw(steps, first, self.shard_tasks)

        def compute(values: Tensor, drawn: Drawn) -> dict[str, Tensor]:
            with precision(here.engine):
                # No method that a program is made of reads the number of the meta-step.
                return self._compute(algorithm, *named(values), self.tasks.show(drawn), self.tasks.ways, 0)

        dtype = getattr(torch, here.engine.dtype)
        layouts, profiled = (self.blueprint.values, self.blueprint.sums), here.tracking.profile
        return Program(draw, compute, *layouts, dtype, self.device, self.shards, self.spans, profiled)

    def flat(self, values: np.ndarray, step: int, shard: int) -> np.ndarray:
        """The same as one buffer [total], in the parameters' dtype, from flat θ and state."""
        theta, state = self.blueprint.named(values, self.device)
        found: np.ndarray = self.blueprint.sums.flatten(self.sums(theta, state, step, shard)).detach().cpu().numpy()
        return found

    def part(
        self, values: np.ndarray, exponents: np.ndarray, step: int, shard: int, out: np.ndarray | None = None
    ) -> Part:
        """One shard's sums as integers: a pure function of its arguments and the config.

        out: int64 [total], where they may be written to.
        """
        if self.programs is not None:
            program = self.programs.at(step)
            return self._fitting(lambda: program(values, exponents, step, shard * self.shard_tasks))
        theta, state = self.blueprint.named(values, self.device)
        sums = self.sums(theta, state, step, shard)
        with self.spans.of("sum"):
            return quantise(self.blueprint.sums, sums, exponents, self.shards, out)

    def sent(
        self,
        values: np.ndarray,
        exponents: np.ndarray,
        step: int,
        number: int,
        lane: Lane,
        out: np.ndarray | None = None,
    ) -> tuple[Part, Lane]:
        """What a lane, a shard or a replica, sends to the aggregator, and what it carries on: a pure function.

        Where `outer.compression` says so, `q` is the payload, uint8; whether it fits is
        judged by what it decompresses to.
        """
        if self.config.outer.local is None and self.blueprint.compression is None:
            return self.part(values, exponents, step, number, out), {}
        theta, state = self.blueprint.named(values, self.device)
        carried = {name: torch.from_numpy(np.array(value)) for name, value in lane.items()}
        memory: dict[str, Tensor] = {}
        if self.config.outer.local is None:
            sums = self.sums(theta, state, step, number)
        else:
            sums, memory = self._round(theta, state, step, number, _below("memory.", carried))
        layout, compression = self.blueprint.sums, self.blueprint.compression
        if compression is None:
            with self.spans.of("sum"):
                part = quantise(layout, sums, exponents, self.shards)
            return part, _kept(memory, {})
        if not all(bool(value.isfinite().all()) for value in sums.values()):
            return Part(np.zeros(0, dtype=np.uint8), False, ()), {}
        with self.spans.of("sum"):
            payload, residual = compression.compress(sums, _below("residual.", carried))
            part = quantise(layout, compression.decompress(payload), exponents, self.shards)
        return part._replace(q=payload), _kept(memory, residual)

    def _round(
        self, theta: dict[str, Tensor], state: dict[str, Tensor], step: int, replica: int, memory: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The local meta-steps of a replica; each is the mean over its own shards."""
        tasks = self.config.task.meta_batch
        shards = range(replica * tasks // self.shard_tasks, (replica + 1) * tasks // self.shard_tasks)

        def batch(theta: Mapping[str, Tensor], state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
            total: dict[str, Tensor] = {}
            for shard in shards:
                sums = self.sums(dict(theta), dict(state), number, shard)
                total = {name: total.get(name, 0) + value.detach().double() for name, value in sums.items()}
            return {name: value / tasks for name, value in total.items()}

        return descend(self.config.outer, batch, theta, state, step, memory)

    def judge(self, values: np.ndarray, setting: Setting, split: str, first: int, tasks: int) -> dict[str, np.ndarray]:
        """Score and loss, float64 [tasks] each, of evaluation tasks first … first+tasks−1; of a grid's cells,
        [tasks, rates, steps].

        `setting` is the run's config with the evaluation's own `eval` section, or a grid around it. A whole shard
        is computed and cut, so that the shapes, and with them the bits, never depend on
        how many tasks are asked for.
        """
        judged = setting.judged if isinstance(setting, Grid) else setting
        key = (split, judged.eval.model_dump_json() + judged.algorithm.model_dump_json())  # of its stage
        if key not in self._judged:
            sampler = evaluation_tasks(judged, self.tables, split, self.device)
            self._judged[key] = (sampler, algorithms.for_evaluation(judged, sampler.shape, self.tasks.classes))
        sampler, algorithm = self._judged[key]
        try:
            if self.programs is not None and not isinstance(setting, Grid):
                if key not in self._judging:  # only the last one: a GPU has memory for each
                    self._judging.clear()
                    self._judging[key] = self._judging_program(judged, sampler, algorithm)
                found = self._judging[key](values, first)
            else:
                theta, state = self.blueprint.named(values, self.device)
                episodes = sampler.sample(judged.eval.draw, first, self.shard_tasks)
                given = (algorithm, OBJECTIVES[judged.kind], theta, state, episodes, sampler.ways)
                with precision(self.config.engine):
                    found = judge_grid(*given, setting) if isinstance(setting, Grid) else self._judge(*given)
            return {name: value[:tasks].double().cpu().numpy() for name, value in found.items()}
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        self._judging.clear()
        raise RunError(
            f"eval: {self.shard_tasks} tasks at once, those of a shard, do not fit into memory while they are judged; "
            "a smaller task.shard may, or fewer eval.queries"
        )

    def _judging_program(self, judged: Config, sampler: Sampler, algorithm: Algorithm) -> Judging:
        """Judging with one setting."""

        def judge(values: Tensor, first: Tensor) -> dict[str, Tensor]:
            with precision(self.config.engine):
                episodes = sampler.sample(judged.eval.draw, first, self.shard_tasks)
                given = (*self.blueprint.by_name(values), episodes, sampler.ways)
                return self._judge(algorithm, OBJECTIVES[judged.kind], *given)

        return Judging(judge, self.blueprint.values, getattr(torch, self.config.engine.dtype), self.device)


def _below(prefix: str, lane: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in lane.items() if name.startswith(prefix)}


def _kept(memory: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> Lane:
    both = {f"memory.{n}": value for n, value in memory.items()} | {f"residual.{n}": v for n, v in residual.items()}
    return {name: value.numpy() for name, value in both.items()}
