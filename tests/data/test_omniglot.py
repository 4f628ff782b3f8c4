"""Omniglot: the real set where there is one, and a small fake one for everything that can be wrong with it."""

import io
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadist.config import Source
from metadist.data import omniglot
from metadist.data.sources import prepare
from metadist.data.table import open_table
from metadist.errors import DataError

Write = Callable[..., Path]


def source(root: Path | None) -> Source:
    return Source(name="omniglot", root=None if root is None else str(root))


def refusal(root: Path | None) -> str:
    """The one line that a root is refused with."""
    with pytest.raises(DataError) as error:
        prepare(source(root))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the splits -----------------------------------------------------------------


@pytest.mark.parametrize(("split", "sizes"), [("vinyals", (1028, 172, 423)), ("finn", (1100, 100, 423))])
def test_split_sizes(split: str, sizes: tuple[int, int, int]) -> None:
    count = Counter(omniglot.characters(split).values())
    assert (count["train"], count["val"], count["test"]) == sizes


def test_both_splits_share_out_the_same_characters_differently() -> None:
    vinyals, finn = omniglot.characters("vinyals"), omniglot.characters("finn")
    assert vinyals.keys() == finn.keys() and vinyals != finn
    assert len({character.split("/")[0] for character in finn}) == 50


def test_real_omniglot(real_omniglot: Path) -> None:
    table = prepare(source(real_omniglot))
    assert table.images.shape == (1623 * 4 * 20, 1, 28, 28)
    for name, characters in {"train": 1028, "val": 172, "test": 423}.items():
        split = table.splits[name]
        listed = (real_omniglot / "splits" / "vinyals" / f"{name}.txt").read_text().split()
        assert len(split.classes) == 4 * characters
        assert sorted(split.classes) == sorted(listed)
        assert set(split.count.tolist()) == {20}
    share = (table.images[::97] > 127).float().mean().item()
    assert 0.03 < share < 0.25  # strokes are ink, paper is 0


# --- reading --------------------------------------------------------------------


def test_images_are_inverted_small_and_turned_counter_clockwise(
    fake_omniglot: Write, drawings: dict[str, bytes]
) -> None:
    table = prepare(source(fake_omniglot()))
    with Image.open(io.BytesIO(drawings["Alpha/character01/0001_03.png"])) as image:
        expected = 255 - np.asarray(image.convert("L").resize((28, 28), Image.Resampling.LANCZOS))
    split = table.splits["train"]
    assert split.classes == [f"Alpha/character01/rot{degrees:03d}" for degrees in (0, 90, 180, 270)]
    assert expected.max() == 255 and expected.min() == 0
    for turns, start in enumerate(split.start.tolist()):
        assert np.array_equal(table.images[start + 2, 0].numpy(), np.rot90(expected, turns))
    assert [table.splits[name].groups for name in ("val", "test")] == [[("Alpha", 0, 4)], [("Beta", 0, 4)]]


def test_archives_and_folders_give_the_same_table(fake_omniglot: Write, tmp_path: Path) -> None:
    root = fake_omniglot()
    unpacked = tmp_path / "torchvision" / "omniglot-py"
    for part in omniglot.PARTS:
        with zipfile.ZipFile(root / f"{part}.zip") as archive:
            archive.extractall(unpacked)
        (unpacked / part / "Alpha" / "character01").mkdir(parents=True, exist_ok=True)
        (unpacked / part / "Alpha" / "character01" / "._0001_01.png").write_bytes(b"macOS leaves these")
    fingerprint = prepare(source(root)).fingerprint
    assert prepare(source(unpacked)).fingerprint == fingerprint
    assert prepare(source(unpacked.parent)).fingerprint == fingerprint


def test_strange_members_of_an_archive_are_left_alone(fake_omniglot: Write, tmp_path: Path) -> None:
    root = fake_omniglot()
    fingerprint = prepare(source(root)).fingerprint
    before = set(tmp_path.rglob("*"))
    with zipfile.ZipFile(root / "images_background.zip", "a") as archive:
        for name in ("../../evil.png", "/evil.png", "__MACOSX/Alpha/character01/0001_01.png", "../character01/1.png"):
            archive.writestr(name, b"no image")
    assert prepare(source(root)).fingerprint == fingerprint
    assert {path.suffix for path in set(tmp_path.rglob("*")) - before} == {".arrow"}


# --- what can be wrong ------------------------------------------------------------


def test_missing_empty_and_foreign_folders(tmp_path: Path, empty_cache: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "is empty" in message and str(tmp_path / "empty") in message and "images_background.zip" in message
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "holiday.jpg").write_bytes(b"")
    assert "holds no Omniglot" in refusal(tmp_path / "foreign")
    assert "is no folder" in refusal(tmp_path / "foreign" / "holiday.jpg")


def test_one_part_alone(fake_omniglot: Write) -> None:
    root = fake_omniglot()
    (root / "images_evaluation.zip").unlink()
    assert "lacks images_evaluation.zip" in refusal(root)


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_corrupt_archive_also_after_a_good_build(fake_omniglot: Write, damage: str) -> None:
    root = fake_omniglot()
    prepare(source(root))
    archive = root / "images_evaluation.zip"
    data = bytearray(archive.read_bytes())
    data[400] ^= 255
    archive.write_bytes({"cut": data[:3000], "flip": data, "text": b"<html>not found</html>"}[damage])
    message = refusal(root)
    assert str(archive) in message and "corrupt archive" in message


@pytest.mark.parametrize("data", [b"", b"no image at all", None])
def test_corrupt_drawing(fake_omniglot: Write, drawings: dict[str, bytes], data: bytes | None) -> None:
    name = "Beta/character01/0001_07.png"
    root = fake_omniglot({name: drawings[name][:60] if data is None else data})
    message = refusal(root)
    assert name in message and "images_evaluation.zip" in message and "no PNG" in message


def test_drawing_of_another_size(fake_omniglot: Write) -> None:
    file = io.BytesIO()
    Image.new("1", (84, 84)).save(file, "PNG")
    assert "84 x 84" in refusal(fake_omniglot({"Alpha/character02/0001_01.png": file.getvalue()}))


def test_missing_character_and_missing_drawing(fake_omniglot: Write, drawings: dict[str, bytes]) -> None:
    root = fake_omniglot({"Beta/character01/0001_07.png": None})
    assert "Beta/character01 has 19 drawings" in refusal(root)
    root = fake_omniglot({name: None for name in drawings if name.startswith("Beta")})
    assert "1 of 3 characters are missing, the first is Beta/character01" in refusal(root)


def test_a_failed_build_leaves_no_table(fake_omniglot: Write, empty_cache: Path) -> None:
    refusal(fake_omniglot({"Beta/character01/0001_07.png": b""}))
    assert [path.name for path in empty_cache.iterdir()] == ["omniglot.lock"]


# --- downloading --------------------------------------------------------------------


def test_download_that_fails_says_how_to_go_on(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", away)
    message = refusal(None)
    assert "no route to host" in message and "data.root=FOLDER" in message


def test_download_goes_into_the_cache_once(
    fake_omniglot: Write, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    from torchvision.datasets import Omniglot

    root = fake_omniglot()
    sums = {part: hashlib.md5((root / f"{part}.zip").read_bytes()).hexdigest() for part in omniglot.PARTS}
    fetched = []

    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        assert url.endswith(f"/{filename}")
        fetched.append(filename)
        (Path(folder) / filename).write_bytes((root / filename).read_bytes())

    monkeypatch.setattr(Omniglot, "zips_md5", sums)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    table = prepare(source(None))
    assert prepare(source(None)).path == table.path
    assert fetched == ["images_background.zip", "images_evaluation.zip"]
    assert open_table(table.path).fingerprint == prepare(source(root)).fingerprint
