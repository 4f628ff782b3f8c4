"""What would make trials unlike, or cannot be a search, is refused in one line; what is judged is the same for all."""

import json
from typing import Any

import pytest

from metadist.config import validate, with_keys
from metadist.errors import ConfigError
from metadist.evaluation.protocol import settings, validation_settings
from metadist.search.job import SearchJob, checked, refuse_changed_search
from metadist.search.run import refuse
from metadist.search.state import Trial
from metadist.search.trial import trial_config

JOB: dict[str, Any] = {
    "task": {"meta_batch": 16},
    "outer": {"steps": 100},
    "cluster": {"workers": 0},
    "eval": {"every": 20},
    "engine": {"device": "cpu"},
    "search": {"space": {"algorithm.inner_lr": {"loguniform": [0.1, 1]}}},
}


def job_of(**keys: Any) -> SearchJob:
    return checked(with_keys(json.loads(json.dumps(JOB)), keys), "job")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"search.space": 5}, "search.space: 5 is no space; valid is {KEY: {choice: [1, 3, 5]}}"),
        ({"search.space": None}, "search.space: None is no space"),
        ({"search": 5}, "job: has no section search"),
        ({"search.space": {"seed.x": {"choice": [1]}}}, "search.space.seed.x: seed is a value, not a section"),
        ({"search.space": {"outer.lr.x": {"choice": [1]}}}, "search.space.outer.lr.x: lr is a value, not a section"),
        (
            {"search.space": {"task.within_group": {"choice": [True]}}},
            "search.space.task.within_group: is not searched",
        ),
        ({"stages": [{"at": 3, "set": {"outer.lr": 0.1}}]}, "stages: a search makes its own; leave them out"),
    ],
)
def test_what_is_no_search(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(**keys)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_strategy_without_bits_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.strategy: async has no bits"):
        refuse(job_of(**{"cluster.workers": 1, "cluster.strategy": "async"}), tmp_path / "search")


def test_any_strategy_with_bits_makes_trials() -> None:
    for strategy in ("aggregator", "allreduce"):
        job = job_of(**{"cluster.workers": 2, "cluster.strategy": strategy})
        assert trial_config(job, Trial("001", 1, "random", {"algorithm.inner_lr": 0.3})).cluster.strategy == strategy


def test_a_population_keeps_its_size() -> None:
    pbt = {"search.scheduler": "pbt", "search.searcher": "random"}
    refuse_changed_search(job_of(), job_of(**{"search.trials": 20}))
    with pytest.raises(ConfigError, match=r"search\.trials: was 16 and cannot become 20 on resume; a population"):
        refuse_changed_search(job_of(**pbt), job_of(**pbt, **{"search.trials": 20}))


def test_each_meta_batch_has_its_own_shards() -> None:
    job = job_of(**{"search.space": {"task.meta_batch": {"choice": [4, 16, 20]}}})
    assert [job.config({"task.meta_batch": size}).shard for size in (4, 16, 20)] == [2, 8, 5]
    assert all(job.allows({"task.meta_batch": size}) for size in (4, 16, 20))


def test_validations_are_of_one_stream_whatever_the_meta_test_is_of() -> None:
    config = validate({**{k: v for k, v in JOB.items() if k != "search"}, "eval": {"every": 20, "draw": 1}}, "job")
    assert validation_settings(config, 20).eval.draw == 0
    assert settings(config)[0].eval.draw == 1
