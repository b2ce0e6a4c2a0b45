"""Class folders on disk."""

from __future__ import annotations

import os
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_file
from mlip_jax.core.texts import shown
from mlip_jax.data.sets.class_trees import CLASSES_FILE, open_tree
from mlip_jax.data.sets.files import IMAGE_SUFFIXES, ClassSource, ImageFiles, files_below, is_hidden
from mlip_jax.data.sets.kinds import Opening, by_path


def open_folder(path: Path, opening: Opening) -> ClassSource:
    """Opens PATH/CLASS/*.jpg, or PATH/SPLIT/CLASS/*.jpg, as `classes.open_tree` reads it.

    Raises:
      MissingSplit, UserError: as `classes.open_tree`; UserError for a missing folder too.
    """
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")
    return open_tree(_FolderTree(path), opening)


class _FolderTree:
    """Folders below a path."""

    def __init__(self, place: Path) -> None:
        self.name = place.resolve().name
        self.place = place

    def folders(self, above: str) -> list[str]:
        """The folders in the root ("") or in one of its folders."""
        folder = self.place / above
        try:
            with os.scandir(folder) as entries:
                return [e.name for e in entries if e.is_dir() and not is_hidden(e.name)]
        except OSError as error:
            raise UserError(f"cannot read {shown(str(folder))}: {error.strerror}") from None

    def images(self, folder: str) -> list[str]:
        """The image files anywhere below a folder, sorted; paths from the root."""
        files = (f"{folder}/{file}" for file in files_below(self.place / folder))
        return [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]

    def classes_file(self) -> tuple[str, bytes] | None:
        """The path and content of classes.json, if there is one."""
        return read_beside(self.place)

    def open(self, files: list[str]) -> ImageFiles:
        """Some of the image files, to be read when asked for."""
        return ImageFiles(self.place, files)


def read_beside(folder: Path) -> tuple[str, bytes] | None:
    """The path and content of a folder's classes.json, if there is one.

    Raises:
      UserError: when it cannot be read.
    """
    file = folder / CLASSES_FILE
    try:
        return (str(file), read_file(file)) if file.exists() else None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


KIND = by_path(open_folder)
