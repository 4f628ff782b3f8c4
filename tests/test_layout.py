"""What belongs where: the top of the repository, and which rooms know Ray or MLflow."""

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

AGREED = {
    "cluster", "metadist", "jobs", "tests", "infra",
    "pyproject.toml", "Makefile", "README.md", "LICENSE", ".gitignore", ".ci",
}  # fmt: skip


def top_level() -> set[str]:
    """Names at the top that belong to the project: those git knows, or in a plain copy those that are not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        listed = None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        return {line.partition("/")[0] for line in listed.stdout.splitlines()}
    ignore = ROOT / ".gitignore"
    patterns = [line.strip().strip("/") for line in ignore.read_text().splitlines()] if ignore.exists() else []
    patterns += [".git", "PKG-INFO"]  # a source distribution has the latter
    return {p.name for p in ROOT.iterdir() if not any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)}


def test_the_top_of_the_repository() -> None:
    found = top_level()
    assert found <= AGREED, f"not agreed upon: {sorted(found - AGREED)}"
    assert {"metadist", "jobs", "tests", "pyproject.toml", "README.md"} <= found


def test_one_importable_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["metadist"]
    assert project["project"]["scripts"] == {"metadist": "metadist.cli:main"}


ALONE = (
    "metadist.config", "metadist.data.sources", "metadist.tasks.few_shot", "metadist.models", "metadist.algorithms",
    "metadist.engine.engine", "metadist.engine.exact", "metadist.evaluation.protocol", "metadist.evaluation.adapter",
    "metadist.runtime.aggregator", "metadist.runtime.dispatcher", "metadist.runtime.worker",
    "metadist.runtime.in_process", "metadist.runtime.train", "metadist.run", "metadist.evaluate", "metadist.cli",
)  # fmt: skip


def test_methods_and_engine_load_neither_ray_nor_mlflow() -> None:
    """One fresh interpreter imports them one after the other and says who brought what."""
    code = (
        "import importlib, sys\n"
        f"for name in {ALONE!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('ray', 'mlflow'):\n"
        "        if heavy in sys.modules:\n"
        "            sys.exit(f'{name} loads {heavy}')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_file_is_packaged_under_its_name(job: Path) -> None:
    from metadist.config import load, packaged_files
    from metadist.search.job import load_search

    assert packaged_files()[job.stem].read_text() == job.read_text()
    (load_search if job.stem.startswith("search-") else load)(job.stem)


def test_every_manifest_is_packaged_under_its_name() -> None:
    from metadist.manifests.render import templates

    folder = ROOT / "cluster" / "kuberay"
    assert templates() == {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def test_what_lies_outside_of_the_package_is_brought_into_it() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["force-include"] == {folder: f"metadist/{folder}" for folder in ("jobs", "cluster/kuberay")}
    assert {"cluster", "infra", "jobs"} <= set(targets["sdist"]["include"])
