"""Class folders on disk."""

from __future__ import annotations

from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.class_trees import CLASSES_FILE, open_tree
from mlip_jax.data.sets.files import IMAGE_SUFFIXES, ClassSource, ImageFiles, is_hidden
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
        return [
            entry.name
            for entry in (self.place / above).iterdir()
            if entry.is_dir() and not is_hidden(entry.name)
        ]

    def images(self, folder: str) -> list[str]:
        """The image files anywhere below a folder, sorted; paths from the root."""
        files = [
            str(file.relative_to(self.place))
            for file in sorted((self.place / folder).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        return [file for file in files if not is_hidden(file)]

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
        return (str(file), file.read_bytes()) if file.exists() else None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


KIND = by_path(open_folder)
