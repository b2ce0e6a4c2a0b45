"""What is searched: a folder of image files, or a dataset that training or evaluation opens."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import read_file
from mlip_jax.core.progress import track
from mlip_jax.core.registry import DATASETS
from mlip_jax.data.sets.files import IMAGE_SUFFIXES, files_below
from mlip_jax.data.sets.opening import named, open_source, split_spec
from mlip_jax.data.sets.records import Source
from mlip_jax.data.sets.splits import ALL


class Item(NamedTuple):
    """An image, by what an index knows it."""

    path: str  # below the folder; of a dataset, the record's name
    stamp: str  # another one: the image is another one


class Collection(Protocol):
    """Images by path."""

    spec: str  # opens the same from any folder
    attribution: str  # to be shown with the images; "": none known

    def items(self) -> list[Item]:
        """All images, in the order of the index."""

    def read(self, path: str) -> bytes:
        """The encoded image. Raises OSError when it is not there or cannot be read."""

    def place(self, path: str) -> str:
        """The path as people use it."""


def open_collection(spec: str, cache_dir: str = "") -> Collection:
    """Opens a folder, with all folders below it, or a dataset by its spec.

    Args:
      spec: a folder, or what `open_source` takes; of a dataset, all splits unless one is pinned.
      cache_dir: where datasets named by one word lie.

    Raises:
      UserError: for a folder that is not there, or as `open_source`.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return _Folder(folder)
    kind, colon, where = spec.partition(":")
    if not colon and split_spec(spec)[0] not in named():
        near = suggestion(spec, (*named(), *_siblings(folder)))
        fault = "a file, not a folder of images" if folder.exists() else "no folder or dataset"
        raise UserError(f"--images={spec} is {fault}{near}")
    if colon and kind not in DATASETS:
        raise UserError(
            f"--images={spec} is no folder, and no dataset is called {kind}:"
            f"{suggestion(kind, DATASETS)}"
        )
    if colon and DATASETS[kind].where == "PATH":
        spec = f"{kind}:{Path(where).expanduser().absolute()}"
    opened_spec = spec if split_spec(spec)[1] else f"{spec}#{ALL}"
    return _Set(spec, open_source(opened_spec, "train", cache_dir=cache_dir))


def reason(error: OSError) -> str:
    """Why an image cannot be read, in words."""
    return error.strerror or re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))


def _siblings(folder: Path) -> list[str]:
    try:
        return [str(folder.parent / name.name) for name in folder.parent.iterdir()]
    except OSError:
        return []


class _Folder:
    """Every image file below a folder; what is hidden is left out, links to folders too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self.spec, self.attribution = str(self._folder), ""

    def items(self) -> list[Item]:
        return sorted(self._walk())

    def _walk(self) -> Iterator[Item]:
        for name in files_below(self._folder):
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            try:
                status = os.stat(os.path.join(self._folder, name))
                stamp = f"{status.st_size}-{status.st_mtime_ns}"
            except OSError:
                stamp = ""  # a link to nothing: it counts as unreadable
            yield Item(name, stamp)

    def read(self, path: str) -> bytes:
        # An index is a file like others: what it says must not lead out of the folder.
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise OSError(f"{path} is not below {self._folder}")
        return read_file(self._folder / path)

    def place(self, path: str) -> str:
        full_path = self._folder / path
        return str(
            full_path.relative_to(Path.cwd()) if full_path.is_relative_to(Path.cwd()) else full_path
        )


class _Set:
    """The records of a dataset. They have no time of change: the stamp is a digest of the image."""

    def __init__(self, spec: str, source: Source) -> None:
        self.spec, self.attribution = spec, source.attribution
        self._source = source
        self._lock = threading.Lock()  # not every dataset's reader is made for several threads
        self._indices: dict[str, int] = {}
        for index in range(len(source)):
            name = source.name_of(index)
            self._indices[name if name not in self._indices else f"{name} ({index})"] = index

    def items(self) -> list[Item]:
        return [
            Item(path, self._stamp(path)) for path in track(self._indices, "looking at the images")
        ]

    def _stamp(self, path: str) -> str:
        try:
            return hashlib.sha256(self.read(path)).hexdigest()[:16]
        except OSError:
            return ""

    def read(self, path: str) -> bytes:
        if path not in self._indices:
            raise OSError(f"{path} is no more in {self.spec}")
        with self._lock:
            return self._source[self._indices[path]].image

    def place(self, path: str) -> str:
        return path
