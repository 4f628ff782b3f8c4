"""One cache for the session, a small fake Omniglot, and the real one where there is one."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.config import Source
from metadist.data import omniglot
from metadist.data.sources import prepare
from metadist.data.table import Table

CHARACTERS = {"Alpha/character01": "train", "Alpha/character02": "val", "Beta/character01": "test"}
"""The split that the fake Omniglot is read with."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of the session, unless an outer conftest has set one."""
    if before := os.environ.get("METADIST_CACHE"):
        yield Path(before)
        return
    os.environ["METADIST_CACHE"] = folder = str(tmp_path_factory.mktemp("cache"))
    yield Path(folder)
    del os.environ["METADIST_CACHE"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def start_prepare() -> "Callable[..., subprocess.Popen[str]]":
    """Starts a fresh process that prepares a source into a cache and prints the fingerprint."""

    def start(source: Source, cache: Path, setup: str = "", hash_seed: str = "0") -> "subprocess.Popen[str]":
        imports = "from metadist.config import Source; from metadist.data.sources import prepare"
        code = f"{imports}; {setup}\nprint(prepare(Source(**{source.model_dump()!r})).fingerprint)"
        env = {**os.environ, "METADIST_CACHE": str(cache), "PYTHONHASHSEED": hash_seed}
        return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def fake_characters() -> dict[str, str]:
    return CHARACTERS


@pytest.fixture(scope="session")
def glyphs_twice(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, start_prepare: "Callable[..., subprocess.Popen[str]]"
) -> tuple[Table, str]:
    """The glyphs, and the fingerprint of a build in a fresh process, made at the same time."""
    other = start_prepare(Source(name="glyphs"), tmp_path_factory.mktemp("second"), hash_seed="7")
    table = prepare(Source(name="glyphs"))
    return table, other.communicate(timeout=300)[0].strip()


@pytest.fixture(scope="session")
def glyphs(glyphs_twice: tuple[Table, str]) -> Table:
    return glyphs_twice[0]


@pytest.fixture(scope="session")
def real_omniglot() -> Path:
    folder = os.environ.get("METADIST_TEST_DATA")
    if not folder:
        pytest.skip("needs METADIST_TEST_DATA")
    return Path(folder) / "omniglot"


@pytest.fixture(scope="session")
def drawings() -> dict[str, bytes]:
    """Name → PNG of the drawings of the fake Omniglot: each a random blot."""
    random = np.random.default_rng(0)
    files = {}
    for character in CHARACTERS:
        for number in range(20):
            pixels = np.full((105, 105), 255, np.uint8)
            top, left = random.integers(5, 60, 2)
            pixels[top : top + 30, left : left + 40] = 0
            file = io.BytesIO()
            Image.fromarray(pixels).convert("1").save(file, "PNG")
            files[f"{character}/0001_{number + 1:02d}.png"] = file.getvalue()
    return files


def write_archives(root: Path, drawings: dict[str, bytes]) -> Path:
    """Both archives below `root`; alphabet Beta is the evaluation part."""
    root.mkdir(parents=True, exist_ok=True)
    for part, alphabet in zip(omniglot.PARTS, ("Alpha", "Beta"), strict=True):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            for name, data in drawings.items():
                if name.startswith(alphabet):
                    archive.writestr(f"{part}/{name}", data)
    return root


@pytest.fixture
def fake_omniglot(
    tmp_path: Path, drawings: dict[str, bytes], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a fake Omniglot with some drawings replaced (or left out: None); returns its root."""
    monkeypatch.setattr(omniglot, "characters", lambda split: CHARACTERS)

    def write(changes: dict[str, bytes | None] | None = None) -> Path:
        files = {name: data for name, data in {**drawings, **(changes or {})}.items() if data is not None}
        return write_archives(tmp_path / "raw", files)

    return write
