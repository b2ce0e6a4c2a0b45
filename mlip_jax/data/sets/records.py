"""What a dataset of images with captions gives, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Int64

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import is_whole

_PLACES_SHOWN = 5


class Origin(NamedTuple):
    """Where a record of a prepared dataset lies."""

    shard: str  # its name
    place: int


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    image: bytes  # an encoded file: PNG, JPEG, ...
    captions: tuple[str, ...]  # at least one; the first is the main one
    tags: tuple[str, ...]  # such as a category: words to add to a caption
    label: int  # index into the source's class_names; -1: none
    name: str  # path or id: what errors and reports print
    # Of a prepared dataset's; two are equal wherever they lie.
    origin: Origin | None = field(default=None, compare=False)


class MissingSplit(UserError):
    """The dataset exists, but not the split that was asked for."""


@dataclass
class Skipped:
    """What has no usable caption: counted, named, and an error when it is too much.

    What has half a character in a text is counted and named, too.
    """

    unit: str  # what is counted: "rows", "images"
    cleaning: str  # as the captions were cleaned, one of captions.CLEANINGS
    first: list[str] = field(default_factory=list)  # places, of the first few
    count: int = 0
    emptied: int = 0  # of these, that had a caption before the cleaning
    mended: int = 0  # that are kept, with a text that `texts.whole` has changed
    first_mended: list[str] = field(default_factory=list)

    def add(self, place: str, texts: Iterable[str]) -> None:
        """Counts one; `texts` are its captions as they were before the cleaning."""
        self.count += 1
        self.emptied += any(text.strip() for text in texts)
        if len(self.first) < _PLACES_SHOWN:
            self.first.append(place)

    def mend(self, place: str, texts: Iterable[str]) -> None:
        """Counts one if a text of its own cannot be kept as it is; see `texts.whole`."""
        if all(map(is_whole, texts)):
            return
        self.mended += 1
        if len(self.first_mended) < _PLACES_SHOWN:
            self.first_mended.append(place)

    def merge(self, other: Skipped) -> None:
        """Counts what another has counted too."""
        self.first = (self.first + other.first)[:_PLACES_SHOWN]
        self.first_mended = (self.first_mended + other.first_mended)[:_PLACES_SHOWN]
        self.mended += other.mended
        self.count += other.count
        self.emptied += other.emptied

    def notes(self, kept: int, max_share: float) -> tuple[str, ...]:
        """Sentences for `Source.notes`, or none.

        Raises:
          UserError: when more than `max_share` of all is left out.
        """
        mended: tuple[str, ...] = ()
        if self.mended:
            mended = (
                f'half of a surrogate pair is no character and is read as "?"; {self.unit} with '
                f"one: {self.mended} ({_listed(self.first_mended, self.mended)})",
            )
        if not self.count:
            return mended
        total = kept + self.count
        cleaned = (
            f" (of {self.emptied}, nothing is left after the cleaning {self.cleaning!r})"
            if self.emptied
            else ""
        )
        note = (
            f"{self.count} of {total} {self.unit} have no caption{cleaned} and are left out: "
            f"{_listed(self.first, self.count)}"
        )
        if self.count > max_share * total:
            raise UserError(f"{note}; more than max_skipped_share={max_share:g} allows")
        return (note, *mended)


def _listed(places: list[str], count: int) -> str:
    return ", ".join([*places, *(["..."] if count > len(places) else [])])


class Source(Protocol):
    """What every kind of dataset offers; see `MultiLabel` too."""

    name: str
    split: str  # "train", "validation", or the split's own name where that was asked for
    parts: tuple[str, ...]  # the dataset's own splits that this is made of
    class_names: tuple[str, ...]
    attribution: str  # to be shown wherever the dataset is used; "": none known
    notes: tuple[str, ...]  # what was left out or merged on opening, a line each

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record. Raises OSError when its image cannot be read."""

    def name_of(self, index: int) -> str:
        """The record's name, without reading its image."""

    def captions(self) -> Iterator[str]:
        """Every caption and tag of the split, in the order of its records; no image is decoded."""


@runtime_checkable
class MultiLabel(Protocol):
    """What a dataset offers besides when its images may show several classes each.

    The label of its records is -1, and their captions are the classes that they show, or "".
    """

    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """1 where an image shows a class, -1 where not, 0 where it is too difficult to count.

        It reads no image.
        """


@runtime_checkable
class InShards(Protocol):
    """What a dataset offers besides when its records lie in shards, one shard after the other."""

    window: int  # how many shards are mixed in training; 0: all
    is_remote: bool  # whether shards are brought from a server when they are needed
    by_content: bool  # whether records of equal images are found in a batch alone, by their bytes

    def shard_ends(self) -> Int64[np.ndarray, " shards"]:
        """Where each shard's records end, as indices; a shard may have none."""

    def bring(self, shard: int, *, ahead: bool = False) -> None:
        """Has a shard at hand, so that its records are read at once; where it is, nothing happens.

        Args:
          shard: its number.
          ahead: whether it is not needed yet, and so brought only if there is room.

        Raises:
          UserError, RunError: when it cannot be had.
        """

    def release(self, shard: int) -> None:
        """Says that a shard is not needed for long."""


def shard_of(source: InShards, index: int) -> tuple[int, int]:
    """The shard of a record, and its place there."""
    ends = source.shard_ends()
    shard = int(np.searchsorted(ends, index, "right"))
    return shard, int(index) - (int(ends[shard - 1]) if shard else 0)
