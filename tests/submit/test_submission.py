"""Words of a person become a job: its kind, its id, and what is refused before anything is sent."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.config import load
from metadist.errors import ConfigError, DataError
from metadist.submit.fetch import fetch
from metadist.submit.package import PACKAGE, code_hash, package_files, stage
from metadist.submit.submission import Options, outlives_a_host, submission


def test_the_id_is_of_config_and_code(tiny_job: Path) -> None:
    """The same words in another order, and a default that is written out, are the same job."""
    first = submission([str(tiny_job), "seed=3", "outer.steps=20"])
    assert first.id.startswith("tiny-")
    assert submission(["train", "outer.steps=20", str(tiny_job), "seed=3", "task.rotate=false"]) == first
    others = {
        submission([str(tiny_job), "seed=3", *words]).id
        for words in ([], ["outer.steps=21"], ["storage=/results"], ["jobs.retries=1"])
    }
    assert len({*others, first.id}) == 5
    assert submission([str(tiny_job), "seed=3", "outer.steps=20"], id="mine").identity == first.identity


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["quickstart", "task.shots=5", "storage=s3://a/b"], Options()),
        (["search-inner-loop", "search.trials=3"], Options()),
        (["evaluate", "run-1", "jobs.retries=0", "eval.shots=5"], Options(best=True, split="val")),
        (["reproduce", "omniglot", "storage=/a", "seed=1"], Options(methods="maml,anil", budget="paper")),
    ],
)
def test_the_entry_point_reads_the_same_job(
    words: list[str], options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what is sent, in the folder that is sent with it."""
    sent = submission(words, options)
    _, folder = stage(tmp_path, sent.job)
    monkeypatch.chdir(folder)
    received = submission(
        [word for word in sent.words if not word.startswith("--")],
        Options(**{
            word[2:].partition("=")[0]: word.partition("=")[2] or True for word in sent.words if word.startswith("--")
        }),
        sent.id,
    )  # fmt: skip
    assert received == sent


def test_the_driver_is_inside_of_the_cluster(tiny_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine decides: neither its address nor its GPUs."""
    for name in (str(tiny_job), "search-inner-loop"):
        for workers in (0, 2):
            words = [name, f"cluster.workers={workers}", "engine.device=auto"]
            monkeypatch.setattr("metadist.config.visible_gpus", lambda: 0)
            sent = submission(words)
            monkeypatch.setattr("metadist.config.visible_gpus", lambda: 8)
            assert submission(words) == sent
            assert sent.job is not None
            told = yaml.safe_load(sent.job)
            assert told["cluster"]["address"] == "auto"
            assert told["engine"]["device"] == "cpu"


def test_what_runs_is_told_by_the_verb_or_the_job_file() -> None:
    assert submission(["quickstart"]).verb == "train"
    assert submission(["search-inner-loop"]).verb == "search"
    evaluation = submission(["evaluate", "quickstart-1"])
    assert (evaluation.verb, evaluation.run, evaluation.job) == ("evaluate", "quickstart-1", None)
    assert evaluation.id.startswith("evaluate-quickstart-1-")
    assert submission(["reproduce", "sinusoid"]).id.startswith("reproduce-sinusoid-")


REFUSED = {
    "no-job": (["seed=1"], ("none is named", "metadist submit")),
    "two-jobs": (["quickstart", "omniglot"], ("quickstart and omniglot are 2",)),
    "unknown-job": (["quikstart"], ("did you mean quickstart?",)),
    "unknown-key": (["quickstart", "task.shotz=1"], ("task.shotz", "task.shots")),
    "tracking": (["quickstart", "tracking.uri=file:./a"], ("tracking.uri",)),
    "a-search-as-training": (["train", "search-inner-loop"], ("search", "metadist search")),
    "a-training-as-search": (["search", "quickstart"], ("no section search",)),
    "a-search-with-async": (["search-inner-loop", "cluster.strategy=async"], ("cluster.strategy",)),
    "relative-storage": (["quickstart", "storage=results"], ("storage", "relative", "/FOLDER")),
    "storage-scheme": (["quickstart", "storage=ftp://a"], ("storage", "ftp://", "s3")),
    "a-key-in-the-storage": (["quickstart", "storage=s3://a:b@c/d"], ("storage", "AWS_ACCESS_KEY_ID")),
    "a-password-in-the-tracking": (
        ["quickstart", "tracking.uri=https://user:secret@host"],
        ("tracking.uri", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "metadist-credentials"),
    ),
    "a-password-in-a-search": (
        ["search-inner-loop", "tracking.uri=http://user:secret@host:5000"],
        ("tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
    ),
    "a-password-in-a-query": (
        ["quickstart", "tracking.uri=http://host/?user=a&password=secret"],
        ("tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
    ),
    "relative-root": (["omniglot-maml-5w1s", "data.root=raw"], ("data.root", "'raw' is relative", "every host")),
    "relative-root-of-many": (
        ["quickstart", "data.name=[{name: glyphs}, {name: omniglot, root: raw}]"],
        ("data.root of omniglot", "'raw' is relative"),
    ),
    "relative-shared": (["search-inner-loop", "data.shared=tables"], ("data.shared", "'tables' is relative")),
    "relative-root-of-an-evaluation": (["evaluate", "a", "data.root=raw"], ("data.root", "'raw' is relative")),
    "relative-root-of-a-table": (["reproduce", "omniglot", "data.root=raw"], ("data.root", "'raw' is relative")),
    "another-cluster": (["quickstart", "cluster.address=local"], ("cluster.address: 'local'", "--address", "auto")),
    "another-cluster-of-a-search": (
        ["search-inner-loop", "cluster={address: 'ray://a:1'}"],
        ("cluster.address: 'ray://a:1'", "auto"),
    ),
    "another-cluster-of-a-run": (["evaluate", "a", "cluster.address=a:1"], ("cluster.address: 'a:1'", "auto")),
    "another-cluster-of-a-table": (["reproduce", "omniglot", "cluster.address=a:1"], ("cluster.address: 'a:1'",)),
    "evaluation-of-no-number": (["evaluate", "a", "eval.shots=x"], ("eval.shots", "'x'")),
    "evaluation-of-another-shape": (["evaluate", "a", "eval.also=3"], ("eval.also", "3")),
    "queue": (["quickstart", "jobs.queue=0"], ("jobs.queue",)),
    "evaluation-of-a-training-key": (["evaluate", "a", "outer.lr=1"], ("outer.lr", "belongs to the training")),
    "evaluation-of-an-unknown-key": (["evaluate", "a", "eval.shotz=1"], ("eval.shotz", "did you mean eval.shots?")),
    "evaluation-of-no-id": (["evaluate", "runs/a"], ("runs/a", "no id")),
    "table": (["reproduce", "omniglott"], ("omniglott", "sinusoid")),
    "row": (["reproduce", "sinusoid", "outer.lr=-1"], ("outer.lr",)),
}


@pytest.mark.parametrize(("words", "say"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_sent(words: list[str], say: tuple[str, ...]) -> None:
    with pytest.raises((ConfigError, DataError)) as refusal:
        submission(words)
    assert all(word in str(refusal.value) for word in say), refusal.value
    assert "secret@" not in str(refusal.value)


@pytest.mark.parametrize(
    ("storage", "anywhere"), [("s3://a/b", True), ("gs://a", True), ("/a", False), ("~/a", False), ("file:///a", False)]
)
def test_a_file_uri_is_a_disk_of_the_head(storage: str, anywhere: bool, tmp_path: Path) -> None:
    """Fetched through the job server as a folder is, and refused for a cluster whose disks go with it."""
    assert outlives_a_host(storage) is anywhere
    if storage == "file:///a":
        asked = []

        class Asked(Exception):
            pass

        class Head:
            def run_apart(self, name: str, words: list[str]) -> str:
                asked.append(words)
                raise Asked

        with pytest.raises(Asked):
            fetch(Head(), "run", storage, tmp_path / "back")  # type: ignore[arg-type]
        assert asked == [["metadist.jobs.send", "run", storage]]


def test_what_only_the_run_can_refuse_is_sent() -> None:
    """Values of an evaluation that do not go with the defaults may go with what the run says."""
    for words in (
        ["data.name=sinusoid"],
        ["data.root=/raw"],
        ["eval.ways=20", "eval.shots=5"],
        ["cluster.address=auto"],
        ["eval.also=[{queries: 15}]"],
    ):
        assert submission(["evaluate", "a", *words]).words[2:] == words
    assert submission(["omniglot-maml-5w1s", "data.root=/raw", "data.shared=s3://bucket/tables"]).verb == "train"


def test_options_and_ids(tiny_job: Path) -> None:
    with pytest.raises(ConfigError, match="--methods: is read by `metadist submit reproduce` only, not by train"):
        submission(["quickstart"], Options(methods="maml"))
    with pytest.raises(ConfigError, match="--best: is read by `metadist submit evaluate` only, not by reproduce"):
        submission(["reproduce", "omniglot"], Options(best=True))
    with pytest.raises(ConfigError, match="--split: 'train'"):
        submission(["evaluate", "a"], Options(split="train"))
    for id in ("a b", "", ".a", "a/b", "a" * 101):
        with pytest.raises(ConfigError, match="--id"):
            submission([str(tiny_job)], id=id or " ")
    assert submission(["omniglot-maml++-5w1s"]).id.startswith("omniglot-maml---5w1s-"), "what a URL can hold"


# --- what travels ------------------------------------------------------------------


def test_the_package_and_the_job_file_travel_and_nothing_else(tmp_path: Path) -> None:
    names = set(package_files())
    assert {"cli.py", "submit/supervisor.py", "data/vinyals.txt.xz", "jobs/entry.py", "jobs/quickstart.yaml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".md", ".pyc", ".arrow", ".parquet"))]
    assert sum(path.stat().st_size for path in package_files().values()) < 2 * 2**20
    _, folder = stage(tmp_path, "seed: 1\n")
    assert [path.name for path in folder.iterdir()] == ["job.yaml"]


def test_an_installed_package_is_the_same_one(tmp_path: Path) -> None:
    """Where `jobs/` lies in the package, as in a wheel, below a folder with a dot; what lies about is left behind."""
    (tmp_path / ".venv").mkdir()
    package, _ = stage(tmp_path / ".venv", None)
    (package / "runs").mkdir()
    (package / "runs" / "metrics.parquet").write_text("data")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cli.pyc").write_text("")
    told = subprocess.run(
        [sys.executable, "-c", "from metadist.submit.package import *; print(PACKAGE, code_hash())"],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(package.parent)},
    ).stdout.split()  # fmt: skip
    assert told == [str(package), code_hash()]
    assert package != PACKAGE


def test_a_changed_line_of_code_is_another_job(tmp_path: Path) -> None:
    package, _ = stage(tmp_path, None)
    (package / "engine" / "exact.py").write_text((package / "engine" / "exact.py").read_text() + "\n# changed\n")
    code = "from metadist.submit.submission import submission; print(submission(['quickstart']).id)"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ).stdout.strip()  # fmt: skip
    assert told.startswith("quickstart-")
    assert told != submission(["quickstart"]).id


def test_a_direct_run_reads_a_job_with_the_submissions_keys(
    tiny: Callable[..., Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """A job file is the same for `train` and `submit`."""
    path = tmp_path / "job.yaml"
    path.write_text("jobs: {retries: 1}\nstorage: s3://bucket/runs\n")
    assert load(path).jobs.retries == 1
    assert cli("train", path, "--dry-run").code == 0


def test_what_waits_on_the_head_is_small() -> None:
    """An entry point for every job that runs: no torch and no Ray in it."""
    code = (
        "import sys, metadist.submit.supervisor\nfrom metadist.submit.submission import submission\n"
        "submission(['quickstart'])\nprint({'torch', 'ray', 'mlflow'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "set()\n"
