"""An index on the disk: embeddings by row, memory-mapped, and the images that they are of.

    index.json            what it is of, and which of the following files are its own
    embeddings-N.npy      float32 [images, width], L2-normalised
    images-N.jsonl        {"path", "stamp"} of each row
    offsets-N.npy         where each line of that begins and the last ends: no query reads all
    neighbours-N.usearch  beyond `neighbours.EXACT` images
    unreadable-N.jsonl    {"path", "error"} of what could not be embedded

index.json is replaced last: whatever ends the program, what it names is whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import decode_json, read_json, write_atomically
from mlip_jax.search import neighbours
from mlip_jax.search.collection import Item

FILE_NAME = "index.json"
_FORMAT = 1


@dataclass(frozen=True)
class About:
    """What index.json says."""

    images: str  # the collection's spec
    model: str  # the folder that it was loaded from
    step: int | None
    digest: str  # `identity.digest`
    count: int  # of rows
    unreadable: int
    generation: int  # N in the names of the files
    neighbours: bool = False  # whether there is an approximate index too
    format: int = _FORMAT

    def model_name(self) -> str:
        """The model in words."""
        return self.model if self.step is None else f"{self.model} (step {self.step})"


class Index:
    """A whole index, open for reading.

    Attributes:
      folder: where it lies.
      about: what it is of.
      embeddings: float32 [images, width], memory-mapped.
    """

    def __init__(self, folder: Path) -> None:
        """Opens it.

        Raises:
          UserError: where there is none, or a damaged one.
        """
        self.folder = folder
        path = folder / FILE_NAME
        values = read_json(path, missing=None, advice="remove the folder and index again")
        if values is None:
            raise UserError(
                f"there is no index in {folder}: make one with --images=FOLDER, or name it with "
                "--index=DIR"
            )
        self.about = _about(path, values)
        try:
            self.embeddings = np.load(self.file("embeddings", "npy"), mmap_mode="r")
            self._offsets = np.load(self.file("offsets", "npy"), mmap_mode="r")
            # All stay open: a server goes on with the files that it has when others replace them.
            self._lines = np.memmap(self.file("images", "jsonl"), np.uint8, "r")
            rows, width = self.embeddings.shape
            consistent = rows == len(self._offsets) - 1 == self.about.count and width > 0
            consistent = consistent and self.embeddings.dtype == np.float32
            consistent = consistent and self._offsets[-1] == len(self._lines)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(folder, str(error)) from error
        if not consistent:
            raise _damaged(folder, "its files do not fit together")

    def file(self, name: str, suffix: str) -> Path:
        """One of its files."""
        return self.folder / f"{name}-{self.about.generation}.{suffix}"

    def path(self, row: int) -> str:
        """The path of a row's image in its collection.

        Raises:
          IndexError: for a row that is not there.
        """
        if not 0 <= row < self.about.count:
            raise IndexError(f"no row {row}")
        return self._item(row).path

    def items(self) -> Iterator[Item]:
        """All rows, in their order."""
        return map(self._item, range(self.about.count))

    def _item(self, row: int) -> Item:
        start, end = self._offsets[row : row + 2]
        try:
            return item(self._lines[start:end].tobytes())
        except ValueError as error:
            raise _damaged(self.folder, f"row {row} is no row") from error

    @functools.cached_property
    def graph(self) -> Any:
        """The approximate index, of usearch.

        Raises:
          UserError: when usearch is not installed.
        """
        return neighbours.open_graph(self.file("neighbours", "usearch"), self.embeddings.shape[1])


def item(line: bytes) -> Item:
    """An image of its line. Raises ValueError where it is none."""
    values = decode_json(line, one_line=True)
    try:
        parsed = Item(values["path"], values["stamp"])
    except KeyError as error:
        raise ValueError("no path and stamp") from error
    if not all(isinstance(value, str) for value in parsed):
        raise ValueError("no texts")
    return parsed


def write_about(folder: Path, about: About) -> None:
    """Makes an index the one that its folder holds."""
    write_atomically(folder / FILE_NAME, json.dumps(asdict(about), indent=2) + "\n")


def _about(path: Path, values: Any) -> About:
    try:
        about = About(**values)
        sizes = (about.count, about.unreadable, about.generation)
        fits = all(isinstance(text, str) for text in (about.images, about.model, about.digest))
        fits = fits and all(type(size) is int and size >= 0 for size in sizes)
    except TypeError:
        fits = False
    if not fits or about.format != _FORMAT:
        raise UserError(f"{path} is no index of this version: index anew with another --index=DIR")
    return about


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"the index in {folder} is damaged ({reason}): remove it and index again")


def check_model(about: About, folder: Path, digest: str, model_name: str) -> None:
    """Raises UserError where an index was made with another model than that of `digest`."""
    if about.digest != digest:
        raise UserError(
            f"the index in {folder} was made with another model, {about.model_name()}, than "
            f"{model_name} as it is now: index again with --images and another --index=DIR, "
            "or remove that folder"
        )
