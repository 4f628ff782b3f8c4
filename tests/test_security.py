"""Whoever can reach a cluster or a folder: tokens, and files that cannot run code."""

import ast
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadist.config import Cluster
from metadist.errors import ClusterError, ConfigError
from metadist.runtime import cluster as runtime_cluster

ROOT = Path(__file__).parents[1]
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


# --- Ray's authentication ------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Sets what Ray reads, does something, and returns what is set then."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def after(deed: Callable[[], object], **given: str) -> dict[str, str]:
        for name in AUTH:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        deed()
        found = {name: os.environ[name] for name in AUTH if name in os.environ}
        for name in AUTH:  # what the deed added
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        return found

    return after


def test_a_cluster_of_our_own_has_a_token_of_its_own(environment: Callable[..., dict[str, str]]) -> None:
    start = runtime_cluster._close_the_door
    first, second = environment(start), environment(start)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert not (Path.home() / ".ray").exists()


@pytest.mark.parametrize("deed", [runtime_cluster._close_the_door, runtime_cluster.say_whether_there_is_a_token])
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_mode_in_the_environment_wins(
    deed: Callable[[], None], mode: str, environment: Callable[..., dict[str, str]]
) -> None:
    assert environment(deed, RAY_AUTH_MODE=mode) == {"RAY_AUTH_MODE": mode}


def test_a_cluster_of_others_is_joined_with_the_token_that_there_is(
    environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    join = runtime_cluster.say_whether_there_is_a_token
    assert environment(join) == {"RAY_AUTH_MODE": "disabled"}
    for name in AUTH[1:]:
        assert environment(join, **{name: "x"}) == {"RAY_AUTH_MODE": "token", name: "x"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert environment(join) == {"RAY_AUTH_MODE": "token"}


@pytest.mark.cluster
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_with_another_token_refuses_in_one_line(
    mode: str, cluster_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    with pytest.raises(ClusterError, match="asks for a token") as told:
        runtime_cluster._expect_answer(Cluster(address=cluster_process.address))
    assert "\n" not in str(told.value)


def test_a_lab_shuts_its_door_and_its_book(tmp_path: Path) -> None:
    """Ray's token stands in the lab's book, and nobody else may read it."""
    sys.path.insert(0, str(ROOT / "cluster" / "lab"))
    import hosts

    lab = hosts.new_lab(tmp_path / "lab", 2, {})
    assert lab.environment["RAY_AUTH_MODE"] == "token"
    assert len(lab.environment["RAY_AUTH_TOKEN"]) == 64
    lab.save()
    assert stat.S_IMODE((tmp_path / "lab" / "lab.json").stat().st_mode) == 0o600
    assert hosts.open_lab(tmp_path / "lab").environment == lab.environment
    assert (
        hosts.new_lab(tmp_path / "other", 2, {"RAY_AUTH_MODE": "disabled"}).environment["RAY_AUTH_MODE"] == "disabled"
    )


# --- files of someone else ------------------------------------------------------------


class Trap:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


UNPICKLING = """
import sys
found = []
sys.addaudithook(lambda event, given: found.append(given) if event == "pickle.find_class" else None)
from metadist.cli import main
sys.argv = ["metadist", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("code", end.code)
print("unpickled", found)
"""


@pytest.mark.parametrize("verb", [("train", "--resume"), ("evaluate",)])
def test_no_verb_unpickles_what_lies_in_a_run_folder(verb: tuple[str, ...], tiny_copy: Path) -> None:
    """Traps in the place of every file but the config; and whole, the verb works without a pickle."""
    command = [sys.executable, "-c", UNPICKLING, *verb, str(tiny_copy)]
    if verb[0] == "train":
        (tiny_copy / "result.json").unlink()
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unpickled []" in whole.stdout, whole.stdout + whole.stderr
    trap = tiny_copy.parent / "caught"
    for path in [path for path in tiny_copy.rglob("*") if path.is_file() and path.name != "config.yaml"]:
        path.write_bytes(pickle.dumps(Trap(trap)))
    harmed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unpickled []" in harmed.stdout, harmed.stdout + harmed.stderr
    assert not trap.exists()


def test_a_trap_catches(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "caught")))
    assert (tmp_path / "caught").exists()


LOADERS = {("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("np", "load"), ("numpy", "load")}
UNPACKERS = {"extractall", "unpack_archive", "full_load", "unsafe_load"}
BANNED = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_no_module_can_unpickle_a_file() -> None:
    for path in (ROOT / "metadist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not BANNED & {alias.name.partition(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in BANNED, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in LOADERS, f"{path}:{node.lineno}"
                assert node.attr not in {"extractall", "unpack_archive", "full_load", "unsafe_load"}, (
                    f"{path}:{node.lineno}"
                )


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_config_cannot_run_code(tag: str, tmp_path: Path) -> None:
    from metadist.config import read_yaml

    job = tmp_path / "job.yaml"
    job.write_text(f"seed: {tag} [{json.dumps(str(tmp_path / 'made'))}]\n")
    with pytest.raises(ConfigError):
        read_yaml(job)
    assert not (tmp_path / "made").exists()
