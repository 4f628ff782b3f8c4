"""A member of a population takes over another one's run: its checkpoints, its history, and its schedule so far."""

import os
import shutil
from pathlib import Path

from metadist.config import Config, to_yaml
from metadist.durable import storage_errors, write
from metadist.runtime.run_folder import run_name

KEPT = ("checkpoints", "metrics.parquet")
"""Of the donor's folder. What it is called, and who trains in it, is the member's own."""

TRACKED = "tracking.json"


def graft(donor: Path, member: Path, config: Config) -> None:
    """Make `member` a run of `config` that stands where `donor` stands. Done again, it comes to the same.

    Raises StorageError; then the member is what it was, or away, and doing it again makes it whole.
    """
    fresh, old = member.with_name(f".{member.name}.new"), member.with_name(f".{member.name}.old")
    with storage_errors(member):
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir()
        for name in KEPT:
            source = donor / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, fresh / name)
        if (member / TRACKED).is_file():  # in MLflow it is the same trial still
            shutil.copy2(member / TRACKED, fresh / TRACKED)
        write(fresh / "config.yaml", to_yaml(config).encode())
        write(fresh / "name", run_name(member).encode())
        if member.exists():
            os.rename(member, old)
        os.rename(fresh, member)
        shutil.rmtree(old, ignore_errors=True)
