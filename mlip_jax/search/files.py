"""The folder of an index: drafts, what may lie there, and who may write."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mlip_jax.core import locks, places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import open_lock, remove_drafts
from mlip_jax.search.index import FILE_NAME, Index

PIECES = "pieces-"  # a folder of what is embedded, until the index is whole
_LOCK = ".lock"
_KINDS = (
    "embeddings-*.npy",
    "images-*.jsonl",
    "offsets-*.npy",
    "neighbours-*.usearch",
    "unreadable-*.jsonl",
)
_OWN = (*_KINDS, f"{PIECES}*", FILE_NAME, ".*")


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Takes a folder away again, and those above it, that was made for what then failed.

    Whatever lies in it but the lock stays.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if new_folders and [path.name for path in folder.iterdir()] == [_LOCK]:
                (folder / _LOCK).unlink()
            for path in new_folders:
                path.rmdir()
        raise


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that cannot be made, or that holds what is no index's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = [
            entry.name
            for entry in folder.iterdir()
            if not any(entry.match(pattern) for pattern in _OWN)
        ]
    except OSError as error:
        raise UserError(f"cannot use {folder} as --index: {error.strerror}") from error
    if strange:
        raise UserError(
            f"{folder} holds other things, such as {printable(strange[0])}: give an index a "
            "folder of its own with --index=DIR"
        )


def clean(folder: Path) -> None:
    """Takes away drafts, and the files that index.json does not name."""
    for place in (folder, *folder.glob(f"{PIECES}*")):
        remove_drafts(place)
    if not (folder / FILE_NAME).exists():
        return
    generation = Index(folder).about.generation
    for kind in _KINDS:
        for file in folder.glob(kind):
            if file.stem.rpartition("-")[2] != str(generation):
                places.remove(file)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from indexing in a folder.

    Raises:
      UserError: when one does so already, or the folder cannot be written to.
    """
    try:
        file = open_lock(folder / _LOCK)
    except OSError as error:
        raise UserError(f"cannot use {folder} as --index: {error.strerror}") from error
    with file, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.enter_context(locks.leased(folder / _LOCK))
        except (BlockingIOError, locks.InUse) as error:
            raise UserError(
                f"another process indexes in {folder}: wait for it, or give another --index"
            ) from error
        yield


def printable(path: str) -> str:
    """A path that a terminal takes: names of files need not be valid Unicode."""
    return os.fsencode(path).decode(errors="replace")
