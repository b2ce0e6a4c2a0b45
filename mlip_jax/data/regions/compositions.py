"""Compositions: several drawings on one white canvas, so that where each of them lies is known."""

from __future__ import annotations

import functools
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.data.images.preprocessing import decode, flatten
from mlip_jax.data.regions.base import Box, Region
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.sets.records import Record, Source

SIDE = 192  # pixels of a canvas
SPLITS = ("train", "validation")
_CANVASES = 300
_COUNTS = (2, 3, 4)  # drawings on a canvas, in turn
_SIZES = (0.4, 0.5)  # a drawing's longer side as a share of the canvas's
_GAP = 4  # pixels between drawings, at least
_WHITE = 250  # a pixel darker than this in any channel is ink
_SEED = 0
_TRIES = 50  # places for one drawing before all are laid out anew


class _Rectangle(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


class Compositions:
    """Canvases of 2, 3 or 4 drawings in turn, each asked for by its name.

    The drawings are the embedded dataset's. Each is cut to its ink, scaled so that its longer side
    is 0.4 to 0.5 of the canvas's, and laid where it overlaps no other; what it covers is its box.
    No concept comes twice before all have come once. Which drawings, how large and where is drawn
    from one seed. All of this is our choice.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, drawings: Source, canvases: int = _CANVASES) -> None:
        """Takes the dataset of drawings, whose records' names end in "/CONCEPT"."""
        self.about = f"Canvases of 2 to 4 {drawings.split} drawings of the embedded dataset."
        self._drawings = drawings
        counts = [_COUNTS[canvas % len(_COUNTS)] for canvas in range(canvases)]
        self._canvas_of = np.repeat(np.arange(canvases), counts)
        self._drawing_of = _choose(drawings, len(self._canvas_of))
        # The queries of a canvas follow one another.
        self._composed = functools.lru_cache(maxsize=1)(self._compose)

    def __len__(self) -> int:
        return len(self._canvas_of)

    def __getitem__(self, index: int) -> Region:
        canvas = self._canvas_of[index]
        image, regions = self._composed(int(canvas))
        expression, box = regions[index - int(np.searchsorted(self._canvas_of, canvas))]
        return Region(image, expression, box, self.name_of(index))

    def name_of(self, index: int) -> str:
        """The canvas's name."""
        return f"canvas {self._canvas_of[index]}"

    def _compose(self, canvas: int) -> tuple[bytes, list[tuple[str, Box]]]:
        """The canvas as PNG, and the name and box of each drawing."""
        records = [self._drawings[int(i)] for i in self._drawing_of[self._canvas_of == canvas]]
        cut = [_ink(record) for record in records]
        places = _lay_out(np.random.default_rng((_SEED, canvas)), [ink.size for ink in cut])
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        regions: list[tuple[str, Box]] = []
        for record, ink, place in zip(records, cut, places, strict=True):
            size = place.right - place.left, place.bottom - place.top
            picture.paste(ink.resize(size, Image.Resampling.BICUBIC), place[:2])
            left, top, right, bottom = (edge / SIDE for edge in place)
            regions.append((record.captions[0], (left, top, right, bottom)))
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue(), regions


def open_compositions(
    split: str = "validation", *, cache_dir: str = "", cleaning: str = "none"
) -> Compositions:
    """Compositions of the drawings of a split; those of "train" are for making choices by.

    Args:
      split: one of SPLITS.
      cache_dir: where the embedded dataset lies, as for `open_source`.
      cleaning: how the names are cleaned, `config.model.text.cleaning`.

    Raises:
      UserError: for another split, and as `open_source`.
    """
    if split not in SPLITS:
        raise UserError(
            f"compositions#{split}: expected {' or '.join(SPLITS)}{suggestion(split, SPLITS)}"
        )
    return Compositions(open_source("emoji", split, cache_dir=cache_dir, cleaning=cleaning))


def _choose(drawings: Source, count: int) -> Int[np.ndarray, " count"]:
    """Drawings in random order, one of each concept; over again where these do not suffice."""
    concepts: dict[str, int] = {}
    for index in np.random.default_rng(_SEED).permutation(len(drawings)):
        concepts.setdefault(drawings.name_of(int(index)).rpartition("/")[2], int(index))
    return np.resize(list(concepts.values()), count)


def _ink(record: Record) -> Image.Image:
    """The drawing without its white margins."""
    drawing = flatten(decode(record.image), "white")
    rows, columns = np.nonzero((np.asarray(drawing) < _WHITE).any(axis=2))
    if not len(rows):
        return drawing
    left, top = int(np.min(columns)), int(np.min(rows))
    return drawing.crop((left, top, int(np.max(columns)) + 1, int(np.max(rows)) + 1))


def _lay_out(rng: np.random.Generator, shapes: list[tuple[int, int]]) -> list[_Rectangle]:
    """Rectangles of these shapes' aspects (width, height), apart from one another."""
    while True:
        placed: list[_Rectangle] = []
        for shape, side in zip(shapes, rng.uniform(*_SIZES, len(shapes)) * SIDE, strict=True):
            width, height = (max(1, round(edge * side / max(shape))) for edge in shape)
            place = _free_place(rng, width, height, placed)
            if place is None:
                break
            placed.append(place)
        else:
            return placed


def _free_place(
    rng: np.random.Generator, width: int, height: int, occupied: list[_Rectangle]
) -> _Rectangle | None:
    """The first of some places at random that is free; None when none is."""
    left, top = (rng.integers(0, SIDE - edge + 1, _TRIES) for edge in (width, height))
    right, bottom = left + width, top + height
    free = np.ones(_TRIES, bool)
    for other in occupied:
        free &= (
            (left >= other.right + _GAP)
            | (right <= other.left - _GAP)
            | (top >= other.bottom + _GAP)
            | (bottom <= other.top - _GAP)
        )
    if not free.any():
        return None
    first = np.argmax(free)
    return _Rectangle(*(int(edges[first]) for edges in (left, top, right, bottom)))
