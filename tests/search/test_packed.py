"""Trials that are computed together: each is, but for the last digits, the run that it would be alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from metadist.errors import ConfigError, RunError
from metadist.run import train
from metadist.runtime.journal import read_metrics
from metadist.runtime.train import Stopped
from metadist.search.job import SearchJob, checked
from metadist.search.packed import check_pack, run_packed
from metadist.search.state import Trial

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


@pytest.fixture
def search(tiny: Callable[..., Any]) -> Callable[..., SearchJob]:
    def make(*overrides: str) -> SearchJob:
        overrides = ("engine.dtype=float64", "outer.steps=6", "eval.every=3", "checkpoint.every=3", *overrides)
        base = tiny(*overrides).model_dump()
        reads_rate = "inner_lr" in base["algorithm"]
        space = {key: domain for key, domain in SPACE.items() if reads_rate or key != "algorithm.inner_lr"}
        return checked({"search": {"space": space}, **base}, "test")

    return make


def trials(job: SearchJob) -> list[Trial]:
    values = [{key: value for key, value in point.items() if key in job.search.space} for point in POINTS]
    return [Trial(f"{n:03}", n, "random", point) for n, point in enumerate(values)]


def go(trial: Trial, step: int, mean: float, ci95: float) -> Any:
    return "go"


@pytest.mark.parametrize("name", METHODS)
def test_packed_trials_agree_with_runs_alone(search: Callable[..., SearchJob], tmp_path: Path, name: str) -> None:
    job = search(f"algorithm.name={name}", *METHODS[name])
    every = trials(job)
    ended = run_packed(job, every, tmp_path / "packed", go)
    different = set()
    for trial in every:
        config = job.config(trial.values).with_values(cluster={"workers": 0}, eval={"test": False})
        alone = train(config, "alone", tmp_path / "alone" / trial.id)
        packed = ended[trial.id]
        assert not isinstance(packed, Exception), packed
        assert (packed.result["reproducible"], alone.result["reproducible"]) == (False, True)
        assert packed.result["meta_steps"] == 6
        one, other = (load_file(folder / "theta.safetensors") for folder in (packed.folder, alone.folder))
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-9, atol=1e-9)
        rows = [read_metrics(folder / "metrics.parquet") for folder in (packed.folder, alone.folder)]
        for mine, its in zip(*rows, strict=True):
            assert (mine.get("val_accuracy") is None) == (mine["step"] != 3 and mine["step"] != 6)
            for key in ("step", "loss", "accuracy", "grad_norm", "lr", "val_accuracy"):
                if its.get(key) is not None or mine.get(key) is not None:
                    assert mine[key] == pytest.approx(its[key], rel=1e-9), key
        different.add(packed.result["theta_sha256"])
    assert len(different) == len({str(trial.values) for trial in every}), "no trial is another"


def test_a_trial_that_is_stopped_leaves_the_others(search: Callable[..., SearchJob], tmp_path: Path) -> None:
    job = search()
    asked = []

    def ask(trial: Trial, step: int, mean: float, ci95: float) -> Any:
        asked.append((trial.id, step, mean, ci95))
        return "stop" if (trial.id, step) == ("001", 3) else "go"

    ended = run_packed(job, trials(job), tmp_path, ask)
    assert isinstance(ended["001"], Stopped)
    assert sorted(one[:2] for one in asked) == [("000", 3), ("000", 6), ("001", 3), ("002", 3), ("002", 6)]
    rows = read_metrics(tmp_path / "001" / "metrics.parquet")
    assert [row["step"] for row in rows] == [1, 2, 3]
    (mean,) = (mean for id, step, mean, _ in asked if (id, step) == ("001", 3))
    assert rows[-1]["val_accuracy"] == mean
    assert not (tmp_path / "001" / "result.json").exists()
    for id in ("000", "002"):
        assert ended[id].result["meta_steps"] == 6  # type: ignore[union-attr]


def test_one_that_fails_or_diverges_leaves_the_others(search: Callable[..., SearchJob], tmp_path: Path) -> None:
    job = search("data.name=sinusoid", "task.ways=5", "model.norm=none", "algorithm.inner_steps=20")
    wild = Trial("001", 1, "random", {"algorithm.inner_lr": 1e30})
    calm = Trial("000", 0, "random", {"algorithm.inner_lr": 1e-3})
    taken = Trial("002", 2, "random", {"algorithm.inner_lr": 2e-3})
    (tmp_path / "002").mkdir()
    (tmp_path / "002" / "config.yaml").touch()
    ended = run_packed(job, [calm, wild, taken], tmp_path, go)
    assert "diverged at step 0" in str(ended["001"])
    assert isinstance(ended["002"], RunError)
    assert ended["000"].result["meta_steps"] == 6  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ours", "others", "say"),
    [
        ((), ({"algorithm.inner_steps": 2},), ("algorithm.inner_steps", "outer.lr")),
        (("engine.mode=loop",), (), ("engine.mode", "loop")),
        (("outer.compression=int8",), (), ("outer.compression",)),
        ((), ({"task.seed": None, "seed": 3},), ("task.seed",)),
    ],
)
def test_what_does_not_go_together(search: Callable[..., SearchJob], ours: Any, others: Any, say: Any) -> None:
    job = search(*ours)
    configs = [job.base, *(job.config(one) for one in others)]
    with pytest.raises(ConfigError) as told:
        check_pack(configs)
    for word in say:
        assert word in str(told.value)


def test_several_seeds_need_one_sampling(search: Callable[..., SearchJob]) -> None:
    open_base = search().base.with_values(eval={"seed": None})
    with pytest.raises(ConfigError, match=r"eval\.seed.*see the same tasks"):
        check_pack([open_base, open_base.model_copy(update={"seed": 5})])


def test_a_method_that_compares_tasks_is_refused(search: Callable[..., SearchJob], tmp_path: Path) -> None:
    job = search("algorithm.name=task-conditioned", "task.within_group=true")
    with pytest.raises(ConfigError, match="task-conditioned compares the tasks"):
        run_packed(job, trials(job), tmp_path, go)
