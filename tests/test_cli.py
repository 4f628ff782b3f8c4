"""The verbs a person types."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from metadist.cli import app
from metadist.config import load, packaged_jobs, resolve, to_yaml
from metadist.methods import every_method
from metadist.tracking.destination import resolve_uri

Cli = Callable[..., Any]


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from verbs(child, (*path, name))


@pytest.mark.parametrize("verb", list(verbs(typer.main.get_command(app))), ids=" ".join)
def test_help(cli: Cli, verb: tuple[str, ...]) -> None:
    ended = cli(*verb, "--help")
    assert ended.code == 0
    assert "Usage:" in ended.out
    assert ended.err == ""


def test_the_promised_verbs_are_there() -> None:
    assert {("train",), ("evaluate",), ("data", "list"), ("data", "prepare"), ("data", "show")} <= set(
        verbs(typer.main.get_command(app))
    )


# --- train -------------------------------------------------------------------------


def test_a_run_says_where_its_results_are(cli: Cli, tiny_job: Path, tiny_run: Any, tmp_path: Path) -> None:
    ended = cli("train", tiny_job, "--run-dir", tmp_path / "run")
    assert ended.code == 0
    assert ended.err == ""
    assert "\x1b" not in ended.out, "no control characters outside a terminal"
    assert str(tmp_path / "run") in re.sub(r"\s", "", ended.out)
    assert "meta-step 12/12" in ended.out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]


def test_a_fresh_name_without_run_dir(
    cli: Cli, tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("train", tiny_job, "outer.steps=1", "eval.test=false").code == 0
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run.name)


@pytest.mark.parametrize("job", sorted(packaged_jobs()))
def test_dry_run_prints_a_job_and_runs_nothing(
    cli: Cli, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, outside a checkout."""
    monkeypatch.chdir(tmp_path)
    ended = cli("train", job, "outer.steps=7", "--dry-run", "seed=3")
    assert (ended.code, ended.err) == (0, "")
    assert os.listdir(tmp_path) == []
    (tmp_path / "resolved.yaml").write_text(ended.out)
    config = load(tmp_path / "resolved.yaml")
    uri = resolve_uri("auto", tmp_path / "runs" / "any")
    assert config == resolve(load(job, ["outer.steps=7", "seed=3", f"tracking.uri={uri}"]))
    assert (config.outer.steps, config.seed) == (7, 3)
    assert to_yaml(resolve(config)) == ended.out, "resolved once is resolved"
    again = cli("train", "resolved.yaml", "--dry-run")
    assert again.out == ended.out
    autos = [line.strip() for line in ended.out.splitlines() if "auto" in line]
    assert autos == ["aggregators: auto", "sums: auto"], "where sums go, by the size of θ; no bit depends on it"


def test_overrides_are_read_as_yaml(cli: Cli, tiny_job: Path) -> None:
    words = ("task.shots=5", "outer.clip=null", "eval.also=[{queries: 15}]", "tracking.uri=off", "outer.lr=1e-2")
    shown = yaml.safe_load(cli("train", tiny_job, *words, "--dry-run").out)
    assert shown["task"]["shots"] == 5
    assert shown["outer"]["clip"] is None
    assert shown["outer"]["lr"] == 0.01
    assert shown["eval"]["also"] == [{"queries": 15}]
    assert shown["tracking"]["uri"] == "off"


def test_the_command_itself(start_cli: Cli, tmp_path: Path, tiny_job: Path, tiny_run: Any) -> None:
    """Real processes, in a folder that is no checkout: one prints, one is refused, one trains."""
    shown = start_cli("train", "quickstart", "--dry-run")
    wrong = start_cli("train", "quickstart", "task.shotz=1")
    train = start_cli("train", tiny_job, "--run-dir", "run")
    assert shown.wait(60) == 0
    assert yaml.safe_load(shown.said)["data"]["name"] == "glyphs"
    assert wrong.wait(60) == 2
    assert wrong.said.startswith("error: ")
    assert wrong.said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert train.wait(120) == 0, train.said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"], "another process, the same bits"
    assert 1 < result["wall_seconds"] < 120, "since the process began"


def test_what_is_no_known_error_keeps_its_traceback(
    cli: Cli, tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metadist.run

    def defect(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(metadist.run, "checked_tables", defect)
    with pytest.raises(ZeroDivisionError):
        cli("train", tiny_job, "--run-dir", tmp_path / "run")


def test_ctrl_c_is_one_line(cli: Cli, tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import metadist.run

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metadist.run, "checked_tables", interrupt)
    ended = cli("train", tiny_job, "--run-dir", tmp_path / "run")
    assert (ended.code, ended.err) == (130, "interrupted\n")


# --- evaluate ----------------------------------------------------------------------


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "evaluations").iterdir())]


def test_evaluating_under_the_same_conditions_gives_the_same(cli: Cli, tiny_copy: Path, tiny_run: Any) -> None:
    ended = cli("evaluate", tiny_copy)
    assert ended.code == 0, ended
    (found,) = evaluations(tiny_copy)
    assert found["test"] == tiny_run.result["test"]
    assert found["untrained"] == tiny_run.result["untrained"]
    assert str(next((tiny_copy / "evaluations").iterdir())) in ended.out


def test_evaluating_with_other_episodes(cli: Cli, tiny_copy: Path) -> None:
    words = ("eval.shots=2", "eval.queries=3", "eval.episodes=30", "eval.transductive=false", "eval.inner_steps=3")
    assert cli("evaluate", tiny_copy, *words).code == 0
    assert cli("evaluate", tiny_copy, "eval.episodes=10", "--best", "--split", "val").code == 0
    found = {one["split"]: one for one in evaluations(tiny_copy)}
    test = found["test"]["test"]
    assert (test["episodes"], test["ways"], test["shots"], test["queries"]) == (30, 3, 2, 3)
    assert (test["transductive"], test["inner_steps"]) == (False, 3)
    assert found["test"]["state"] == "theta.safetensors"
    assert found["val"]["state"] == "best.safetensors"


def test_more_episodes_hold_the_first_ones(cli: Cli, tiny_copy: Path) -> None:
    """Episode i is the same whatever was asked for: 20 and 40 episodes differ by half of them."""
    for episodes in (20, 40, 20):
        assert cli("evaluate", tiny_copy, f"eval.episodes={episodes}").code == 0
    first, more, again = (one["test"]["accuracy"] for one in evaluations(tiny_copy))
    assert first == again
    correct = (more * 40 - first * 20) * 3
    assert abs(correct - round(correct)) < 1e-6


def test_a_metric_method_takes_any_number_of_ways(cli: Cli, tiny_job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = tmp_path / "protonet.yaml"
    raw = yaml.safe_load(tiny_job.read_text())
    job.write_text(yaml.safe_dump({**raw, "algorithm": {"name": "protonet"}, "outer": {"steps": 2}}))
    assert cli("train", job, "--run-dir", run).code == 0
    assert cli("evaluate", run, "eval.ways=7", "eval.finetune_steps=2").code == 0
    assert evaluations(run)[0]["test"]["ways"] == 7
    assert evaluations(run)[0]["test"]["finetune_steps"] == 2


def test_evaluating_an_unfinished_run(refused: Cli, half_run: Path) -> None:
    refused("evaluate", half_run, say=("theta.safetensors", "--resume"))


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["eval.ways=5"], ("eval.ways", "3")),
        (["eval.shots=20"], ("eval.shots",)),
        (["task.shots=2"], ("task.shots", "belongs to the training")),
        (["outer.lr=2"], ("outer.lr",)),
        (["eval.shotz=2"], ("eval.shotz", "eval.shots")),
        (["--split", "train"], ("--split", "test, val")),
    ],
)
def test_an_impossible_evaluation(refused: Cli, tiny_run: Any, words: list[str], say: tuple[str, ...]) -> None:
    refused("evaluate", tiny_run.folder, *words, say=say)
    assert not (tiny_run.folder / "evaluations").exists()


def test_evaluating_what_is_no_run(refused: Cli, tmp_path: Path) -> None:
    refused("evaluate", tmp_path / "nothing", say=("nothing", "run folder"))


def test_evaluating_damaged_parameters(cli: Cli, refused: Cli, tiny_copy: Path) -> None:
    (tiny_copy / "theta.safetensors").write_bytes(b"half a file")
    refused("evaluate", tiny_copy, say=("theta.safetensors", "damaged", "result.json"))
    (tiny_copy / "result.json").unlink()
    assert cli("train", "--resume", tiny_copy).code == 0
    assert cli("evaluate", tiny_copy, "eval.episodes=2").code == 0, "as it said"


# --- data --------------------------------------------------------------------------


def test_data_list(cli: Cli) -> None:
    ended = cli("data", "list")
    assert ended.code == 0
    assert all(word in ended.out for word in ("glyphs", "omniglot", "vinyals", "finn"))


def test_data_prepare(cli: Cli, one_cache: Path) -> None:
    ended = cli("data", "prepare", "glyphs")
    assert ended.code == 0
    assert "meta-train" in ended.out
    assert str(one_cache) in ended.out


def test_data_show(cli: Cli, tmp_path: Path) -> None:
    ended = cli("data", "show", "glyphs", "--out", tmp_path / "sheet.png")
    assert ended.code == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["prepare", "glyps"], ("glyps", "glyphs")),
        (["prepare", "sinusoid"], ("sinusoid", "formula")),
        (["show", "sinusoid"], ("sinusoid", "formula")),
        (["prepare", "glyphs", "data.split=finn"], ("finn", "scripts")),
        (["prepare", "omniglot", "data.root=/nowhere"], ("/nowhere",)),
        (["prepare", "omniglot", "data.rot=/nowhere"], ("data.rot", "data.root")),
        (["prepare", "omniglot", "task.shots=5"], ("data.root", "data.split")),
        (["prepare", "omniglot", "glyphs"], ("one data set",)),
        (["show", "glyphs", "--part", "everything"], ("--part", "train, val, test")),
    ],
)
def test_data_refuses(refused: Cli, words: list[str], say: tuple[str, ...]) -> None:
    refused("data", *words, say=say)


def test_real_omniglot(cli: Cli, tmp_path: Path) -> None:
    """The real archives, prepared."""
    if not os.environ.get("METADIST_TEST_DATA"):
        pytest.skip("needs METADIST_TEST_DATA")
    root = Path(os.environ["METADIST_TEST_DATA"]) / "omniglot"
    ended = cli("data", "prepare", "omniglot", f"data.root={root}")
    assert ended.code == 0, ended
    assert "1028 meta-train, 172 meta-val, 423 meta-test" in ended.out.replace(",", "").replace("  ", " ") or (
        "4112 meta-train" in ended.out
    )


def test_tracking_can_be_off(cli: Cli, tiny_run: Any) -> None:
    """A run with `tracking.uri: off` starts no copying process and says that there is nothing to deliver."""
    assert not (tiny_run.folder / "tracking.log").exists()
    assert cli("track", "sync", tiny_run.folder).code == 0


def test_the_module_of_the_command_needs_neither_torch_nor_ray() -> None:
    """`--help` answers at once."""
    code = "import sys, metadist.cli; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- methods, embed, reproduce ------------------------------------------------------


def test_methods_lists_every_method(cli: Cli) -> None:
    ended = cli("methods")
    assert ended.code == 0
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.strip()}
    for method in every_method():
        assert method.method_name() in lines
        assert method.family in ended.out
    assert lines["maml"].rstrip().endswith("yes"), "its recipe is transductive"
    assert not lines["protonet"].rstrip().endswith("yes")


def test_embed_writes_every_test_task(cli: Cli, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "data: {name: sinusoid}\ntask: {shots: 10, queries: 10, meta_batch: 16, shard: 8}\n"
        "model: {name: mlp, width: 8, layers: 1, norm: none}\ncluster: {workers: 0}\ntracking: {uri: off}\n"
        "algorithm: {name: task-conditioned, inner_lr: 0.01, embedding: 1}\nouter: {steps: 2}\n"
        "eval: {every: 0, episodes: 12}\n"
    )
    assert cli("train", job, "--run-dir", tmp_path / "run").code == 0
    ended = cli("embed", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("12 tasks; ")
    for name in ("embeddings.parquet", "embeddings.png"):
        assert (tmp_path / "run" / "embeddings" / name).stat().st_size > 0


def test_reproduce_ends_with_1_where_a_row_failed(
    cli: Cli, tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metadist.reproduce import published

    path = tmp_path / "table.yaml"
    row = {"setting": "3w1s", "job": str(tiny_job)}
    rows = [
        {"method": "maml", **row, "short": ["outer.steps=2"]},
        {"method": "broken", **row, "short": ["algorithm.inner_lr=1e37"]},
    ]
    path.write_text(yaml.safe_dump({"title": "Tiny", "measure": "accuracy", "rows": rows}))
    monkeypatch.setattr(published, "tables", lambda: {"tiny": path})
    ended = cli("reproduce", "tiny", "--methods", "maml", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "(on cpu, no workers)" in ended.err
    assert "maml, 3w1s" in (tmp_path / "out" / "short" / "table.md").read_text()
    ended = cli("reproduce", "tiny", "--out", tmp_path / "out")
    assert ended.code == 1
    assert "broken" in ended.err
