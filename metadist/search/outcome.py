"""From the last trial to the answer: who goes on, who wins, by how much, and the one meta-test.

A winner to which a pack gave other bits than its own is trained again by itself; what is told from there on is of that
run.

Each line of it is an event in the ledger before the next one begins, so a search that is resumed repeats none.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from metadist.config import Config
from metadist.engine.engine import Blueprint, blueprint
from metadist.errors import Interrupted, MetadistError, RunError
from metadist.evaluation.protocol import Score, meta_test, score, settings
from metadist.measure import MEASURES, Measure
from metadist.run import checked_tables, start
from metadist.runtime.preemption import Preempted
from metadist.runtime.runtime import Runtime
from metadist.search import rows
from metadist.search.answer import by_itself, gain_line, run_of, write_answer
from metadist.search.events import plain
from metadist.search.job import SearchJob
from metadist.search.ledger import Event, Ledger
from metadist.search.state import Decision, Trial
from metadist.search.trial import run_trial

Say = Callable[[str], None]

SELECTION_DRAW, FRESH_DRAW = 0, 1
"""Of `eval.draw`. The trials' validations are of the first stream too, so the second one is new to all."""


class NothingFinished(MetadistError):
    """No trial took all its meta-steps."""

    exit_code = 5


def ranked(trials: Sequence[Trial], measure: Measure) -> list[Trial]:
    """Trials that took all their meta-steps, the best last validation first."""

    def place(trial: Trial) -> tuple[float, int]:
        found = trial.reports[-1].values["score"]
        return (_last_if_nan(-found if measure.higher_is_better else found), trial.index)

    done = [trial for trial in trials if trial.end and trial.end.how == "finished" and trial.reports]
    return sorted(done, key=place)


def _last_if_nan(place: float) -> float:
    return math.inf if math.isnan(place) else place


def conclude(job: SearchJob, trials: Sequence[Trial], folder: Path, ledger: Ledger, say: Say) -> None:
    """Judge the best trials again, tell the winner's gain on fresh tasks, test it once, and write all files.

    The trials' runs are in `folder/trials`. Where Ray is connected the judging uses its cluster. Raises
    NothingFinished.
    """
    measure = job.measure
    rows.save(job, trials, folder, ledger.events)
    best_first = ranked(trials, measure)
    if not best_first:
        write_answer(job, trials, folder, ledger.events)
        raise NothingFinished(f"{folder}: no trial finished: {_reasons(trials) or 'none was started'}")
    finalists = best_first[: job.search.finalists]
    baseline = next((trial for trial in best_first if trial.origin == "baseline"), None)
    if baseline is not None and baseline not in finalists:
        finalists = [*finalists, baseline]
    _once(ledger, "finalists", dict, ids=[trial.id for trial in finalists])

    lines = _Lines(job, folder, ledger, say)
    selection = {trial.id: lines.judged(trial).mean for trial in finalists}
    sign = -1.0 if measure.higher_is_better else 1.0
    known = sorted(finalists, key=lambda trial: _last_if_nan(sign * selection[trial.id]))
    winner = next((trial for trial in known if lines.stands(trial)), None)
    if winner is None:
        write_answer(job, trials, folder, ledger.events)
        raise NothingFinished(f"{folder}: no finalist finished by itself; see {folder / 'logs'}")
    _once(ledger, "selected", dict, id=winner.id, among=[trial.id for trial in finalists])
    lines.fresh(winner, baseline)
    if job.base.eval.test:
        lines.tested(winner)
    rows.save(job, trials, folder, ledger.events)
    write_answer(job, trials, folder, ledger.events)
    _once(ledger, "done", dict, id=winner.id)


def _once(ledger: Ledger, name: str, find: Callable[[], dict[str, Any]], **about: Any) -> Event:
    """The event of this name about this; where the ledger has none, what `find` gives becomes one."""
    for event in ledger.events:
        if event.get("event") == name and all(event.get(key) == value for key, value in about.items()):
            return event
    return ledger.append({"event": name, **about, **find()})


def _reasons(trials: Sequence[Trial]) -> str:
    """Ways in which they ended, with how many did, and one reason of each."""
    counts = Counter(trial.end.how for trial in trials if trial.end)
    first = {trial.end.how: trial.end.reason for trial in reversed(trials) if trial.end}
    return "; ".join(f"{count} {how}" + (f" ({first[how]})" if first[how] else "") for how, count in counts.items())


class _Lines(NamedTuple):
    """What is found out about a trial, each once."""

    job: SearchJob
    folder: Path
    ledger: Ledger
    say: Say

    def judged(self, trial: Trial) -> Score:
        """On the validation tasks among which the winner is chosen."""

        def find() -> dict[str, Any]:
            found = score(self._scores(trial, SELECTION_DRAW, self.job.search.selection))
            self.say(f"trial {trial.id}: {self._told(found)} on {self.job.search.selection:,} validation tasks")
            return {"episodes": self.job.search.selection, **_numbers(found)}

        return _score(_once(self.ledger, "judged", find, id=trial.id))

    def stands(self, trial: Trial) -> bool:
        """Whether a finalist's bits are those of its run by itself; where a pack's are not, it is trained again."""
        assert trial.end is not None
        if self.job.search.pack == 1 or trial.end.facts.get("reproducible", True):
            return True

        def find() -> dict[str, Any]:
            last: dict[str, float] = {}

            def go(step: int, values: dict[str, float]) -> Decision:
                self.say(f"trial {trial.id} by itself: {step:,}/{self.job.base.outer.steps:,}")
                last.update(values)
                return "go"

            self.say(f"trial {trial.id} was packed; it is trained again by itself")
            try:
                end = run_trial(self.job, by_itself(trial), self.folder, go)
            except (Interrupted, Preempted):
                raise KeyboardInterrupt from None  # of the search
            scores = {name: _number(last.get(name, math.nan)) for name in ("score", "ci95")}
            return {**end._asdict(), "facts": plain(end.facts), **scores}

        return bool(_once(self.ledger, "alone", find, id=trial.id)["how"] == "finished")

    def fresh(self, winner: Trial, baseline: Trial | None) -> Event:
        """Winner and baseline on the same tasks that no decision has seen.

        gain: mean over tasks of the difference, above 0 where the winner is better; gain_ci95: half-width of its
        95 % interval, 1.96 · s / √N of the differences.
        """
        search, measure = self.job.search, self.job.measure

        def find() -> dict[str, Any]:
            ours = self._scores(winner, FRESH_DRAW, search.fresh)
            told: dict[str, Any] = {"episodes": search.fresh, "winner": _numbers(score(ours))}
            if baseline is None:
                return told
            theirs = ours if baseline is winner else self._scores(baseline, FRESH_DRAW, search.fresh)
            gain = score((ours - theirs) * (1.0 if measure.higher_is_better else -1.0))
            return told | {
                "baseline": _numbers(score(theirs)),
                "gain": _number(gain.mean),
                "gain_ci95": _number(gain.ci95),
            }

        about = {"id": winner.id, "against": baseline.id if baseline else None}
        event = _once(self.ledger, "fresh", find, **about)
        self.say(f"winner: trial {winner.id}; {gain_line(event, measure)}")
        return event

    def tested(self, winner: Trial) -> Event:
        """The winner on meta-test, by the job's own `eval`."""

        def find() -> dict[str, Any]:
            with self._ready(winner) as (runtime, values, plan, config):
                first, *others = settings(config)
                self.say(f"meta-test of trial {winner.id}: {2 + len(others)} × {config.eval.episodes:,} episodes")
                tests = [meta_test(runtime, setting, values) for setting in (first, *others)]
                untrained = meta_test(runtime, first, plan.initial())
            name = MEASURES[config.kind].name
            told = {key: untrained[key] for key in (name, "ci95")}
            return {"test": _told_json(tests[0]), "also": [*map(_told_json, tests[1:])], "untrained": _told_json(told)}

        begun = any(event.get("event") == "test-begun" and event["id"] == winner.id for event in self.ledger.events)
        over = any(event.get("event") == "tested" and event["id"] == winner.id for event in self.ledger.events)
        if begun and not over:
            self.say("the meta-test was interrupted; the same tasks are judged again, to the same bits")
        _once(self.ledger, "test-begun", dict, id=winner.id)
        return _once(self.ledger, "tested", find, id=winner.id)

    def _scores(self, trial: Trial, draw: int, episodes: int) -> np.ndarray:
        """The metric of each task of a stream of meta-validation, float64 [episodes]."""
        with self._ready(trial) as (runtime, values, _, config):
            setting = settings(config.with_values(eval={"draw": draw}))[0]
            return runtime.judge(values, setting, "val", episodes)[self.job.measure.judged]

    @contextmanager
    def _ready(self, trial: Trial) -> Iterator[tuple[Runtime, np.ndarray, Blueprint, Config]]:
        """Something that judges the trial's last state, that state as one flat buffer, and its config."""
        config = self.job.run_of(trial)
        if _connected():
            config = config.with_values(cluster={"address": "auto"})
        theta = self.folder / "trials" / run_of(trial, self.ledger.events) / "theta.safetensors"
        tables = checked_tables(config, self.say)
        plan = blueprint(config, tables)
        try:
            named = load_file(theta)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{theta}: the state of a finished trial cannot be read: {error}") from error
        values = np.concatenate([np.ravel(named[name]) for name in plan.values.names])
        runtime = start(config, tables, None, self.say)
        try:
            yield runtime, values, plan, config
        finally:
            runtime.close()

    def _told(self, found: Score) -> str:
        return self.job.measure.interval(found.mean, found.ci95)


def _connected() -> bool:
    """Whether the search's cluster is still there; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _numbers(found: Score) -> dict[str, float | None]:
    return {"score": _number(found.mean), "ci95": _number(found.ci95)}


def _number(value: float) -> float | None:
    """JSON has no NaN: an interval of one episode is null."""
    return float(value) if math.isfinite(value) else None


def _told_json(told: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in told.items()}


def _score(event: Event) -> Score:
    return Score(*(math.nan if event[key] is None else event[key] for key in ("score", "ci95")))
