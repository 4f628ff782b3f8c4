"""glyphs: letters of many scripts, rendered from the DejaVu fonts that matplotlib ships. No download.

A class is a letter, a group is a script. A letter is a code point of the Unicode categories Lu, Ll or Lo
without a decomposition that at least two faces draw; its script is told by its Unicode name.

Look-alikes are one class. Every shape is scaled to one box and compared on a grid: two shapes are alike
when all ink of each lies within one pixel of the other's ink (diagonals count), or within two for letters of
different scripts, where no writer keeps them apart. Letters are taken in the order of their code points, and
a letter gives up the faces in which it is like a letter before it. One that gives up its first
face, or keeps fewer than two, is a look-alike: the class is the earlier letter and stays in that letter's
script. So Greek Alpha and Cyrillic A are the Latin A, and o is O. Scripts left with fewer than 20 letters
are dropped.

Splits, by a rule fixed before anything was trained: scripts sorted by number of letters, descending, ties
by name, have ranks r = 0, 1, ...; r % 4 == 2 is meta-test, r % 4 == 3 is meta-val, all others meta-train.

The 20 examples of a letter differ in face, stroke width and a seeded affine distortion. The bytes are the
same on every machine with the same fonts and FreeType: pixels are computed on integers, and coefficients
use only the exactly rounded operations (+ - * /, no sine) and are then cut to 12 binary digits.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metadist.data.raw import Raw, Say
from metadist.data.table import ClassImages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

DESCRIPTION = "letters of 13 scripts in 2 to 12 typefaces, rendered here; the classes of a split are whole scripts"
SPLITS = ("scripts",)
VERSION = 1
SHAPE = (1, 28, 28)

EXAMPLES = 20
SIDE = 28
FINE = 4  # pixels are sampled this many times finer per axis, then averaged
BOX = 24  # the square that a shape is scaled to when shapes are compared
STRETCH = 1.4
WITHIN_SCRIPT, ACROSS_SCRIPTS = 2, 4  # squared distances below which ink counts as the same
FONT_SIZE = 96
TWO_WORD_SCRIPTS = {"CANADIAN": "Canadian Syllabics", "OLD": "Old Italic"}
MIN_LETTERS = 20


def locate(root: Path | None, cache: Path, say: Say) -> Raw:
    """The fonts of the installed matplotlib. The content covers everything that shapes the pixels."""
    from PIL import __version__ as pillow
    from PIL import features

    digest = hashlib.sha256(f"pillow {pillow} freetype {features.version('freetype2')}".encode())
    for path in font_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return Raw(digest.hexdigest(), lambda split, say: classes(say))


def font_files() -> list[Path]:
    """The DejaVu faces, the plain sans first: it decides which letters look alike."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(folder.glob("DejaVu*.ttf"), key=lambda path: (path.name != "DejaVuSans.ttf", path.name))


def classes(say: Say = lambda line: None) -> Iterator[ClassImages]:
    """All letters of all scripts with their images."""
    fonts = [_open_font(path) for path in font_files()]
    faces = _distinct(_letters())
    sizes = Counter(map(script, faces))
    ranked = sorted((s for s in sizes if sizes[s] >= MIN_LETTERS), key=lambda s: (-sizes[s], s))
    split_of = {s: {2: "test", 3: "val"}.get(rank % 4, "train") for rank, s in enumerate(ranked)}
    kept = [letter for letter in faces if script(letter) in split_of]
    say(f"glyphs: rendering {len(kept)} letters of {len(ranked)} scripts")
    for letter in kept:
        group = script(letter)
        images = np.stack([_example(fonts, faces[letter], letter, i) for i in range(EXAMPLES)])
        yield ClassImages(split_of[group], group, f"{group}/U+{ord(letter):04X}", images[:, None])


def script(letter: str) -> str:
    """The script a letter's Unicode name begins with."""
    word = unicodedata.name(letter).split()[0]
    return TWO_WORD_SCRIPTS.get(word, word.capitalize())


# --- which letters -------------------------------------------------------------


def _letters() -> dict[str, list[int]]:
    """Letter → indices of the faces that have it, in the order of code points."""
    from fontTools.ttLib import TTFont

    faces: dict[int, list[int]] = {}
    for index, path in enumerate(font_files()):
        with TTFont(path, lazy=True) as font:
            for code in font.getBestCmap():
                faces.setdefault(code, []).append(index)
    return {chr(code): faces[code] for code in sorted(faces) if len(faces[code]) >= 2 and _is_letter(chr(code))}


def _is_letter(character: str) -> bool:
    plain = unicodedata.normalize("NFKD", character) == character
    return plain and unicodedata.category(character) in ("Lu", "Ll", "Lo")


def _distinct(faces: dict[str, list[int]]) -> dict[str, list[int]]:
    """The letters that are no look-alike of an earlier one, with the faces in which they are distinct."""
    like: dict[tuple[str, int], set[str]] = {}
    for index, path in enumerate(font_files()):
        font = _open_font(path)
        letters = [letter for letter in faces if index in faces[letter]]
        if not letters:
            continue
        shapes = np.stack([_shape(font, letter) for letter in letters])
        scripts = np.array([script(letter) for letter in letters])
        same_script = scripts[:, None] == scripts
        alike = np.where(same_script, _alike(shapes, WITHIN_SCRIPT), _alike(shapes, ACROSS_SCRIPTS))
        for later, earlier in np.argwhere(np.tril(alike, -1)):
            like.setdefault((letters[later], index), set()).add(letters[earlier])
    kept: dict[str, list[int]] = {}
    for letter, its_faces in faces.items():
        distinct = [face for face in its_faces if not like.get((letter, face), set()) & kept.keys()]
        if len(distinct) >= 2 and distinct[0] == its_faces[0]:
            kept[letter] = distinct
    return kept


def _shape(font: FreeTypeFont, letter: str) -> NDArray[np.bool_]:
    """A letter's ink, scaled to the box that all shapes are compared in; bool [SIDE, SIDE].

    Up to a ratio of STRETCH the sides become equal, because the distortion of the examples
    hides such differences too: a wide and a narrow Gamma are one letter.
    """
    glyph = _draw(font, letter, 0)
    longest = max(glyph.size)
    wide, high = (FINE * BOX * min(1.0, STRETCH * side / longest) / side for side in glyph.size)
    return np.asarray(_place(glyph, (wide, 0.0, 0.0, high), (0.0, 0.0))) >= 128


def _alike(shapes: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Which of n shapes look alike; bool [n, n]. `reach` is a squared distance in pixels."""
    near = np.zeros_like(shapes)
    padded = np.pad(shapes, ((0, 0), (2, 2), (2, 2)))
    for y in range(-2, 3):
        for x in range(-2, 3):
            if x * x + y * y <= reach:
                near |= padded[:, 2 + y : 2 + y + SIDE, 2 + x : 2 + x + SIDE]
    n = len(shapes)
    # Counts of pixels in float32 are exact.
    ink, far = shapes.reshape(n, -1).astype(np.float32), (~near).reshape(n, -1).astype(np.float32)
    covered: NDArray[np.bool_] = ink @ far.T == 0
    return covered & covered.T


# --- drawing ---------------------------------------------------------------------


@cache
def _open_font(path: Path) -> FreeTypeFont:
    from PIL import ImageFont

    # The basic layout: the other one depends on a library that not every Pillow has.
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _draw(font: FreeTypeFont, letter: str, stroke: int) -> Image:
    """A letter, upright and cropped to its ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (int(v) for v in font.getbbox(letter, stroke_width=stroke))
    glyph = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(glyph).text((2 - left, 2 - top), letter, fill=255, font=font, stroke_width=stroke)
    return glyph.crop(glyph.getbbox() or (0, 0, 1, 1))


def _place(glyph: Image, matrix: tuple[float, float, float, float], shift: tuple[float, float]) -> Image:
    """A glyph mapped by `matrix` (xx, xy, yx, yy) around the centre of a SIDE x SIDE image, then shifted."""
    from PIL.Image import Resampling, Transform

    xx, xy, yx, yy = matrix
    determinant = xx * yy - xy * yx
    # Pillow asks for the map from the new image to the old one. Short binary fractions keep it exact.
    a, b, d, e = (round(v / determinant * 4096) / 4096 for v in (yy, -xy, -yx, xx))
    centre_x, centre_y = (FINE * (SIDE / 2 + s) for s in shift)
    c = round((glyph.width / 2 - a * centre_x - b * centre_y) * 4096) / 4096
    f = round((glyph.height / 2 - d * centre_x - e * centre_y) * 4096) / 4096
    fine = (FINE * SIDE, FINE * SIDE)
    return glyph.transform(fine, Transform.AFFINE, (a, b, c, d, e, f), Resampling.NEAREST).reduce(FINE)


def _example(fonts: list[FreeTypeFont], faces: list[int], letter: str, index: int) -> NDArray[np.uint8]:
    """Example `index` of a letter, a pure function of its arguments; uint8 [SIDE, SIDE].

    The faces take turns. Rotation is within 12 degrees, shear within 0.15, either side of the
    shape's box is 16 to 22 pixels at most before turning, the shift is within 2 pixels.
    """
    draw = random.Random(f"glyphs {VERSION} {ord(letter)} {index}")

    def between(low: float, high: float) -> float:
        return low + (high - low) * draw.random()

    font = fonts[faces[index % len(faces)]]
    left, top, right, bottom = font.getbbox(letter)
    # In proportion, so that a small letter, enlarged, does not become a blot.
    stroke = draw.randrange(3) * int(max(right - left, bottom - top)) // FONT_SIZE
    glyph = _draw(font, letter, stroke)
    width, height = (size / max(glyph.size) for size in glyph.size)
    half = between(-0.105, 0.105)  # tangent of half the angle
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    shear, wide, high = between(-0.15, 0.15), between(16.0, 22.0), between(16.0, 22.0)
    xx, xy = cosine * wide, (cosine * shear - sine) * high
    yx, yy = sine * wide, (sine * shear + cosine) * high
    # The turned shape must fit and leave the outermost pixels free; what is left over bounds the shift.
    span_x, span_y = abs(xx) * width + abs(xy) * height, abs(yx) * width + abs(yy) * height
    fit = min(1.0, (SIDE - 2) / max(span_x, span_y))
    room_x, room_y = (min(2.0, (SIDE - 2 - fit * span) / 2) for span in (span_x, span_y))
    scale = fit * FINE / max(glyph.size)
    matrix = (xx * scale, xy * scale, yx * scale, yy * scale)
    return np.asarray(_place(glyph, matrix, (between(-room_x, room_x), between(-room_y, room_y))))
