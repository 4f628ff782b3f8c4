"""The suite that measures what is cheaper than brute force measures the same work on both sides."""

import pytest

from metadist.bench.search import JOBS, PACKS, packed_rows, pair, search_job, sweep_rows, trial_job
from metadist.search.job import checked


def test_rows_of_a_sweep_and_of_packs() -> None:
    rows = [*sweep_rows("regression", 1, lambda line: None), *packed_rows("regression", 1, lambda line: None)]
    assert len(rows) == 2 + 2 * len(PACKS)
    for plain, better in zip(rows[::2], rows[1::2], strict=True):
        assert (plain.baseline, better.baseline) == (None, plain.name)
        assert plain.value > 0
        assert better.ratio == better.value / plain.value, "of one turn, the ratio is that of the medians"


def test_a_ratio_is_the_median_of_those_within_a_turn() -> None:
    _, row = pair("plain", "better", [1.0, 10.0, 100.0], [2.0, 10.0, 300.0], "tasks/s")
    assert (row.value, row.ratio, row.repeats) == (10.0, 2.0, 3)


@pytest.mark.parametrize("name", JOBS)
def test_the_searches_are_searches(name: str) -> None:
    for search in ({"concurrent": 2}, {"concurrent": 8, "pack": 4}):
        found = checked(search_job(name, search), "bench")
        assert found.search.processes == 2 and found.base.outer == trial_job(name).outer
