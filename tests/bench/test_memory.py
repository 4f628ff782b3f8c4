"""Rows of memory stand beside one inner step, rows of recomputed steps' time beside kept ones'."""

import pytest

from metadist.bench.memory import METHODS, job, rows
from metadist.engine.fit import Need


def test_rows() -> None:
    found = {
        method: {k: Need(2, (n + 1) * k * 2**20, 0.1 * k * (n + 1), 0) for k in (1, 4)}
        for n, method in enumerate(METHODS)
    }
    by_name = {row.name: row for row in rows(found)}
    assert len(by_name) == 2 * 2 * len(METHODS)
    grown = by_name["maml, recompute, 4 inner steps"]
    assert (grown.value, grown.baseline, grown.ratio) == (8, "maml, recompute, 1 inner step", 4)
    dearer = by_name["maml, recompute, 4 inner steps, time"]
    assert dearer.baseline == "maml, 4 inner steps, time"
    assert dearer.ratio == pytest.approx(2)
    assert by_name["maml, 1 inner step"].ratio is None
    assert grown.point == ("", "maml, recompute", "inner steps", 4, "1 inner step", "")
    assert dearer.point == grown.point._replace(to="maml")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_job(method: str) -> None:
    assert job(method, 50).shard == 2
