"""A contact sheet: what a table's images look like, for a person."""

from __future__ import annotations

from pathlib import Path

from metadist.data.table import Table
from metadist.errors import DataError, StorageError

CELL = 34


def save_sheet(table: Table, out: Path, split: str = "train", classes: int = 20, examples: int = 10) -> None:
    """Write an image with one row per class, the classes spread evenly over the split.

    Raises DataError for a split that the table does not have or a suffix that is no image
    format's, StorageError when `out` cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    if split not in table.splits:
        raise DataError(f"{table.name} has no split {split!r}; valid: {', '.join(table.splits)}")
    known = Image.registered_extensions()
    out = Path(out)
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise DataError(f"{out}: the name does not end like an image file; use for example .png")
    part = table.splits[split]
    rows = min(classes, len(part.classes))
    chosen = [i * len(part.classes) // rows for i in range(rows)]
    channels, height, width = table.images.shape[1:]
    label = 12 + max((int(ImageFont.load_default().getlength(part.classes[c])) for c in chosen), default=0)
    sheet = Image.new("RGB", (label + CELL * examples, CELL * max(rows, 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, c in enumerate(chosen):
        draw.text((6, row * CELL + CELL // 2 - 6), part.classes[c], fill="black")
        start = int(part.start[c])
        for column in range(min(examples, int(part.count[c]))):
            pixels = table.images[start + column].numpy()
            image = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
            image = ImageOps.invert(image) if channels == 1 else image  # ink is 255; paper is white
            if max(height, width) > CELL - 4:
                image = ImageOps.contain(image, (CELL - 4, CELL - 4))
            sheet.paste(image, (label + column * CELL + 2, row * CELL + 2))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise StorageError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
