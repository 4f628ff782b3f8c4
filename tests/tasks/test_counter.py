"""Counter-based random numbers against the same arithmetic on Python's integers."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.tasks import counter
from metadist.tasks.counter import below, distinct, key, mix

WORD = (1 << 64) - 1
words = st.integers(-(1 << 63), (1 << 63) - 1)


def mix_integer(x):
    """SplitMix64 (Steele, Lea & Flood 2014): one step of the counter and the finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def key_integer(seed, *coordinates):
    state = mix_integer(seed & WORD)
    for coordinate in coordinates:
        state = mix_integer(state ^ (coordinate & WORD))
    return state


def below_integer(key, draw, bound):
    return (mix_integer((key + draw) & WORD) >> 32) * bound >> 32


def test_splitmix64_published_outputs():
    """The first outputs of the generator with seed 0."""
    golden = 0x9E3779B97F4A7C15
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    for number, expected in enumerate(outputs):
        state = number * golden & WORD
        signed = state - (1 << 64) if state >> 63 else state
        assert int(mix(torch.tensor(signed))) & WORD == expected == mix_integer(state)


@given(st.lists(words, min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_mix(values):
    assert [int(v) & WORD for v in mix(torch.tensor(values))] == [mix_integer(v & WORD) for v in values]


@given(words, st.lists(words, max_size=4), st.lists(words, min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_key(seed, coordinates, last):
    expected = [key_integer(seed, *coordinates, one) for one in last]
    assert [int(k) & WORD for k in key(seed, *coordinates, torch.tensor(last))] == expected
    assert int(key(seed, *coordinates)) & WORD == key_integer(seed, *coordinates)
    assert [int(k) & WORD for k in key(np.int64(seed), *map(np.int64, coordinates), torch.tensor(last))] == expected


def test_key_takes_unsigned_coordinates_and_broadcasts():
    assert int(key(WORD, WORD)) & WORD == key_integer(-1, -1)
    grid = key(1, torch.arange(3)[:, None], torch.arange(4))
    assert grid.shape == (3, 4)
    assert int(grid[2, 3]) == int(key(1, 2, 3))
    assert len(set(grid.flatten().tolist())) == 12


def test_key_tells_the_order_of_its_coordinates():
    assert int(key(0, 1, 2)) != int(key(0, 2, 1)) != int(key(1, 0, 2))


@given(words, st.integers(0, 1 << 40), st.integers(1, (1 << 31) - 1))
@settings(deadline=None, max_examples=100)
def test_below(seed, draw, bound):
    found = int(below(torch.tensor([seed]), draw, bound))
    assert found == below_integer(seed & WORD, draw, bound)
    assert 0 <= found < bound


@pytest.mark.parametrize("room", [1 << 24, 500])
@pytest.mark.parametrize("amount", [1, 3, 7, 12])
def test_distinct_is_a_shuffle_that_stops_early(amount, room, monkeypatch):
    monkeypatch.setattr(counter, "ROOM", room)
    keys = key(3, torch.arange(200))
    size = torch.tensor([random.Random(i).randint(amount, 12) for i in range(200)])
    found = distinct(keys, size, amount)
    assert found.shape == (200, amount)
    for one, most, row in zip(keys.tolist(), size.tolist(), found.tolist(), strict=True):
        deck = list(range(most))
        for position in range(amount):
            other = position + below_integer(one & WORD, position, most - position)
            deck[position], deck[other] = deck[other], deck[position]
        assert row == deck[:amount]
        assert len(set(row)) == amount
        assert max(row) < most


def test_distinct_of_all_is_a_permutation():
    found = distinct(key(0, torch.arange(50)), torch.full((50,), 6), 6)
    assert all(sorted(row) == list(range(6)) for row in found.tolist())
    assert len({tuple(row) for row in found.tolist()}) > 40


def test_every_ordered_pair_is_equally_likely():
    """Chi-square with 5·4 cells: 19 degrees of freedom, 60 is beyond one in a million."""
    draws = 20_000
    found = distinct(key(7, torch.arange(draws)), torch.full((draws,), 5), 2)
    counts = torch.bincount(found[:, 0] * 5 + found[:, 1], minlength=25).double()
    counts = counts[counts > 0]
    assert len(counts) == 20
    assert float(((counts - draws / 20) ** 2 / (draws / 20)).sum()) < 60


def test_neighbouring_seeds_steps_and_tasks_are_unrelated():
    """The high bit of keys that differ by one in one coordinate is a fair coin: 5 σ of 4096."""
    n = torch.arange(4096)
    for one, other in [(key(n[0].item(), n), key(1, n)), (key(0, 0, n), key(0, 1, n)), (key(0, n), key(0, n + 1))]:
        same = int(((one < 0) == (other < 0)).sum())
        assert abs(same - 2048) < 5 * 32
