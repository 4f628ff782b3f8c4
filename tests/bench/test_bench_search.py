"""The suite that measures what is cheaper than brute force measures the same work on both sides."""

from metadist.bench.search import PACKS, packed_rows, pair, sweep_rows
from metadist.config import load, validate


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


def test_the_packed_trial_is_a_search(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from metadist.bench.search import TRIALS, _trial_job
    from metadist.config import to_yaml
    from metadist.search.job import checked

    job = _trial_job()
    path = tmp_path / "job.yaml"
    path.write_text(to_yaml(job))
    assert load(path) == job
    raw = {"search": {"space": {"algorithm.inner_lr": {"choice": list(TRIALS)}}}, **job.model_dump()}
    assert checked(raw, "bench").base.outer == validate(job.model_dump(), "bench").outer
