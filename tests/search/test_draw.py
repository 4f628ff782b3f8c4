"""Points by counter: each trial's by itself, in the domains, where the conditions allow."""

import math
from collections import Counter

import pytest
from simulated_search import CONDITIONS, GRID, job

from metadist.errors import ConfigError
from metadist.search.draw import check_draws, grid, own_point, random_point


def test_a_point_is_a_function_of_seed_and_index():
    task = job(seed=7)
    forwards = [random_point(task, index) for index in range(20)]
    backwards = [random_point(task, index) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({str(point) for point in forwards}) == 20
    assert random_point(job(seed=8), 3) != forwards[3]


def test_golden_points():
    """What a search with these seeds has drawn, it draws in every later version."""
    first, second = (random_point(job(seed=0), index) for index in (1, 2))
    assert first == {
        "algorithm.inner_lr": pytest.approx(0.09736498042785455), "algorithm.inner_steps": 1, "algorithm.order": 1,
    }  # fmt: skip
    assert second == {
        "algorithm.inner_lr": pytest.approx(4.1924578864657445), "algorithm.inner_steps": 1, "algorithm.order": 2,
    }  # fmt: skip


def test_every_domain_is_covered_evenly():
    space = {
        "algorithm.inner_lr": {"loguniform": [0.01, 1]},
        "outer.lr": {"uniform": [0.001, 0.003]},
        "algorithm.inner_steps": {"randint": [1, 4]},
        "model.norm": {"choice": ["batch", "none"]},
        "outer.clip": {"grid": [None, 1.0]},
    }
    task = job(space=space)
    points = [random_point(task, index) for index in range(800)]
    rates = [math.log10(point["algorithm.inner_lr"]) for point in points]
    assert min(rates) >= -2 and max(rates) <= 0 and abs(sum(rates) / 800 + 1) < 0.06
    outer = [point["outer.lr"] for point in points]
    assert min(outer) >= 0.001 and max(outer) <= 0.003 and abs(sum(outer) / 800 - 0.002) < 6e-5
    for key, values in (("algorithm.inner_steps", 4), ("model.norm", 2), ("outer.clip", 2)):
        counts = Counter(point[key] for point in points)
        assert len(counts) == values and max(abs(count - 800 / values) for count in counts.values()) < 80
    # keys are drawn by themselves: every combination comes up
    assert len({(p["algorithm.inner_steps"], p["model.norm"], p["outer.clip"]) for p in points}) == 16


def test_conditions_are_kept_and_touch_no_other_point():
    free, bound = job(), job(conditions=CONDITIONS)
    for index in range(60):
        point = random_point(bound, index)
        assert point["algorithm.order"] == 1 or point["algorithm.inner_steps"] <= 3
        if bound.allows(random_point(free, index)):
            assert point == random_point(free, index)


def test_a_value_that_goes_with_some_others_only_is_drawn_with_them():
    space = {"task.shard": {"choice": [3, 8]}, "task.meta_batch": {"choice": [16, 24]}}
    task = job(space=space)
    drawn = {(point["task.shard"], point["task.meta_batch"]) for point in (random_point(task, i) for i in range(40))}
    assert drawn == {(8, 16), (3, 24), (8, 24)}


METHODS = {"algorithm.name": {"choice": ["maml", "protonet"]}, "algorithm.inner_lr": {"loguniform": [0.1, 1]}}


def test_a_method_gets_its_own_keys_only():
    task = job(space=METHODS)
    points = [random_point(task, index) for index in range(12)]
    assert {tuple(point) for point in points} == {
        ("algorithm.name", "algorithm.inner_lr"), ("algorithm.name",),
    }  # fmt: skip
    assert {task.config(point).algorithm.name for point in points} == {"maml", "protonet"}


def test_conditions_that_allow_nothing():
    task = job(conditions=[{"when": {"seed": 0}, "need": {"algorithm.inner_steps": 9}}])
    with pytest.raises(ConfigError, match=r"^search.conditions: none of 1,000 points drawn for trial 004 is allowed; "):
        random_point(task, 4)


def test_what_refuses_most_and_what_is_drawn_is_named():
    conditions = [
        {"when": {"algorithm.order": 2}, "need": {"algorithm.inner_steps": {"at_most": 3}}},
        {"when": {}, "need": {"algorithm.inner_steps": {"at_least": 6, "at_most": 9}}},
    ]
    for check in (lambda task: random_point(task, 1), check_draws):
        with pytest.raises(ConfigError) as told:
            check(job(searcher="random", conditions=conditions))
        assert str(told.value) == (
            "search.conditions: none of 1,000 points drawn for trial 001 is allowed; search.conditions.1 refuses 1,000 "
            "of them: it asks for algorithm.inner_steps at least 6 and at most 9; search.space draws "
            "algorithm.inner_steps by {'randint': (1, 5)}; others refuse the rest"
        )
    check_draws(job(searcher="random", conditions=conditions, trials=1))  # the job's own values are no draw


def test_a_grid_without_a_point_is_refused_before_it_begins():
    never = [{"when": {"algorithm.inner_steps": [1, 3, 5]}, "need": {"algorithm.inner_lr": 7.0}}]
    with pytest.raises(ConfigError) as told:
        check_draws(job(searcher="grid", conditions=never))
    assert "none of 9 combinations is allowed; search.conditions.0 refuses 9 of them: it asks for " in str(told.value)
    assert "algorithm.inner_lr is 7.0 where algorithm.inner_steps one of [1, 3, 5]" in str(told.value)
    check_draws(job(searcher="grid"))
    with pytest.raises(ConfigError, match=r"^search\.space: its only point is the job's own run"):
        check_draws(job(searcher="grid", space={"algorithm.inner_lr": {"grid": [0.4]}}))


def test_a_space_of_which_no_point_is_a_run():
    task = job(space={"task.shard": {"choice": [3, 5]}, "task.meta_batch": {"choice": [16, 32]}})
    with pytest.raises(ConfigError, match=r"^search.space: none of .* trial 001 is a run; the last: task.shard: ."):
        random_point(task, 1)


def test_a_grid_has_every_combination_the_last_key_fastest():
    points = [tuple(point.values()) for point in grid(job(searcher="grid", baseline=False))]
    assert points == [(lr, steps) for lr in (0.05, 0.4, 3.0) for steps in (1, 3, 5)]
    assert (0.4, 1) not in [tuple(point.values()) for point in grid(job(searcher="grid"))]  # the job's own values


def test_a_grid_leaves_out_what_is_not_allowed_and_what_is_the_same_run():
    conditions = [{"when": {"algorithm.inner_lr": {"at_least": 1}}, "need": {"algorithm.inner_steps": [1, 3]}}]
    points = [tuple(point.values()) for point in grid(job(searcher="grid", baseline=False, conditions=conditions))]
    assert len(points) == 8 and (3.0, 5) not in points
    space = {**GRID, "algorithm.inner_lr": {"grid": [1, 1.0, 2]}}
    assert len(list(grid(job(searcher="grid", space=space)))) == 6
    space = {"algorithm.name": {"grid": ["protonet", "maml"]}, "algorithm.inner_lr": {"grid": [0.1, 0.2]}}
    points = [tuple(point.values()) for point in grid(job(searcher="grid", space=space))]
    assert points == [("protonet",), ("maml", 0.1), ("maml", 0.2)]


def test_the_jobs_own_point():
    task = job()
    assert own_point(task) == {"algorithm.inner_lr": 0.4, "algorithm.inner_steps": 1, "algorithm.order": 2}
    assert task.config(own_point(task)) == task.base
    metric = job({"algorithm": {"name": "protonet"}}, space=METHODS)
    assert own_point(metric) == {"algorithm.name": "protonet"} and metric.config(own_point(metric)) == metric.base
