"""Keys that change on the way: as if each stage were a run of its own that takes over the last one's state."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from metadist.config import Config, apply_overrides, load, resolve, to_yaml, validate
from metadist.data.sources import prepare
from metadist.errors import ConfigError
from metadist.evaluate import evaluate
from metadist.evaluation.protocol import settings, validation_settings
from metadist.run import resume, train
from metadist.runtime.in_process import InProcess
from metadist.runtime.journal import read_metrics

Make = Callable[..., Config]
SECOND = {"algorithm.inner_lr": 0.1, "algorithm.inner_steps": 2, "outer.lr": 0.004}
THIRD = {"outer.lr": 0.0005, "outer.clip": 0.05, "outer.weight_decay": 0.01, "algorithm.order": 1}
STAGES = f"stages=[{{at: 5, set: {SECOND}}}, {{at: 9, set: {THIRD}}}]"
WORDS = ("outer.optimizer=adamw", "outer.schedule=cosine", "eval.every=4")


def by_hand(config: Config, parts: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """θ after runs of some steps each, every one with values of its own and the state of the one before."""
    snapshot, values = None, {}
    for until, changed in parts:
        values |= changed
        words = [f"{key}={value}" for key, value in values.items()]
        here = resolve(validate(apply_overrides(config.model_dump(), words), "by hand"))
        runtime = InProcess(here, [prepare(here.data.sources[0])], snapshot)
        for step in range(runtime.step, until):
            runtime.begin(step)
            runtime.finish(step)
            runtime.apply(step)()
        snapshot = runtime.snapshot()()
    assert snapshot is not None
    return dict(snapshot.values)


@pytest.fixture(scope="module")
def staged(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tiny(STAGES, *WORDS), "staged", tmp_path_factory.mktemp("staged") / "run")


def test_stages_are_runs_one_behind_the_other(staged: Any, tiny: Make) -> None:
    expected = by_hand(tiny(*WORDS), [(5, {}), (9, SECOND), (12, THIRD)])
    found = load_file(staged.folder / "theta.safetensors")
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }
    other = by_hand(tiny(*WORDS), [(6, {}), (9, SECOND), (12, THIRD)])
    assert any(value.tobytes() != other[name].tobytes() for name, value in found.items()), "one step later is another θ"


def validated(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run / "metrics.parquet")
    return [(int(row["step"]), row["val_accuracy"]) for row in rows if "val_accuracy" in row]


@pytest.mark.parametrize("until", [4, 8])
def test_a_resume_between_and_behind_the_stages(until: int, staged: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(staged.folder, tmp_path / "run"))
    for name in ("result.json", "theta.safetensors"):
        (run / name).unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > until:
            shutil.rmtree(path)
    result = resume(run, []).result
    assert result["theta_sha256"] == staged.result["theta_sha256"]
    assert result["best"] == staged.result["best"]
    assert validated(run) == validated(staged.folder), "each with the keys of its step, whoever validated before"


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["aggregator", pytest.param("allreduce", marks=pytest.mark.chaos)])
def test_workers_take_the_same_stages(strategy: str, staged: Any, tiny: Make, cluster: Any, tmp_path: Path) -> None:
    keys = ("cluster.workers=2", f"cluster.address={cluster.address}", f"cluster.strategy={strategy}")
    result = train(tiny(STAGES, *WORDS, *keys), "staged", tmp_path / "run").result
    assert result["theta_sha256"] == staged.result["theta_sha256"]
    assert result["best"] == staged.result["best"]


def test_the_folder_keeps_them(staged: Any) -> None:
    config = load(staged.folder / "config.yaml")
    assert [stage.at for stage in config.stages] == [5, 9]
    assert config.stages[0].set == SECOND
    assert validate(load(staged.folder / "config.yaml").model_dump(), "again") == config
    assert "stages:" in to_yaml(config)


def test_a_state_is_judged_with_the_keys_of_its_last_step(staged: Any, tiny: Make) -> None:
    config = tiny(STAGES, *WORDS)
    assert [validation_settings(config, done).algorithm.inner_lr for done in (5, 6, 9, 12)] == [0.4, 0.1, 0.1, 0.1]
    assert settings(config)[0].algorithm.order == 1
    assert settings(config)[0].stages == []
    found, _ = evaluate(staged.folder, [], best=False, split="test")
    assert found["test"] == staged.result["test"]
    best, _ = evaluate(staged.folder, ["eval.episodes=20"], best=True, split="val")
    assert best["test"]["accuracy"] == pytest.approx(staged.result["best"]["accuracy"], abs=1e-12), (
        "as it was validated"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages=[{at: 12, set: {outer.lr: 0.1}}]"], "stages.0.at: 12 is not behind 0 and below outer.steps=12"),
        (
            ["stages=[{at: 3, set: {outer.lr: 0.1}}, {at: 3, set: {outer.lr: 1}}]"],
            "stages.1.at: 3 is not behind 3 and below outer.steps=12",
        ),
        (["stages=[{at: 0, set: {outer.lr: 0.1}}]"], "stages.0.at: input should be greater than or equal to 1, not 0"),
        (["stages=[{at: 3, set: {task.ways: 3}}]"], "stages.0.set: task.ways cannot change on the way; valid: "),
        (["stages=[{at: 3, set: {}}]"], "stages.0.set: "),
        (["stages=[{at: 3, set: {outer.lr: -1}}]"], "stages.0.set: outer.lr: input should be greater than 0, not -1"),
        (["stages=[{at: 3}]"], "stages.0.set: field required"),
        (
            ["algorithm.name=meta-sgd", "stages=[{at: 3, set: {algorithm.inner_lr: 0.1}}]"],
            "stages.0.set: algorithm.inner_lr of meta-sgd cannot change on the way; valid with maml, anil",
        ),
        (
            ["outer.local={steps: 2, replicas: 2}", "stages=[{at: 3, set: {outer.lr: 0.1}}]"],
            "stages: is not read with outer.local",
        ),
    ],
)
def test_stages_that_cannot_be(words: list[str], says: str, tiny: Make) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(*words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_stages_belong_to_the_mathematics(staged: Any) -> None:
    with pytest.raises(ConfigError, match=r"stages.0.set.algorithm.inner_lr: was 0.1 and cannot become None"):
        resume(staged.folder, ["stages=[{at: 5, set: {outer.lr: 0.1}}]"])
