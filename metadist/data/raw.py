"""What a source hands over before a table is built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from metadist.data.table import ClassImages

Say = Callable[[str], None]
"""Takes one line of progress for a person."""


@dataclass(frozen=True)
class Raw:
    """Raw material, found and hashed but not yet decoded."""

    content: str
    """sha256 hex of all bytes that the examples are made of"""
    read: Callable[[str, Say], Iterable[ClassImages]]
    """(name of a split, progress) → every class"""
