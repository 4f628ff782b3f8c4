"""The suite compares what computes the same, and counts what a formula counts."""

import subprocess
import sys

import pytest

from metadist.bench import contenders, peers
from metadist.bench.contenders import plain
from metadist.bench.peers import LOOP, VECTORISED, case_rows, job, operations
from metadist.data.sources import prepare
from metadist.errors import RunError


def table():
    return prepare(job("c", 2).data.sources[0])


def test_rows_of_a_case(monkeypatch):
    """A plain autograd loop in the place of learn2learn, which need not be there."""
    monkeypatch.setitem(contenders.CONTENDERS, "learn2learn", (plain, (1, 2)))
    rows = {row.name: row for row in case_rows("c", 2, ["learn2learn"], table(), 1, lambda line: None)}
    assert rows["learn2learn (c) order 2"].baseline is None
    for name in (VECTORISED, LOOP):
        row = rows[f"{name} (c) order 2"]
        assert row.baseline == "learn2learn (c) order 2"
        assert row.ratio == pytest.approx(row.value / rows[row.baseline].value)
    share = rows["share of the core's limit (c) order 2"].value
    operations_of, peak = (rows[f"{name} (c) order 2"].value for name in ("operations", "peak beside"))
    assert share == pytest.approx(operations_of * rows[f"{VECTORISED} (c) order 2"].value / peak)


def test_who_computes_something_else_is_told(monkeypatch):
    def wrong(config, network):
        return lambda support, query: 1.001 * plain(config, network)(support, query)

    monkeypatch.setitem(contenders.CONTENDERS, "learn2learn", (wrong, (1, 2)))
    with pytest.raises(RunError, match=r"bench peers: learn2learn and metadist, loop differ in conv1\.weight"):
        peers.case_rows("c", 1, ["learn2learn"], table(), 1, lambda line: None)


def test_operations_by_formula():
    """First order: 10 images pass forwards and backwards, but for the derivative towards the images themselves."""
    layers = [14 * 14 * 9 * 64, *(size * size * 9 * 64 * 64 for size in (7, 4, 2))]
    convolutions = 10 * (2 * sum(layers) + sum(layers[1:]))
    assert operations(job("c", 1), table()) == 2 * (convolutions + 3 * 10 * 64 * 5)


def test_suites_for_one_device_run_without_ray():
    code = "import sys; sys.modules['ray'] = None; import metadist.bench.peers, metadist.bench.engine"
    subprocess.run([sys.executable, "-c", code], check=True)
