"""Tables that hosts take from shared storage."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadist.config import resolve
from metadist.data.shared import check_shared, fetch, offer
from metadist.data.sources import prepare
from metadist.data.table import Table
from metadist.errors import DataError
from metadist.runtime.worker import open_tables


@pytest.fixture
def table(tiny: Callable[..., Any]) -> Table:
    return prepare(tiny().data.sources[0])


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has nothing yet."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "other"))
    return tmp_path / "other"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_host_without_the_data_takes_the_table(
    scheme: str, table: Table, tmp_path: Path, other_host: Path, tiny: Callable[..., Any]
) -> None:
    shared = f"{scheme}{tmp_path / 'shared'}"
    offer(table, shared)
    offer(table, shared)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [table.path.name], "once, and nothing beside it"
    config = resolve(tiny(f"data.shared={shared}"))
    (found,) = open_tables(config, [str(Path("/nowhere") / table.path.name)])
    assert found.path == other_host / table.path.name
    assert found.fingerprint == table.fingerprint
    shutil.rmtree(tmp_path / "shared")
    assert fetch(table.path.name, shared).path == found.path, "brought once"


def test_what_is_not_there_or_damaged_is_told(table: Table, tmp_path: Path, other_host: Path) -> None:
    shared = str(tmp_path / "shared")
    with pytest.raises(DataError, match=f"{table.path.name} cannot be read from"):
        fetch(table.path.name, shared)
    offer(table, shared)
    path = tmp_path / "shared" / table.path.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        fetch(table.path.name, shared)
    assert not [left for left in other_host.iterdir() if left.suffix != ".lock"], "nothing half-brought"


def test_no_file_system() -> None:
    with pytest.raises(DataError, match=r"data.shared: nfs://a/b: .* valid: a folder, or a URI"):
        check_shared("nfs://a/b")


def test_a_folder_that_takes_nothing(table: Table, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="does not take"):
        offer(table, str(tmp_path / "file" / "below"))
