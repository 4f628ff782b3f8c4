"""Naming, building once and sharing what was built."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metadist.config import Source
from metadist.data.sources import NAMES, check, prepare
from metadist.errors import DataError, StorageError

Write = Callable[..., Path]


def test_every_data_set_is_described() -> None:
    assert set(NAMES) >= {"glyphs", "omniglot"}
    for name, entry in NAMES.items():
        check(Source(name=name))
        for split in entry.splits:
            check(Source(name=name, split=split))
        assert entry.description and "\n" not in entry.description


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(name="omniglott"), "did you mean omniglot"),
        (Source(name="zzz"), "valid: glyphs, omniglot"),
        (Source(name="omniglot", split="vinyls"), "did you mean vinyals"),
        (Source(name="glyphs", split="finn"), "valid: scripts"),
        (Source(name="glyphs", root="/"), "takes no root"),
    ],
)
def test_what_cannot_be_is_refused(source: Source, message: str) -> None:
    for refuse in (check, prepare):
        with pytest.raises(DataError, match=message) as error:
            refuse(source)
        assert "\n" not in str(error.value)


def test_a_second_time_opens_the_same_file(fake_omniglot: Write) -> None:
    source = Source(name="omniglot", root=str(fake_omniglot()))
    lines: list[str] = []
    table = prepare(source, lines.append)
    written = table.path.stat().st_mtime_ns
    assert lines and not (heard := list[str]()) and prepare(source, heard.append).path == table.path
    assert heard == [] and table.path.stat().st_mtime_ns == written


def test_other_content_is_another_table(fake_omniglot: Write, drawings: dict[str, bytes]) -> None:
    first = prepare(Source(name="omniglot", root=str(fake_omniglot())))
    name, other = "Alpha/character01/0001_01.png", "Beta/character01/0001_02.png"
    second = prepare(Source(name="omniglot", root=str(fake_omniglot({name: drawings[other]}))))
    assert first.path != second.path and first.fingerprint != second.fingerprint


@pytest.mark.parametrize("keep", [0, 1000, -5])
def test_a_damaged_table_is_built_again(fake_omniglot: Write, keep: int) -> None:
    source = Source(name="omniglot", root=str(fake_omniglot()))
    table = prepare(source)
    path, fingerprint = table.path, table.fingerprint
    good = path.read_bytes()
    path.unlink()  # a file that is mapped must not shrink
    path.write_bytes(good[:keep])
    assert prepare(source).fingerprint == fingerprint
    assert path.read_bytes() == good


def test_processes_that_prepare_at_once_share_one_table(
    fake_omniglot: Write,
    fake_characters: dict[str, str],
    empty_cache: Path,
    start_prepare: "Callable[..., subprocess.Popen[str]]",
) -> None:
    source = Source(name="omniglot", root=str(fake_omniglot()))
    setup = f"from metadist.data import omniglot; omniglot.characters = lambda split: {fake_characters!r}"
    processes = [start_prepare(source, empty_cache, setup) for _ in range(2)]
    fingerprints = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    tables = list(empty_cache.glob("*.arrow"))
    assert len(tables) == 1 and len(fingerprints) == 1
    written = tables[0].stat().st_mtime_ns
    assert prepare(source).fingerprint in fingerprints and tables[0].stat().st_mtime_ns == written
    assert not list(empty_cache.glob(".*"))


def test_a_cache_that_cannot_be_written(fake_omniglot: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="METADIST_CACHE"):
        prepare(Source(name="omniglot", root=str(fake_omniglot())))


def test_looking_at_the_list_of_data_sets_loads_no_torch() -> None:
    code = "import sys, metadist.data.sources; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
