"""The run folder: created when everything has been checked, owned by one living process."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from metadist.config import Config, load, to_yaml
from metadist.durable import lock, storage_errors, write
from metadist.errors import RunError

NAME = "name"


def run_name(path: Path) -> str:
    """A name that no other run has, for what outlives a driver on a cluster; it ends with the folder's place."""
    return f"{uuid.uuid4().hex[:12]}-{_place(path)}"


def _place(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]


def fresh_name(job: str, folder: str = "runs") -> Path:
    """`runs/JOB-DATE-TIME`, with a number behind it where that exists."""
    name = f"{Path(job).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path(folder) / name, 1
    while path.exists():
        number += 1
        path = Path(folder) / f"{name}-{number}"
    return path


class RunFolder:
    """`config.yaml`, `metrics.parquet`, `checkpoints/`, `theta.safetensors`, `result.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, config: Config, name: str) -> "RunFolder":
        """A new folder; one that exists is refused, one that cannot be filled is removed again. name: of the run."""
        refuse_existing(path)
        folder = cls(path)
        with storage_errors(path):
            path.mkdir(parents=True)
        try:
            folder.lock()
            with storage_errors(path):
                folder.checkpoints.mkdir()
            write(path / NAME, name.encode())
            write(path / "config.yaml", to_yaml(config).encode())
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing folder, for going on with it."""
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path}: is no run folder, it has no config.yaml")
        folder = cls(path)
        folder.lock()
        with storage_errors(path):
            folder.checkpoints.mkdir(exist_ok=True)
        for left in [*path.glob(".*.????????"), *folder.checkpoints.glob(".*")]:  # of a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return folder

    def lock(self) -> None:
        """Only one process trains in a folder. The kernel drops the lock with the process, however it ends."""
        with storage_errors(self.path):
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise RunError(f"{self.path}: process {owner or '?'} is training in it; wait for it, or end it") from error
        self._lock = handle
        try:
            with storage_errors(self.path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
        except BaseException:
            self.unlock()
            raise

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def name(self) -> str | None:
        """The run's own name on a cluster; None for a folder that has moved, since another may run under that name."""
        path = self.path / NAME
        found = path.read_text().strip() if path.is_file() else ""
        return found if found.endswith(_place(self.path)) else None

    def config(self) -> Config:
        return load(self.path / "config.yaml")

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while there is none."""
        path = self.path / "result.json"
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path}: is damaged; remove it and resume the run") from error
        return found

    def write_config(self, config: Config) -> None:
        write(self.path / "config.yaml", to_yaml(config).encode())

    def write_result(self, result: Mapping[str, Any]) -> None:
        write(self.path / "result.json", json.dumps(result, indent=2).encode())

    def write_values(self, name: str, values: Mapping[str, Any]) -> None:
        """θ and state by name as safetensors."""
        tensors = {key: torch.as_tensor(value).contiguous() for key, value in values.items()}
        write(self.path / name, save(tensors))


def refuse_existing(path: Path) -> None:
    """A new run never writes into what is there; what a killed process had not begun to fill is removed."""
    if _never_begun(path):
        shutil.rmtree(path)
    if path.exists():
        hint = f"go on with it by `metadist train --resume {path}`, or " if (path / "config.yaml").exists() else ""
        raise RunError(f"{path}: exists already; {hint}choose another --run-dir")


def _never_begun(path: Path) -> bool:
    """Whether this is the folder of a run that ended before its config was written, and nobody's now."""
    if not (path / ".lock").is_file() or any((path / "checkpoints").glob("*")):
        return False
    others = {entry.name for entry in path.iterdir()} - {".lock", "checkpoints", NAME}
    if not all(name.startswith((".config.yaml.", f".{NAME}.")) for name in others):
        return False
    with lock(path / ".lock", wait=False) as free:
        return free
