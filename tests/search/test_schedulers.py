"""Early stopping: Ray's own schedulers decide the same on random sequences."""

import math
import random

import pytest
from simulated_search import REGRESSION, job

from metadist.measure import ACCURACY
from metadist.search.schedulers import _apart, asha, fifo, median, rungs
from metadist.search.state import Report, Trial


class Stub:
    """What Ray's schedulers ask of a trial."""

    def __init__(self, id):
        self.trial_id = id


class Controller:
    """Nobody waits for a place, so nobody is paused."""

    def get_live_trials(self):
        return []


CLASSES = job(scheduler="asha")
NUMBERS = job(REGRESSION, scheduler="asha")


def a_job(chance):
    """A search with some grace, reduction and distance between validations."""
    every = chance.choice([1, 2, 5])
    found = chance.choice([CLASSES, NUMBERS])
    base = found.base.with_values(eval={"every": every}, outer={"steps": chance.randint(4, 40)})
    values = {"grace": every * chance.randint(1, 3), "reduction": chance.randint(2, 4), "samples": chance.randint(1, 4)}
    return found._replace(search=found.search.model_copy(update=values), base=base)


def compared(chance, task, ours, rays):
    """Reports of up to 8 trials in a random order, until all are stopped or have come to their end; the stops."""
    steps, every = task.base.outer.steps, task.base.eval.every
    trials = [Trial(f"{n:03d}", n, "random", {}) for n in range(chance.randint(2, 8))]
    stubs = {trial.id: Stub(trial.id) for trial in trials}
    for stub in stubs.values():
        rays.on_trial_add(Controller(), stub)
    running, stops, digits = list(trials), 0, chance.choice([1, 6])  # with one digit, scores are often equal
    while running:
        trial = chance.choice(running)
        step = min(steps, trial.reports[-1].step + every if trial.reports else every)
        score = round(chance.random() + step / steps * chance.random(), digits)
        result = {"training_iteration": step, "score": score}
        theirs = rays.on_trial_result(Controller(), stubs[trial.id], result)
        if step == steps:  # the trial ends by itself
            trial.reports.append(Report(step, {"score": score}, "go"))
            running.remove(trial)
            continue
        why = ours(task, trials, trial, step, score)
        assert (theirs == "STOP") == bool(why), (trial, step, score, why)
        trial.reports.append(Report(step, {"score": score}, "stop" if why else "go", why))
        if why:
            stops += 1
            running.remove(trial)
    return stops


def mode(task):
    return {"time_attr": "training_iteration", "metric": "score"} | {
        "mode": "max" if task.measure.higher_is_better else "min"
    }


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")  # Ray reads its environment when it is imported, so not before there is one
def test_asha_decides_as_ray_does():
    from ray.tune.schedulers import AsyncHyperBandScheduler

    stops = 0
    for seed in range(400):
        chance = random.Random(seed)
        task = a_job(chance)
        first, steps = task.search.first_rung(task.base), task.base.outer.steps
        if first > steps:
            assert not rungs(task)
            continue
        rays = AsyncHyperBandScheduler(
            max_t=steps, grace_period=first, reduction_factor=task.search.reduction, brackets=1, **mode(task)
        )
        stops += compared(chance, task, asha, rays)
    assert stops > 400


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")  # Ray reads its environment when it is imported, so not before there is one
def test_the_median_rule_decides_as_ray_does():
    from ray.tune.schedulers import MedianStoppingRule

    stops = 0
    for seed in range(400):
        chance = random.Random(seed)
        task = a_job(chance)
        rays = MedianStoppingRule(
            grace_period=task.search.first_rung(task.base), min_samples_required=task.search.samples, **mode(task)
        )
        stops += compared(chance, task, median, rays)
    assert stops > 400


def test_rungs_lie_before_the_end():
    task = job(scheduler="asha", reduction=2, grace=2)
    assert rungs(task) == [2, 4]
    assert rungs(job({"outer": {"steps": 9}}, scheduler="asha", reduction=2, grace=2)) == [2, 4, 8]
    assert rungs(job({"eval": {"every": 4}}, scheduler="asha", reduction=3)) == [4]


def trials_with(*scores):
    return [Trial(f"{n:03d}", n, "random", {}, 0, [Report(1, {"score": s}, "go")]) for n, s in enumerate(scores)]


@pytest.mark.parametrize("rule", [asha, median])
@pytest.mark.parametrize("base", [{}, REGRESSION])
def test_a_score_that_is_no_number_is_the_worst_and_moves_nobody_else(rule, base):
    name = rule.__name__
    task = job(base, scheduler=name, **({"samples": 1} if rule is median else {}))
    new = Trial("009", 9, "random", {})
    others = trials_with(0.5, math.nan, math.inf, -math.inf)
    assert rule(task, [*others, new], new, 1, math.nan)
    assert rule(task, [*others, new], new, 1, math.inf)
    assert not rule(task, [*others, new], new, 1, 0.5)
    assert not rule(task, [*trials_with(math.nan), new], new, 1, 0.1)
    worse = 0.4 if not base else 0.6
    assert rule(task, [*others, new], new, 1, worse)


def test_fifo_stops_nobody():
    new = Trial("009", 9, "random", {})
    assert not fifo(job(scheduler="fifo"), [*trials_with(0.5, 0.6, 0.7), new], new, 1, math.nan)


def test_a_reason_says_what_was_compared():
    new = Trial("009", 9, "random", {})
    others = trials_with(0.5, 0.7, 0.6)
    assert asha(job(scheduler="asha"), others, new, 1, 0.25) == (
        "25.0 % at step 1 is not among the best 1/2 of 4 trials, from 60.0 % on"
    )
    assert median(job(scheduler="median"), others, new, 1, 0.25) == (
        "25.0 % at best up to step 1 is worse than 60.0 %, the median of 3 others"
    )


def test_scores_that_look_alike_are_told_apart():
    assert _apart(ACCURACY, 0.8541, 0.8544) == ("85.41 %", "85.44 %")
    assert _apart(ACCURACY, 0.5, 0.9) == ("50.0 %", "90.0 %")
    assert _apart(ACCURACY, 0.5, 0.5) == ("50.0 %", "50.0 %")
