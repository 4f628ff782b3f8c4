"""Several trials in one process that sample every shard once and compute it together.

Each trial is an ordinary run with a thread, an aggregator and a run folder of its own; where it would compute the
shards of a meta-step, it waits for the others, and one of them computes those of all. They differ in numbers only
(`keys.PACKED`). Where a shard has a closed form their bits are those of the same runs alone; else they are not, and
their results say `reproducible: false`. A trial that ends early leaves the others. After a resume the trials may stand
at different meta-steps: those behind go first.
"""

import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.device import precision
from metadist.engine.engine import Engine
from metadist.engine.exact import quantise
from metadist.engine.packed import one_by_one, vectorised_packed
from metadist.engine.shard import Sums
from metadist.engine.sweep import Setting
from metadist.runtime.aggregator import Broadcast, Snapshot, sealed
from metadist.runtime.in_process import InProcess
from metadist.runtime.train import Stopped
from metadist.runtime.worker import Introduction, Receipt, Worker
from metadist.search.job import SearchJob
from metadist.search.state import Decision, End, Trial
from metadist.search.trial import attempt, log_of

Ask = Callable[[Trial, int, dict[str, float]], Decision]
"""Tells of a trial's validation behind so many meta-steps, and waits for what is decided."""

Ended = Callable[[Trial, End], None]


def run_pack(job: SearchJob, trials: Sequence[Trial], folder: Path, ask: Ask, ended: Ended) -> None:
    """Begin trials of the search in `folder` together, or go on with them, until each has ended.

    ask, ended: called one at a time, in the order of the meta-steps and within one in that of the trials, however the
    threads are scheduled. Raises StorageError, and whatever else is no trial's end.
    """
    pack, own = Pack(len(trials)), threading.local()

    def one(number: int, trial: Trial) -> None:
        try:
            with log_of(folder, trial).open("a", encoding="utf-8") as own.file:
                end = attempt(job, trial, folder, partial(pack.ask, number, partial(ask, trial)), pack.begin(number))
            pack.end(number, lambda: ended(trial, end))
        except BaseException as error:  # noqa: BLE001, raised again where it can be caught
            pack.broken = pack.broken or error
        finally:
            pack.leave(number)

    threads = [
        threading.Thread(target=one, args=(n, trial), name=f"trial-{trial.id}") for n, trial in enumerate(trials)
    ]
    with redirect_stdout(_ByThread(own, sys.stdout)), redirect_stderr(_ByThread(own, sys.stderr)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if pack.broken is not None:
        raise pack.broken


class _ByThread(io.TextIOBase):
    """What a trial's thread prints goes to the trial's log, what others print to where it would have gone."""

    def __init__(self, own: threading.local, others: TextIO) -> None:
        self._own, self._others = own, others

    @property
    def _file(self) -> TextIO:
        file: TextIO = getattr(self._own, "file", self._others)
        return self._others if file.closed else file

    def write(self, text: str) -> int:
        return self._file.write(text)

    def flush(self) -> None:
        self._file.flush()


ASKS, ENDS, COMPUTES = range(3)
"""What a trial comes to a meeting for, behind so many meta-steps, in the order in which it is done."""


class _Wish(NamedTuple):
    """engine, values: of who computes; call: of who asks or ends."""

    step: int
    what: int
    call: Callable[[], Any] | None = None
    engine: Engine | None = None
    values: np.ndarray | None = None


class Pack:
    """Where the trials meet: what the earliest of them came for is done when all have come."""

    def __init__(self, trials: int) -> None:
        self.alone = threading.Lock()
        """What a trial does for itself that takes a core."""
        self.broken: BaseException | None = None
        self._meeting = threading.Condition()
        self._active = set(range(trials))
        self._at = [0] * trials
        self._wishes: dict[int, _Wish] = {}
        self._granted: dict[int, Any] = {}

    def begin(self, number: int) -> Callable[..., InProcess]:
        """What makes a trial's runtime."""

        def runtime(config: Config, tables: list[Table], snapshot: Snapshot | None, *_: Any) -> InProcess:
            return InProcess(config, tables, snapshot, Member(self, number, config, tables))

        return runtime

    def sums(self, number: int, engine: Engine, step: int, values: np.ndarray) -> list[Sums]:
        """A trial's, of every shard of a meta-step."""
        found: list[Sums] = self._granted_to(number, _Wish(step, COMPUTES, engine=engine, values=values))
        return found

    def ask(self, number: int, ask: Callable[..., Decision], step: int, values: dict[str, float]) -> Decision:
        """What becomes of a trial behind a validation."""
        found: Decision = self._granted_to(number, _Wish(step, ASKS, lambda: ask(step, values)))
        return found

    def end(self, number: int, tell: Callable[[], None]) -> None:
        """Tell of a trial's end."""
        self._granted_to(number, _Wish(self._at[number], ENDS, tell))

    def leave(self, number: int) -> None:
        """The others go on without this one."""
        with self._meeting:
            self._active.discard(number)
            self._wishes.pop(number, None)
            self._meeting.notify_all()

    def _granted_to(self, number: int, wish: _Wish) -> Any:
        with self._meeting:
            self._at[number] = wish.step
            self._wishes[number] = wish
            while number not in self._granted:
                if self._active <= self._wishes.keys():
                    self._grant()
                    self._meeting.notify_all()
                else:
                    self._meeting.wait()
            found = self._granted.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found

    def _grant(self) -> None:
        """Do what the earliest have come for; all others wait meanwhile."""
        first = min(wish[:2] for wish in self._wishes.values())
        numbers = sorted(n for n, wish in self._wishes.items() if wish[:2] == first)
        wishes = [self._wishes.pop(n) for n in numbers]
        if self.broken is not None:
            self._granted |= {n: Stopped("the pack has ended") for n in numbers}
        elif first[1] == COMPUTES:
            self._granted |= dict(zip(numbers, _computed(wishes), strict=True))
        else:
            self._granted |= {n: _called(wish) for n, wish in zip(numbers, wishes, strict=True)}


def _called(wish: _Wish) -> Any:
    assert wish.call is not None
    try:
        return wish.call()
    except BaseException as error:  # noqa: BLE001, raised again by the trial's own thread
        return error


def _computed(wishes: Sequence[_Wish]) -> list[list[Sums]] | list[Exception]:
    """By trial, then by shard; what went wrong is each trial's."""
    engines = [wish.engine for wish in wishes if wish.engine is not None]
    first, step = engines[0], wishes[0].step
    try:
        named = [
            engine.blueprint.named(wish.values, engine.device)
            for engine, wish in zip(engines, wishes, strict=True)
            if wish.values is not None
        ]
        with precision(first.config.engine):
            shards = [
                vectorised_packed(
                    [engine.algorithms.at(step) for engine in engines],
                    [theta for theta, _ in named],
                    [state for _, state in named],
                    first.tasks.sample(step, shard * first.shard_tasks, first.shard_tasks),
                    first.tasks.ways,
                    step,
                )
                for shard in range(first.shards)
            ]
    except Exception as error:  # noqa: BLE001, each trial ends of it
        return [error] * len(wishes)
    return [[shard[place] for shard in shards] for place in range(len(wishes))]


class Member:
    """A trial's worker: what it computes, it computes with the others of its pack."""

    def __init__(self, pack: Pack, number: int, config: Config, tables: Sequence[Table]) -> None:
        self.pack, self._number = pack, number
        self._worker = Worker(config, [str(table.path) for table in tables])
        self._worker.tables = list(tables)
        with pack.alone:
            self.engine = self._worker.engine
        self._step, self._sums = -1, list[Sums]()

    @property
    def exact(self) -> bool:
        """A stage changes numbers only, so the first one speaks for all."""
        engine = self.engine
        alike = engine.config.engine.mode == "vectorised"  # no pack computes by a graph
        return alike and one_by_one(engine.algorithms.at(0), engine.tasks.sample(0, 0, 1))

    def introduce(self) -> Introduction:
        with self.pack.alone:
            return self._worker.introduce()

    def compute(
        self, broadcast: Broadcast, step: int, attempt: int, shards: Sequence[int], *lanes: Any
    ) -> tuple[Any, ...]:
        """As `Worker.compute`, of all shards of a step."""
        if step != self._step:  # an attempt with other exponents has the same sums
            self._sums, self._step = self.pack.sums(self._number, self.engine, step, broadcast.values), step
        layout = self.engine.blueprint.sums
        exponents, shard_count = broadcast.exponents, self.engine.shards
        parts = {shard: quantise(layout, self._sums[shard], exponents, shard_count) for shard in shards}
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
        """As `Worker.judge`; one trial at a time."""
        with self.pack.alone:
            return self.engine.judge(values, judged, split, first, tasks)
