"""MNIST's files (LeCun et al. 1998, and Fashion-MNIST's): greyscale images and labels as arrays."""

from __future__ import annotations

import gzip
import io
import math
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.class_folders import read_beside
from mlip_jax.data.sets.class_trees import read_classes
from mlip_jax.data.sets.files import ClassSource
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.splits import STANDARD

_PREFIXES = {"train": "train", "test": "t10k"}
_MAGIC = {1: 0x00000801, 3: 0x00000803}  # unsigned bytes, by the number of dimensions
_MOST_BYTES = 4 * 2**30  # of one file, unpacked; EMNIST's largest has half a GiB


def open_idx(folder: Path, opening: Opening) -> ClassSource:
    """Opens FOLDER/train-images-idx3-ubyte and train-labels-idx1-ubyte, t10k-... for the test.

    The files may be packed (.gz), and have a full stop for the second hyphen. The class names are
    the list in FOLDER/classes.json, else the digits.

    Raises:
      MissingSplit: when the files of the split are not there.
      UserError: for a missing folder, damaged files, counts that differ, or labels that are no
        class's number.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    present = {
        split: images_file
        for split in _PREFIXES
        if (images_file := _find(folder, split, "images", 3)) is not None
    }
    if not present:
        raise UserError(f"no train-images-idx3-ubyte or t10k-images-idx3-ubyte (.gz) in {folder}")
    choice = STANDARD.choose(folder, opening.wanted, present)
    names = _class_names(folder)
    files, labels = [], []
    for part in choice.parts:
        labels_file = _find(folder, part, "labels", 1)
        if labels_file is None:
            raise UserError(f"{folder} lacks {_PREFIXES[part]}-labels-idx1-ubyte (.gz)")
        files.append(present[part])
        labels.append(_read_labels(labels_file, names))
    stored = IdxImages(files)
    for file, file_labels, count in zip(files, labels, stored.counts, strict=True):
        if len(file_labels) != count:
            raise UserError(
                f"{file} holds {count:,} images, but there are {len(file_labels):,} labels"
            )
    return ClassSource(
        folder.resolve().name,
        choice,
        stored,
        np.concatenate(labels).astype(np.int32),
        names,
        cleaning=opening.cleaning,
        max_skipped_share=opening.max_skipped_share,
    )


class IdxImages:
    """The images of one or more files, kept in memory in each process; PNG when asked for."""

    def __init__(self, files: list[Path]) -> None:
        """Reads the files. Raises UserError when one is damaged."""
        self._files = files
        self._lock = threading.Lock()
        self._pixels: list[np.ndarray] | None = [_read(file, 3) for file in files]
        self.counts = tuple(len(pixels) for pixels in self._pixels)

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the files itself.
        return {**self.__dict__, "_lock": None, "_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, index: int) -> bytes:
        """The image as PNG."""
        with self._lock:
            if self._pixels is None:
                self._pixels = [_read(file, 3) for file in self._files]
        file, place = self._find(index)
        out = io.BytesIO()
        Image.fromarray(self._pixels[file][place]).save(out, "PNG", compress_level=1)
        return out.getvalue()

    def name(self, index: int) -> str:
        """The file's path, and the image's place in it."""
        file, place = self._find(index)
        return f"{self._files[file]}[{place}]"

    def _find(self, index: int) -> tuple[int, int]:
        """The file, and the place in it."""
        ends = np.cumsum(self.counts)
        file = int(np.searchsorted(ends, index, side="right"))
        return file, int(index - (ends[file] - self.counts[file]))


def _find(folder: Path, split: str, content: str, dimensions: int) -> Path | None:
    for separator in "-.":
        for suffix in ("", ".gz"):
            kind = f"{content}{separator}idx{dimensions}-ubyte{suffix}"
            file = folder / f"{_PREFIXES[split]}-{kind}"
            if file.is_file():
                return file
    return None


def _class_names(folder: Path) -> tuple[str, ...]:
    classes_file = read_beside(folder)
    if classes_file is None:
        return tuple(map(str, range(10)))
    values = read_classes(*classes_file)
    if not isinstance(values, list):
        raise UserError(
            f"{classes_file[0]}: expected a list of class names, in the order of the labels"
        )
    return tuple(" ".join(name.split()) for name in values)


def _read_labels(file: Path, names: tuple[str, ...]) -> UInt8[np.ndarray, " images"]:
    labels = _read(file, 1)
    wrong = np.flatnonzero(labels >= len(names))
    if wrong.size:
        raise UserError(
            f"{file}: the label {labels[wrong[0]]} of image {wrong[0]} is out of range: there are "
            f"{len(names)} classes; name them all in {file.parent / 'classes.json'}"
        )
    return labels


def _read(file: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file: magic number, sizes, then bytes."""
    open_file = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rb") as stream:
            magic = stream.read(4)
            if int.from_bytes(magic) != _MAGIC[dimensions]:
                raise UserError(
                    f"{file}: begins with {magic.hex() or 'nothing'}, not with the magic number "
                    f"{_MAGIC[dimensions]:08x} of an IDX file of {dimensions} dimensions"
                )
            shape = [int.from_bytes(stream.read(4)) for _ in range(dimensions)]
            size = math.prod(shape)
            content = stream.read(min(size, _MOST_BYTES) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{file}: no gzip file, or a damaged one") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if len(content) != size:
        sizes = "x".join(map(str, shape))
        raise UserError(
            f"{file}: damaged: its header says {sizes} bytes, the file has another number"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


KIND = by_path(open_idx)
