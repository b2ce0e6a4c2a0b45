"""Datasets of image regions with an expression each: what grounding is measured on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import is_number, read_file
from mlip_jax.core.texts import brief, shown
from mlip_jax.data.images.preprocessing import open_image, readable
from mlip_jax.data.sets.jsonl import check_texts, image_key, json_rows
from mlip_jax.data.sets.records import Skipped
from mlip_jax.data.sets.splits import STANDARD, Wanted, split_of
from mlip_jax.data.text.captions import usable

Box = tuple[float, float, float, float]  # left, top, right, bottom

# Boxes are rounded outwards as often as not.
_TOLERANCE = 1.0  # pixels


@dataclass(frozen=True)
class Region:
    """One query: an image, what is asked for in it, and where that lies."""

    image: bytes  # an encoded file
    expression: str
    # As shares of the width and height of the image as it is stored, in [0, 1]: like COCO's own
    # tools, it knows nothing of EXIF data that turn the image. `orientation.turned_box` does.
    box: Box
    name: str  # of the image: what errors and reports print


class Regions(Protocol):
    """What every kind of dataset offers. The queries of an image follow one another."""

    about: str  # a sentence: where images, expressions and boxes come from
    notes: tuple[str, ...]  # what was left out on opening, a line each

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Region:
        """The query.

        Raises:
          OSError: when its image cannot be read.
          UserError: for a box that reaches out of the image.
        """

    def name_of(self, index: int) -> str:
        """The name of the query's image, without reading it."""


class Query(NamedTuple):
    """A region before its image is read."""

    file: Path
    expression: str
    box: tuple[float, float, float, float]  # left, top, width, height in pixels
    place: str  # where it is said: what errors print


class FileRegions:
    """Queries on image files."""

    def __init__(self, about: str, queries: Iterable[Query], notes: tuple[str, ...] = ()) -> None:
        """Takes queries in any order.

        Raises:
          UserError: "PLACE: what is wrong" for an image file that does not exist.
        """
        by_image: dict[Path, list[Query]] = {}
        for query in queries:
            by_image.setdefault(query.file, []).append(query)
        for file, (first, *_) in by_image.items():
            if not os.path.isfile(file):
                raise UserError(f"{first.place}: there is no image {shown(str(file))}")
        self.about = about
        self.notes = notes
        self._queries = [query for image_queries in by_image.values() for query in image_queries]

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> Region:
        query = self._queries[index]
        image = read_file(query.file)
        return Region(image, query.expression, _shares(query, _size(image)), self.name_of(index))

    def name_of(self, index: int) -> str:
        """The image's path."""
        return shown(str(self._queries[index].file))


def open_regions(
    path: Path, split: str = "", *, cleaning: str = "none", max_skipped_share: float = 0.01
) -> FileRegions:
    """Opens a JSONL file of regions, checking every row of it.

    Rows are {"file" (or "image", "path"): ..., "caption": ..., "box": [left, top, width, height]},
    the box in pixels of the image as it is stored; files are relative to the JSONL file's folder.
    "split" is optional; without `split` that for validation is taken, else for test, else all.

    Args:
      path: the file.
      split: a split's name, or "all".
      cleaning: how captions are cleaned, `config.model.text.cleaning`.
      max_skipped_share: more rows than this whose caption is empty are an error.

    Raises:
      MissingSplit: when no row is of this split.
      UserError: for a missing file, or "PATH:LINE: what is wrong" for a malformed row.
    """
    splits: dict[str, list[Query]] = {}
    for _, place, _, row in json_rows(path):
        if not isinstance(row.get("caption"), str):
            raise UserError(f'{place}: needs "caption", a text')
        file = path.parent / image_key(row)
        query = Query(file, row["caption"], check_box(place, row.get("box")), place)
        splits.setdefault(split_of(place, row.get("split")), []).append(query)
    choice = STANDARD.choose(path, Wanted("evaluation", split), splits)
    rows = [query for part in choice.parts for query in splits[part]]
    return clean_regions(f"Regions of {path.name}.", rows, cleaning, max_skipped_share)


def clean_regions(
    about: str, queries: Iterable[Query], cleaning: str, max_skipped_share: float
) -> FileRegions:
    """The queries with their expressions cleaned, without those of which nothing is left.

    Raises:
      UserError: when too many are left out, or all; for an image file that does not exist.
    """
    kept, skipped = [], Skipped("queries", cleaning)
    for query in queries:
        check_texts(query.place, "the caption", [query.expression])
        skipped.mend(query.place, [query.expression])
        cleaned = usable([query.expression], cleaning)
        if cleaned:
            kept.append(query._replace(expression=cleaned[0]))
        else:
            skipped.add(query.place, [query.expression])
    return FileRegions(about, kept, skipped.notes(len(kept), max_skipped_share))


def check_box(place: str, box: Any) -> tuple[float, float, float, float]:
    """A box as it stands in a file: [left, top, width, height].

    Raises:
      UserError: "PLACE: what is wrong" when it is no such thing or has no area.
    """
    if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box))):
        raise UserError(
            f"{place}: a box must be [left, top, width, height] in pixels, not {brief(box)}"
        )
    if not min(box[2:]) > 0:
        raise UserError(f"{place}: the box {list(box)} has no area")
    left, top, width, height = map(float, box)
    return left, top, width, height


def _shares(query: Query, size: tuple[int, int]) -> Box:
    """The box by shares of the image's size, width first."""
    left, top, width, height = query.box
    edges = (left, top, left + width, top + height)
    ends = (*size, *size)
    if min(edges) < -_TOLERANCE or any(
        edge > end + _TOLERANCE for edge, end in zip(edges, ends, strict=True)
    ):
        raise UserError(
            f"{query.place}: the box {list(query.box)} reaches out of "
            f"{shown(str(query.file))}, which is {size[0]} x {size[1]} pixels"
        )
    left, top, right, bottom = (
        min(max(edge / end, 0.0), 1.0) for edge, end in zip(edges, ends, strict=True)
    )
    return left, top, right, bottom


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image as it is stored, by its header."""
    with readable():
        return open_image(data).size
