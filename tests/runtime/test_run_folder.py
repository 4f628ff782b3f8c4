"""The run folder: created whole, owned by one living process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadist.config import Config, resolve
from metadist.errors import RunError
from metadist.runtime.run_folder import RunFolder, fresh_name, refuse_existing, run_name

HOLD = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.pwrite(handle, str(os.getpid()).encode(), 0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., Config]) -> RunFolder:
    return RunFolder.create(tmp_path / "a" / "run", resolve(tiny()), run_name(tmp_path / "a" / "run"))


@pytest.fixture
def holder(folder: RunFolder) -> Iterator[subprocess.Popen]:
    """Another process that trains in the folder, as far as the lock can tell."""
    folder.unlock()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_new_folder_is_whole(folder: RunFolder, tiny: Callable[..., Config]) -> None:
    assert sorted(os.listdir(folder.path)) == [".lock", "checkpoints", "config.yaml", "name"]
    assert folder.config() == resolve(tiny())
    assert folder.result() is None


def test_a_folder_that_exists_is_refused(folder: RunFolder, tiny: Callable[..., Config]) -> None:
    with pytest.raises(RunError, match=r"exists already.*--resume"):
        RunFolder.create(folder.path, tiny(), "name")


def test_a_living_process_keeps_others_out(folder: RunFolder, holder: subprocess.Popen) -> None:
    with pytest.raises(RunError, match=f"process {holder.pid} is training in it"):
        RunFolder.open(folder.path)


def test_a_dead_process_does_not(folder: RunFolder, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder.path / ".lock").read_text() == str(holder.pid), "its file is still there"
    RunFolder.open(folder.path).unlock()


def test_an_unlocked_folder_can_be_opened_again(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=f"process {os.getpid()} is training in it"):
        RunFolder.open(folder.path)
    folder.unlock()
    RunFolder.open(folder.path).unlock()


def test_a_damaged_result_is_told_in_one_line(folder: RunFolder) -> None:
    (folder.path / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: is damaged"):
        folder.result()


def test_fresh_names_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):
        path = fresh_name("jobs/quickstart.yaml")
        path.mkdir(parents=True)
        seen.add(path)
    assert len(seen) == 3
    assert all(path.parent == Path("runs") and path.name.startswith("quickstart-") for path in seen)


def test_a_folder_whose_run_never_began_is_made_again(folder: RunFolder, tiny: Callable[..., Config]) -> None:
    """A process killed before it had written the config: neither --resume nor a new run could use it."""
    (folder.path / "config.yaml").unlink()
    with pytest.raises(RunError, match="exists already"):
        refuse_existing(folder.path)  # somebody is about to write it
    folder.unlock()
    (folder.path / ".config.yaml.0123abcd").write_text("half of")
    (folder.path / "notes.txt").write_text("of a person")
    with pytest.raises(RunError, match="exists already"):
        refuse_existing(folder.path)
    (folder.path / "notes.txt").unlink()
    refuse_existing(folder.path)
    assert not folder.path.exists()
    RunFolder.create(folder.path, tiny(), "name").unlock()
    with pytest.raises(RunError, match="go on with it by"):
        refuse_existing(folder.path)
