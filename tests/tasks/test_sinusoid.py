"""Sinusoids against an independent implementation of the documented rule, and what they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.config import Config
from metadist.tasks.samplers import evaluation_tasks, training_tasks
from metadist.tasks.sinusoid import Sinusoid

WORD = (1 << 64) - 1
SPLITS = ("train", "val", "test")
SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**40)


def sinusoid(split="train", seed=5, shots=3, queries=4, dtype=torch.float64):
    return Sinusoid(split, seed, shots, queries, dtype)


# --- the rule ------------------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def chain(*words):
    state = mix(words[0])
    for word in words[1:]:
        state = mix(state ^ word)
    return state


def uniform(key, number, low, high):
    """The middle of one of 2^30 equal cells."""
    cell = ((mix((key + number) & WORD) >> 32) << 30) >> 32
    return low + (high - low) * (cell + 0.5) / 2**30


def task_by_rule(split, seed, step, number, points):
    """Amplitude, phase and inputs of one task, on Python's numbers."""
    task = chain(seed, SPLITS.index(split), step, number)
    amplitude = uniform(chain(0, task, 0), 0, 0.1, 5.0)
    phase = uniform(chain(0, task, 1), 0, 0.0, math.pi)
    return amplitude, phase, [uniform(chain(0, task, 2), i, -5.0, 5.0) for i in range(points)]


@settings(max_examples=40, deadline=None)
@given(split=st.sampled_from(SPLITS), seed=SEEDS, step=STEPS, first=STEPS, shots=st.integers(1, 6))
def test_equals_an_independent_implementation(split, seed, step, first, shots):
    sampler = sinusoid(split, seed, shots, queries=2)
    (sx, sy), (qx, qy), _, family = sampler.sample(step, first, 3)
    for i in range(3):
        amplitude, phase, inputs = task_by_rule(split, seed, step, first + i, shots + 2)
        outputs = [amplitude * math.sin(x - phase) for x in inputs]
        assert torch.cat([sx[i], qx[i]]).flatten().tolist() == pytest.approx(inputs, rel=1e-14, abs=1e-14)
        assert torch.cat([sy[i], qy[i]]).flatten().tolist() == pytest.approx(outputs, rel=1e-12, abs=1e-12)
        assert int(family[i]) == math.floor(4 * phase / math.pi)


# --- promises ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, step=STEPS, first=STEPS, split=st.sampled_from(SPLITS))
def test_every_target_is_its_tasks_curve_at_its_input(seed, step, first, split):
    """And every number lies in its range."""
    sampler = sinusoid(split, seed)
    amplitude, phase = sampler.curves(step, first, 5)
    assert ((amplitude >= 0.1) & (amplitude <= 5.0)).all()
    assert ((phase >= 0) & (phase <= math.pi)).all()
    episodes = sampler.sample(step, first, 5)
    for x, y in (episodes.support, episodes.query):
        assert ((x >= -5) & (x <= 5)).all()
        assert torch.equal(y, amplitude[:, None, None] * torch.sin(x - phase[:, None, None]))
    assert ((episodes.family >= 0) & (episodes.family <= 3)).all()
    assert torch.equal(episodes.family, (4 * phase / math.pi).floor().long())


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, step=STEPS, first=st.integers(0, 10**6), cut=st.integers(0, 8), tasks=st.integers(1, 5))
def test_a_task_is_the_same_whatever_batch_it_is_sampled_in(seed, step, first, cut, tasks):
    whole = sinusoid(seed=seed).sample(step, first, 13)
    sampler = sinusoid(seed=seed)
    sampler.sample(step + 1, 0, 2)  # no generator is carried along
    part = sampler.sample(step, first + cut, tasks)
    for one, other in zip(torch.utils._pytree.tree_leaves(part), torch.utils._pytree.tree_leaves(whole), strict=True):
        assert torch.equal(one, other[cut : cut + tasks])


def test_more_points_hold_the_first_ones():
    """A point is a function of its number: judging with more queries draws no other support set."""
    few, many = sinusoid(queries=2).sample(1, 0, 6), sinusoid(queries=9).sample(1, 0, 6)
    assert torch.equal(few.support.x, many.support.x)
    assert torch.equal(few.query.y, many.query.y[:, :2])


def test_seeds_steps_splits_and_tasks_differ():
    samples = [sinusoid(split).curves(3, 0, 8) for split in SPLITS]
    samples += [sinusoid(seed=6).curves(3, 0, 8), sinusoid().curves(4, 0, 8), sinusoid().curves(3, 8, 8)]
    seen = [value for pair in samples for values in pair for value in values.tolist()]
    assert len(set(seen)) == len(seen)
    inputs = torch.cat([sinusoid(split).sample(3, 0, 8).support.x.flatten() for split in SPLITS])
    assert len(set(inputs.tolist())) == len(inputs)


def test_support_and_query_points_are_distinct():
    episodes = sinusoid(shots=20, queries=30).sample(0, 0, 100)
    points = torch.cat([episodes.support.x, episodes.query.x], 1)[..., 0]
    assert all(len(set(of_task)) == 50 for of_task in points.tolist())


def test_the_layout_of_an_episode():
    sampler = sinusoid(dtype=torch.float32)
    episodes = sampler.sample(0, 0, 6)
    assert episodes.support.x.shape == episodes.support.y.shape == (6, 3, 1)
    assert episodes.query.x.shape == episodes.query.y.shape == (6, 4, 1)
    assert {v.dtype for v in (*episodes.support, *episodes.query)} == {torch.float32}
    assert (sampler.shape, sampler.ways, sampler.classes) == ((1,), 1, 0)
    assert torch.equal(episodes.classes, torch.zeros(6, 1, dtype=torch.int64))
    assert (episodes.family.shape, episodes.family.dtype) == ((6,), torch.int64)
    exact = sinusoid().sample(0, 0, 6)
    assert torch.equal(exact.query.y.float(), episodes.query.y), "float64 is narrowed at the very end"


# --- the distribution ----------------------------------------------------------


def chi_square(values, low, high, cells=20):
    counts = torch.bincount(((values - low) / (high - low) * cells).long().clamp(max=cells - 1), minlength=cells)
    expected = len(values) / cells
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("split", SPLITS)
def test_amplitudes_phases_and_inputs_are_uniform_and_independent(split):
    """19 degrees of freedom: 65 is beyond one in a million; correlations within 5 / √N."""
    sampler, tasks = sinusoid(split), 20000
    amplitude, phase = sampler.curves(0, 0, tasks)
    episodes = sampler.sample(0, 0, tasks)
    assert chi_square(amplitude, 0.1, 5.0) < 65
    assert chi_square(phase, 0.0, math.pi) < 65
    drawn = [amplitude, phase]
    for examples in (episodes.support, episodes.query):
        for number in (0, 2):
            drawn.append(examples.x[:, number, 0])
            assert chi_square(drawn[-1], -5.0, 5.0) < 65
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 5 / math.sqrt(tasks)
    assert float(amplitude.min()) < 0.11 < 4.99 < float(amplitude.max()), "the whole range"
    assert float(phase.min()) < 0.01 < math.pi - 0.01 < float(phase.max())


def test_all_four_families_are_equally_frequent():
    """3 degrees of freedom: 31 is beyond one in a million."""
    family = sinusoid().sample(0, 0, 8000).family
    counts = torch.bincount(family, minlength=4)
    assert counts.shape == (4,)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 31


# --- from a config -------------------------------------------------------------


def config_of(**sections):
    base = {"data": {"name": "sinusoid"}, "model": {"name": "mlp"}, "task": {"shots": 3, "queries": 4}, "seed": 9}
    return Config.model_validate({**base, **sections})


def test_training_tasks_are_those_of_the_config():
    tasks = training_tasks(config_of(engine={"dtype": "float64"}), [], "cpu")
    expected = sinusoid(seed=9).sample(2, 5, 7)
    assert torch.equal(tasks.sample(2, 5, 7).query.y, expected.query.y)
    assert (tasks.shape, tasks.ways, tasks.classes) == ((1,), 1, 0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_tasks_are_those_of_eval(split):
    plain = evaluation_tasks(config_of(), [], split, "cpu").sample(0, 0, 2)
    assert torch.equal(plain.support.x, sinusoid(split, seed=9, dtype=torch.float32).sample(0, 0, 2).support.x)
    other = evaluation_tasks(config_of(eval={"shots": 10, "queries": 50}), [], split, "cpu").sample(0, 0, 2)
    assert (other.support.x.shape, other.query.y.shape) == ((2, 10, 1), (2, 50, 1))
