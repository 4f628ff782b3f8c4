"""A run folder from its config to `result.json`, and what a resume may and may not do."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import metadist
import metadist.run
from metadist.config import Config, load, resolve
from metadist.errors import ConfigError, DataError, MetadistError, RunError
from metadist.run import left_idle, resume, train
from metadist.runtime import worker

Make = Callable[..., Config]


# --- what it says before it begins -------------------------------------------------


@pytest.mark.parametrize(("words", "gpus", "told"), [
    ([], 1, r"^on the CPU: this machine's GPUs \(1\) are fewer than its workers \(2\); engine\.device=cuda shares"),
    ([], 0, None), ([], 2, None),
    (["engine.device=cpu"], 1, None), (["engine.device=cuda"], 1, None), (["cluster.gpus=0"], 1, None),
    (["cluster.address=auto"], 1, None),
    (["cluster.workers=4"], 0, r"^a meta-step has 2 shards \(task\.shard=2\) for 4 workers: with a smaller"),
    (["task.shard=4"], 0, r"^a meta-step has 1 shard \(task\.shard=4\) for 2 workers"),
    (["cluster.workers=0", "task.shard=4"], 0, None),
    (["outer.local={steps: 2, replicas: 1}"], 0, None),
])  # fmt: skip
def test_what_is_left_idle_is_told(
    words: list[str], gpus: int, told: str | None, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (metadist.config, metadist.run):
        monkeypatch.setattr(module, "visible_gpus", lambda: gpus)
    asked = tiny("task.meta_batch=4", "task.shard=2", "cluster.workers=2", "engine.device=auto", *words)
    found = left_idle(asked, resolve(asked))
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])


# --- what a run leaves behind ------------------------------------------------------


def test_the_folder(tiny_run: Any) -> None:
    assert sorted(os.listdir(tiny_run.folder)) == [
        ".lock", "best.safetensors", "checkpoints", "config.yaml", "log.jsonl", "metrics.parquet", "name",
        "result.json", "theta.safetensors",
    ]  # fmt: skip
    steps = {path.name for path in (tiny_run.folder / "checkpoints").iterdir()}
    assert {"step-12", "step-8"} <= steps, "the newest"
    assert f"step-{tiny_run.result['best']['step']}" in steps, "the best on validation"
    assert len(steps) >= 3


def test_the_config_is_resolved_and_a_job(tiny_run: Any, tiny: Make) -> None:
    assert load(tiny_run.folder / "config.yaml") == resolve(tiny())
    autos = [line.strip() for line in (tiny_run.folder / "config.yaml").read_text().splitlines() if "auto" in line]
    assert autos == ["aggregators: auto", "sums: auto"], "where sums go, which no bit depends on"


def test_the_result(tiny_run: Any) -> None:
    result = json.loads((tiny_run.folder / "result.json").read_text())
    assert result == tiny_run.result
    kinds = {
        "theta_sha256": str, "meta_steps": int, "steps_recomputed": int, "workers": int, "shards_by_worker": dict,
        "device": str, "tasks_per_second": float, "wall_seconds": float, "bytes_per_step": float,
        "hardware": dict, "gpus": float, "test": dict, "untrained": dict,
        "reproducible": bool, "versions": dict, "numeric_fingerprint": dict, "data_fingerprint": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        assert type(result[key]) is kind, key
    assert result["meta_steps"] == 12
    assert result["steps_recomputed"] == 0
    assert result["workers"] == 0
    assert result["shards_by_worker"] == {str(os.getpid()): 12 * 4}
    assert result["device"] == "cpu"
    assert result["reproducible"] is True
    assert result["tasks_per_second"] > 0
    assert result["wall_seconds"] > 0
    assert {"torch", "ray", "metadist"} <= set(result["versions"])
    assert result["versions"]["metadist"] == metadist.__version__
    assert {"device", "instructions", "torch", "threads", "engine", "probe"} <= set(result["numeric_fingerprint"])
    test = result["test"]
    assert {key: type(test[key]) for key in ("accuracy", "ci95", "episodes", "ways", "shots", "queries")} == {
        "accuracy": float, "ci95": float, "episodes": int, "ways": int, "shots": int, "queries": int,
    }  # fmt: skip
    assert (test["episodes"], test["ways"], test["shots"], test["queries"]) == (20, 3, 1, 1)
    assert test["transductive"] is True
    for judged in (test, result["untrained"]):
        assert 0 <= judged["accuracy"] <= 1
        assert 0 < judged["ci95"] < 1
    assert result["test"]["accuracy"] != result["untrained"]["accuracy"]


def raw_tensors(path: Path) -> dict[str, bytes]:
    """A safetensors file's bytes by name, read by hand."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    assert all(entry["dtype"] == "F32" for entry in header.values())
    return {n: content[8 + size + e["data_offsets"][0] : 8 + size + e["data_offsets"][1]] for n, e in header.items()}


def test_the_hash_can_be_computed_by_hand(tiny_run: Any) -> None:
    tensors = raw_tensors(tiny_run.folder / "theta.safetensors")
    digest = hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()
    assert digest == tiny_run.result["theta_sha256"]


def test_theta_is_of_the_last_step_and_the_best_is_kept_beside_it(tiny_run: Any) -> None:
    for name, step in (("theta", 12), ("best", tiny_run.result["best"]["step"])):
        kept = load_file(tiny_run.folder / f"{name}.safetensors")
        checkpoint = load_file(tiny_run.folder / "checkpoints" / f"step-{step}" / "state.safetensors")
        assert kept
        assert all(kept[key].tobytes() == checkpoint[f"value.{key}"].tobytes() for key in kept)


def test_the_metrics(tiny_run: Any) -> None:
    table = pq.read_table(tiny_run.folder / "metrics.parquet").to_pydict()
    assert table["step"] == list(range(1, 13))
    for name in ("loss", "accuracy", "grad_norm", "lr", "tasks_per_second", "seconds", "time", "bytes"):
        assert np.isfinite(table[name]).all(), name
    validated = [step for step, value in zip(table["step"], table["val_accuracy"], strict=True) if value is not None]
    assert validated == [6, 12]
    best = max(value for value in table["val_accuracy"] if value is not None)
    assert best == tiny_run.result["best"]["accuracy"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny: Make, tiny_run: Any, tmp_path: Path) -> None:
    again = train(tiny(), "tiny", tmp_path / "again").result
    other = train(tiny("seed=2"), "tiny", tmp_path / "other").result
    assert again["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert again["test"] == tiny_run.result["test"]
    assert other["theta_sha256"] != tiny_run.result["theta_sha256"]


def test_without_evaluation(tiny: Make, tiny_run: Any, tmp_path: Path) -> None:
    result = train(tiny("eval.every=0", "eval.test=false"), "tiny", tmp_path / "run").result
    assert (result["test"], result["untrained"], result["best"]) == (None, None, None)
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"], "judging moves nothing"
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_further_meta_tests(tiny: Make, tmp_path: Path) -> None:
    also = "eval.also=[{queries: 3}, {transductive: false, shots: 2, episodes: 10}]"
    result = train(tiny(also, "outer.steps=1"), "tiny", tmp_path / "run").result
    assert [(one["queries"], one["shots"], one["transductive"], one["episodes"]) for one in result["also"]] == [
        (3, 1, True, 20),
        (1, 2, False, 10),
    ]


# --- resume ------------------------------------------------------------------------


def test_an_interrupted_run_ends_in_the_same_bits(half_run: Path, tiny_run: Any) -> None:
    finished = resume(half_run, [])
    assert finished.result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert finished.result["meta_steps"] == 12
    assert finished.result["test"] == tiny_run.result["test"]
    assert finished.result["best"] == tiny_run.result["best"]
    assert finished.result["shards_by_worker"] == {str(os.getpid()): 4 * 4}, "the steps behind the checkpoint"
    table, before = (pq.read_table(f / "metrics.parquet").to_pydict() for f in (half_run, tiny_run.folder))
    assert table["step"] == before["step"]
    assert table["loss"] == before["loss"]
    assert table["val_accuracy"] == before["val_accuracy"]


def test_a_finished_run_says_so(tiny_copy: Path, tiny_run: Any, cli: Callable[..., Any]) -> None:
    files = {path: path.stat().st_mtime_ns for path in tiny_copy.rglob("*") if path.name != ".lock"}
    ended = cli("train", "--resume", tiny_copy)
    assert ended.code == 0
    assert "is finished: 12 meta-steps" in " ".join(ended.out.split())
    assert ended.err == ""
    assert files == {path: path.stat().st_mtime_ns for path in tiny_copy.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("damage", ["all", "newest"])
def test_damaged_checkpoints(half_run: Path, tiny_run: Any, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted((half_run / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    for path in paths if damage == "all" else paths[-1:]:
        with (path / "state.safetensors").open("r+b") as file:
            file.truncate(100)
    result = resume(half_run, []).result
    told = capsys.readouterr().err
    assert "step-8 is damaged" in told
    assert ("has no usable checkpoint; starting at step 0" in told) == (damage == "all")
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert sum(result["shards_by_worker"].values()) == 4 * (12 if damage == "all" else 6)
    assert pq.read_table(half_run / "metrics.parquet").column("step").to_pylist() == list(range(1, 13))


def test_without_a_checkpoint_it_starts_at_0(half_run: Path, tiny_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(half_run / "checkpoints")
    (half_run / "metrics.parquet").unlink()
    assert resume(half_run, []).result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert "no usable checkpoint; starting at step 0" in capsys.readouterr().err


def test_more_steps_where_no_schedule_depends_on_them(tiny: Make, tiny_run: Any, tmp_path: Path) -> None:
    short = train(tiny("outer.steps=7"), "tiny", tmp_path / "run").result
    assert short["meta_steps"] == 7
    longer = resume(tmp_path / "run", ["outer.steps=12"]).result
    assert longer["meta_steps"] == 12
    assert longer["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert load(tmp_path / "run" / "config.yaml").outer.steps == 12
    assert pq.read_table(tmp_path / "run" / "metrics.parquet").column("step").to_pylist() == list(range(1, 13))


def test_fewer_steps_than_are_done(tiny_copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"outer\.steps: the run has done 12"):
        resume(tiny_copy, ["outer.steps=5"])
    assert (tiny_copy / "result.json").exists(), "what is there is kept"


def test_what_may_change(half_run: Path, tiny_run: Any) -> None:
    free = ["checkpoint.every=1", "eval.every=0", "eval.episodes=30", "cluster.timeout=7", "tracking.experiment=x"]
    result = resume(half_run, free).result
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["test"]["episodes"] == 30
    assert load(half_run / "config.yaml").checkpoint.every == 1


CHANGES = (
    "seed=2", "task.shots=2", "task.ways=4", "task.shard=4", "task.meta_batch=4", "model.width=8", "model.norm=layer",
    "algorithm.inner_lr=0.1", "algorithm.order=1", "algorithm.name=protonet", "outer.lr=0.1", "outer.optimizer=sgd",
    "outer.schedule=cosine", "outer.clip=1", "engine.threads=2", "engine.mode=loop", "engine.dtype=float64",
    "data.split=scripts", "task.transductive=false",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_mathematics_is_refused(half_run: Path, change: str, refused: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in half_run.rglob("*") if path.is_file() and path.name != ".lock"}
    key = change.partition("=")[0]
    if change == "algorithm.name=protonet":
        raw = (half_run / "config.yaml").read_text()
        assert "inner_lr" in raw
        refused("train", "--resume", half_run, change, say=("algorithm",))
    else:
        refused("train", "--resume", half_run, change, say=(f"error: {key}:", "what may change"))
    assert before == {p: p.read_bytes() for p in half_run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_steps_of_a_schedule_are_mathematics(tiny: Make, tmp_path: Path) -> None:
    train(tiny("outer.schedule=cosine", "outer.steps=2"), "tiny", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"outer\.steps: was 2 and cannot become 12"):
        resume(tmp_path / "run", ["outer.steps=12"])


def test_steps_that_a_resume_computes_again_are_counted(half_run: Path) -> None:
    """Metrics were written up to step 12, the newest checkpoint is of step 8."""
    assert resume(half_run, []).result["steps_recomputed"] == 4


def test_a_refused_resume_keeps_no_lock(half_run: Path, tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for overrides in (["seed=2"], ["outer.steps=3"], ["nonsense=1"], ["tracking.uri=nonsense"]):
        with pytest.raises(MetadistError):
            resume(half_run, overrides)
    assert resume(half_run, []).result["theta_sha256"] == tiny_run.result["theta_sha256"]


def test_a_living_process_is_not_disturbed(half_run: Path, tiny_run: Any, refused: Callable[..., Any]) -> None:
    code = (
        "import fcntl, os, time\n"
        f"handle = os.open({str(half_run / '.lock')!r}, os.O_RDWR)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX); os.ftruncate(handle, 0); os.pwrite(handle, str(os.getpid()).encode(), 0)\n"
        "print('held', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        refused("train", "--resume", half_run, say=(f"process {process.pid} is training in it",))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert resume(half_run, []).result["theta_sha256"] == tiny_run.result["theta_sha256"], "a dead one is no lock"


def test_another_machine_is_told_and_remembered(
    half_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = worker.fingerprint
    monkeypatch.setattr(worker, "fingerprint", lambda *a: real(*a) | {"instructions": "another processor"})
    result = resume(half_run, []).result
    assert "instructions another processor instead of" in capsys.readouterr().err
    assert result["reproducible"] is False
    monkeypatch.undo()
    assert resume(half_run, ["outer.steps=13"]).result["reproducible"] is False, "once lost, it stays lost"


def test_other_data_are_refused(half_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadist.run, "data_fingerprint", lambda tables: "0123456789abcdef")
    with pytest.raises(RunError, match="the data are not those of the run"):
        resume(half_run, [])


def test_nothing_is_created_before_everything_is_checked(tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval\.shots"):
        train(tiny("eval.shots=19", "eval.queries=19"), "tiny", tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
