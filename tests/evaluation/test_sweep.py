"""A grid of inner rates and steps in one pass: every cell is what an evaluation of that setting alone says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.config import Config
from metadist.errors import ConfigError
from metadist.evaluation.sweep import read_grid, swept
from metadist.runtime.in_process import InProcess

RATES, STEPS = (0.05, 0.4, 1.1), (0, 1, 2, 4)

METHODS = {
    "maml": (), "anil": (), "boil": (), "scratch": (),
    "imaml": ("algorithm.proximal=1.0",),
    "lstm-optimizer": ("model.width=4", "algorithm.hidden=4", "algorithm.layers=1"),
    "reptile": ("algorithm.inner_optimizer=sgd", "algorithm.inner_batch=2"),
    "maml++": ("algorithm.learned_rates=false", "algorithm.inner_steps=4"),
    "task-conditioned": ("task.within_group=true",),
}  # fmt: skip
"""Methods that read the rate when they adapt."""

LEARNED = {"meta-sgd": (), "maml++": ("algorithm.inner_steps=4",), "lstm-learner": ("model.width=4",)}
"""Methods that have learned their rates."""


def judge_of(config: Config) -> InProcess:
    from metadist.data.sources import prepare

    return InProcess(config, [prepare(source) for source in config.data.sources], None)


def moved(judge: InProcess) -> np.ndarray:
    """θ that is nobody's initial one, whose zeros would hide differences."""
    blueprint = judge.worker.engine.blueprint
    noise = np.random.default_rng(0).normal(size=blueprint.values.total) * 0.02
    return (blueprint.initial() + noise).astype(blueprint.initial().dtype)


def cells(config: Config, rates: tuple[float, ...], steps: tuple[int, ...]) -> tuple[Any, dict[Any, Any]]:
    """What a sweep says, and what evaluations of one setting each say, score and loss of every task."""
    from metadist.engine.sweep import Grid

    judge = judge_of(config)
    values = moved(judge)
    found = judge.judge(values, Grid(config, rates, steps), "val", config.eval.episodes)
    alone = {}
    for r, rate in enumerate(rates or (None,)):
        for k, count in enumerate(steps):
            algorithm = {} if rate is None else {"inner_lr": rate}
            one = config.with_values(algorithm=algorithm, eval={"inner_steps": count})
            # A judge of its own: an engine's method is that of its run.
            alone[r, k] = judge_of(one).judge(values, one, "val", config.eval.episodes)
    return found, alone


def assert_same(config: Config, rates: tuple[float, ...], steps: tuple[int, ...], exact: bool) -> None:
    found, alone = cells(config, rates, steps)
    assert found["score"].shape == (config.eval.episodes, max(1, len(rates)), len(steps))
    for (r, k), one in alone.items():
        if exact:
            np.testing.assert_array_equal(found["score"][:, r, k], one["score"])
            np.testing.assert_array_equal(found["loss"][:, r, k], one["loss"])
        else:
            np.testing.assert_allclose(found["loss"][:, r, k], one["loss"], rtol=1e-9)
            np.testing.assert_allclose(found["score"][:, r, k], one["score"], rtol=1e-9)
    losses = found["loss"]
    assert len({losses[:, :, k].tobytes() for k in range(len(steps))}) == len(steps), "steps matter"
    if rates:
        moving = losses[:, :, -1]
        assert len({moving[:, r].tobytes() for r in range(len(rates))}) == len(rates), "rates matter"


@pytest.fixture
def judged(tiny: Callable[..., Config]) -> Callable[..., Config]:
    from metadist.config import resolve

    def make(*overrides: str) -> Config:
        return resolve(tiny("eval.episodes=5", "task.shots=2", *overrides))

    return make


@pytest.mark.parametrize("name", METHODS)
def test_every_cell_is_an_evaluation_of_that_setting(judged: Callable[..., Config], name: str) -> None:
    config = judged("engine.dtype=float64", f"algorithm.name={name}", "algorithm.inner_steps=2", *METHODS[name])
    assert_same(config, RATES, STEPS, exact=False)


@pytest.mark.parametrize("name", LEARNED)
def test_steps_alone_are_exactly_an_evaluation(judged: Callable[..., Config], name: str) -> None:
    config = judged(f"algorithm.name={name}", "algorithm.inner_steps=2", *LEARNED[name])
    assert_same(config, (), STEPS[1:], exact=True)


def test_in_a_loop_every_cell_is_exactly_an_evaluation(judged: Callable[..., Config]) -> None:
    assert_same(judged("engine.mode=loop", "algorithm.inner_steps=2"), RATES, STEPS, exact=True)


def test_a_regression_and_statistics_of_the_support_set(judged: Callable[..., Config]) -> None:
    config = judged("engine.dtype=float64", "data.name=sinusoid", "model.norm=none", "task.ways=5")
    assert_same(config, RATES, STEPS, exact=False)
    assert_same(judged("engine.dtype=float64", "eval.transductive=false"), RATES, STEPS, exact=False)


def test_more_rates_than_go_at_once(judged: Callable[..., Config]) -> None:
    config = judged("engine.dtype=float64", "eval.episodes=2")
    assert_same(config, tuple(0.1 * n for n in range(1, 12)), (1,), exact=False)


def test_a_convolution_in_single_precision(judged: Callable[..., Config]) -> None:
    """Tasks of all rates are one batch of matrix products, of which a library may sum in another order."""
    config = judged("model={name: stride2, width: 8}", "eval.episodes=4")
    found, alone = cells(config, RATES, STEPS)
    for (r, k), one in alone.items():
        np.testing.assert_allclose(found["loss"][:, r, k], one["loss"], rtol=1e-3)


def test_what_a_grid_says(judged: Callable[..., Config]) -> None:
    config = judged("eval.episodes=12")
    judge = judge_of(config)
    values = moved(judge)
    words = ["algorithm.inner_lr=0.1,0.9", "algorithm.inner_steps=0,2"]
    found = swept(judge, read_grid(words, config, {}), config, values, "val")
    json.dumps(found, allow_nan=False)
    assert (found["inner_lr"], found["inner_steps"]) == ([0.1, 0.9], [0, 2])
    accuracy = np.array(found["accuracy"])
    assert accuracy.shape == (2, 2)
    assert accuracy[0, 0] == accuracy[1, 0], "without steps there is no rate"
    assert found["best"]["accuracy"] == accuracy.max()
    trained = judge.judge(values, config, "val", 12)["score"]
    assert found["trained"] == {
        "inner_lr": 0.4, "inner_steps": 1, "accuracy": trained.mean(),
        "ci95": pytest.approx(1.96 * trained.std(ddof=1) / 12**0.5),
    }  # fmt: skip
    assert found["best"]["gain"] == pytest.approx(accuracy.max() - trained.mean())
    assert found["diverged"] == [[0, 0], [0, 0]]


def test_a_cell_that_diverges_is_told(judged: Callable[..., Config]) -> None:
    config = judged("data.name=sinusoid", "model.norm=none", "task.ways=5", "eval.episodes=3")
    judge = judge_of(config)
    grid = read_grid(["algorithm.inner_lr=0.01,1e30", "algorithm.inner_steps=3"], config, {})
    found = swept(judge, grid, config, moved(judge), "test")
    json.dumps(found, allow_nan=False)
    assert found["diverged"] == [[0], [3]]
    assert found["mse"][1] == [None]
    assert found["best"]["inner_lr"] == 0.01


# --- words -----------------------------------------------------------------------


@given(st.floats(1e-6, 1), st.floats(1.01, 1e4), st.integers(2, 64), st.sampled_from(["log", "lin"]))
def test_a_range_has_its_bounds_and_ascends(low: float, ratio: float, count: int, how: str) -> None:
    from metadist.evaluation.sweep import RATE, _values

    found = _values("", RATE, f"{low!r}:{low * ratio!r}:{how}:{count}")
    assert (found[0], found[-1]) == (low, low * ratio)
    assert list(found) == sorted(set(found))
    assert len(found) <= count


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["algorithm.order=1,2"], ("algorithm.order", "not swept", "algorithm.inner_lr=")),
        (["algorithm.inner_lr"], ("algorithm.inner_lr", "nothing", "0.1:5:log:8")),
        (["algorithm.inner_lr=a,b"], ("a,b", "valid")),
        (["algorithm.inner_lr=0.1:5"], ("0.1:5", "log:8")),
        (["algorithm.inner_lr=5:0.1:log:8"], ("5:0.1", "valid")),
        (["algorithm.inner_lr=0.1:5:log:1000"], ("1000", "valid")),
        (["algorithm.inner_lr=0.1:5:cubic:8"], ("cubic", "valid")),
        (["algorithm.inner_lr=0,1"], ("0 is no rate",)),
        (["algorithm.inner_lr=nan"], ("nan is no rate",)),
        (["algorithm.inner_lr=1e39"], ("inner_lr=1e+39", "less than or equal")),
        (["algorithm.inner_steps=1.5"], ("whole numbers",)),
        (["algorithm.inner_steps=1:5:lin:5"], ("whole numbers",)),
        (["algorithm.inner_steps=-1"], ("-1 is no number of steps",)),
        (["algorithm.inner_steps=" + ",".join(map(str, range(65)))], ("65 values", "64")),
        (["algorithm.inner_steps=1", "eval.inner_steps=2"], ("swept twice",)),
    ],
)
def test_bad_words_are_one_line(judged: Callable[..., Config], words: list[str], say: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as told:
        read_grid(words, judged(), {})
    assert "\n" not in str(told.value)
    for word in say:
        assert word in str(told.value)


def test_what_goes_with_no_sweep_is_refused(judged: Callable[..., Config]) -> None:
    rate, steps = ["algorithm.inner_lr=0.1,1"], ["algorithm.inner_steps=1,9"]
    with pytest.raises(ConfigError, match="protonet has no inner loop"):
        read_grid(rate, judged("algorithm={name: protonet}"), {})
    for name, others in LEARNED.items():
        with pytest.raises(ConfigError, match=r"has learned its rates.*valid is algorithm\.inner_steps"):
            read_grid(rate, judged(f"algorithm.name={name}", *others), {})
    with pytest.raises(ConfigError, match=r"learns what belongs to each of its 2 inner steps"):
        read_grid(steps, judged("algorithm.name=maml++", "algorithm.inner_steps=2"), {})
    with pytest.raises(ConfigError, match=r"inner_lr=20.*overshoots"):
        read_grid(["algorithm.inner_lr=0.5,20"], judged("algorithm.name=imaml", "algorithm.inner_lr=0.1"), {})
    with pytest.raises(ConfigError, match=r"eval\.inner_steps is overridden as well"):
        read_grid(steps, judged(), {"eval.inner_steps": 3})


# --- the command -------------------------------------------------------------------


def test_the_command_says_what_evaluate_says(cli: Any, tiny_copy: Path) -> None:
    words = ("--sweep", "algorithm.inner_lr=0.1,0.4,2", "--sweep", "algorithm.inner_steps=0,1,3")
    ended = cli("evaluate", tiny_copy, "eval.episodes=20", "--best", *words)
    assert ended.code == 0, ended.err
    (path,) = (tiny_copy / "sweeps").glob("val-*.json")
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(path.read_text())
    assert "3-way" in ended.out and "0.1" in ended.out and "3 steps" in ended.out
    assert found["trained"]["accuracy"] == found["accuracy"][1][1]
    overrides = ("eval.episodes=20", "eval.inner_steps=3", "algorithm.inner_lr=2")
    assert cli("evaluate", tiny_copy, *overrides, "--best", "--split", "val").code == 0
    (path,) = (tiny_copy / "evaluations").glob("val-*.json")
    alone = json.loads(path.read_text())["test"]
    assert found["accuracy"][2][2] == alone["accuracy"]
    assert found["ci95"][2][2] == alone["ci95"]


@pytest.mark.cluster
def test_workers_say_what_one_process_says(cli: Any, tiny_copy: Path, cluster: Any) -> None:
    words = ("--sweep", "algorithm.inner_lr=0.1,0.4,2", "--sweep", "algorithm.inner_steps=0,1,3")
    found = []
    for overrides in (("cluster.workers=0",), ("cluster.workers=2", f"cluster.address={cluster.address}")):
        ended = cli("evaluate", tiny_copy, *overrides, *words)
        assert ended.code == 0, ended.err
        newest = max((tiny_copy / "sweeps").glob("val-*.json"))
        found.append(json.loads(newest.read_text()))
    assert found[0]["overrides"] != found[1]["overrides"]
    for key in ("accuracy", "ci95", "loss", "trained", "best"):
        assert found[0][key] == found[1][key]


def test_the_command_refuses_in_one_line(refused: Any, tiny_run: Any) -> None:
    rate = ("--sweep", "algorithm.inner_lr=0.1,1")
    refused("evaluate", tiny_run.folder, "--sweep", "inner_lr=1", say=("inner_lr=1", "algorithm.inner_lr"))
    refused("evaluate", tiny_run.folder, *rate, "algorithm.inner_lr=3", say=("overridden", "leave one"))
    refused("evaluate", tiny_run.folder, *rate, "eval.also=[{queries: 2}]", say=("eval.also", "--sweep"))
    refused("evaluate", tiny_run.folder, *rate, "--split", "train", say=("--split", "test, val"))
    refused("evaluate", tiny_run.folder, *rate, "outer.lr=3", say=("outer.lr", "belongs to the training"))
