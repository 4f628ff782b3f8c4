"""Who is tried next, who goes on and who is stopped: the decisions of a search, and nothing of how trials are run.

The state is a fold of the ledger's events. Every call makes events from the state, has them durable, folds them in, and
only then answers; so whoever reads the ledger again stands where the search stood, and nothing that was decided is
decided anew. There is no random generator and no clock in what is decided, but for `search.budget`, which is an event.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from metadist.errors import ConfigError
from metadist.search.draw import grid, own_point, random_point
from metadist.search.events import OWN, fold, plain
from metadist.search.job import SearchJob
from metadist.search.keys import first_random
from metadist.search.ledger import Event
from metadist.search.population import moves
from metadist.search.schedulers import SCHEDULERS
from metadist.search.space import Point
from metadist.search.state import Decision, How, Origin, Trial
from metadist.search.tpe import tpe_point


class Record(Protocol):
    """Where events are kept, such as a Ledger; `append` returns when the event is durable, and as it will be read."""

    @property
    def events(self) -> Sequence[Event]: ...

    def append(self, event: Event) -> Event: ...


@dataclass(frozen=True)
class Start:
    """Run this trial: from its last checkpoint, if it has one."""

    trial: Trial


@dataclass(frozen=True)
class Graft:
    """Let these trials take over where others stand, each with its donor's id; then say `grafted`."""

    step: int
    moves: tuple[tuple[Trial, str], ...]


@dataclass(frozen=True)
class Wait:
    """Ask again when a trial has ended."""


@dataclass(frozen=True)
class Finished:
    """There is nothing to start any more, and nothing runs."""


class Director:
    """The decisions of one search. ledger: its events so far; `trials` is what they say, in the order of their index.

    clock: seconds, of which only differences are used.
    """

    def __init__(self, job: SearchJob, ledger: Record, clock: Callable[[], float] = time.monotonic) -> None:
        self.job = job
        self.trials: list[Trial] = []
        self._ledger, self._clock = ledger, clock
        own = [event["seconds"] for event in ledger.events if event.get("event") in OWN]
        self._spent, self._began = max(own, default=0.0), clock()  # by drivers before this one; when this one began
        self._running: set[str] = set()  # given out by this driver
        self.over = ""
        """Why no further trial is started, for a person."""
        self._graft: Graft | None = None
        self._grid: list[Point] = []  # its first points
        self._rest = grid(job)
        for event in ledger.events:
            self._apply(event)

    # --- what is asked -----------------------------------------------------------

    def next(self) -> Start | Graft | Wait | Finished:
        """What to do now. Raises ConfigError where the conditions allow no point at all, StorageError."""
        self._bury()
        if self._graft is not None:
            return self._graft
        packs = {self._pack(int(id)) for id in self._running}
        if len(packs) >= self.job.search.processes:
            return Wait()
        able = (one for one in self.trials if self._goes_on(one) and self._pack(one.index) not in packs)
        trial = next(able, None) or self._started()
        if trial is None:
            return self._turn() or (Wait() if self._running else Finished())
        self._running.add(trial.id)
        return Start(trial)

    def beside(self, first: Trial) -> Trial | None:
        """One more trial for the process of one that `next` has just given; None where its pack is whole.

        Raises as `next` does.
        """
        pack = self._pack(first.index)
        able = (one for one in self.trials if self._goes_on(one) and self._pack(one.index) == pack)
        trial = next(able, None)
        if trial is None and self._pack(len(self.trials)) == pack:
            trial = self._started()
        if trial is not None:
            self._running.add(trial.id)
        return trial

    def report(self, id: str, step: int, values: Mapping[str, float]) -> Decision:
        """Whether a trial goes on behind a validation. values: `score`, and what else was measured.

        Asked again, as after a resume, it answers what it answered before. Raises StorageError.
        """
        trial = self._trial(id)
        known = next((report.decision for report in trial.reports if report.step == step), None)
        if known == "pause" and step <= trial.released:  # its checkpoint is lost, its generation is over
            return "go"
        if known is not None:
            return known
        if trial.end is not None or trial.stopped:
            return "stop"
        why = self._why(trial, step, values["score"])
        told = {name: plain(float(value)) for name, value in values.items()}
        decision = "stop" if why else "pause" if self._pauses(trial, step) else "go"
        self._record("report", id=id, step=step, values=told, decision=decision, why=why)
        return trial.reports[-1].decision

    def grafted(self) -> None:
        """The moves are made. Raises StorageError."""
        if self._graft is not None:
            self._record("grafted", step=self._graft.step)

    def end(self, id: str, how: How, step: int, reason: str, facts: Mapping[str, Any]) -> None:
        """A trial has ended, or its process has (`crashed`). Told again, it changes nothing. Raises StorageError."""
        if id in self._running:
            if how == "paused":
                self._record("held", id=id)
            else:
                self._end(self._trial(id), how, step, reason, facts)
            self._running.discard(id)

    # --- what follows from the state -----------------------------------------------

    def _pack(self, index: int) -> int:
        return self.job.search.pack_of(index)

    def _goes_on(self, trial: Trial) -> bool:
        """Whether it has more to do, and nobody does it."""
        return trial.end is None and not trial.held and trial.id not in self._running

    def _started(self) -> Trial | None:
        """A new trial; None where there is none to come."""
        search, index = self.job.search, len(self.trials)
        self._look_at_the_clock()
        if self.over or index >= search.trials:
            return None
        try:
            proposed = self._proposed(index)
        except ConfigError as error:
            if index <= search.baseline:  # nothing of the space was tried
                raise
            self._record("exhausted", reason=str(error))
            return None
        if proposed is None:
            return None
        origin, values = proposed
        self._record("trial", id=f"{index:03d}", index=index, origin=origin, values=values)
        return self.trials[-1]

    def _proposed(self, index: int) -> tuple[Origin, Point] | None:
        search = self.job.search
        if search.baseline and index == 0:
            return "baseline", own_point(self.job)
        number = index - search.baseline
        match search.searcher:
            case "grid":
                self._grid += islice(self._rest, max(0, number + 1 - len(self._grid)))
                return ("grid", self._grid[number]) if number < len(self._grid) else None
            case "optuna" if number >= first_random(search):
                return "optuna", tpe_point(self.job, index, self.trials)
        return "random", random_point(self.job, index)

    def _why(self, trial: Trial, step: int, score: float) -> str:
        """Why a trial is stopped; empty where it goes on."""
        if trial.origin == "baseline" or step >= self.job.base.outer.steps:
            return ""
        return SCHEDULERS[self.job.search.scheduler](self.job, self.trials, trial, step, score)

    def _end(self, trial: Trial, how: How, step: int, reason: str, facts: Mapping[str, Any]) -> None:
        if trial.stopped:  # whatever else happened to it on its way out
            how, reason = "stopped", trial.reports[-1].why
        if how == "crashed" and trial.attempt < self.job.search.retries:
            self._record("retry", id=trial.id, attempt=trial.attempt + 1, reason=reason)
        else:
            self._record("end", id=trial.id, how=how, step=step, reason=reason, facts=plain(facts))

    def _pauses(self, trial: Trial, step: int) -> bool:
        """Whether a member waits for the others of its generation."""
        search, base = self.job.search, self.job.base
        member = search.scheduler == "pbt" and trial.origin != "baseline"
        return member and step < base.outer.steps and step % search.generation(base) == 0

    def _turn(self) -> Graft | None:
        """The end of a generation, when all its members stand there."""
        members = [one for one in self.trials if one.end is None and one.origin != "baseline"]
        if not members or not all(one.held for one in members):
            return None
        step = members[0].reports[-1].step
        found = moves(self.job, members, step)
        self._record("generation", step=step, moves=[move._asdict() for move in found])
        return self._graft

    def _bury(self) -> None:
        """Trials that were stopped by a driver that died before it heard of their end."""
        for trial in self.trials:
            if trial.end is None and trial.id not in self._running and trial.stopped:
                self._end(trial, "stopped", trial.reports[-1].step, "", {})

    def _look_at_the_clock(self) -> None:
        budget = self.job.search.budget
        if budget is not None and not self.over and self._seconds() >= 60 * budget:
            self._record("budget", minutes=budget)

    # --- the events ------------------------------------------------------------------

    def _seconds(self) -> float:
        return self._spent + self._clock() - self._began

    def _record(self, event: str, **what: Any) -> None:
        self._apply(self._ledger.append({"event": event, "seconds": round(self._seconds(), 3), **what}))

    def _apply(self, event: Event) -> None:
        fold(self.trials, event)
        budget = self.job.search.budget
        match event:
            case {"event": "budget", "minutes": minutes} if budget is not None and budget <= minutes:
                self.over = (
                    f"search.budget: its {budget:g} minutes are over; search.budget=MINUTES on resume gives more"
                )
            case {"event": "exhausted", "reason": reason}:
                self.over = str(reason)
            case {"event": "generation", "step": step, "moves": moved}:
                self._graft = Graft(step, tuple((self._trial(move["id"]), move["donor"]) for move in moved))
            case {"event": "grafted"}:
                self._graft = None

    def _trial(self, id: str) -> Trial:
        return self.trials[int(id)]
