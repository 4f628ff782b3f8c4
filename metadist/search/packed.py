"""Several trials in one process whose shards are computed together.

Each trial is an ordinary run with a thread, an aggregator and a run folder of its own; where it would compute the
shards of a meta-step, it waits for the others, and one of them computes those of all. They differ in numbers only:
`algorithm.inner_lr`, `outer.lr`, and `seed` where `task.seed` and `eval.seed` say what is sampled. Their bits are not
those of the same runs alone, so their results say `reproducible: false`. A trial that ends early leaves the others.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metadist.algorithms.algorithm import Comparing
from metadist.config import Config, flatten
from metadist.data.table import Table
from metadist.engine.device import settle
from metadist.engine.engine import Engine
from metadist.engine.exact import quantise, scales
from metadist.engine.packed import vectorised_packed
from metadist.engine.shard import Sums
from metadist.engine.sweep import Setting
from metadist.errors import ConfigError, MetadistError
from metadist.evaluation.protocol import score
from metadist.run import Finished, checked_tables, train_with
from metadist.runtime.aggregator import Broadcast, sealed
from metadist.runtime.in_process import InProcess
from metadist.runtime.train import Stopped
from metadist.runtime.worker import Introduction, Receipt, Worker
from metadist.search.job import SearchJob
from metadist.search.state import Decision, Trial

NUMBERS = ("algorithm.inner_lr", "outer.lr", "seed")
"""Keys in which packed trials may differ."""

Ask = Callable[[Trial, int, float, float], Decision]
"""What becomes of a trial, behind so many meta-steps with a score and its interval on validation; from any thread."""


def run_packed(
    job: SearchJob, trials: Sequence[Trial], folder: Path, ask: Ask, say: Callable[[str], None] = print
) -> dict[str, Finished | MetadistError]:
    """Train some trials together into `folder`/ID; how each ended, by id: Stopped where `ask` said so.

    Raises ConfigError where they do not go together.
    """
    configs = [job.config(trial.values).with_values(cluster={"workers": 0}, eval={"test": False}) for trial in trials]
    check_pack(configs)
    tables = checked_tables(configs[0], say)
    pack = Pack(configs, tables)
    ended: dict[str, Finished | MetadistError] = {}
    broken: list[BaseException] = []

    def one(number: int, trial: Trial) -> None:
        settle(configs[number].engine)  # threads of torch are counted by thread
        try:
            worker = Member(pack, number, lambda step, mean, ci95: ask(trial, step, mean, ci95))
            runtime = InProcess(configs[number], tables, None, worker)
            record = {"reproducible": False}
            ended[trial.id] = train_with(configs[number], tables, folder / trial.id, runtime, record)
        except MetadistError as end:
            ended[trial.id] = end
        except BaseException as error:  # noqa: BLE001, raised again where it can be caught
            broken.append(error)
        finally:
            pack.leave(number)

    threads = [
        threading.Thread(target=one, args=(n, trial), name=f"trial-{trial.id}") for n, trial in enumerate(trials)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    return ended


def check_pack(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot be computed together. Raises ConfigError."""
    first, *others = map(flatten, configs)
    differ = sorted({key for one in others for key in {*first, *one} if first.get(key) != one.get(key)})
    for key in differ:
        if key not in NUMBERS:
            raise ConfigError(f"{key}: packed trials are alike in it; they may differ in {', '.join(NUMBERS)}")
    config = configs[0]
    for key, value in (("task.seed", config.task.seed), ("eval.seed", config.eval.seed)):
        if "seed" in differ and value is None:
            raise ConfigError(f"{key}: packed trials of several seeds see the same tasks; say which seed samples them")
    if config.engine.mode != "vectorised":
        raise ConfigError(f"engine.mode: packed trials are computed vectorised, not as a {config.engine.mode}")
    if config.outer.remembers or config.outer.compression != "none":
        key = "local" if config.outer.local else "compression"
        raise ConfigError(f"outer.{key}: packed trials send their shards as they are; leave it out")


class Pack:
    """Where the trials meet, once in every meta-step."""

    def __init__(self, configs: Sequence[Config], tables: Sequence[Table]) -> None:
        self.tables = tables
        self.engines = [Engine(config, tables) for config in configs]
        if isinstance(self.engines[0].algorithms.at(0), Comparing):
            name = configs[0].algorithm.name
            raise ConfigError(f"algorithm.name: {name} compares the tasks of a shard and is not packed")
        self.alone = threading.Lock()
        """What a trial does for itself that takes a core."""
        self._meeting = threading.Condition()
        self._active = set(range(len(configs)))
        self._handed: dict[int, tuple[int, np.ndarray]] = {}
        self._found: dict[int, list[Sums] | BaseException] = {}

    def sums(self, number: int, step: int, values: np.ndarray) -> list[Sums]:
        """Those of every shard of the meta-step; waits until each trial has come with its θ."""
        with self._meeting:
            self._handed[number] = (step, values)
            while number not in self._found:
                if self._active <= self._handed.keys():
                    self._together()
                    self._meeting.notify_all()
                else:
                    self._meeting.wait()
            found = self._found.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found

    def leave(self, number: int) -> None:
        """The others go on without this one."""
        with self._meeting:
            self._active.discard(number)
            self._handed.pop(number, None)
            self._meeting.notify_all()

    def _together(self) -> None:
        numbers = sorted(self._handed)
        try:
            parts = self._computed(numbers)
            self._found |= {n: [shard[p] for shard in parts] for p, n in enumerate(numbers)}
        except Exception as error:  # noqa: BLE001, each trial ends of it
            self._found |= dict.fromkeys(numbers, error)
        self._handed.clear()

    def _computed(self, numbers: Sequence[int]) -> list[list[Sums]]:
        """By shard, then by trial."""
        engines = [self.engines[n] for n in numbers]
        (step,) = {self._handed[n][0] for n in numbers}
        named = [
            engine.blueprint.named(self._handed[n][1], engine.device)
            for n, engine in zip(numbers, engines, strict=True)
        ]
        tasks, size = engines[0].tasks, engines[0].shard_tasks
        return [
            vectorised_packed(
                [engine.algorithms.at(step) for engine in engines],
                [theta for theta, _ in named],
                [state for _, state in named],
                tasks.sample(step, shard * size, size),
                tasks.ways,
                step,
            )
            for shard in range(engines[0].shards)
        ]


class Member:
    """A trial's worker: what it computes, it computes with the others of its pack."""

    def __init__(self, pack: Pack, number: int, ask: Callable[[int, float, float], Decision]) -> None:
        self.pack, self.engine, self._number, self._ask = pack, pack.engines[number], number, ask
        self._step, self._sums = -1, list[Sums]()
        self._stopped, self._scores = False, list[np.ndarray]()

    def introduce(self) -> Introduction:
        worker = Worker(self.engine.config, [str(table.path) for table in self.pack.tables])
        worker.tables, worker.engine = list(self.pack.tables), self.engine
        with self.pack.alone:
            return worker.introduce()

    def compute(
        self, broadcast: Broadcast, step: int, attempt: int, shards: Sequence[int], *lanes: Any
    ) -> tuple[Any, ...]:
        """As `Worker.compute`, of all shards of a step. Raises Stopped where the last validation's answer was that."""
        if self._stopped:
            raise Stopped(f"stopped behind {step} meta-steps")
        if step != self._step:  # an attempt with other exponents has the same sums
            self._sums, self._step = self.pack.sums(self._number, step, broadcast.values), step
        layout = self.engine.blueprint.sums
        scale = scales(layout, broadcast.exponents)
        parts = {shard: quantise(layout, self._sums[shard], scale, self.engine.shards) for shard in shards}
        fitting = [shard for shard, part in parts.items() if part.fits]
        total = np.add.reduce([parts[shard].q for shard in fitting]) if fitting else np.zeros(0, dtype=np.int64)
        receipt = Receipt(
            os.getpid(),
            tuple(fitting),
            tuple(shard for shard, part in parts.items() if not part.finite),
            tuple(sorted({index for part in parts.values() if part.finite for index in part.exceeding})),
            True,
            (sealed(total),),
        )
        return receipt, total, *lanes

    def judge(self, values: np.ndarray, judged: Setting, split: str, first: int, tasks: int) -> dict[str, np.ndarray]:
        """As `Worker.judge`; at the end of a validation it is asked what becomes of the trial."""
        with self.pack.alone:
            found = self.engine.judge(values, judged, split, first, tasks)
        if split == "val":
            self._scores = [*(self._scores if first else []), found["score"]]
            if first + tasks == self.engine.config.eval.val_episodes:
                whole = score(np.concatenate(self._scores))
                self._stopped = self._ask(self._step + 1, whole.mean, whole.ci95) == "stop"
        return found
