"""Trials that are computed together: each is the run that it would be alone, in closed form to the bit."""

import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from metadist.config import resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.errors import ConfigError, StorageError
from metadist.methods import every_method
from metadist.run import train
from metadist.runtime.checkpoint import checkpoints, save_checkpoint
from metadist.runtime.journal import read_metrics
from metadist.runtime.run_folder import RunFolder
from metadist.search.job import SearchJob, checked
from metadist.search.packed import COMPUTES, _ByThread, _computed, _Wish, run_pack
from metadist.search.state import End, Report, Trial

POINTS = ({"algorithm.inner_lr": 0.4}, {"algorithm.inner_lr": 0.1, "outer.lr": 0.003}, {"seed": 7})
SPACE = {
    "algorithm.inner_lr": {"uniform": [0.01, 2]},
    "outer.lr": {"uniform": [0.0001, 0.1]},
    "seed": {"randint": [0, 9]},
}
METHODS = {
    "maml": (), "meta-sgd": (), "protonet": (),
    "reptile": ("algorithm.inner_optimizer=sgd",),
    "maml++": ("model.statistics=running", "algorithm.inner_steps=2"),
}  # fmt: skip
CLOSED = ("engine.dtype=float32", "model.name=stride2", "model.width=4", "model.layers=2")
"""A network whose shards have a closed form."""


@pytest.fixture
def search(tiny: Callable[..., Any]) -> Callable[..., SearchJob]:
    def make(*overrides: str, **keys: Any) -> SearchJob:
        overrides = ("engine.dtype=float64", "outer.steps=6", "eval.every=3", "eval.val_episodes=8", *overrides)
        base = tiny(*overrides).model_dump()
        reads_rate = "inner_lr" in base["algorithm"]
        space = {key: domain for key, domain in SPACE.items() if reads_rate or key != "algorithm.inner_lr"}
        return checked({"search": {"space": space, "pack": 3, "concurrent": 3, **keys}, **base}, "test")

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("trials", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def trials(job: SearchJob) -> list[Trial]:
    values = [{key: value for key, value in point.items() if key in job.search.space} for point in POINTS]
    return [Trial(f"{n:03}", n, "random", point) for n, point in enumerate(values)]


def go(trial: Trial, step: int, values: dict[str, float]) -> Any:
    return "go"


def run(job: SearchJob, trials: list[Trial], folder: Path, ask: Any = go) -> dict[str, End]:
    """How each ended, in the order in which they did."""
    ended: dict[str, End] = {}
    run_pack(job, trials, folder, ask, lambda trial, end: ended.__setitem__(trial.id, end))
    return ended


def both_runs(job: SearchJob, trial: Trial, folder: Path, alone: Path) -> tuple[tuple[Path, Any], tuple[Path, Any]]:
    """Folder and result of a packed trial, and those of its run alone."""
    config = job.config(trial.values).with_values(cluster={"workers": 0}, eval={"test": False})
    by_itself = train(config, "alone", alone / trial.id)
    packed = folder / "trials" / trial.id
    return (packed, RunFolder(packed).result()), (by_itself.folder, by_itself.result)


def assert_alike(job: SearchJob, trial: Trial, folder: Path, alone: Path) -> str:
    """θ and history of a packed trial beside those of its run alone; θ's hash."""
    (packed, result), (by_itself, other_result) = both_runs(job, trial, folder, alone)
    assert (result["reproducible"], other_result["reproducible"]) == (False, True)
    one, other = (load_file(path / "theta.safetensors") for path in (packed, by_itself))
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=1e-9, atol=1e-9)
    rows = [read_metrics(path / "metrics.parquet") for path in (packed, by_itself)]
    for mine, its in zip(*rows, strict=True):
        assert (mine.get("val_accuracy") is None) == (mine["step"] != 3 and mine["step"] != 6)
        for key in ("step", "loss", "accuracy", "grad_norm", "lr", "val_accuracy"):
            if its.get(key) is not None or mine.get(key) is not None:
                assert mine[key] == pytest.approx(its[key], rel=1e-9), key
    return str(result["theta_sha256"])


def assert_the_same(job: SearchJob, trial: Trial, folder: Path, alone: Path) -> str:
    """The bits of both; θ's hash."""
    (packed, result), (by_itself, other_result) = both_runs(job, trial, folder, alone)
    assert (result["reproducible"], other_result["reproducible"]) == (True, True)
    assert result["theta_sha256"] == other_result["theta_sha256"]
    mine, its = (read_metrics(path / "metrics.parquet") for path in (packed, by_itself))
    for key in ("step", "loss", "accuracy", "grad_norm", "lr", "val_accuracy", "val_loss"):
        assert [row.get(key) for row in mine] == [row.get(key) for row in its], key
    return str(result["theta_sha256"])


@pytest.mark.parametrize("name", METHODS)
def test_packed_trials_agree_with_runs_alone(search: Callable[..., SearchJob], folder: Path, name: str) -> None:
    job = search(f"algorithm.name={name}", *METHODS[name])
    every = trials(job)
    ended = run(job, every, folder)
    different = {assert_alike(job, trial, folder, folder / "alone") for trial in every}
    assert len(different) == len({str(trial.values) for trial in every}), "no trial is another"
    for trial in every:
        end = ended[trial.id]
        assert (end.how, end.step, end.facts["reproducible"]) == ("finished", 6, False)
        assert "peak_memory" not in end.facts, "it is that of the pack"
        log = (folder / "logs" / f"{trial.id}.log").read_text()
        assert log.count("meta-step 6/6") == 1, "its own lines alone"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_closed_form_packed_trials_have_the_bits_of_runs_alone(
    search: Callable[..., SearchJob], folder: Path, dtype: str
) -> None:
    """Also when one of them is stopped on the way, and when they differ in their seed."""
    job = search(*CLOSED, f"engine.dtype={dtype}")
    every = trials(job)

    def ask(trial: Trial, step: int, values: dict[str, float]) -> Any:
        return "stop" if (trial.id, step) == ("001", 3) else "go"

    ended = run(job, every, folder, ask)
    assert {id: end.how for id, end in ended.items()} == {"001": "stopped", "000": "finished", "002": "finished"}
    assert all(end.facts["reproducible"] for end in ended.values())
    assert len({assert_the_same(job, every[n], folder, folder / "alone") for n in (0, 2)}) == 2


def test_a_trial_that_is_stopped_leaves_the_others(search: Callable[..., SearchJob], folder: Path) -> None:
    job = search()
    asked = []

    def ask(trial: Trial, step: int, values: dict[str, float]) -> Any:
        asked.append((trial.id, step, values["score"]))
        return "stop" if (trial.id, step) == ("001", 3) else "go"

    ended = run(job, trials(job), folder, ask)
    assert [one[:2] for one in asked] == [("000", 3), ("001", 3), ("002", 3), ("000", 6), ("002", 6)]
    assert list(ended) == ["001", "000", "002"] and ended["001"].how == "stopped"
    rows = read_metrics(folder / "trials" / "001" / "metrics.parquet")
    assert [row["step"] for row in rows] == [1, 2, 3]
    (score,) = (score for id, step, score in asked if (id, step) == ("001", 3))
    assert rows[-1]["val_accuracy"] == score
    assert not (folder / "trials" / "001" / "result.json").exists()
    assert all(ended[id].how == "finished" for id in ("000", "002"))


def test_one_that_fails_or_diverges_leaves_the_others(
    search: Callable[..., SearchJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = search("data.name=sinusoid", "task.ways=5", "model.norm=none", "algorithm.inner_steps=20")
    rates = {"000": 1e-3, "001": 1e30, "002": 2e-3}
    every = [Trial(id, int(id), "random", {"algorithm.inner_lr": rate}) for id, rate in rates.items()]
    monkeypatch.setattr("metadist.search.trial.OTHERS_SECONDS", 0.1)
    taken = RunFolder.create(folder / "trials" / "002", job.base, "another's")
    ended = run(job, every, folder)
    taken.unlock()
    assert ended["001"].how == "diverged" and "diverged at step 0" in ended["001"].reason
    assert ended["002"].how == "failed" and "another process" in ended["002"].reason
    assert ended["000"].how == "finished" and ended["000"].step == 6


@pytest.mark.parametrize(
    ("behind", "words", "compare"),
    [(0, (), assert_alike), (3, (), assert_alike), (3, CLOSED, assert_the_same)],
    ids=["by vmap from the start", "by vmap", "in closed form"],
)
def test_a_pack_whose_process_died_goes_on(
    search: Callable[..., SearchJob], folder: Path, behind: int, words: Any, compare: Any
) -> None:
    """Killed in its second validation, when one trial has told of it; one's checkpoint is older than the others'."""
    job = search(*words)
    every = trials(job)
    told: list[tuple[str, int]] = []

    class Killed(BaseException):
        pass

    def dies(trial: Trial, step: int, values: dict[str, float]) -> Any:
        if (trial.id, step) == ("001", 6):
            raise Killed
        told.append((trial.id, step))
        trial.reports.append(Report(step, values, "go"))
        return "go"

    threads = threading.active_count()
    with pytest.raises(Killed):
        run(job, every, folder, dies)
    assert threading.active_count() == threads
    for step, path in checkpoints(folder / "trials" / "002" / "checkpoints"):
        if step > behind:
            shutil.rmtree(path)

    def ask(trial: Trial, step: int, values: dict[str, float]) -> Any:
        told.append((trial.id, step))
        return "go"

    ended = run(job, every, folder, ask)
    assert all(ended[trial.id].how == "finished" for trial in every)
    assert {(id, step) for id, step in told} == {(trial.id, step) for trial in every for step in (3, 6)}
    for trial in every:
        compare(job, trial, folder, folder / "alone")


def test_a_full_disk_ends_the_pack(
    search: Callable[..., SearchJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path, *words: Any) -> Any:
        if "001" in os.fspath(place):
            raise StorageError("disk: cannot be written: No space left on device")
        return save_checkpoint(place, *words)

    monkeypatch.setattr("metadist.runtime.train.save_checkpoint", full)
    with pytest.raises(StorageError, match=r"No space left on device$"):
        run(search(), trials(search()), folder)


# --- what goes together --------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "keys", "say"),
    [
        (
            (),
            {"space": {"algorithm.inner_steps": {"choice": [1, 2]}}},
            r"^test: search\.space\.algorithm\.inner_steps: trials of search\.pack=3 differ in algorithm\.inner_lr,",
        ),
        ((), {"concurrent": 4}, r"search\.concurrent: 4 trials at once are no whole packs; .* such as 3$"),
        ((), {"concurrent": 2}, r"search\.concurrent: 2 trials at once are no whole packs"),
        ((), {"scheduler": "pbt", "searcher": "random"}, r"search\.scheduler: pbt changes values on the way"),
        ((), {"scheduler": "fifo", "also": ["seconds"]}, r"search\.also: seconds of a trial is not known within"),
        (("cluster.workers=2",), {}, r"cluster\.workers: a pack computes in one process; valid with .* is 0"),
        (("engine.mode=loop",), {}, r"engine\.mode: a pack is computed all at once"),
        (("outer.compression=int8",), {}, r"outer\.compression: packed trials send"),
        (
            ("algorithm.name=task-conditioned", "task.within_group=true"),
            {},
            r"algorithm\.name: task-conditioned compares the tasks of a shard and is not packed",
        ),
    ],
)
def test_what_does_not_go_together(search: Callable[..., SearchJob], words: Any, keys: Any, say: str) -> None:
    with pytest.raises(ConfigError, match=say) as told:
        search(*words, **keys)
    assert "\n" not in str(told.value)


def test_the_jobs_own_run_is_packed_with_nobody(search: Callable[..., SearchJob]) -> None:
    assert [search().search.pack_of(n) for n in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [search(baseline=False).search.pack_of(n) for n in range(4)] == [0, 0, 0, 1]
    assert search(concurrent=6).search.processes == 2


@pytest.mark.parametrize("method", every_method(), ids=lambda method: method.method_name())
def test_every_method_packs_that_does_not_compare_tasks(method: Any, tiny: Callable[..., Any]) -> None:
    """A shard of two trials, whose inner rates differ where the method has one."""
    import torch

    from metadist.algorithms.algorithm import Comparing
    from metadist.config import resolve
    from metadist.data.sources import prepare
    from metadist.engine.engine import Engine
    from metadist.engine.packed import vectorised_packed
    from metadist.engine.shard import vectorised

    name = method.method_name()
    further = {"task-conditioned": ["task.within_group=true"], "imaml": ["algorithm.inner_steps=3"]}.get(name, [])
    rates = [[f"algorithm.inner_lr={rate}"] if "inner_lr" in method.model_fields else [] for rate in (0.01, 0.005)]
    raw = [tiny("engine.dtype=float64", f"algorithm.name={name}", *further, *rate) for rate in rates]
    engines = [Engine(config, [prepare(source) for source in config.data.sources]) for config in map(resolve, raw)]
    methods = [engine.algorithms.at(0) for engine in engines]
    assert isinstance(methods[0], Comparing) == method.compares_tasks
    if method.compares_tasks:
        return
    named = [engine.blueprint.named(engine.blueprint.initial()) for engine in engines]
    thetas, states = [theta for theta, _ in named], [state for _, state in named]
    tasks, size = engines[0].tasks, engines[0].shard_tasks
    episodes = tasks.sample(0, 0, size)
    packed = vectorised_packed(methods, thetas, states, episodes, tasks.ways, 0)
    for place, (algorithm, theta, state) in enumerate(zip(methods, thetas, states, strict=True)):
        alone = vectorised(algorithm, theta, state, episodes, tasks.ways, 0)
        assert alone.keys() == packed[place].keys()
        for key, value in alone.items():
            torch.testing.assert_close(packed[place][key], value, rtol=1e-8, atol=1e-10)


def test_in_the_precision_of_the_job(tiny: Callable[..., Any]) -> None:
    """A pack's sums are those of a trial alone, with factors rounded where the config says so."""
    configs = [resolve(tiny(f"engine.precision={precision}")) for precision in ("full", "bf16")]
    engines = [Engine(config, [prepare(config.data.sources[0])]) for config in configs]
    values = engines[0].blueprint.initial()
    full, rounded = (engine.flat(values, 0, 0) for engine in engines)
    (packed,) = _computed([_Wish(0, COMPUTES, engine=engines[1], values=values)])
    apart = np.abs(engines[1].blueprint.sums.flatten(packed[0]).numpy() - rounded).max()  # type: ignore[index]
    assert apart < 0.2 * np.abs(full - rounded).max()


def test_what_is_said_beside_the_trials_is_not_lost() -> None:
    own, others, mine = threading.local(), io.StringIO(), io.StringIO()
    said = _ByThread(own, others)
    said.write("a warning")
    own.file = mine
    said.write("of the trial")
    mine = io.StringIO()
    own.file.close()
    said.write(" and more")
    assert others.getvalue() == "a warning and more"
