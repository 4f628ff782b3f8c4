"""The rule behind `tracking.uri`."""

import subprocess
import sys
from pathlib import Path

import pytest

from metadist.errors import ConfigError
from metadist.tracking import destination


@pytest.mark.parametrize(
    "uri", ["auto", "off", "sqlite:///a.db", "sqlite:////tmp/a.db", "http://host:5000", "https://host/x", "databricks"]
)
def test_what_mlflow_can_write_to_is_taken(uri: str) -> None:
    destination.check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("file:///tmp/mlruns", "folder"),
        ("runs/mlflow", "folder"),
        ("", "folder"),
        ("bogus://host", "scheme"),
        ("http://", "no host"),
        ("sqlite://", "no database file"),
        ("sqlite:///:memory:", "no database file"),
        ("postgresql+nosuchdriver://u:secret@host/db", "no database URL"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_key(uri: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        destination.check_uri(uri)
    line = str(refused.value)
    assert line.startswith("tracking.uri: ") and says in line and "valid: auto" in line
    assert "\n" not in line and "secret" not in line


def test_auto_is_a_database_beside_the_run_folder_and_off_is_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert destination.resolve_uri("auto", run) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert destination.resolve_uri("off", run) is None
    assert destination.resolve_uri("http://host:1", run) == "http://host:1"


def test_a_relative_database_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert destination.resolve_uri("sqlite:///x/a.db", tmp_path / "run") == f"sqlite:///{tmp_path}/x/a.db"


def test_artifacts_go_beside_a_database_and_a_server_keeps_its_own(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert destination.artifact_location("sqlite:////data/m.db", run) == "file:///data/mlartifacts"
    assert destination.artifact_location("postgresql://h/db", run) == f"file://{tmp_path}/runs/mlartifacts"
    assert destination.artifact_location("http://host:1", run) is None


def test_passwords_are_hidden() -> None:
    assert destination.masked("at postgresql://me:pa:ss@host/db now") == "at postgresql://me:***@host/db now"


def test_importing_the_room_imports_neither_mlflow_nor_ray_nor_torch() -> None:
    code = (
        "import sys, metadist.tracking.follow, metadist.tracking.mlflow_copy, metadist.tracking.progress, "
        "metadist.tracking.summary, metadist.tracking.destination as d; d.check_uri('sqlite:///a.db'); "
        "print([m for m in ('mlflow', 'ray', 'torch', 'sqlalchemy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
