"""The space of a search: every way to draw a value, and bad ones in one line each."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_search import BASE, job

from metadist.errors import ConfigError
from metadist.search.job import checked
from metadist.search.space import Choice, Condition, Grid, LogUniform, RandInt, Uniform, grid_points, read_space

UNIT = st.floats(0, 1, exclude_max=True)


@given(UNIT, st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).filter(lambda pair: pair[0] < pair[1]))
def test_uniform_lies_between_its_bounds(u, bounds):
    domain = Uniform(uniform=bounds)
    assert bounds[0] <= domain.at(u) <= bounds[1] and domain.at(0.0) == bounds[0]


@given(UNIT, st.tuples(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6)).filter(lambda pair: pair[0] < pair[1]))
def test_loguniform_lies_between_its_bounds(u, bounds):
    domain = LogUniform(loguniform=bounds)
    assert bounds[0] <= domain.at(u) <= bounds[1]


@given(UNIT, st.tuples(st.integers(-50, 50), st.integers(-50, 50)).filter(lambda pair: pair[0] < pair[1]))
def test_randint_has_both_bounds(u, bounds):
    domain = RandInt(randint=bounds)
    assert isinstance(domain.at(u), int) and bounds[0] <= domain.at(u) <= bounds[1]
    assert domain.at(0.0) == bounds[0] and domain.at(1 - 2**-31) == bounds[1]


@pytest.mark.parametrize(("kind", "name"), [(Choice, "choice"), (Grid, "grid")])
@given(u=UNIT)
def test_choice_and_grid_have_their_values(kind, name, u):
    values = [None, True, 1, 2.5, "batch"]
    domain = kind(**{name: values})
    assert any(domain.at(u) is value for value in domain.witnesses)
    assert [domain.at((n + 0.5) / 5) for n in range(5)] == values


def test_middle_of_each_scale():
    assert Uniform(uniform=(1, 3)).at(0.5) == 2
    assert LogUniform(loguniform=(0.01, 1)).at(0.5) == pytest.approx(0.1)
    assert [RandInt(randint=(1, 3)).at(u) for u in (0.2, 0.5, 0.9)] == [1, 2, 3]


def test_sections_may_be_nested_or_dotted():
    nested = read_space({"algorithm": {"inner_lr": {"uniform": [0, 1]}, "inner_steps": {"grid": [1]}}, "seed": {"randint": [0, 9]}})  # fmt: skip  # noqa: E501
    dotted = read_space({"algorithm.inner_lr": {"uniform": [0, 1]}, "algorithm.inner_steps": {"grid": [1]}, "seed": {"randint": [0, 9]}})  # fmt: skip  # noqa: E501
    assert nested == dotted and list(dotted) == ["algorithm.inner_lr", "algorithm.inner_steps", "seed"]
    assert read_space(nested) == nested  # a space that has been read


def test_grid_points_are_the_product():
    space = read_space({"seed": {"grid": [1, 2]}, "outer.lr": {"uniform": [0, 1]}, "model.norm": {"grid": ["a", "b"]}})
    assert grid_points(space) == [
        {"seed": 1, "model.norm": "a"}, {"seed": 1, "model.norm": "b"},
        {"seed": 2, "model.norm": "a"}, {"seed": 2, "model.norm": "b"},
    ]  # fmt: skip
    assert grid_points({}) == [{}]


@pytest.mark.parametrize(
    ("when", "need", "values", "holds"),
    [
        ({"a": 2}, {"b": {"at_most": 5}}, {"a": 2, "b": 5}, True),
        ({"a": 2}, {"b": {"at_most": 5}}, {"a": 2, "b": 6}, False),
        ({"a": 2}, {"b": {"at_most": 5}}, {"a": 1, "b": 6}, True),
        ({"a": 2}, {"b": {"at_least": 1, "at_most": 5}}, {"a": 2, "b": 0.5}, False),
        ({"a": [1, 2]}, {"b": ["x", None]}, {"a": 1, "b": None}, True),
        ({"a": [1, 2]}, {"b": ["x", None]}, {"a": 1, "b": "y"}, False),
        ({"a": {"at_least": 3}}, {"b": True}, {"a": 3, "b": False}, False),
        ({"a": {"at_least": 3}}, {"b": True}, {"a": None, "b": False}, True),
        ({"a": {"at_least": 1}}, {"b": 2}, {"a": True, "b": 1}, True),
        ({"a": 1, "c": 1}, {"b": 1}, {"a": 1, "b": 2, "c": 2}, True),
        ({"a": 1}, {"b": 1, "c": 1}, {"a": 1, "b": 1, "c": 2}, False),
        ({}, {"b": 1}, {"b": 2}, False),
        ({"gone": 1}, {"b": 1}, {"b": 2}, True),
        ({"a": 1}, {"gone": 1}, {"a": 1}, False),
    ],
)
def test_conditions(when, need, values, holds):
    assert Condition(when=when, need=need).holds(values) is holds


BAD_SPACES = [
    ({}, "search.space: value should have at least 1 item"),
    ({"algorithm.inner_lrr": {"uniform": [0, 1]}}, r"search.space.algorithm.inner_lrr: unknown key .*did you mean"),
    ({"algorythm.inner_lr": {"uniform": [0, 1]}}, "search.space.algorythm.inner_lr: is not searched; valid are keys"),
    ({"algorithm.inner_lr": 0.5}, r"search.space.algorithm.inner_lr: 0.5 is a value; valid is a way to draw one"),
    ({"algorithm.inner_lr": [0.1, 0.5]}, r"search.space.algorithm.inner_lr: \[0.1, 0.5\] is a value"),
    ({"algorithm.inner_lr": {"loguniformm": [0.1, 1]}}, "inner_lr: unknown loguniformm; valid: uniform, loguniform"),
    ({"algorithm.inner_lr": {"uniform": [0, 1], "choice": [1]}}, "inner_lr: .*is not one way to draw a value"),
    ({"algorithm.inner_lr": {"loguniform": [0, 1]}}, "inner_lr: loguniform: Input should be greater than 0"),
    ({"algorithm.inner_lr": {"loguniform": [1, 0.1]}}, "inner_lr: loguniform: the lower bound comes first"),
    ({"algorithm.inner_lr": {"uniform": [1, 1]}}, "inner_lr: uniform: the lower bound comes first"),
    ({"algorithm.inner_lr": {"uniform": [1]}}, "inner_lr: uniform: Field required"),
    ({"algorithm.inner_lr": {"uniform": [1, 2, 3]}}, "inner_lr: uniform: "),
    ({"algorithm.inner_lr": {"uniform": [0.1, math.inf]}}, "inner_lr: uniform: Input should be a finite number"),
    ({"algorithm.inner_lr": {"uniform": ["a", "b"]}}, "inner_lr: uniform: Input should be a valid number"),
    ({"algorithm.inner_lr": {"uniform": [False, True]}}, "inner_lr: uniform: Input should be a number"),
    ({"algorithm.inner_lr": {"uniform": [-1, 1]}}, "inner_lr: input should be greater than"),
    ({"algorithm.inner_steps": {"uniform": [1, 8]}}, "inner_steps: input should be a valid integer"),
    ({"algorithm.inner_steps": {"randint": [0.5, 8]}}, "inner_steps: randint: Input should be a valid integer"),
    ({"algorithm.inner_steps": {"randint": [-1, 5]}}, "inner_steps: input should be greater than"),
    ({"algorithm.inner_steps": {"choice": []}}, "inner_steps: choice: List should have at least 1 item"),
    ({"algorithm.inner_steps": {"choice": [1, "many"]}}, "inner_steps: input should be a valid integer"),
    ({"algorithm.inner_steps": {"choice": [[1], 2]}}, "inner_steps: choice: Input should be"),
    ({"algorithm.order": {"grid": [1, 3]}}, "order: input should be"),
    ({"model.norm": {"choice": ["batch", "group"]}}, "model.norm: input should be 'batch', 'layer' or 'none'"),
    ({"algorithm.name": {"choice": ["maml", "malm"]}}, "algorithm.name: 'malm' is no method; did you mean maml"),
    ({"outer.steps": {"choice": [4, 8]}}, "search.space.outer.steps: is not searched: how long a trial trains"),
    ({"cluster.workers": {"choice": [1, 2]}}, "search.space.cluster.workers: is not searched; valid are keys of seed"),
    ({"eval.every": {"choice": [1, 2]}}, "search.space.eval.every: is not searched; valid are keys of seed, task"),
    ({"seed": {"randint": [-1, 3]}}, "search.space.seed: input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("space", "line"), BAD_SPACES)
def test_a_bad_space_is_refused_in_one_line(space, line):
    with pytest.raises(ConfigError, match=line) as refused:
        job(space=space)
    assert "\n" not in str(refused.value) and str(refused.value).removeprefix("job: ").startswith("search.space")


BAD_SECTIONS = [
    ({"searcher": "tpe"}, "search.searcher: input should be 'random', 'grid' or 'optuna'"),
    ({"trials": 0}, "search.trials: input should be greater than or equal to 1"),
    ({"trails": 4}, "unknown key search.trails; did you mean"),
    ({"concurrent": True}, "search.concurrent: input should be a number"),
    ({"scheduler": "fifo", "reduction": 3}, "search.reduction: is read by search.scheduler=asha only"),
    ({"scheduler": "asha", "samples": 4}, "search.samples: is read by search.scheduler=median only"),
    ({"scheduler": "fifo", "grace": 2}, "search.grace: is read by search.scheduler=asha or median only"),
    (
        {"searcher": "random", "startup": 2},
        "search.startup: is read by search.searcher=optuna only, not by random",
    ),
    ({"searcher": "grid", "startup": 2}, "not by grid; search.startup=null leaves it out"),
    ({"also": ["seconds"]}, "search.also: trials that are stopped early have no costs"),
    ({"also": ["minutes"], "scheduler": "fifo"}, "search.also: 'minutes' is no cost; valid: adaptation_mflop"),
    ({"budget": 0}, "search.budget: input should be greater than 0"),
    ({"conditions": [{"when": {"seed": 1}}]}, "search.conditions.0.need: field required"),
    ({"conditions": [{"when": {"seed": 1}, "need": {"seed": {"most": 3}}}]}, "search.conditions.0.need.seed"),
    (
        {"conditions": [{"when": {"algorithm.ordr": 2}, "need": {"algorithm.inner_steps": 1}}]},
        "search.conditions.0.when: unknown key algorithm.ordr; did you mean algorithm.order",
    ),
    (
        {"conditions": [{"when": {}, "need": {"algorithm.cg_steps": 1}}]},  # imaml's, which is not searched
        "search.conditions.0.need: unknown key algorithm.cg_steps; did you mean algorithm.inner_steps",
    ),
    ({"conditions": [{"when": {"zzz": 2}, "need": {}}]}, "when: unknown key zzz; valid are dotted keys such as"),
]


@pytest.mark.parametrize(("section", "line"), BAD_SECTIONS)
def test_a_bad_section_is_refused_in_one_line(section, line):
    with pytest.raises(ConfigError, match=line) as refused:
        job(**section)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("base", "section", "line"),
    [
        ({"eval": {"every": 0}}, {}, "eval.every: trials are compared on validations; 0 is none in outer.steps=8"),
        ({"eval": {"every": 9}}, {}, "eval.every: trials are compared on validations; 9 is none in outer.steps=8"),
        ({"eval": {"every": 4}}, {"grace": 6}, "search.grace: 6 meta-steps are not a multiple of eval.every=4"),
    ],
)
def test_a_section_that_does_not_go_with_the_run(base, section, line):
    with pytest.raises(ConfigError, match=f"job: {line}"):
        job(base, **section)


def test_a_grid_wants_grids():
    with pytest.raises(ConfigError, match=r"search.space.outer.lr: search.searcher=grid wants \{grid: "):
        checked({**BASE, "search": {"searcher": "grid", "space": {"outer.lr": {"choice": [1, 2]}}}}, "job")


def test_keys_of_any_searched_method_are_keys():
    space = {"algorithm.name": {"choice": ["maml", "imaml"]}}
    task = job(space=space, conditions=[{"when": {"algorithm.name": "imaml"}, "need": {"algorithm.cg_steps": 1}}])
    assert task.allows({"algorithm.name": "maml"})
    assert not task.allows({"algorithm.name": "imaml", "algorithm.cg_steps": 2})
