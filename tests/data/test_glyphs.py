"""The embedded letters: the same everywhere, disjoint, whole."""

import numpy as np
import torch

from metadist.data import glyphs as source
from metadist.data.table import Table, fingerprint_of


def test_a_fresh_process_builds_the_same_bytes(glyphs_twice: tuple[Table, str]) -> None:
    table, other = glyphs_twice
    assert table.fingerprint == other == fingerprint_of(table)


def test_every_class_has_twenty_examples_of_28_by_28(glyphs: Table) -> None:
    classes = sum(len(split.classes) for split in glyphs.splits.values())
    assert 1300 <= classes <= 1450
    assert glyphs.images.shape == (20 * classes, 1, 28, 28)
    for split in glyphs.splits.values():
        assert set(split.count.tolist()) == {20} and len(split.classes) >= 60


def test_splits_follow_the_written_rule(glyphs: Table) -> None:
    sizes = {group: n for split in glyphs.splits.values() for group, _, n in split.groups}
    ranked = sorted(sizes, key=lambda script: (-sizes[script], script))
    assert min(sizes.values()) >= 20 and len(ranked) >= 10
    expected = {"train": ranked[0::4] + ranked[1::4], "test": ranked[2::4], "val": ranked[3::4]}
    for name, split in glyphs.splits.items():
        assert sorted(group for group, _, _ in split.groups) == sorted(expected[name])


def test_no_image_of_one_split_is_an_image_of_another(glyphs: Table) -> None:
    images = glyphs.images.flatten(1).numpy()
    owner: dict[bytes, str] = {}
    for name, split in glyphs.splits.items():
        assert all(script == letter.split("/")[0] for script, first, n in split.groups
                   for letter in split.classes[first : first + n])  # fmt: skip
        for start, count in zip(split.start.tolist(), split.count.tolist(), strict=True):
            for row in images[start : start + count]:
                assert owner.setdefault(row.tobytes(), name) == name
    assert len(owner) > 0.95 * len(images)


def test_look_alikes_are_one_class_of_the_first_script(glyphs: Table) -> None:
    classes = {name: split for split, part in glyphs.splits.items() for name in part.classes}
    assert classes["Latin/U+0041"] == "train"
    for twin in ("Greek/U+0391", "Cyrillic/U+0410", "Cyrillic/U+0430", "Latin/U+006F", "Greek/U+039F"):
        assert twin not in classes
    assert {"Greek/U+03A9", "Cyrillic/U+0416", "Cyrillic/U+042F"} <= classes.keys()


def test_no_shape_of_one_split_is_alike_a_shape_of_another(glyphs: Table) -> None:
    font = source._open_font(source.font_files()[0])
    faces = source._letters()
    letters, split_of = [], []
    for name, split in glyphs.splits.items():
        for label in split.classes:
            letter = chr(int(label.split("U+")[1], 16))
            if faces[letter][0] == 0:
                letters.append(letter)
                split_of.append(name)
    shapes = np.stack([source._shape(font, letter) for letter in letters])
    apart = np.array(split_of)[:, None] != np.array(split_of)
    assert len(letters) > 1000 and apart.any()
    assert not (source._alike(shapes, source.ACROSS_SCRIPTS) & apart).any()


def test_letters_are_centred_whole_and_inked(glyphs: Table) -> None:
    images = glyphs.images[:, 0]
    ink = (images > 0).flatten(1).sum(1)
    assert ink.min() >= 20 and images.flatten(1).amax(1).min() >= 200
    edge = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    assert edge.max() == 0  # nothing is cut off
    rows, columns = (images > 0).any(2).float(), (images > 0).any(1).float()
    for profile in (rows, columns):
        first, last = profile.argmax(1), 27 - profile.flip(1).argmax(1)
        off_centre = (first + last) / 2 - 13.5
        # Up to 2 by the shift; the rest is the ink's box, which is smaller than the box that was turned.
        assert off_centre.abs().max() <= 5 and off_centre.abs().quantile(0.99) <= 2.5
        assert off_centre.mean().abs() <= 0.25


def test_examples_of_a_letter_differ(glyphs: Table) -> None:
    letter = glyphs.splits["train"].classes.index("Latin/U+0041")
    start = int(glyphs.splits["train"].start[letter])
    assert len({image.numpy().tobytes() for image in glyphs.images[start : start + 20]}) == 20
