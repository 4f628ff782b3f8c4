"""What travels to the cluster: the package with its job files, and one job file. Never data, runs or caches.

Ray names both by their content: code that is there already is not sent again.
"""

import hashlib
import shutil
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".xz", ".json"}
"""Of the files that a run reads; nothing else that lies in the package travels."""

JOB = "job.yaml"


def package_files() -> dict[str, Path]:
    """Name in the package → file; the job files are `jobs/…` in it, as in an installed one."""
    inside = PACKAGE / "jobs"
    jobs = inside if inside.is_dir() else PACKAGE.parent / "jobs"  # installed, or a checkout
    found = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*")}
    found |= {f"jobs/{path.relative_to(jobs).as_posix()}": path for path in jobs.rglob("*")}
    return {
        name: path
        for name, path in sorted(found.items())
        if path.suffix in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in Path(name).parts)
        and not name.startswith("cluster/")  # manifests, which an installed package has; no run reads them
    }


@cache
def code_hash() -> str:
    """SHA-256 of the package's names and contents."""
    whole = hashlib.sha256()
    for name, path in package_files().items():
        content = path.read_bytes()
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def stage(folder: Path, job: str | None) -> tuple[Path, Path]:
    """Lay out in an empty folder what travels: the package, and a folder with the job file, if there is one."""
    package, words = folder / PACKAGE.name, folder / "job"
    for name, path in package_files().items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, package / name)
    words.mkdir()
    if job is not None:
        (words / JOB).write_text(job, encoding="utf-8")
    return package, words
