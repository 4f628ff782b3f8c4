"""omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015).

A class is a character in one of four rotations, named "<Alphabet>/characterNN/rotDDD": the 28 x 28 image
turned counter-clockwise by DDD degrees. A group is an alphabet. Ink is 255 on 0.

Drawings are 105 x 105 black on white. They are resized with Lanczos as in the MAML code (Finn et al. 2017),
but from grey levels: on the one-bit images themselves Pillow ignores the filter and takes the nearest pixel.

Splits: `vinyals`, the 1,028 / 172 / 423 characters of Vinyals et al. 2016 that prototypical networks and
others report on; `finn`, sizes 1,100 / 100 / 423 as in the MAML paper, in the fixed order of a hash of the
name, because the paper's own shuffle depends on the order in which a file system lists folders.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metadist.data.files import lock, writing
from metadist.data.raw import Raw, Say
from metadist.data.table import ClassImages
from metadist.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DESCRIPTION = "handwritten characters of 50 alphabets, 20 drawings each, rotations by 90 degrees as new classes"
SPLITS = ("vinyals", "finn")
VERSION = 1
SHAPE = (1, 28, 28)

PARTS = ("images_background", "images_evaluation")
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError)
"""What the zip reader raises on damaged bytes, depending on which byte it is."""
DRAWINGS = 20
ROTATIONS = (0, 90, 180, 270)
DRAWING = re.compile(r"(?:images_(?:background|evaluation)/)?([^/]+/character\d\d)/([^/.][^/]*\.png)")


def locate(root: Path | None, downloads: Path, say: Say) -> Raw:
    """The two parts, as archives or as folders, below `root`, or downloaded. Reads every byte once."""
    digest = hashlib.sha256()
    try:
        parts = find(_download(downloads, say) if root is None else root)
        for part in parts:
            if part.is_dir():
                for name, data in _members(part):
                    digest.update(f"{name}\0{len(data)}\0".encode() + data)
            else:
                digest.update(part.read_bytes())
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror or error}; {_valid()}") from error
    return Raw(digest.hexdigest(), partial(classes, parts))


def find(root: Path) -> list[Path]:
    """Where both parts are below `root`: archive or folder, directly or in torchvision's omniglot-py."""
    if not root.is_dir():
        raise DataError(f"data.root: {root} {'is no folder' if root.exists() else 'does not exist'}; {_valid()}")
    for folder in (root, root / "omniglot-py"):
        found = [_part(folder, name) for name in PARTS]
        if any(found):
            for name, part in zip(PARTS, found, strict=True):
                if part is None:
                    raise DataError(f"data.root: {folder} lacks {name}.zip; {_valid()}")
            return [part for part in found if part is not None]
    raise DataError(f"data.root: {root} {'holds no Omniglot' if any(root.iterdir()) else 'is empty'}; {_valid()}")


def characters(split: str) -> dict[str, str]:
    """Character ("<Alphabet>/characterNN") → "train", "val" or "test"."""
    packed = (Path(__file__).parent / "vinyals.txt.xz").read_bytes()
    lines = (line.split() for line in lzma.decompress(packed).decode().splitlines())
    vinyals = {character: part for part, character in lines}
    if split == "vinyals":
        return vinyals
    shuffled = sorted(vinyals, key=lambda character: hashlib.sha256(f"finn {character}".encode()).digest())
    bounds = {"train": shuffled[:1100], "val": shuffled[1100:1200], "test": shuffled[1200:]}
    return {character: part for part, members in bounds.items() for character in members}


def classes(parts: list[Path], split: str, say: Say) -> Iterator[ClassImages]:
    """Every character in every rotation. Raises DataError for what is damaged or missing."""
    split_of = characters(split)
    drawings: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for part in parts:
        say(f"omniglot: reading {part.name}")
        for name, data in _members(part):
            match = DRAWING.fullmatch(name)
            if match is not None and match[1] in split_of:
                drawings.setdefault(match[1], {})[match[2]] = _decode(data, f"{part}: {name}")
    where = parts[0].parent
    missing = [character for character in split_of if character not in drawings]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(split_of)} characters are missing, the first is {missing[0]}; "
            f"a complete Omniglot has all"
        )
    for character, images in drawings.items():
        if len(images) != DRAWINGS:
            raise DataError(f"{where}: {character} has {len(images)} drawings; a complete Omniglot has {DRAWINGS}")
        upright = np.stack([images[name] for name in sorted(images)])
        alphabet = character.split("/")[0]
        for turns, degrees in enumerate(ROTATIONS):
            rotated = np.rot90(upright, turns, axes=(1, 2))
            yield ClassImages(split_of[character], alphabet, f"{character}/rot{degrees:03d}", rotated[:, None])


def _part(folder: Path, name: str) -> Path | None:
    archive, unpacked = folder / f"{name}.zip", folder / name
    return archive if archive.is_file() else unpacked if unpacked.is_dir() else None


def _members(part: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every drawing of a part, by name. Archives are read in memory and never unpacked."""
    if part.is_dir():
        for path in sorted(part.glob("*/character*/*.png")):
            name = path.relative_to(part).as_posix()
            if DRAWING.fullmatch(name):
                yield name, path.read_bytes()
        return
    name = ""
    try:
        with zipfile.ZipFile(part) as archive:
            for name in sorted(filter(DRAWING.fullmatch, archive.namelist())):
                yield name, archive.read(name)
    except DAMAGE as error:
        inside = f" at {name}" if name else ""
        raise DataError(f"{part}: corrupt archive{inside} ({error}); replace it by {part.name} of Omniglot") from error


def _decode(data: bytes, where: str) -> NDArray[np.uint8]:
    """A drawing's bytes as an image; uint8 [28, 28], ink is 255."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (105, 105):
                raise DataError(f"{where}: {image.width} x {image.height} pixels; a drawing of Omniglot has 105 x 105")
            small = image.convert("L").resize(SHAPE[1:], Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise DataError(f"{where}: damaged or no PNG image; replace it by the one of Omniglot") from error
    return 255 - np.asarray(small)


def _download(folder: Path, say: Say) -> Path:
    """Both archives in `folder`, fetched with torchvision's addresses and checksums where they are not there yet."""
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import check_integrity, download_url

    folder = folder / "omniglot-py"
    with lock(folder / ".lock"):
        for name, md5 in Omniglot.zips_md5.items():
            if check_integrity(str(folder / f"{name}.zip"), md5):
                continue
            say(f"omniglot: downloading {name}.zip")
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(30)  # torchvision sets none, and a silent network would hold the run for ever
            try:
                with writing(folder):
                    download_url(f"{Omniglot.download_url_prefix}/{name}.zip", str(folder), f"{name}.zip", md5)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"omniglot: the download of {name}.zip failed ({error}); or {_valid()}, with data.root=FOLDER"
                ) from error
            finally:
                socket.setdefaulttimeout(timeout)
    return folder


def _valid() -> str:
    return f"name a folder that holds {PARTS[0]}.zip and {PARTS[1]}.zip or both unpacked"
