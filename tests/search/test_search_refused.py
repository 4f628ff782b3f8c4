"""What a search refuses before it makes anything, in one line; and its dry run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.runtime.cluster import places
from metadist.search.job import load_search
from metadist.search.run import size, tried

SPACE = {"algorithm.inner_lr": {"grid": [0.2, 0.4]}, "algorithm.inner_steps": {"choice": [1, 2, 3]}}


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[..., Config]) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"search": {"space": SPACE}, **tiny().model_dump(mode="json")}))
    for source in tiny().data.sources:
        prepare(source)  # that it is built is a line of its own
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.workers={min: 1, max: 2}"], "cluster.workers: a trial's placement group has one size"),
        (["cluster.address=ray://127.0.0.1:1"], "cluster.address: ray://127.0.0.1:1 keeps the driver outside"),
        (
            ["cluster.workers=1", "search.scheduler=fifo", "search.also=[peak_memory]"],
            "search.also: peak_memory is known of trials that compute in one process",
        ),
        (["search.space={algorithm.inner_rl: {grid: [1]}}"], "did you mean algorithm.inner_lr"),
        (["cluster.address=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_refused(words: list[str], said: str, job_file: Path, tmp_path: Path, refused: Any) -> None:
    code = 4 if "answers" in said else 2
    refused("search", job_file, *words, "--run-dir", tmp_path / "search", say=(said,), code=code)


def test_folders(job_file: Path, tmp_path: Path, refused: Any) -> None:
    refused("search", job_file, "--run-dir", tmp_path, say=("exists already", "--run-dir"))
    refused("search", "--resume", tmp_path, say=("is no search folder", "search.yaml"))
    refused("search", job_file, "--resume", tmp_path, say=("leave out",))
    refused("search", "--resume", tmp_path, "--dry-run", say=("--resume",))
    refused("search", say=("no job is named", "packaged jobs: search-inner-loop,"))
    refused("train", job_file, say=("metadist search",))
    refused("search", "show", say=("metadist search show DIR",))
    refused("search", "show", tmp_path, say=("is no search folder",))


def test_dry_run(job_file: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints a job file that is the same job, and the size of the space; makes nothing."""
    monkeypatch.chdir(tmp_path)
    ended = cli("search", job_file, "search.trials=5", "--dry-run")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "# space: 6 combinations"
    again = tmp_path / "again.yaml"
    again.write_text(ended.out)
    assert load_search(again) == load_search(job_file, ["search.trials=5"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.yaml", "job.yaml"]


def test_size(job_file: Path) -> None:
    need = "search.conditions=[{when: {algorithm.inner_lr: 0.2}, need: {algorithm.inner_steps: {at_most: 2}}}]"
    assert size(load_search(job_file, [need])) == "5 combinations"
    space = "search.space={algorithm.inner_lr: {loguniform: [0.1, 1]}, algorithm.inner_steps: {randint: [1, 4]}}"
    assert size(load_search(job_file, [space])) == (
        "4 combinations, each with any value of algorithm.inner_lr between its bounds"
    )


def test_places_on_a_host(tiny: Callable[..., Config]) -> None:
    host = {"CPU": 4.0, "node:a": 1.0, "disk": 1.0}
    expected = {
        (): 4,
        ("cluster.cpus=1.5",): 2,
        ("cluster.resources={disk: 1}",): 1,
        ("cluster.resources={tape: 1}",): 0,
        ("cluster.cpus=0", "cluster.workers=7"): 7,
    }
    for words, there in expected.items():
        assert places(host, resolve(tiny(*words)).cluster) == there, words


def test_the_packaged_search(tmp_path: Path) -> None:
    job = load_search("search-inner-loop")
    assert job.search.trials >= 16 and job.base.cluster.workers == 0
    assert size(job).startswith("7 combinations")


def test_trials_at_once_share_the_gpus(
    job_file: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadist.config.visible_gpus", lambda: 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for overrides, share in (([], 0.5), (["search.concurrent=4"], 0.25), (["cluster.workers=2"], 0.25)):
        job = load_search(job_file, ["engine.device=cuda", *overrides])
        assert job.base.cluster.gpus == share and job.base.engine.device == "cuda"
    words = ["engine.device=cuda", "cluster.gpus=1", "--run-dir", tmp_path / "search"]
    refused("search", job_file, *words, say=("cluster.gpus: 2 trials at once", "at most 0.5 is valid"))


def test_a_grid_says_what_it_leaves_out(job_file: Path) -> None:
    """Without `search.trials` it is whole; the job's own run is one more than the points here."""
    grid = "search.space={algorithm.inner_lr: {grid: [0.2, 0.3]}, algorithm.inner_steps: {grid: [1, 2, 3]}}"
    words = [grid, "search.searcher=grid"]
    for more in ([], ["search.trials=null"], ["search.startup=null"]):
        whole = load_search(job_file, [*words, *more])
        assert whole.search.trials == whole.grid_runs() and tried(whole).startswith("grid: all ")
    count = whole.grid_runs()
    assert tried(load_search(job_file, [*words, "search.trials=4"])) == (
        f"grid: 4 of {count} points are tried, the job's own values among them; "
        f"search.trials={count}, or null, is the whole grid"
    )


def test_the_packaged_search_by_random() -> None:
    job = load_search("search-inner-loop", ["search.searcher=random", "search.startup=null"])
    assert job.search.searcher == "random" and job.search.budget == 10
