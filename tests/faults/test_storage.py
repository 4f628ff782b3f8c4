"""Storage that goes away, or stops for a while, under a run; and a tracking server that is never there."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadist.config import Config
from metadist.errors import StorageError
from metadist.run import resume, train
from metadist.runtime.checkpoint import newest_good
from metadist.runtime.in_process import InProcess
from metadist.runtime.journal import read_metrics

Make = Callable[..., Config]


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Something to do once, right before a step of a run in this process."""
    real = InProcess.begin

    def plan(chosen: int, deed: Callable[[], None]) -> None:
        left = [deed]

        def begin(self: InProcess, step: int) -> None:
            if step == chosen and left:
                left.pop()()
            real(self, step)

        monkeypatch.setattr(InProcess, "begin", begin)

    return plan


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 file system of its own."""
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    image.write_bytes(bytes(16 * 2**20))
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True, check=False) if have_tools() else None
    if made is None or made.returncode or subprocess.run(["mount", "-o", "loop", image, path], check=False).returncode:
        pytest.skip("needs root and a loop device")
    yield path
    subprocess.run(["fsfreeze", "--unfreeze", path], capture_output=True, check=False)
    subprocess.run(["umount", "--lazy", path], check=False)


def have_tools() -> bool:
    from shutil import which

    return os.geteuid() == 0 and all(map(which, ("mkfs.ext4", "fsfreeze", "mount")))


def test_storage_that_goes_away(disk: Path, before_step: Any, tiny: Make, tiny_run: Any) -> None:
    """It is not there any more in the middle of a run; when it is back, the run goes on."""
    run = disk / "run"
    before_step(9, lambda: subprocess.run(["umount", "--lazy", disk], check=True))
    with pytest.raises(StorageError, match="No such file or directory") as told:
        train(tiny(), "tiny", run)
    assert f"metadist train --resume {run}" in str(told.value)
    subprocess.run(["mount", "-o", "loop", disk.with_name("image"), disk], check=True)
    found = newest_good(run / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step in {4, 8}
    assert resume(run, []).result["theta_sha256"] == tiny_run.result["theta_sha256"]


def test_storage_that_stops_for_a_while(disk: Path, before_step: Any, tiny: Make, tiny_run: Any) -> None:
    """Every write waits for seconds; steps go on meanwhile, and no checkpoint is lost."""
    run, steps, done_meanwhile = disk / "run", list[int](), list[int]()

    def thaw() -> None:
        done_meanwhile.extend(steps)
        subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)

    def freeze() -> None:
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
        threading.Timer(3, thaw).start()

    real = InProcess.apply

    def apply(self: InProcess, step: int) -> Any:
        steps.append(step)
        return real(self, step)

    before_step(5, freeze)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "apply", apply)
        result = train(tiny("eval.every=0"), "tiny", run).result
    assert max(done_meanwhile) >= 8, "the run did not wait for the disk in every step"
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert [row["step"] for row in read_metrics(run / "metrics.parquet")] == list(range(1, 13))
    found = newest_good(run / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step == 12


def test_a_tracking_server_that_is_away_for_the_whole_run(
    tiny: Make, tiny_run: Any, tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bits, a line that says so, and everything delivered later."""
    import metadist.run
    from metadist.tracking.mlflow_copy import sync

    monkeypatch.setattr(metadist.run, "TRACKING_SECONDS", 2.0)
    run = tmp_path / "run"
    finished = train(tiny(f"tracking.uri=http://127.0.0.1:{free_port()}"), "tiny", run)
    assert finished.result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert any(f"metadist track sync {run}" in note for note in finished.notes), finished.notes
    later = sync(run, final=True, uri="auto")
    assert later.finished
    assert later.points > 12
