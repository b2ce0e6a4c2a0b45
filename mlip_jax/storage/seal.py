"""Size and CRC-32 of a folder's files, by which damage is found later."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import shown

NAME = "files.json"
_MOST = 200  # characters of a name that a message shows
Files = dict[str, list[int]]
# Orbax writes these after the seal: when it commits.
_UNSEALED = {"_CHECKPOINT_METADATA", "commit_success.txt", NAME}


def write(folder: Path, files: Files) -> None:
    """Records files of the folder."""
    (folder / NAME).write_text(json.dumps(files), encoding="utf-8")


def files_of(folder: Path, unread: str = "") -> Files:
    """Relative path -> [size, CRC-32] of the files that the seal covers."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in _UNSEALED or (unread and name.startswith(unread)):
            continue
        size, checksum = 0, 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        files[name] = [size, checksum]
    return files


def damage(folder: Path, *, unread: str = "") -> str:
    """What is wrong with a checkpoint's files, or nothing.

    Args:
      folder: the checkpoint.
      unread: the beginning of names that are not looked at, such as those of its large files.
    """
    try:
        sealed = read_json(folder / NAME)
        present = files_of(folder, unread)
    except (OSError, UserError) as error:
        return str(error)
    if not sealed:
        return f"{NAME} names no files"
    for name, expected in sealed.items():
        if unread and name.startswith(unread):
            continue
        if name not in present:
            return f"{shown(name[:_MOST])} is missing"
        if present[name] != expected:
            return f"{shown(name[:_MOST])} has changed since it was written"
    return ""
