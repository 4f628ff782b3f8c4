"""Scores, the settings of a meta-test, and what cannot be judged."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.algorithms import for_evaluation
from metadist.algorithms.maml import MAML
from metadist.algorithms.protonet import ProtoNet
from metadist.config import validate
from metadist.data.table import Split, Table
from metadist.engine.engine import Engine
from metadist.errors import ConfigError, DataError
from metadist.evaluation.protocol import check, described, meta_test, score, settings

IMAGE = (1, 8, 8)


def make_table(classes=6, examples=8):
    generator = torch.Generator().manual_seed(0)
    rows = 3 * classes * examples
    images = torch.randint(0, 256, (rows, *IMAGE), generator=generator).to(torch.uint8)
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        start = torch.arange(classes) * examples + number * classes * examples
        names = [f"{split}{c}" for c in range(classes)]
        splits[split] = Split(start, torch.full((classes,), examples), names, [(split, 0, classes)])
    return Table("noise", images, splits, "0" * 64, Path("nowhere"))


def config_of(**sections):
    base = {
        "model": {"width": 4}, "task": {"ways": 3, "shots": 2, "queries": 2, "meta_batch": 8, "shard": 4},
        "engine": {"dtype": "float64", "device": "cpu", "mode": "vectorised"},
    }  # fmt: skip
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return validate(base, "test")


# --- scores --------------------------------------------------------------------


def test_score_by_hand():
    found = score(np.array([1.0, 0.8, 0.6, 0.8]))
    assert found.mean == pytest.approx(0.8)
    assert found.ci95 == pytest.approx(1.96 * math.sqrt(0.08 / 3) / 2)  # N − 1


def test_score_against_the_standard_library():
    values = np.random.default_rng(0).random(237)
    found = score(values)
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    assert found.ci95 == pytest.approx(1.96 * statistics.stdev(values) / math.sqrt(237), rel=1e-12)


def test_score_of_equal_and_of_single_episodes():
    assert score(np.full(5, 0.5)) == (0.5, 0.0)
    assert score(np.array([0.5])).mean == 0.5
    assert math.isnan(score(np.array([0.5])).ci95)


def test_the_interval_covers():
    """19 of 20 intervals hold the mean: of 2000, within 5 σ of 1900."""
    rng = np.random.default_rng(0)
    found = [score(rng.binomial(15, 0.8, 200) / 15) for _ in range(2000)]
    assert abs(sum(abs(s.mean - 0.8) <= s.ci95 for s in found) - 1900) < 5 * 10


# --- settings ------------------------------------------------------------------


def test_also_adds_settings():
    config = config_of(eval={"episodes": 7, "also": [{"queries": 15}, {"transductive": False, "shots": 5}]})
    first, second, third = settings(config)
    assert first.eval == config.eval.model_copy(update={"also": []})
    assert (second.eval.queries, second.eval.shots, second.eval.transductive) == (15, None, None)
    assert (third.eval.queries, third.eval.shots, third.eval.transductive) == (None, 5, False)
    assert all(s.eval.also == [] and s.eval.episodes == 7 for s in (first, second, third))
    assert all(s.task == config.task and s.algorithm == config.algorithm for s in (first, second, third))


def test_a_key_of_also_that_is_given_null_is_the_tasks_again():
    config = config_of(eval={"queries": 4, "also": [{"queries": None}]})
    assert [described(s)["queries"] for s in settings(config)] == [4, 2]


@pytest.mark.parametrize(("changes", "named"), [({"queries": 0}, "queries"), ({"ways": 1}, "ways")])
def test_a_wrong_value_in_also_names_its_entry(changes, named):
    with pytest.raises(ConfigError, match=rf"eval\.also\.1.*{named}") as error:
        settings(config_of(eval={"also": [{}, changes]}))
    assert "\n" not in str(error.value)


def test_what_an_evaluation_was_of():
    config = config_of(eval={"queries": 5, "episodes": 9}, algorithm={"name": "maml", "inner_steps": 2})
    expected = {"episodes": 9, "ways": 3, "shots": 2, "queries": 5, "transductive": True, "inner_steps": 2}
    assert described(config) == expected
    changed = config.with_values(eval={"inner_steps": 0, "transductive": False})
    assert described(changed) == expected | {"inner_steps": 0, "transductive": False}
    metric = config_of(algorithm={"name": "protonet"}, eval={"finetune_steps": 3})
    assert described(metric)["finetune_steps"] == 3
    assert "inner_steps" not in described(metric)


def test_a_meta_test_is_a_score_and_what_it_is_of():
    asked = []

    class Judge:
        def judge(self, values, judged, split, episodes):
            asked.append((values, judged, split, episodes))
            return {"score": np.linspace(0, 1, episodes), "loss": np.zeros(episodes)}

    config = config_of(eval={"episodes": 11})
    found = meta_test(Judge(), config, None)
    assert asked == [(None, config, "test", 11)]
    assert found["accuracy"] == pytest.approx(0.5)
    expected = score(np.linspace(0, 1, 11))
    assert found == {"accuracy": expected.mean, "ci95": expected.ci95, **described(config)}


# --- which method is judged ----------------------------------------------------


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_a_class_bound_head_refuses_other_ways(name):
    for key, changes in (("eval.ways", {"ways": 4}), ("eval.also.0.ways", {"also": [{"ways": 4}]})):
        with pytest.raises(ConfigError, match=rf"{key}: {name} .*task\.ways=3.* 4; valid is 3"):
            config_of(algorithm={"name": name}, eval=changes)
    for_evaluation(config_of(algorithm={"name": name}, eval={"ways": 3}), IMAGE)


def test_a_metric_method_takes_any_ways_that_the_classes_allow():
    check(config_of(algorithm={"name": "protonet"}, eval={"ways": 6}), [make_table()])
    with pytest.raises(DataError, match=r"^eval\.ways: 7"):
        check(config_of(algorithm={"name": "protonet"}, eval={"ways": 7}), [make_table()])


def test_a_check_sees_every_entry_of_also():
    config = config_of(eval={"also": [{"queries": 6}, {"queries": 7}]})
    with pytest.raises(DataError, match=r"^eval\.shots \+ eval\.queries: 2 \+ 7"):
        check(config, [make_table()])
    check(config.with_values(eval={"also": [{"queries": 6}]}), [make_table()])
    check(config.with_values(eval={"every": 0, "test": False}), [make_table()])  # nothing is judged


def test_eval_says_how_the_method_is_judged():
    config = config_of(algorithm={"name": "maml", "inner_steps": 1}, eval={"inner_steps": 4, "transductive": False})
    judged = for_evaluation(config, IMAGE)
    assert isinstance(judged, MAML)
    assert (judged.inner_steps, judged.normalisation.queries) == (4, "support")
    running = config_of(model={"statistics": "running"}, task={"transductive": False})
    assert for_evaluation(running, IMAGE).normalisation.queries == "running"
    assert for_evaluation(running.with_values(eval={"transductive": True}), IMAGE).normalisation.queries == "together"
    tuned = for_evaluation(
        config_of(algorithm={"name": "protonet"}, eval={"finetune_steps": 3, "finetune_lr": 0.5}), IMAGE
    )
    assert isinstance(tuned, ProtoNet)
    assert (tuned.finetune_steps, tuned.finetune_lr) == (3, 0.5)


# --- an engine judging ---------------------------------------------------------


@pytest.fixture(scope="module")
def _torchs_settings_stay():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_torchs_settings_stay")
class TestEngineJudges:
    def test_a_cut_shard_is_the_whole_ones_beginning(self):
        config = config_of()
        engine = Engine(config, [make_table()])
        values = engine.blueprint.initial()
        whole = engine.judge(values, config, "test", 4, 4)
        part = engine.judge(values, config, "test", 4, 3)
        assert whole["score"].dtype == np.float64
        assert all(np.array_equal(part[name], whole[name][:3]) for name in ("score", "loss"))
        shifted = engine.judge(values, config, "test", 6, 2)
        assert np.allclose(shifted["loss"], whole["loss"][2:], rtol=1e-12)

    def test_settings_and_splits_are_kept_apart(self):
        config = config_of(eval={"also": [{"queries": 1}]})
        engine = Engine(config, [make_table()])
        values = engine.blueprint.initial()
        one, other = settings(config)
        first = engine.judge(values, one, "test", 0, 4)["loss"]
        assert not np.array_equal(first, engine.judge(values, other, "test", 0, 4)["loss"])
        assert not np.array_equal(first, engine.judge(values, one, "val", 0, 4)["loss"])
        assert np.array_equal(first, engine.judge(values, one, "test", 0, 4)["loss"])

    def test_a_part_is_a_pure_function_of_step_and_shard(self):
        config = config_of()
        one, other = Engine(config, [make_table()]), Engine(config, [make_table()])
        values = one.blueprint.initial()
        exponents = np.full(len(one.blueprint.sums.names), 30)
        parts = [one.part(values, exponents, step, shard).q for step, shard in [(0, 0), (0, 1), (1, 0)]]
        assert np.array_equal(other.part(values, exponents, 0, 1).q, parts[1])
        assert np.array_equal(one.part(values, exponents, 0, 0).q, parts[0])
        assert not np.array_equal(parts[0], parts[1])
        assert not np.array_equal(parts[0], parts[2])

    def test_shards_are_cuts_of_one_meta_batch(self):
        """Whatever the shard size, the sum over the meta-batch is the same within rounding."""
        totals = []
        for shard in (1, 4, 8):
            engine = Engine(config_of(task={"shard": shard}), [make_table()])
            theta, state = engine.blueprint.named(engine.blueprint.initial())
            sums = [engine.sums(theta, state, 3, s) for s in range(engine.shards)]
            totals.append({name: sum(one[name] for one in sums) for name in sums[0]})
        for total in totals[1:]:
            for name, value in totals[0].items():
                assert torch.allclose(total[name], value, rtol=1e-11, atol=1e-13)
