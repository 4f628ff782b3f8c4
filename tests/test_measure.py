"""What is better, and how a person reads it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.measure import ACCURACY, MEASURES, MSE

NUMBERS = st.floats(0, 1e6, allow_nan=False)


@given(NUMBERS, NUMBERS)
def test_more_accuracy_and_less_error_are_better(one, other):
    assert ACCURACY.better(one, other) == (one > other) == MSE.better(other, one)
    assert not ACCURACY.better(one, one)
    assert not MSE.better(one, one)


@pytest.mark.parametrize("measure", [ACCURACY, MSE])
def test_nothing_is_no_better_than_something(measure):
    assert not measure.better(math.nan, 0.5)


def test_the_measure_of_a_kind():
    assert MEASURES == {"classification": ACCURACY, "regression": MSE}
    assert (ACCURACY.name, MSE.name) == ("accuracy", "mse")


@pytest.mark.parametrize(("measure", "value", "words"), [
    (ACCURACY, 0.9876, "98.8 %"), (ACCURACY, 1.0, "100.0 %"), (ACCURACY, 0.0, "0.0 %"), (ACCURACY, None, "–"),
    (MSE, 0.123456, "0.1235"), (MSE, 12.34567, "12.35"), (MSE, 0.0, "0"), (MSE, 1e-7, "1e-07"), (MSE, None, "–"),
])  # fmt: skip
def test_a_value_as_a_person_reads_it(measure, value, words):
    assert measure.show(value) == words


def test_digits_are_of_percent():
    assert ACCURACY.show(0.98765, digits=2) == "98.77 %"
    assert ACCURACY.interval(0.98765, 0.00432, digits=2) == "98.77 ± 0.43 %"


@pytest.mark.parametrize(("measure", "value", "ci95", "words"), [
    (ACCURACY, 0.9876, 0.0123, "98.8 ± 1.2 %"), (ACCURACY, 0.9876, None, "98.8 %"),
    (MSE, 0.123456, 0.01234, "0.1235 ± 0.012"), (MSE, 0.123456, None, "0.1235"), (MSE, 3.0, 0.25, "3 ± 0.25"),
])  # fmt: skip
def test_an_interval_as_a_person_reads_it(measure, value, ci95, words):
    assert measure.interval(value, ci95) == words
