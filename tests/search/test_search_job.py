"""A search's job file: what a resumed search may change."""

import pytest
from simulated_search import CONDITIONS, REGRESSION, SPACE, job

from metadist.errors import ConfigError
from metadist.search.job import checked, load_search, refuse_changed_search, to_yaml

CLASSES = {"cluster": {"workers": 2}}


@pytest.mark.parametrize(
    ("base", "section"),
    [
        (CLASSES, {}),
        (CLASSES, {"concurrent": 7}),
        (CLASSES, {"trials": 17}),
        ({"cluster": {"workers": 5, "address": "auto", "strategy": "allreduce"}}, {}),
        (CLASSES, {"metric": "accuracy", "mode": "max"}),
        ({**CLASSES, "tracking": {"uri": "off", "experiment": "other"}}, {"concurrent": 1, "trials": 99}),
    ],
)
def test_a_resumed_search_may_change(base, section):
    refuse_changed_search(job(CLASSES), job(base, **section))


@pytest.mark.parametrize(
    ("base", "section", "line"),
    [
        (CLASSES, {"trials": 15}, "search.trials: was 16 and cannot become 15 on resume; there can only be more"),
        (CLASSES, {"seed": 1}, "search.seed: was 0 and cannot become 1 on resume, trials would not be compared alike"),
        (CLASSES, {"scheduler": "median"}, "search.scheduler: was asha and cannot become median on resume"),
        (CLASSES, {"conditions": CONDITIONS}, r"search.conditions: was \[\] and cannot become \[\{.*\}\] on resume"),
        (CLASSES, {"metric": "loss"}, "search.metric: was accuracy and cannot become loss on resume"),
        (CLASSES, {"mode": "min"}, "search.mode: was max and cannot become min on resume"),
        (CLASSES, {"finalists": 2}, "search.finalists: was 3 and cannot become 2 on resume"),
        (
            CLASSES,
            {"space": {**SPACE, "algorithm.inner_lr": {"loguniform": [0.1, 5]}}},
            r"search.space.algorithm.inner_lr: was \{'loguniform': \[0.01, 5.0\]\} and cannot become ",
        ),
        (
            CLASSES,
            {"space": {**SPACE, "outer.lr": {"uniform": [0.1, 5]}}},
            "search.space.outer.lr: was None and cannot become ",
        ),
        ({**CLASSES, "outer": {"steps": 9}}, {}, "outer.steps: was 8 and cannot become 9 on resume"),
        ({**CLASSES, "eval": {"every": 1, "val_episodes": 50}}, {}, "eval.val_episodes: was 200 and cannot become 50"),
        ({**CLASSES, "checkpoint": {"every": 7}}, {}, "checkpoint.every: was 100 and cannot become 7 on resume"),
        ({**CLASSES, **REGRESSION}, {}, "data.name: was glyphs and cannot become sinusoid on resume"),
        (
            {"cluster": {"workers": 2, "strategy": "async"}},
            {},
            "cluster.strategy: was aggregator and cannot become async on resume",
        ),
    ],
)
def test_a_resumed_search_may_not_change(base, section, line):
    with pytest.raises(ConfigError, match=f"^{line}") as refused:
        refuse_changed_search(job(CLASSES), job(base, **section))
    assert "\n" not in str(refused.value)


def test_a_job_that_is_written_and_read_is_the_same(tmp_path):
    task = job(conditions=CONDITIONS, budget=2.5, grace=2)
    (tmp_path / "search.yaml").write_text(to_yaml(task))
    again = load_search(tmp_path / "search.yaml")
    assert again == task and list(again.search.space) == list(task.search.space)
    refuse_changed_search(task, again)


def test_the_score_is_the_measure_of_the_tasks():
    assert job().measure.higher_is_better and not job(REGRESSION).measure.higher_is_better
    with pytest.raises(ConfigError):
        checked({"search": {"space": {"seed": {"choice": [0, 0.5]}}}}, "job")


@pytest.mark.parametrize(
    ("base", "section", "name", "mode"),
    [
        ({}, {}, "accuracy", "max"),
        ({}, {"metric": "loss"}, "loss", "min"),
        ({}, {"mode": "min"}, "accuracy", "min"),
        (REGRESSION, {"metric": "mse"}, "mse", "min"),
        (REGRESSION, {"metric": "loss", "mode": "max"}, "loss", "max"),
    ],
)
def test_metric_and_mode(base, section, name, mode):
    assert (job(base, **section).measure.name, job(base, **section).measure.mode) == (name, mode)


def test_a_metric_that_validations_do_not_give_is_refused():
    for base, metric, line in (
        ({}, "mse", "search.metric: classification has no mse; valid: accuracy, loss"),
        (REGRESSION, "accuracy", "search.metric: regression has no accuracy; valid: mse, loss"),
        ({}, "f1", "search.metric: input should be 'accuracy', 'mse' or 'loss', not 'f1'"),
    ):
        with pytest.raises(ConfigError, match=line):
            job(base, metric=metric)
    with pytest.raises(ConfigError, match=r"search.mode: input should be 'max' or 'min'"):
        job(mode="least")
