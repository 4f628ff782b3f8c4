"""Optuna's proposals: a function of seed, index and history; better than chance; within the conditions."""

import json
import math

import optuna
import pytest
from simulated_search import BASE, CONDITIONS, REGRESSION, SPACE, Kept, facts, job, search

from metadist.search.draw import random_point
from metadist.search.events import trials_of
from metadist.search.job import checked
from metadist.search.state import End, Report, Trial
from metadist.search.tpe import tpe_point


def past(task, ends, value=None):
    """Finished trials at random points, each as `ends` says; value: of a point."""
    found = []
    for index, how in enumerate(ends):
        point = random_point(task, index)
        score = 0.5 if value is None else value(point)
        trial = Trial(f"{index:03d}", index, "random", point, 0, [Report(4, {"score": score}, "go")])
        trial.end = None if how is None else End(how, 4, "", facts(trial) if "algorithm.inner_steps" in point else {})
        found.append(trial)
    return found


def near(point):
    """Best at an inner rate of 0.7."""
    return 0.9 - abs(math.log(point["algorithm.inner_lr"] / 0.7)) / 5


ENDS = ("finished", "stopped", "diverged", None, "crashed", "memory", "finished", "refused", "failed") * 2


def test_it_is_a_function_of_seed_index_and_history():
    task = job(conditions=CONDITIONS)
    history = past(task, ENDS, near)
    found = [tpe_point(task, index, history) for index in (18, 19)]
    assert found[0] != found[1]
    optuna.create_study().optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)  # whatever else goes on
    assert [tpe_point(task, index, history) for index in (18, 19)] == found
    assert tpe_point(task._replace(search=task.search.model_copy(update={"seed": 5})), 18, history) != found[0]
    assert tpe_point(task, 18, history[:-9]) != found[0]


def test_a_history_that_went_through_the_ledger_gives_the_same():
    task, kept = job(concurrent=1, trials=14, conditions=CONDITIONS), Kept()
    director = search(task, kept)
    read = trials_of(json.loads(json.dumps(kept.events)))
    for trial in director.trials:
        if trial.origin == "optuna":
            assert tpe_point(task, trial.index, read[: trial.index]) == trial.values


@pytest.mark.parametrize("base", [{}, REGRESSION])
def test_it_finds_what_chance_does_not(base):
    """In the measure's sense of better."""
    task = job(base)
    sign = 1 if task.measure.higher_is_better else -1
    history = past(task, ["finished"] * 20, lambda point: sign * near(point))
    found = [near(tpe_point(task, index, history)) for index in range(20, 60)]
    chance = [near(random_point(task, index)) for index in range(20, 60)]
    assert sum(found) / 40 > sum(chance) / 40 + 0.1


def test_what_diverged_or_was_stopped_early_is_avoided():
    task = job(space={"algorithm.inner_lr": {"loguniform": [0.01, 5]}})

    def low(how):
        """How many of 30 proposals lie below a rate at which all trials ended so."""
        history = past(task, ["finished"] * 30, lambda point: -point["algorithm.inner_lr"])
        for trial in history:
            if trial.values["algorithm.inner_lr"] < 0.2:
                trial.end = trial.end._replace(how=how)
        return sum(tpe_point(task, index, history)["algorithm.inner_lr"] < 0.2 for index in range(30, 60))

    assert low("crashed") == low("failed")
    for how in ("diverged", "memory", "refused", "stopped"):
        assert low(how) < 8 < low("finished")


def test_trials_that_run_are_not_proposed_again():
    space = {"algorithm.inner_lr": {"uniform": [0.01, 5]}}
    task = job(space=space)
    history = past(task, ["finished"] * 10, lambda point: -abs(point["algorithm.inner_lr"] - 2))
    best = tpe_point(task, 10, history)["algorithm.inner_lr"]
    running = [Trial(f"{n:03d}", n, "optuna", {"algorithm.inner_lr": best}) for n in range(10, 20)]
    apart = [abs(tpe_point(task, 20 + n, history + running)["algorithm.inner_lr"] - best) for n in range(10)]
    alike = [abs(tpe_point(task, 20 + n, history)["algorithm.inner_lr"] - best) for n in range(10)]
    assert sum(apart) > sum(alike)


def test_conditions_hold_and_what_they_forbid_is_left():
    """Where both keys' best values exclude each other."""
    task = job(conditions=CONDITIONS)

    def best(point):
        return point["algorithm.order"] + point["algorithm.inner_steps"]

    history = past(task, ["finished"] * 25, best)
    for index in range(25, 40):
        assert task.allows(tpe_point(task, index, history))


def test_conditions_that_allow_one_point_in_a_thousand_are_met():
    space = {"seed": {"randint": [0, 299]}, "algorithm.inner_lr": {"loguniform": [0.01, 5]}}
    task = job(space=space, conditions=[{"when": {}, "need": {"seed": 17}}])
    history = [Trial("000", 0, "random", {"seed": 17, "algorithm.inner_lr": 0.4}, 0, [Report(1, {"score": 1.0}, "go")])]
    history[0].end = End("finished", 1, "", {})
    assert tpe_point(task, 1, history)["seed"] == 17


def test_without_anything_known_it_draws():
    task = job()
    assert tpe_point(task, 3, []) == random_point(task, 3)
    assert tpe_point(task, 3, past(task, [None, "crashed", "failed"])) == random_point(task, 3)


def test_own_values_outside_of_the_space_say_nothing_of_those_keys():
    space = {"algorithm.inner_lr": {"uniform": [1, 5]}, "algorithm.inner_steps": {"choice": [2, 3]}}
    task = job(space=space, startup=1, concurrent=1, trials=6)
    assert [trial.origin for trial in search(task, Kept()).trials] == ["baseline", "random", *["optuna"] * 4]


def test_values_that_are_equal_and_not_the_same():
    """To optuna true, 1 and 1.0 are one value."""
    space = {"outer.clip": {"choice": [None, 1, 2.5]}, "task.transductive": {"choice": [True, False]}}
    task = job(space=space)
    history = past(task, ["finished"] * 24, lambda _: 0.1)
    for trial in history[:2]:
        trial.values["outer.clip"], trial.reports[0].values["score"] = 1, 0.9
    for trial in history[2:]:
        trial.values["outer.clip"] = None if trial.index % 2 else 2.5
    found = [tpe_point(task, index, history) for index in range(24, 36)]
    assert all(type(point["task.transductive"]) is bool and type(point["outer.clip"]) is not bool for point in found)
    assert sum(point["outer.clip"] == 1 for point in found) >= 8


def test_a_method_is_asked_for_its_own_keys_only():
    space = {"algorithm.inner_lr": {"loguniform": [0.1, 1]}, "algorithm.name": {"choice": ["maml", "protonet"]}}
    task = job(space=space)
    history = past(task, ["finished"] * 12, lambda point: 0.9 if point["algorithm.name"] == "protonet" else 0.1)
    found = [tpe_point(task, index, history) for index in range(12, 24)]
    assert sum(point == {"algorithm.name": "protonet"} for point in found) >= 8
    assert all(task.allows(point) for point in found)


def test_several_aims():
    """Score and steps pull apart: with the costs as an aim, fewer steps are proposed."""
    one = checked({**BASE, "search": {"space": SPACE, "scheduler": "fifo"}}, "job")
    two = checked({**BASE, "search": {"space": SPACE, "scheduler": "fifo", "also": ["adaptation_mflop"]}}, "job")

    def best(point):
        return 0.1 * point["algorithm.inner_steps"]

    ends = ["finished"] * 24 + ["diverged", None]
    steps = {
        task.search.also != []: sum(
            tpe_point(task, index, past(task, ends, best))["algorithm.inner_steps"] for index in range(26, 50)
        )
        for task in (one, two)
    }
    assert steps[True] < steps[False]


def test_a_score_that_is_no_number_is_no_score():
    task = job()
    history = past(task, ["finished", "stopped"] * 3, lambda _: math.nan)
    assert task.allows(tpe_point(task, 6, history))
