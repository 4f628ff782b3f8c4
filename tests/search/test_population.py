"""Population-based training: moves that depend on scores alone, and members whose line of ancestors is one run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.config import to_yaml
from metadist.errors import ConfigError
from metadist.run import train
from metadist.search.director import Director, Finished, Graft, Start, Wait
from metadist.search.draw import random_point
from metadist.search.graft import graft
from metadist.search.job import SearchJob, checked
from metadist.search.ledger import Ledger
from metadist.search.population import moves
from metadist.search.rows import early_rows, found, trial_rows
from metadist.search.state import Report, Trial
from metadist.search.trial import run_trial, trial_config

JOB: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "glyphs"},
    "task": {"ways": 3, "shots": 1, "queries": 1, "meta_batch": 4, "shard": 2},
    "model": {"name": "mlp", "width": 8, "layers": 1},
    "outer": {"steps": 9, "lr": 1e-2},
    "engine": {"device": "cpu"},
    "cluster": {"workers": 0},
    "eval": {"every": 3, "val_episodes": 10, "episodes": 10},
    "tracking": {"uri": "off"},
}
SEARCH: dict[str, Any] = {
    "space": {"algorithm.inner_lr": {"loguniform": [0.01, 3]}, "algorithm.inner_steps": {"choice": [1, 2, 3]}},
    "trials": 5, "concurrent": 1, "searcher": "random", "scheduler": "pbt", "baseline": False,
}  # fmt: skip


def job_of(**search: Any) -> SearchJob:
    return checked({**json.loads(json.dumps(JOB)), "search": {**SEARCH, **search}}, "pbt")


def population(job: SearchJob, scores: list[float]) -> list[Trial]:
    values = [{"algorithm.inner_lr": 0.1 * (index + 1), "algorithm.inner_steps": 2} for index in range(len(scores))]
    return [
        Trial(f"{index:03d}", index, "random", values[index], reports=[Report(3, {"score": score}, "pause")])
        for index, score in enumerate(scores)
    ]


def test_the_lowest_take_over_the_highest() -> None:
    job, drawn = job_of(quantile=0.25), random.Random(0)
    for _ in range(30):
        scores = [drawn.random() for _ in range(8)]
        found = moves(job, population(job, scores), 3)
        order = sorted(range(8), key=lambda index: scores[index])
        assert {int(move.id) for move in found} == set(order[:2])
        assert {int(move.donor) for move in found} <= set(order[-2:])
        for move in found:
            rate = move.values["algorithm.inner_lr"]
            assert isinstance(rate, float)
            assert 0.01 <= rate <= 3
            assert move.values["algorithm.inner_steps"] in (1, 2, 3)
    assert moves(job, population(job, [0.5]), 3) == [], "one alone has nobody to learn from"
    assert len(moves(job_of(quantile=0.5), population(job, [0.1, 0.2, 0.3]), 3)) == 1, "nobody is donor and replaced"


def test_values_are_perturbed_or_drawn_anew() -> None:
    """With resample=0 every rate is a factor from the donor's; with 1 they are drawn."""
    scores = [0.9, 0.1, 0.5, 0.6]
    (near,) = moves(job_of(resample=0.0), population(job_of(), scores), 3)
    assert near.values["algorithm.inner_lr"] in (pytest.approx(0.08), pytest.approx(0.125))
    assert near.values["algorithm.inner_steps"] in (1, 3)
    (anew,) = moves(job_of(resample=1.0), population(job_of(), scores), 3)
    assert anew.values["algorithm.inner_lr"] not in (pytest.approx(0.08), pytest.approx(0.125))
    assert moves(job_of(resample=1.0), population(job_of(), scores), 6)[0].values != anew.values, "of every generation"


def test_worse_is_more_where_the_score_is_an_error() -> None:
    raw = json.loads(json.dumps(JOB))
    del raw["task"]["ways"]
    raw |= {"data": {"name": "sinusoid"}}
    job = checked({**raw, "search": SEARCH}, "pbt")
    (move,) = moves(job, population(job, [4.0, 1.0, 2.0, 0.5]), 3)
    assert (move.id, move.donor) == ("000", "003")


# --- a director and a world without processes ------------------------------------


class Memory:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        self.events.append(json.loads(json.dumps(event)))
        return self.events[-1]


def score(trial: Trial, step: int) -> float:
    """Of a simulated training: some rates are better, and time helps."""
    rate = trial.now["algorithm.inner_lr"]
    assert isinstance(rate, float)
    return step * 0.01 - abs(rate - 0.5)


def simulate(job: SearchJob, memory: Memory, drawn: random.Random, until: int | None = None) -> Director:
    """Run a search whose trials are numbers, in a random order; `until`: so many events at most."""
    director = Director(job, memory, clock=lambda: 0.0)
    running: dict[str, list[Any]] = {}

    class Killed(Exception):
        pass

    append = memory.append

    def counted(event: dict[str, Any]) -> dict[str, Any]:
        if until is not None and len(memory.events) >= until:
            raise Killed
        return append(event)

    memory.append = counted  # type: ignore[method-assign]
    at = {trial.id: max([0, *(r.step for r in trial.reports)]) for trial in director.trials}
    try:
        while True:
            match director.next():
                case Start(trial):
                    paused = trial.reports and trial.reports[-1].decision == "pause" and not trial.held
                    again = (paused and trial.reports[-1].step > trial.released) or at.get(trial.id) == 9
                    running[trial.id] = [trial, at.get(trial.id, 0) - (3 if again else 0)]
                    continue
                case Graft(step, moved):
                    for trial, _ in moved:
                        at[trial.id] = step
                    director.grafted()
                    continue
                case Finished():
                    return director
                case Wait():
                    pass
            id = drawn.choice(sorted(running))
            trial, step = running[id]
            running[id][1] = at[id] = step + 3
            decision = director.report(id, step + 3, {"score": score(trial, step + 3)})
            if decision != "go" or step + 3 == job.base.outer.steps:
                del running[id]
                director.end(id, "paused" if decision == "pause" else "finished", step + 3, "", {})
    except Killed:
        return director
    finally:
        memory.append = append  # type: ignore[method-assign]


def told(director: Director) -> list[Any]:
    return [(t.id, t.values, t.stages, [(r.step, r.values["score"]) for r in t.reports]) for t in director.trials]


def test_generations_are_the_same_at_any_concurrency() -> None:
    alone = simulate(job_of(), Memory(), random.Random(0))
    assert any(trial.stages for trial in alone.trials), "some took over others"
    assert all(trial.end is not None and trial.reports[-1].step == 9 for trial in alone.trials)
    for concurrent in (2, 3, 8):
        for seed in range(5):
            found = simulate(job_of(concurrent=concurrent), Memory(), random.Random(seed))
            assert told(found) == told(alone)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_killed_behind_any_event_it_decides_the_same(concurrent: int) -> None:
    job, whole = job_of(concurrent=concurrent), Memory()
    undisturbed = simulate(job, whole, random.Random(0))
    for cut in range(len(whole.events)):
        memory = Memory()
        simulate(job, memory, random.Random(cut), until=cut)
        before = list(memory.events)
        assert told(simulate(job, memory, random.Random(cut + 1))) == told(undisturbed)
        assert memory.events[: len(before)] == before


def test_what_mattered_is_told_by_the_values_that_members_began_with() -> None:
    """Whoever took over another's state, too: its first score was its own."""
    job = job_of(trials=9, quantile=0.5)
    director = simulate(job, Memory(), random.Random(0))
    grafted = [trial for trial in director.trials if trial.drawn]
    assert len(grafted) > 3
    rows = early_rows(job, director.trials)
    for trial, row in zip(director.trials, rows, strict=True):
        rate = row["algorithm.inner_lr"]
        assert rate == random_point(job, trial.index)["algorithm.inner_lr"]
        assert row["early"] == pytest.approx(3 * 0.01 - abs(rate - 0.5))
    assert found(job, director.trials).shares()["algorithm.inner_lr"] > 0
    saved = trial_rows(job, director.trials)
    assert all((row["early"] is None) == bool(trial.drawn) for row, trial in zip(saved, director.trials, strict=True))


def test_the_baseline_is_no_member() -> None:
    found = simulate(job_of(baseline=True, concurrent=2), Memory(), random.Random(0))
    first = found.trials[0]
    assert first.origin == "baseline"
    assert not first.stages
    assert [report.decision for report in first.reports] == ["go"] * 3


# --- real runs ---------------------------------------------------------------------


def drive(job: SearchJob, folder: Path, between: Callable[[str], None] = lambda what: None) -> list[Trial]:
    """A search with real trials, one after the other in this process."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.jsonl")
    try:
        director = Director(job, ledger)
        while True:
            match director.next():
                case Start(trial):
                    id = trial.id
                    end = run_trial(job, trial, folder, lambda step, values, id=id: director.report(id, step, values))  # type: ignore[misc]
                    between("trial")
                    director.end(id, end.how, end.step, end.reason, end.facts)
                case Graft(_, moved):
                    for trial, donor in moved:
                        graft(folder / "trials" / donor, folder / "trials" / trial.id, trial_config(job, trial))
                        between("graft")
                    director.grafted()
                case Finished():
                    return director.trials
    finally:
        ledger.close()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trial]]:
    folder = tmp_path_factory.mktemp("pbt")
    return folder, drive(job_of(), folder)


def test_a_member_is_one_run_with_a_schedule(searched: tuple[Path, list[Trial]], tmp_path: Path) -> None:
    """Its line of ancestors, trained by itself as a job file, comes to its bits."""
    folder, trials = searched
    moved = [trial for trial in trials if trial.stages]
    assert moved
    for trial in moved:
        assert trial.end is not None
        assert trial.end.how == "finished"
        path = tmp_path / f"{trial.id}.yaml"
        path.write_text(to_yaml(job_of().run_of(trial)))
        assert [stage["at"] for stage in yaml.safe_load(path.read_text())["stages"]] == [at for at, _ in trial.stages]
        alone = train(job_of().run_of(trial).with_values(eval={"test": False}), "alone", tmp_path / trial.id).result
        assert alone["theta_sha256"] == trial.end.facts["theta_sha256"]
    assert not [path for path in (folder / "trials").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_interrupted_at_trials_and_grafts(seed: int, searched: tuple[Path, list[Trial]], tmp_path: Path) -> None:
    """Whoever goes on makes the moves again, from the ledger, and comes to the same."""

    class Killed(Exception):
        pass

    drawn = random.Random(seed)

    def maybe(what: str) -> None:
        if drawn.random() < 0.4:
            raise Killed

    for _ in range(60):
        try:
            trials = drive(job_of(), tmp_path / "search", maybe)
            break
        except Killed:
            for left in (tmp_path / "search" / "trials").glob(".*.old"):
                shutil.rmtree(left)
    expected = searched[1]
    facts = [(t.id, t.values, t.stages, t.end and t.end.facts["theta_sha256"]) for t in trials]
    assert facts == [(t.id, t.values, t.stages, t.end and t.end.facts["theta_sha256"]) for t in expected]


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (
            {"space": {"task.meta_batch": {"choice": [4, 8]}}},
            "search.space.task.meta_batch: search.scheduler=pbt changes",
        ),
        ({"space": {"seed": {"randint": [0, 9]}}}, "search.space.seed: search.scheduler=pbt changes values on the way"),
        ({"searcher": "optuna"}, "search.searcher: a population begins at random; valid is random"),
        ({"interval": 4}, "search.interval: 4 meta-steps are not a multiple of eval.every=3"),
        ({"perturb": [1.2, 0.8]}, "search.perturb.0: "),
        ({"scheduler": "asha", "interval": 3}, "search.interval: is read by search.scheduler=pbt only, not by asha"),
        ({"grace": 3}, "search.grace: is read by search.scheduler=asha or median only, not by pbt"),
    ],
)
def test_what_cannot_be(search: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(**search)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
