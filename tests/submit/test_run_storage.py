"""A run's folder in a storage: whole, or resumable from, whenever the copying was broken off."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from metadist.errors import RunError, StorageError
from metadist.run import resume
from metadist.runtime.checkpoint import newest_good
from metadist.submit import storage as of
from metadist.submit.storage import Storage


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but those that a run keeps to itself."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not path.name.startswith(".")}


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local folder, or one of an S3-compatible server; empty."""
    if request.param == "folder":
        return str(tmp_path / "storage")
    for name, value in request.getfixturevalue("keys").items():
        monkeypatch.setenv(name, value)
    found: str = request.getfixturevalue("bucket").replace("/runs?", f"/{tmp_path.name}?")
    return found


def test_a_run_comes_back_as_it_was(place: str, tiny_copy: Path, tmp_path: Path) -> None:
    storage = Storage(place, "a")
    assert storage.submission() is None
    assert not storage.restore(tmp_path / "back")
    storage.begin({"id": "a"}, tmp_path / "passing.json")
    storage.mirror(tiny_copy)
    there = Storage(place, "a")
    assert there.submission() == {"id": "a"}
    assert there.restore(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tiny_copy)
    assert not Storage(place, "b").restore(tmp_path / "other"), "another run has nothing of it"


def test_what_a_run_removes_is_removed(place: str, tiny_copy: Path, tmp_path: Path) -> None:
    """By the process that copied it and by a later one; what changed is copied again."""
    for number, storage in enumerate((first := Storage(place, "a"), first, Storage(place, "a"))):
        if number:
            oldest = min((tiny_copy / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
            shutil.rmtree(oldest)
            (tiny_copy / "config.yaml").write_text(f"changed: {number}\n")
        storage.mirror(tiny_copy, final=True)
        assert set(storage.files()) == set(contents(tiny_copy))
    assert Storage(place, "a").restore(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tiny_copy)


@pytest.mark.parametrize("fresh", [False, True], ids=["the-same-process", "a-later-one"])
def test_a_checkpoint_that_another_ones_replaces_is_copied_again(fresh: bool, tiny_copy: Path, tmp_path: Path) -> None:
    """As a search does: under its name, with its bytes and its time."""
    storage = Storage(str(tmp_path / "storage"), "a")
    storage.mirror(tiny_copy)
    (tiny_copy / "checkpoints").rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tiny_copy / "checkpoints")
    for path in (tiny_copy / "checkpoints").rglob("*.*"):
        status = path.stat()
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (Storage(storage.place, "a") if fresh else storage).mirror(tiny_copy)
    assert Storage(storage.place, "a").restore(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tiny_copy)


def test_what_was_sent_or_brought_back_is_not_sent_again(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "storage"), "a")
    storage.mirror(tiny_copy)
    other = Storage(storage.place, "a")
    assert other.restore(tmp_path / "back")
    (tmp_path / "back" / "config.yaml").write_text("changed: 1\n")
    real_copy, copied = of.copy, []

    def copy(*given: Any) -> None:
        copied.append(Path(given[3]).name)
        real_copy(*given)

    monkeypatch.setattr(of, "copy", copy)
    storage.mirror(tiny_copy)
    assert copied == []
    other.mirror(tmp_path / "back")
    assert copied == ["config.yaml"]


class BrokenOff(Exception):
    """The host is gone."""


def test_copying_that_is_broken_off_anywhere_leaves_a_good_checkpoint(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Any
) -> None:
    """A finished run over what was stored behind step 8: after each copy and each removal, as far as it came."""
    before = tmp_path / "before"
    shutil.copytree(tiny_copy, before)
    for name in ("result.json", "theta.safetensors", "best.safetensors", "checkpoints/step-12"):
        path = before / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(before / "checkpoints" / "step-4", before / "checkpoints" / "step-2")  # not in the finished one
    real_copy, real_delete = of.copy, Storage._remove
    ends = 0
    for most in itertools.count():
        place = str(tmp_path / f"storage-{most}")
        Storage(place, "a").mirror(before)
        left = iter(range(most))

        def copy(*given: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise BrokenOff
            real_copy(*given)

        def remove(*given: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise BrokenOff
            real_delete(*given)

        monkeypatch.setattr(of, "copy", copy)
        monkeypatch.setattr(Storage, "_remove", remove)
        try:
            Storage(place, "a").mirror(tiny_copy, final=True)
            ends += 1
        except BrokenOff:
            pass
        monkeypatch.setattr(of, "copy", real_copy)
        monkeypatch.setattr(Storage, "_remove", real_delete)
        back = tmp_path / f"back-{most}"
        assert Storage(place, "a").restore(back)
        found = newest_good(back / "checkpoints", lambda line: None)
        assert found is not None
        assert found[0].step in (8, 12)
        if (back / "result.json").is_file():
            assert found[0].step == 12
            assert (back / "theta.safetensors").is_file()
        if most in (3, 6, 8):
            assert resume(back, []).result["theta_sha256"] == tiny_run.result["theta_sha256"]
        if ends:
            break
    assert most > 8


def finish(search: Path, trial: str) -> None:
    """A trial's folder and the ledger's line about it, as a search writes them; no id is in the order of time."""
    step = search / "trials" / trial / "checkpoints" / "step-4"
    step.mkdir(parents=True)
    for path in (step / "state.safetensors", step / "checkpoint.json", step.parents[1] / "result.json"):
        path.write_text(trial)
    with (search / "ledger.jsonl").open("a") as file:
        file.write(f"{trial}\n")


def test_a_stored_ledger_names_only_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off after any copy, while a trial ends between any two; `search.json` is behind the ledger."""
    real_copy = of.copy
    ended = 0
    for most in itertools.count():
        search, place = tmp_path / f"search-{most}", tmp_path / f"storage-{most}"
        finish(search, "t9")
        Storage(str(place), "a").mirror(search)
        finish(search, "t5")
        (search / "search.json").write_text("{}")
        left = iter(range(most))

        def copy(*given: Any, search: Path = search, left: Iterator[int] = left) -> None:
            number = next(left, None)
            if number is None:
                raise BrokenOff
            finish(search, f"t{number + 10}")
            real_copy(*given)

        monkeypatch.setattr(of, "copy", copy)
        try:
            Storage(str(place), "a").mirror(search)
            ended += 1
        except BrokenOff:
            pass
        monkeypatch.setattr(of, "copy", real_copy)
        stored = place / "a" / "run"
        named = (stored / "ledger.jsonl").read_text().split()
        for trial in named:
            assert len([path for path in (stored / "trials" / trial).rglob("*.*") if path.is_file()]) == 3
        assert ("t5" in named) >= (stored / "search.json").exists()
        if ended:
            break
    assert named == ["t9", "t5"]
    assert most == 8


def test_a_trial_that_is_away_for_a_moment_stays_stored(tmp_path: Path) -> None:
    search, storage = tmp_path / "search", Storage(str(tmp_path / "storage"), "a")
    finish(search, "t1")
    storage.mirror(search)
    whole = storage.files()
    trial, aside = search / "trials" / "t1", search / "trials" / ".t1.old"
    for _ in range(2):
        trial.rename(aside)
        storage.mirror(search)
        assert storage.files() == whole
        aside.rename(trial)
        storage.mirror(search)
    shutil.rmtree(trial)
    storage.mirror(search)
    storage.mirror(search)
    assert list(storage.files()) == ["ledger.jsonl"]


def test_what_a_killed_writer_had_begun_is_removed_by_the_next(tmp_path: Path) -> None:
    search, place = tmp_path / "search", tmp_path / "storage"
    finish(search, "t1")
    Storage(str(place), "a").mirror(search)
    stored = place / "a" / "run"
    for name in (".ledger.jsonl.0123abcd", "trials/t1/.result.json.0123abcd", "../.submission.json.0123abcd"):
        (stored / name).write_text("half")
    (stored / ".kept").write_text("")
    Storage(str(place), "a").mirror(search)
    assert [path.name for path in (place / "a").rglob(".*")] == [".kept"]


def test_a_place_that_takes_or_has_nothing(tiny_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"storage: .*file/below cannot be written"):
        Storage(str(tmp_path / "file" / "below"), "a").mirror(tiny_copy)
    with pytest.raises(StorageError, match=r"storage: nfs://a: .* valid: a folder, or a URI"):
        Storage("nfs://a", "a")
    (tmp_path / "a").mkdir()
    for damaged in (b"{", b"[]", b"\xff"):
        (tmp_path / "a" / "submission.json").write_bytes(damaged)
        with pytest.raises(RunError, match=r"submission.json: is damaged; remove it"):
            Storage(str(tmp_path), "a").submission()


def test_what_pyarrow_refuses_is_of_the_storage(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its errors are no OSError: a name that is no path in a bucket, for one."""

    def copy(*_: object) -> None:
        raise pa.ArrowInvalid("no such thing")

    monkeypatch.setattr(of, "copy", copy)
    with pytest.raises(StorageError, match=r"storage: .* cannot be written: no such thing"):
        Storage(str(tmp_path / "storage"), "a").mirror(tiny_copy)


def test_a_server_that_is_not_there(
    free_port: Callable[[], int], keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, tiny_copy: Path
) -> None:
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    place = f"s3://results/a?scheme=http&endpoint_override=127.0.0.1%3A{free_port()}&region=us-east-1"
    with pytest.raises(StorageError, match="storage: s3://results/a"):
        Storage(place, "a").files()


def test_a_bucket_gives_it_back_when_the_cluster_is_gone(
    bucket: str, keys: dict[str, str], cli: Callable[..., Any], refused: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No job server is asked, and none is named; a folder is on a host that only a server reaches."""
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}\n")
    Storage(bucket, "gone").mirror(tmp_path / "run")
    ended = cli("jobs", "fetch", "gone", "--to", tmp_path / "back", "--storage", bucket)
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "back") == {"result.json": b"{}\n"}
    to = ("--to", tmp_path / "none")
    refused("jobs", "fetch", "nothing", *to, "--storage", bucket, say=("nothing of it is stored in",))
    for disk in (str(tmp_path), f"file://{tmp_path}"):
        refused("jobs", "fetch", "gone", *to, "--storage", disk, code=4, say=("--address", "RAY_ADDRESS"))
