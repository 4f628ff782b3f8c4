"""Searches whose trials are a formula, so that every way a search can go is gone through in no time."""

import json
import math
from collections.abc import Callable
from typing import Any

from metadist.search.director import Director, Finished, Record, Start, Wait
from metadist.search.job import SearchJob, checked
from metadist.search.ledger import Event
from metadist.search.state import Trial

SPACE: dict[str, Any] = {
    "algorithm.inner_lr": {"loguniform": [0.01, 5]},
    "algorithm.inner_steps": {"randint": [1, 5]},
    "algorithm.order": {"choice": [1, 2]},
}
GRID: dict[str, Any] = {
    "algorithm.inner_lr": {"grid": [0.05, 0.4, 3.0]},
    "algorithm.inner_steps": {"grid": [1, 3, 5]},
}
CONDITIONS = [{"when": {"algorithm.order": 2}, "need": {"algorithm.inner_steps": {"at_most": 3}}}]
BASE: dict[str, Any] = {
    "outer": {"steps": 8},
    "engine": {"device": "cpu"},
    "cluster": {"workers": 0},
    "eval": {"every": 1},
}
PACKED: dict[str, Any] = {"algorithm.inner_lr": {"loguniform": [0.01, 5]}, "seed": {"randint": [1, 5]}}
REGRESSION: dict[str, Any] = {"data": {"name": "sinusoid"}, "model": {"name": "mlp"}}


def job(base: dict[str, Any] | None = None, **search: Any) -> SearchJob:
    """A search of 8 meta-steps with a validation behind each."""
    space = PACKED if "pack" in search else GRID if search.get("searcher") == "grid" else SPACE
    return checked({**BASE, **(base or {}), "search": {"space": space, **search}}, "job")


class Kept:
    """A ledger in memory."""

    def __init__(self, events: list[Event] = []) -> None:  # noqa: B006, it is copied
        self.events = list(events)

    def append(self, event: Event) -> Event:
        self.events.append(json.loads(json.dumps(event, allow_nan=False)))
        return self.events[-1]


def score(trial: Trial, step: int) -> float:
    """Best at an inner rate of 0.7 and 3 steps; better with every step; NaN of some."""
    lr, steps = trial.values["algorithm.inner_lr"], trial.values.get("algorithm.inner_steps", 3)
    assert isinstance(lr, float) and isinstance(steps, int)
    if trial.index == 5 and step == 3:
        return math.nan
    return 0.9 - abs(math.log(lr / 0.7)) / 5 - abs(steps - 3) / 20 - 0.5 / step


def facts(trial: Trial) -> dict[str, Any]:
    return {"adaptation_mflop": 10.0 * int(str(trial.values.get("algorithm.inner_steps", 3))), "peak_memory": 1e9}


def dies(trial: Trial, step: int) -> bool:
    """Number 2's process once, number 4's always."""
    return step == 2 and (trial.index == 4 or (trial.index == 2 and trial.attempt == 0))


def diverges(trial: Trial, step: int) -> bool:
    return step == (3 if trial.index % 2 else 1) and float(str(trial.values["algorithm.inner_lr"])) > 2


Choose = Callable[[list[str]], str]


def search(
    job: SearchJob,
    ledger: Record,
    choose: Choose = min,
    until: Callable[[], bool] = lambda: False,
) -> Director:
    """Run a search to its end, or until its driver is killed.

    choose: the running trial that comes next, of all by their steps.
    """
    director = Director(job, ledger, clock=lambda: 0.0)
    running: dict[str, tuple[Trial, int]] = {}
    while True:
        while isinstance(answer := director.next(), Start):
            trial: Trial | None = answer.trial
            while trial is not None:
                assert trial.id not in running and trial.end is None
                # from its last checkpoint, which may be older than its last report
                running[trial.id] = trial, max(0, len(trial.reports) - 2)
                trial = director.beside(answer.trial)
            assert len(running) <= job.search.concurrent
            assert len({job.search.pack_of(int(id)) for id in running}) <= job.search.processes
        if isinstance(answer, Finished):
            assert not running
            return director
        assert isinstance(answer, Wait) and running
        if until():
            return director
        id = choose(sorted(running, key=lambda id: (running[id][1], id)))
        if not _goes_on(director, running, id):
            del running[id]


def _goes_on(director: Director, running: dict[str, tuple[Trial, int]], id: str) -> bool:
    """Let a trial make one step."""
    trial, step = running[id]
    step += 1
    running[id] = trial, step
    if dies(trial, step):
        director.end(id, "crashed", step - 1, "its process died", {})
        director.end(id, "crashed", step - 1, "its process died", {})  # Tune tells more than one of us
        return False
    if diverges(trial, step):
        director.end(id, "diverged", step - 1, "not finite", {})
        return False
    if director.report(id, step, {"score": score(trial, step), "ci95": 0.01}) == "stop":
        director.end(id, "stopped", step, "", {})
        return False
    if step == director.job.base.outer.steps:
        director.end(id, "finished", step, "", facts(trial))
        return False
    return True
