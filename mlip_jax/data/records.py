"""What a set of images with captions gives, whatever it is kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlip_jax.config import UserError


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    image: bytes  # an encoded file: PNG, JPEG, ...
    captions: tuple[str, ...]  # at least one; the first is the main one
    tags: tuple[str, ...]  # such as a category: words to add to a caption
    label: int  # index into the source's class_names; -1: none
    name: str  # path or id: what errors and reports print


class MissingSplit(UserError):
    """The set exists, but not the split that was asked for."""


class Source(Protocol):
    """What every kind of set offers."""

    name: str
    split: str  # "train" or "validation"
    class_names: tuple[str, ...]
    attribution: str  # to be shown wherever the set is used; "": none known
    notes: tuple[str, ...]  # what was left out on opening, a line each

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record. Raises OSError when its image cannot be read."""

    def name_of(self, index: int) -> str:
        """The record's name, without reading its image."""
