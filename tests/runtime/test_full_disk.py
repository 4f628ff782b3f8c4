"""A disk that is really full: one line, and what was good before stays good."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadist.runtime.checkpoint import newest_good

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a file system of so many KiB."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass


def test_a_disk_that_fills_up_while_training(
    disk: Disk, tiny_job: Path, tiny_run: Any, refused: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """There is room for three checkpoints or so."""
    size = sum(path.stat().st_size for path in (tiny_run.folder / "checkpoints" / "step-8").iterdir())
    path = disk(int(3.5 * size) // 1024)
    refused("train", tiny_job, "--run-dir", path / "run", code=3, say=("No space left on device", str(path / "run")))
    left = os.listdir(path / "run" / "checkpoints")
    assert left
    assert not [name for name in left if name.startswith(".")]
    assert not (path / "run" / "result.json").exists()
    found = newest_good(path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step >= 4
    subprocess.run(["mount", "-o", "remount,size=4m", str(path)], check=True)
    ended = cli("train", "--resume", path / "run")
    assert ended.code == 0, ended
    assert tiny_run.result["theta_sha256"] in (path / "run" / "result.json").read_text()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_disk_without_room_for_a_run_folder(
    disk: Disk, tiny_job: Path, refused: Callable[..., Any], room: int
) -> None:
    """Room for so many pages: for nothing, for the lock, and for the lock and half of the rest."""
    path = disk(64)
    (path / "room").write_bytes(bytes(4096 * room))
    fill(path)
    (path / "room").unlink()
    refused("train", tiny_job, "--run-dir", path / "deep" / "run", code=3, say=("No space left on device",))
    if room < 2:
        assert not (path / "deep" / "run").exists()


def test_evaluating_on_a_full_disk(disk: Disk, tiny_run: Any, refused: Callable[..., Any]) -> None:
    path = disk(2048)
    subprocess.run(["cp", "-r", str(tiny_run.folder), str(path / "run")], check=True)
    fill(path)
    refused("evaluate", path / "run", "eval.episodes=4", code=3, say=("No space left on device",))


def test_resuming_on_a_full_disk(disk: Disk, half_run: Path, refused: Callable[..., Any]) -> None:
    path = disk(2048)
    subprocess.run(["cp", "-r", str(half_run), str(path / "run")], check=True)
    (path / "run" / ".lock").unlink()
    fill(path)
    refused("train", "--resume", path / "run", code=3, say=("No space left on device",))
    assert newest_good(path / "run" / "checkpoints", pytest.fail)[0].step == 8
